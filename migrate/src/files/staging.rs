//! The directory where files arrive at the destination, and how they become the tree that is used.
//!
//! ```text
//! TARGET                        what the container, or the processes, use
//! TARGET.pageferry/             for root alone
//!     about.json                whose tree TARGET is, see `TargetState`
//!     tree/                     what has arrived, until it is whole
//!     parked/                   files that have no name for a while
//!     upper/, work/             of an overlay: the tree, once TARGET is mounted
//!     point/                    of an overlay: what becomes TARGET to be mounted at; then what was there before
//! ```
//!
//! Both are on one file system, so that a rename makes a whole tree of what has arrived, or takes it back.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, open, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::syncfs;
use pageferry::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

use super::hash::BlockHasher;
use super::overlay::{self, Lowers, remove};
use super::scan::Scanner;
use super::tree_dir::{TreeDir, open_beneath};
use super::writer::Writer;
use crate::records;
use crate::tree_summary::disk_bytes;

/// What is behind a target's name for the directory beside it.
const SUFFIX: &str = ".pageferry";

/// What is known of a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TargetState {
    /// A tree arrives, and is not the target yet.
    Arriving,
    /// A migration brought the target.
    Brought,
    /// A migration took what used it to another host: it is out of date.
    MovedAway,
}

#[derive(Debug, Serialize, Deserialize)]
struct TargetRecord {
    #[serde(rename = "standing")]
    state: TargetState,
    migration: String,
    /// What the target's writable layer is mounted over, if the target is an overlay of ours.
    #[serde(default)]
    overlay: Option<Lowers>,
}

/// A target, and the directory beside it in which files arrive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct StagingDir {
    target: PathBuf,
    dir: PathBuf,
    /// What the tree is mounted over; `None`: it becomes the target itself.
    overlay: Option<Lowers>,
}

/// Which directory became a target, so that it can be taken back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Installed {
    target: PathBuf,
    /// On the file system of both: the number of the device may be another one after a start of the host.
    inode: u64,
}

/// What may be done with a target that is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Permitted {
    /// It is replaced, whoever made it.
    pub(crate) replace: bool,
    /// One that a migration brought is not in use here any more.
    pub(crate) unused: bool,
}

impl StagingDir {
    pub(crate) fn of(target: &Path) -> StagingDir {
        let mut dir = target.as_os_str().to_owned();
        dir.push(SUFFIX);
        StagingDir {
            target: target.to_owned(),
            dir: dir.into(),
            overlay: None,
        }
    }

    /// The same for a tree that is the writable layer over `lowers`, if there are any.
    pub(crate) fn over(self, lowers: Option<Lowers>) -> StagingDir {
        StagingDir {
            overlay: lowers,
            ..self
        }
    }

