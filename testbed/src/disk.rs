//! A disk that fails: a file system in a file, which is cut.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::process::run;

/// See the module's text. It is taken away when this is dropped.
#[derive(Debug)]
pub struct FailingDisk {
    file: PathBuf,
    mounted: PathBuf,
}

impl FailingDisk {
    /// A disk of `bytes` in the new directory `dir`.
    ///
    /// # Errors
    /// This process may not mount, or the machine has no loop devices.
    pub fn new(dir: &Path, bytes: u64) -> Result<FailingDisk> {
        let (file, mounted) = (dir.join("disk.img"), dir.join("mounted"));
        fs::create_dir_all(&mounted)?;
        File::create(&file)?.set_len(bytes)?;
        // Without a journal only data is written at the end.
        let mut make = Command::new("mkfs.ext4");
        run(make
            .args(["-q", "-F", "-b", "4096", "-O", "^has_journal"])
            .arg(&file))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&file, &mounted]))?;
        Ok(FailingDisk { file, mounted })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// From now on reading what lies beyond its first `bytes` fails with EIO, in the file at `path` too, of which nothing
    /// is remembered.
    ///
    /// # Errors
    /// The disk cannot be cut.
    pub fn fail_beyond(&self, bytes: u64, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        file.sync_all()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        let disk = File::options().write(true).open(&self.file)?;
        Ok(disk.set_len(bytes)?)
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        // Other namespaces may still have it: it goes with the last of them.
        let gone = run(Command::new("umount").arg("--lazy").arg(&self.mounted));
        if let Err(error) = gone {
            eprintln!("{} stays mounted: {error:#}", self.mounted.display());
        }
    }
}
