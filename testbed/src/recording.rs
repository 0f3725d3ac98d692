//! Records what a program does to files below a directory, in its order: which names it makes, gives and removes, what
//! it writes, what it waits for until it is on the disk. From that follows what a power cut may leave.
//!
//! A library, compiled by the C compiler of this machine, stands before the C library. What goes through io_uring it does
//! not see.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::run;

/// What is compiled.
const SOURCE: &str = include_str!("recording.c");

/// What a program has done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Opened a file so that it is made if it is not there.
    Make(PathBuf),
    /// Changed a file's contents.
    Write(PathBuf),
    /// Waited for a file, or for the names in a directory.
    Sync(PathBuf),
    /// Renamed the first to the second.
    Rename(PathBuf, PathBuf),
    /// Removed a name.
    Unlink(PathBuf),
    /// Made a directory.
    MakeDir(PathBuf),
    /// Made the first a symbolic link to the second.
    Link(PathBuf, PathBuf),
}

/// The file to which a program's steps are written.
#[derive(Debug)]
pub struct Recording(PathBuf);

impl Recording {
    /// Has the program that `command` starts recorded, as far as it is about files below `dir`. What this needs goes
    /// to the directory `work`.
    ///
    /// # Errors
    /// There is no C compiler.
    pub fn of(command: &mut Command, dir: &Path, work: &Path) -> Result<Recording> {
        let (source, library) = (work.join("recording.c"), work.join("recording.so"));
        fs::write(&source, SOURCE)?;
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]);
        compiler.arg(&library).arg(&source).arg("-ldl");
        run(&mut compiler).context("compiling a library that records calls")?;
        let file = work.join("recording");
        File::create(&file)?;
        command
            .env("LD_PRELOAD", &library)
            .env("RECORDING_FILE", &file)
            .env("RECORDING_BELOW", dir);
        Ok(Recording(file))
    }

    /// The steps so far.
    ///
    /// # Errors
    /// The file is gone, or holds something else.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let text = fs::read_to_string(&self.0)?;
        text.lines().map(step).collect()
    }
}

fn step(line: &str) -> Result<Step> {
    let mut words = line.split('\t');
    let mut word = || words.next().unwrap_or_default();
    let (what, path, other) = (word(), PathBuf::from(word()), PathBuf::from(word()));
    Ok(match what {
        "make" => Step::Make(path),
        "write" => Step::Write(path),
        "sync" => Step::Sync(path),
        "rename" => Step::Rename(path, other),
        "unlink" => Step::Unlink(path),
        "mkdir" => Step::MakeDir(path),
        "link" => Step::Link(path, other),
        _ => bail!("no step: {line}"),
    })
}