    pub(crate) fn overlay(&self) -> Option<&Lowers> {
        self.overlay.as_ref()
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    fn parked(&self) -> PathBuf {
        self.dir.join("parked")
    }

    fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    fn point(&self) -> PathBuf {
        self.dir.join("point")
    }

    /// Whether the target is an overlay that was mounted by a migration.
    fn is_mounted(&self) -> bool {
        overlay::is_mounted(&self.target, &self.upper())
    }

    fn record(&self) -> Result<Option<TargetRecord>> {
        records::read(&self.dir.join("about.json"))
    }

    fn note(&self, state: TargetState, migration: &str) -> Result<()> {
        let record = TargetRecord {
            state,
            migration: migration.to_owned(),
            overlay: self.overlay.clone(),
        };
        records::write(&self.dir.join("about.json"), &record)
    }

    /// Whether the target is there, and out of date: a migration brought it or took its user away.
    pub(crate) fn is_out_of_date(&self, unused: bool) -> bool {
        let state = self.record().ok().flatten().map(|record| record.state);
        match state {
            Some(TargetState::MovedAway) => true,
            Some(TargetState::Brought) => unused,
            Some(TargetState::Arriving) | None => false,
        }
    }

    /// Whether something is there that files must not replace unless the user says so.
    pub(crate) fn is_taken(&self, unused: bool) -> bool {
        let is_empty = fs::read_dir(&self.target).map(|mut names| names.next().is_none());
        match is_empty {
            Err(error) => error.kind() != io::ErrorKind::NotFound,
            Ok(is_empty) => !is_empty && !self.is_out_of_date(unused),
        }
    }

    /// What is in the way of files that are to come.
    pub(crate) fn problem(&self, permitted: Permitted) -> Option<String> {
        let shown = self.target.display();
        match fs::symlink_metadata(&self.target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Some(format!("{shown} at the destination: {error}")),
            Ok(meta) if !meta.is_dir() => {
                return Some(format!("{shown} at the destination is not a directory"));
            }
            // One of ours is unmounted.
            Ok(_) if self.is_out_of_date(permitted.unused) && self.is_mounted() => {}
            Ok(_) if is_mount_point(&self.target) => {
                return Some(format!(
                    "{shown} at the destination is a mount point: unmount it, or let files stay (--files never)"
                ));
            }
            Ok(_) => {}
        }
        (!permitted.replace && self.is_taken(permitted.unused)).then(|| {
            format!(
                "{shown} at the destination was not made by a migration: remove it, or say --files replace"
            )
        })
    }

    /// Bytes on the disk of what the next tree begins with.
    pub(crate) fn held_bytes(&self, unused: bool) -> u64 {
        let begins_with = match self.is_out_of_date(unused) {
            true if !self.is_mounted() => &self.target,
            _ => &self.dir,
        };
        disk_bytes(begins_with)
    }

    /// Makes room for what is to arrive. Returns whether a tree was there that can be completed.
    pub(crate) fn prepare(&self, migration: &str, permitted: Permitted) -> Result<bool> {
        if let Some(problem) = self.problem(permitted) {
            return Err(Error::new(Kind::Usage, problem));
        }
        let failed = |error| Error::file("make the directory", &self.dir, error);
        if let Some(parent) = self.target.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        // Not for others: a directory within may be another user's, who could put a link into it.
        make_private(&self.dir).map_err(failed)?;
        make_private(&self.parked()).map_err(failed)?;
        if let Some(lowers) = &self.overlay {
            lowers.attempt(&self.dir)?;
        }
        let (tree, is_old) = (self.tree(), self.is_out_of_date(permitted.unused));
        if is_old && self.is_mounted() {
            self.note(TargetState::Arriving, migration)?;
            overlay::unmount(&self.target)?;
        }
        if !self.is_mounted() && !tree.exists() && self.upper().exists() {
            // It was a writable layer: what arrives is one again, or begins with it all the same.
            rename(&self.upper(), &tree, RenameFlags::RENAME_NOREPLACE)?;
        }
        let was_there = tree.exists();
        if !was_there && is_old && self.target.exists() {
            // What is out of date is where the next tree begins.
            self.note(TargetState::Arriving, migration)?;
            rename(&self.target, &tree, RenameFlags::RENAME_NOREPLACE)?;
            return Ok(true);
        }
        make_private(&tree).map_err(failed)?;
        self.note(TargetState::Arriving, migration)?;
        Ok(was_there)
    }

    /// Looks at what has arrived, to go on with it.
    pub(super) fn writer(&self, hasher: &BlockHasher) -> Result<Writer> {
        let parked = self.parked();
        let failed = |error| Error::file("open", &parked, error);
        for entry in fs::read_dir(&parked).map_err(failed)? {
            // What a writer left that did not come to its end.
            let _ = fs::remove_file(entry.map_err(failed)?.path());
        }
        let tree = self.tree();
        let open =
            |path: &Path| TreeDir::open(path).map_err(|error| Error::file("open", path, error));
        let mut scanner = Scanner::new(open(&tree)?, hasher.clone());
        let nothing: HashSet<OsString> = HashSet::new();
        let result = scanner.scan(&nothing)?;
        Ok(Writer::new(
            open(&tree)?,
            open(&parked)?,
            hasher.clone(),
            result.index,
        ))
    }

    /// Keeps other migrations from the staging directory, as long as the file is open.
    pub(super) fn lock(&self) -> Result<File> {
        let path = self.dir.join("lock");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| Error::file("open", &path, error))?;
        file.try_lock().map_err(|_| {
            let text = format!("files arrive in {} already", self.dir.display());
            Error::new(Kind::Usage, text)
        })?;
        Ok(file)
    }

    /// Brings what has arrived to the disk.
    pub(super) fn flush(&self) -> Result<()> {
        let failed = |error| Error::file("sync", &self.dir, error);
        let dir = File::open(&self.dir).map_err(failed)?;
        syncfs(&dir).map_err(|errno| failed(errno.into()))
    }

    /// Which directory becomes the target. To be written down before [`StagingDir::install`].
    pub(crate) fn installed(&self) -> Result<Installed> {
        let tree = match self.overlay {
            None => self.tree(),
            Some(_) => {
                let point = self.point();
                let made = fs::create_dir(&point);
                made.map_err(|error| Error::file("make the directory", &point, error))?;
                point
            }
        };
        let meta = fs::metadata(&tree).map_err(|error| Error::file("look at", &tree, error))?;
        Ok(Installed {
            target: self.target.clone(),
            inode: meta.ino(),
        })
    }

    /// Makes what has arrived the target. What was there takes its place.
    pub(crate) fn install(&self) -> Result<()> {
        let flags = match self.target.exists() {
            true => RenameFlags::RENAME_EXCHANGE,
            false => RenameFlags::RENAME_NOREPLACE,
        };
        let Some(lowers) = &self.overlay else {
            rename(&self.tree(), &self.target, flags)?;
            return self.sync_names();
        };
        let (upper, work) = (self.upper(), self.work());
        rename(&self.tree(), &upper, RenameFlags::RENAME_NOREPLACE)?;
        rename(&self.point(), &self.target, flags)?;
        make_private(&work).map_err(|error| Error::file("make the directory", &work, error))?;
        self.sync_names()?;
        lowers.mount(&self.target, &upper, &work)
    }

