//! Giving images back while they are restored from: what is installed everywhere leaves its file.
//!
//! ```text
//!   page installed or gone in all processes that came from it ──> run of its file ──> Holes ──> punched
//! ```
//!
//! Runs that follow each other in a file are gathered, since each hole is a system call. A file that more than
//! one pagemap or directory names is left alone. Before the first hole a directory gets a file that says so, since
//! pages in holes read as zero, without any error: see [`refuse_consumed`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Chain, Resolved};
use super::dir::ImageDir;
use super::extents::Extents;
use super::holes::Holes;
use super::parents::punch;
use crate::error::{Error, Kind, Result};
use crate::units::{PageRange, PageSize};

/// Says that a directory's images cannot be restored from any more.
const MARK: &str = "consumed-by-auto-dedup";

/// A run of a file is given back when it is so long, or another one begins, bytes.
const RUN_BYTES: u64 = 1 << 20;

/// Fails if images were taken from `dir` or its parents by a restore with `--auto-dedup`.
pub fn refuse_consumed(dir: &ImageDir) -> Result<()> {
    for dir in dir.chain_dirs()? {
        let mark = dir.path().join(MARK);
        if mark.exists() {
            let text = format!(
                "the images in {} are not whole: a restore with --auto-dedup has taken pages out of them, \
                 which would read as zeros (it left {} to say so)",
                dir.path().display(),
                mark.display()
            );
            return Err(Error::new(Kind::Image, text));
        }
    }
    Ok(())
}

/// A file that bytes are taken out of.
#[derive(Debug)]
struct Source {
    file: File,
    holes: Holes,
    /// Used up and not given back yet.
    run: std::ops::Range<u64>,
}

/// Gives the bytes of chains back. See the module's text.
#[derive(Debug, Default)]
pub struct Consumer {
    /// By path; `None` is left alone.
    sources: BTreeMap<PathBuf, Option<Source>>,
    /// How many pagemaps name a file, by device and inode.
    named: BTreeMap<(u64, u64), usize>,
    /// Directories of which the pagemaps were counted, and whether they have their mark.
    dirs: BTreeMap<PathBuf, bool>,
    bytes: u64,
}

impl Consumer {
    /// Bytes that were given back.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The directories that bytes were taken out of.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        let marked = self.dirs.iter().filter(|(_, marked)| **marked);
        marked.map(|(dir, _)| dir.as_path())
    }

    /// Nobody needs the pages `range` of `chain` any more.
    pub fn consume(&mut self, chain: &Arc<Chain>, range: PageRange) -> Result<()> {
        for extent in chain.extents_from(range.start()) {
            let Some(common) = extent.range.intersect(range) else {
                break;
            };
            let part = Resolved {
                range: common,
                ..extent
            };
            if let Some((file, offset, bytes)) = chain.span(&part) {
                let path = chain.file(file).path();
                self.use_up(path, chain.page(), offset..offset + bytes)?;
            }
        }
        Ok(())
    }

    /// Gives back what was gathered.
    pub fn flush(&mut self) -> Result<()> {
        let paths: Vec<PathBuf> = self.sources.keys().cloned().collect();
        paths.iter().try_for_each(|path| self.flush_file(path))
    }

    fn use_up(&mut self, path: &Path, page: PageSize, range: std::ops::Range<u64>) -> Result<()> {
        if !self.sources.contains_key(path) {
            let source = self.open(path, page)?;
            self.sources.insert(path.to_owned(), source);
        }
        let Some(Some(source)) = self.sources.get_mut(path) else {
            return Ok(());
        };
        if !source.run.is_empty() && source.run.end == range.start {
            source.run.end = range.end;
        } else {
            let before = std::mem::replace(&mut source.run, range.clone());
            self.give_back(path, before)?;
        }
        let run = self.sources.get(path).and_then(Option::as_ref);
        match run.is_some_and(|source| source.run.end - source.run.start >= RUN_BYTES) {
            true => self.flush_file(path),
            false => Ok(()),
        }
    }

    fn flush_file(&mut self, path: &Path) -> Result<()> {
        let Some(Some(source)) = self.sources.get_mut(path) else {
            return Ok(());
        };
        let run = std::mem::replace(&mut source.run, 0..0);
        self.give_back(path, run)
    }

    fn give_back(&mut self, path: &Path, run: std::ops::Range<u64>) -> Result<()> {
        let Some(Some(source)) = self.sources.get_mut(path) else {
            return Ok(());
        };
        let Some(blocks) = source.holes.add(run) else {
            return Ok(());
        };
        if let Some(dir) = path.parent() {
            mark(&mut self.dirs, dir)?;
        }
        let bytes = blocks.end - blocks.start;
        punch(&source.file, path, blocks.start, bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    /// Opens a file that bytes are to be taken out of; `None` if others need it as well.
    fn open(&mut self, path: &Path, page: PageSize) -> Result<Option<Source>> {
        if let Some(dir) = path.parent() {
            self.count_pagemaps(dir, page)?;
        }
        let open = File::options().read(true).write(true).open(path);
        let file = open.map_err(|error| Error::file("write", path, error))?;
        let metadata = file.metadata();
        let metadata = metadata.map_err(|error| Error::file("read", path, error))?;
        let named = self.named.get(&(metadata.dev(), metadata.ino()));
        if metadata.nlink() > 1 || named.is_some_and(|named| *named > 1) {
            tracing::info!(
                "--auto-dedup leaves {} alone: other images name it too",
                path.display()
            );
            return Ok(None);
        }
        Ok(Some(Source {
            file,
            holes: Holes::new(metadata.blksize().clamp(512, page.bytes())),
            run: 0..0,
        }))
    }

    fn count_pagemaps(&mut self, dir: &Path, page: PageSize) -> Result<()> {
        if self.dirs.contains_key(dir) {
            return Ok(());
        }
        self.dirs.insert(dir.to_owned(), false);
        let dir = ImageDir::open_any(dir, page)?;
        for target in dir.targets()? {
            let Some(extents) = Extents::open(&dir, target)? else {
                continue;
            };
            if let Ok(metadata) = fs::metadata(dir.pages_path(extents.pages_id())) {
                *self
                    .named
                    .entry((metadata.dev(), metadata.ino()))
                    .or_insert(0) += 1;
            }
        }
        Ok(())
    }
}

/// Leaves the file in `dir` that says that its images are not whole.
fn mark(dirs: &mut BTreeMap<PathBuf, bool>, dir: &Path) -> Result<()> {
    if dirs.insert(dir.to_owned(), true) == Some(true) {
        return Ok(());
    }
    let mark = dir.join(MARK);
    match File::options().write(true).create_new(true).open(&mark) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(Error::file("create", &mark, error))
        }
        _ => Ok(()),
    }
}
