//! A target in the parent directory: whether it has the pages that its child counts on, whether a
//! page is the same, and how what the child has anew is taken out of it.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::chain::{Chain, Missing, Place};
use super::dir::ImageDir;
use super::extents::Extents;
use super::pagemap::Extent;
use crate::criu::header::{PageFlags, Target};
use crate::error::{Error, Kind, Result};
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages of the parent that are read at once to be compared: dumps come in the order of addresses.
const WINDOW_PAGES: u64 = 32;

/// A target of the parent directory, with the pages around the one that was asked for last.
#[derive(Debug)]
pub(super) struct Parent {
    chain: Chain,
    window: PageRange,
    bytes: Vec<u8>,
}

impl Parent {
    /// Opens `target` in the parent of `dir`; `None` if there is no parent or it lacks the target.
    pub(super) fn open(dir: &ImageDir, target: Target) -> Result<Option<Parent>> {
        let parent = dir.parent()?.filter(|parent| parent.has_pagemap(target));
        let chain = parent.map(|parent| Chain::open(&parent, target, Missing::Leave));
        Ok(chain.transpose()?.map(|chain| Parent {
            chain,
            window: PageRange::new(0, 0),
            bytes: Vec::new(),
        }))
    }

    /// Fails unless every page of `range` is in the parent or above it.
    pub(super) fn must_have(&self, range: PageRange) -> Result<()> {
        let counts = "the dump counts on pages of its parent";
        let mut at = range.start();
        for extent in self.chain.extents_from(range.start()) {
            if extent.range.start() > at || at >= range.end() {
                break;
            }
            if matches!(extent.place, Place::Absent { .. }) {
                return Err(self.chain.absence(&extent).within(counts));
            }
            at = extent.range.end();
        }
        if at >= range.end() {
            return Ok(());
        }
        let target = self.chain.target();
        let text = format!("{counts}, but the parent lacks {target}'s page at {at}");
        Err(Error::new(Kind::Image, text))
    }

    /// Whether the page at `vaddr` has just these `bytes` in the parent.
    pub(super) fn equals(&mut self, vaddr: Vaddr, bytes: &[u8]) -> Result<bool> {
        if !self.window.contains(vaddr) && !self.read_window(vaddr)? {
            return Ok(false);
        }
        let at = usize::try_from(vaddr.get() - self.window.start().get())
            .expect("a window fits in memory");
        Ok(self.bytes.get(at..at + bytes.len()) == Some(bytes))
    }

    /// Reads the page at `vaddr`; whether there is one.
    pub(super) fn read(&self, vaddr: Vaddr, page: &mut [u8]) -> Result<bool> {
        let found = self.chain.find(vaddr);
        let found = found.filter(|found| !matches!(found.place, Place::Absent { .. }));
        match found {
            Some(found) => self.chain.read(found.place, page).map(|()| true),
            None => Ok(false),
        }
    }

    /// Reads the pages from `vaddr` on; whether there is one.
    fn read_window(&mut self, vaddr: Vaddr) -> Result<bool> {
        let Some(extent) = self.chain.find(vaddr) else {
            return Ok(false);
        };
        if matches!(extent.place, Place::Absent { .. }) {
            return Ok(false);
        }
        let most = WINDOW_PAGES << self.chain.page().shift();
        let bytes = extent.range.bytes().min(most);
        self.window = PageRange::new(vaddr.get(), vaddr.get() + bytes);
        self.bytes
            .resize(usize::try_from(bytes).expect("a window fits in memory"), 0);
        self.chain.read(extent.place, &mut self.bytes)?;
        Ok(true)
    }
}

/// Takes the pages that `dir` itself has of `target` out of the files of its parents, where they take
/// room for nothing from now on. Returns how many bytes that freed. Compressed pages stay: they do
/// not fill blocks of the file system. So do pages of files that several pagemaps name: others need them.
pub(super) fn punch_out_of_parents(dir: &ImageDir, target: Target) -> Result<u64> {
    let Some(parent) = Parent::open(dir, target)? else {
        return Ok(0);
    };
    let Some(mut own) = Extents::open(dir, target)? else {
        return Ok(0);
    };
    let mut punched = 0;
    let mut open: Option<(u32, Option<File>)> = None;
    while let Some(Extent { range, flags, .. }) = own.next()? {
        if !flags.has(PageFlags::PRESENT) {
            continue;
        }
        for extent in parent.chain.extents_from(range.start()) {
            let Some(common) = extent.range.intersect(range) else {
                break;
            };
            let Place::Raw { file, offset } = extent.place else {
                continue;
            };
            let path = parent.chain.file(file).path();
            if open.as_ref().is_none_or(|(number, _)| *number != file) {
                open = Some((file, open_alone(path, dir.page())?));
            }
            if let Some((_, Some(file))) = &open {
                punch(file, path, offset, common.bytes())?;
                punched += common.bytes();
            }
        }
    }
    Ok(punched)
}

/// Opens a pages file that one pagemap of its directory names; `None` if several do.
fn open_alone(path: &Path, page: PageSize) -> Result<Option<File>> {
    let mut named = 0;
    if let Some(dir) = path.parent() {
        let dir = ImageDir::open_any(dir, page)?;
        for target in dir.targets()? {
            let extents = Extents::open(&dir, target)?;
            let names = |extents: &Extents| dir.pages_path(extents.pages_id()) == path;
            named += usize::from(extents.as_ref().is_some_and(names));
        }
    }
    if named > 1 {
        tracing::warn!(
            "--auto-dedup leaves {} alone: other images name it too",
            path.display()
        );
        return Ok(None);
    }
    let writable = File::options().write(true).open(path);
    let writable = writable.map_err(|error| Error::file("write", path, error))?;
    Ok(Some(writable))
}

pub(super) fn punch(file: &File, path: &Path, offset: u64, bytes: u64) -> Result<()> {
    let too_far = |_| Error::file("punch", path, Errno::EFBIG);
    let offset = i64::try_from(offset).map_err(too_far)?;
    let bytes = i64::try_from(bytes).map_err(too_far)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset, bytes).map_err(|errno| Error::file("punch", path, errno))
}