    /// Mounts a target again that was an overlay before this host was started.
    pub(crate) fn mount_again(&self) -> Result<()> {
        let record = self.record()?;
        let Some(lowers) = record.and_then(|record| match record.state {
            TargetState::Brought => record.overlay,
            TargetState::Arriving | TargetState::MovedAway => None,
        }) else {
            return Ok(());
        };
        let is_empty = fs::read_dir(&self.target).map(|mut names| names.next().is_none());
        match is_empty {
            Ok(true) if !is_mount_point(&self.target) => {
                lowers.mount(&self.target, &self.upper(), &self.work())
            }
            _ => Ok(()),
        }
    }

    /// Directories of layers that the target is mounted over, or will be when this host is started again.
    pub(crate) fn layers_in_use(&self) -> Vec<PathBuf> {
        let record = self.record().ok().flatten();
        record
            .and_then(|record| record.overlay)
            .map_or_else(Vec::new, |lowers| lowers.dirs)
    }

    /// Takes the target back, if it is what was installed. What was there before is there again.
    fn uninstall(&self, installed: &Installed) -> Result<()> {
        if self.is_mounted() {
            overlay::unmount(&self.target)?;
        }
        let device = fs::metadata(&self.dir).map(|meta| meta.dev()).ok();
        let is_it = fs::symlink_metadata(&self.target)
            .is_ok_and(|meta| meta.ino() == installed.inode && Some(meta.dev()) == device);
        let place = match self.overlay {
            None => self.tree(),
            Some(_) => self.point(),
        };
        if is_it {
            let flags = match place.exists() {
                true => RenameFlags::RENAME_EXCHANGE,
                false => RenameFlags::RENAME_NOREPLACE,
            };
            rename(&self.target, &place, flags)?;
        }
        if self.overlay.is_some() {
            // Empty, as it was made.
            let _ = fs::remove_dir(&place);
            if self.upper().exists() && !self.tree().exists() {
                rename(&self.upper(), &self.tree(), RenameFlags::RENAME_NOREPLACE)?;
            }
        }
        self.sync_names()
    }

    /// Gives up: the target is as it was, and with `keep` what has arrived stays for another attempt.
    pub(crate) fn give_up(&self, installed: Option<&Installed>, keep: bool) -> Result<()> {
        if let Some(installed) = installed {
            self.uninstall(installed)?;
        }
        match keep {
            true => Ok(()),
            false => remove(&self.dir),
        }
    }

    /// The target is in use from now on: what was there before is removed.
    pub(crate) fn settle(&self, migration: &str) -> Result<()> {
        self.note(TargetState::Brought, migration)?;
        for dir in [self.tree(), self.parked(), self.point()] {
            remove(&dir)?;
        }
        match self.overlay {
            Some(_) => Ok(()),
            // Of an overlay that was there before.
            None => remove(&self.upper()).and_then(|()| remove(&self.work())),
        }
    }

    /// A layer is whole, and stays under its name: nothing else is beside it.
    pub(crate) fn settle_layer(&self) -> Result<()> {
        remove(&self.dir)
    }

    /// What has arrived, before it is installed.
    pub(crate) fn arrived(&self) -> PathBuf {
        self.tree()
    }

    /// Notes that what used the target lives on another host.
    pub(crate) fn moved_away(&self, migration: &str) -> Result<()> {
        make_private(&self.dir)
            .map_err(|error| Error::file("make the directory", &self.dir, error))?;
        let record = self.record()?;
        let here = self.clone().over(record.and_then(|record| record.overlay));
        here.note(TargetState::MovedAway, migration)
    }

    /// Makes the new names last.
    fn sync_names(&self) -> Result<()> {
        let parent = self.target.parent().unwrap_or(Path::new("/"));
        for dir in [parent, &self.dir] {
            let synced = File::open(dir).and_then(|dir| dir.sync_all());
            synced.map_err(|error| Error::file("sync", dir, error))?;
        }
        Ok(())
    }
}

impl Installed {
    /// Whether it was this target.
    pub(crate) fn is_of(&self, staging: &StagingDir) -> bool {
        self.target == staging.target
    }
}

fn is_mount_point(path: &Path) -> bool {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else {
        return true;
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(parent) = open(parent, flags, Mode::empty()) else {
        return false;
    };
    let name = std::os::unix::ffi::OsStrExt::as_bytes(name);
    let opened = open_beneath(parent, name, OFlag::O_PATH);
    matches!(opened, Err(Errno::EXDEV))
}

fn make_private(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        made => made,
    }
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
    let renamed = renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
    renamed.map_err(|errno| {
        let what = format!("rename {} to", from.display());
        Error::file(&what, to, errno)
    })
}

#[cfg(test)]
mod tests;
