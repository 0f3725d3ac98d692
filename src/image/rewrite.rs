//! Images written anew, a pagemap at a time: with the pages that a restore needs in the directory itself, or
//! without those that a lazy restore can do without.
//!
//! ```text
//! finish   DIR: hole to the parent in a mapping that CRIU restores without its parents  ->  the page
//!          DIR: no page in locked memory, of which a child has a page there  ->  zeros (`super::locked`)
//! split    DIR: page that a lazy restore leaves out   ->  LAZY entry in DIR, page in LAZYDIR
//!               any other hole to the parent          ->  the page
//! ```
//!
//! CRIU looks for pages in parents only where it maps memory before it restores it. It does not for huge pages
//! (anonymous, or of a memfd) and for mappings that plugins provide: a hole there is taken for whatever stands
//! next in the pages file.
//!
//! Invariants: a pagemap and its pages file are replaced together and whole, the pages first, and not before what
//! has moved is in its place. So a directory that is left half-way can be restored from as before.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::chain::{Chain, Missing, Place};
use super::dir::{ImageDir, PARENT_LINK};
use super::extents::Extents;
use super::locked;
use super::pagemap::Extent;
use super::proto::{PagemapEntry, PagemapHead};
use super::store::{ImageStore, Sync};
use super::tree::names::remove_tree;
use super::writer::{Destination, SessionImages};
use crate::criu::header::{PageFlags, Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::units::{PageRange, PageSize};

/// Pages copied at once.
const COPIED_PAGES: u64 = 64;

/// What was done to a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rewritten {
    /// Pagemaps that were written anew.
    pub pagemaps: u64,
    /// Pages that had been holes to the parent and are in the directory now.
    pub filled_pages: u64,
    /// Pages of zeros that locked memory had no entry for.
    pub zero_pages: u64,
    /// Pages that have moved to the other directory.
    pub moved_pages: u64,
}

/// Puts the pages into `dir` that CRIU would not look for in its parents, and those without which a lazy restore gives
/// zeros to the children of locked memory, so that it can be restored from. Reads `pstree.img` and `mm-*.img`: the images
/// must be complete. Changes nothing where nothing is to be done.
///
/// # Errors
///
/// The images cannot be read or written, or no parent has a page that is needed.
pub fn finish(dir: &ImageDir) -> Result<Rewritten> {
    let mut done = Rewritten::default();
    let mut lacking = locked::lacking(dir)?;
    let has_parent = dir.parent()?.is_some();
    for target in dir.targets()? {
        let Target::Process(pid) = target else {
            continue;
        };
        let alone = match has_parent && has_holes(dir, target, |_| true)? {
            true => dir.mappings(pid)?.without_parents,
            false => Vec::new(),
        };
        let lacks_pages =
            !alone.is_empty() && has_holes(dir, target, |range| touches(&alone, range))?;
        let zeros = lacking.remove(&pid).unwrap_or_default();
        if lacks_pages || !zeros.is_empty() {
            let written = rewrite(dir, target, &alone, &zeros, &mut done);
            written.map_err(|error| match zeros.is_empty() {
                true => error,
                false => error.within(format!(
                    "pid {pid} locks memory where a child has pages that it lacks: without pages of zeros in its images a \
                     lazy restore would give zeros to the child"
                )),
            })?;
        }
    }
    Ok(done)
}

fn rewrite(
    dir: &ImageDir,
    target: Target,
    alone: &[PageRange],
    zeros: &[PageRange],
    done: &mut Rewritten,
) -> Result<()> {
    let mut rewrite = Rewrite::begin(dir, target)?;
    rewrite.finish(alone, zeros)?;
    done.filled_pages += rewrite.filled_pages;
    done.zero_pages += rewrite.zero_pages;
    done.pagemaps += 1;
    rewrite.commit()
}

/// Moves the pages that a lazy restore can do without from `dir` to `lazy_dir`, from where a page server can serve
/// them. What stays in `dir` stands alone, without a parent, and is restored from lazily.
///
/// # Errors
///
/// The images cannot be read or written, or no image has a page; [`Kind::Usage`] if both directories are one, or
/// `lazy_dir` has images of the same processes.
pub fn split(dir: &ImageDir, lazy_dir: &Path) -> Result<Rewritten> {
    let failed = |error| Error::file("make the directory", lazy_dir, error);
    fs::create_dir_all(lazy_dir).map_err(failed)?;
    let lazy_dir = ImageDir::open_any(lazy_dir, dir.page())?;
    if lazy_dir.path() == dir.path() {
        let text = format!("{} cannot be split into itself", dir.path().display());
        return Err(Error::new(Kind::Usage, text));
    }
    let mut done = Rewritten::default();
    for target in dir.targets()? {
        let lazy = matches!(target, Target::Process(_)) && has(dir, target, is_movable)?;
        if !lazy && !has_holes(dir, target, |_| true)? {
            continue;
        }
        if lazy && lazy_dir.has_pagemap(target) {
            let there = lazy_dir.path().display();
            let text = format!("{there} has pages of {target} already: give an empty directory");
            return Err(Error::new(Kind::Usage, text));
        }
        let mut rewrite = Rewrite::begin(dir, target)?;
        let moved = lazy.then(|| open(&lazy_dir)).transpose()?;
        rewrite.split(moved)?;
        done.filled_pages += rewrite.filled_pages;
        done.moved_pages += rewrite.moved_pages;
        done.pagemaps += 1;
        rewrite.commit()?;
    }
    // Nothing needs it any more.
    remove_tree(dir)?;
    match fs::remove_file(dir.path().join(PARENT_LINK)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::file("remove", &dir.path().join(PARENT_LINK), error))
        }
        _ => Ok(done),
    }
}

fn open(dir: &ImageDir) -> Result<SessionImages> {
    Ok(ImageStore::open(dir.path(), dir.page(), None, Sync::Close)?.begin())
}

/// Whether an entry of `target`'s own pagemap is what `wanted` says.
fn has(dir: &ImageDir, target: Target, wanted: impl Fn(&Extent) -> bool) -> Result<bool> {
    let Some(mut extents) = Extents::open(dir, target)? else {
        return Ok(false);
    };
    while let Some(extent) = extents.next()? {
        if wanted(&extent) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn has_holes(dir: &ImageDir, target: Target, within: impl Fn(PageRange) -> bool) -> Result<bool> {
    has(dir, target, |extent| {
        extent.flags.has(PageFlags::PARENT) && within(extent.range)
    })
}

/// Whether the pages of an entry can move: a lazy restore leaves them out, and they are here or in a parent.
fn is_movable(extent: &Extent) -> bool {
    let here = extent.flags.has(PageFlags::PRESENT) || extent.flags.has(PageFlags::PARENT);
    extent.flags.has(PageFlags::LAZY) && here
}

fn touches(ranges: &[PageRange], range: PageRange) -> bool {
    let first = ranges.partition_point(|other| other.end() <= range.start());
    ranges
        .get(first)
        .is_some_and(|other| other.intersect(range).is_some())
}

/// `range` in pieces, each with whether it lies within `ranges`, which are sorted and disjoint.
fn pieces(ranges: &[PageRange], range: PageRange) -> Vec<(PageRange, bool)> {
    let mut pieces = Vec::new();
    let mut at = range.start().get();
    let first = ranges.partition_point(|other| other.end() <= range.start());
    for common in ranges[first..]
        .iter()
        .map_while(|other| other.intersect(range))
    {
        if at < common.start().get() {
            pieces.push((PageRange::new(at, common.start().get()), false));
        }
        pieces.push((common, true));
        at = common.end().get();
    }
    if at < range.end().get() {
        pieces.push((PageRange::new(at, range.end().get()), false));
    }
    pieces
}

/// One pagemap on its way.
struct Rewrite<'a> {
    dir: &'a ImageDir,
    target: Target,
    wire: Wire,
    chain: Chain,
    images: SessionImages,
    /// Where moved pages go.
    moved: Option<SessionImages>,
    buffer: Vec<u8>,
    filled_pages: u64,
    zero_pages: u64,
    moved_pages: u64,
}

impl<'a> Rewrite<'a> {
    fn begin(dir: &'a ImageDir, target: Target) -> Result<Rewrite<'a>> {
        let wire = wire_of(dir, target)?;
        let mut images = open(dir)?;
        images.open(target, wire)?;
        Ok(Rewrite {
            dir,
            target,
            wire,
            chain: Chain::open(dir, target, Missing::Leave)?,
            images,
            moved: None,
            buffer: Vec::new(),
            filled_pages: 0,
            zero_pages: 0,
            moved_pages: 0,
        })
    }

    fn each(&mut self, mut entry: impl FnMut(&mut Self, &Extent) -> Result<()>) -> Result<()> {
        let Some(mut extents) = Extents::open(self.dir, self.target)? else {
            return Ok(());
        };
        while let Some(extent) = extents.next()? {
            entry(self, &extent)?;
        }
        Ok(())
    }

    /// `zeros`, by address, are in no entry of the pagemap.
    fn finish(&mut self, alone: &[PageRange], zeros: &[PageRange]) -> Result<()> {
        let mut zeros = zeros.iter().copied().peekable();
        self.each(|rewrite, extent| {
            while let Some(before) = zeros.next_if(|zeros| zeros.start() < extent.range.start()) {
                rewrite.add_zeros(before)?;
            }
            if !extent.flags.has(PageFlags::PARENT) {
                return rewrite.keep(extent.range, extent.flags);
            }
            for (range, alone) in pieces(alone, extent.range) {
                match alone {
                    true => rewrite.fill(range, extent.flags)?,
                    false => rewrite.keep(range, extent.flags)?,
                }
            }
            Ok(())
        })?;
        zeros.try_for_each(|behind| self.add_zeros(behind))
    }

    /// Where nothing is written the pages file has zeros.
    fn add_zeros(&mut self, range: PageRange) -> Result<()> {
        self.zero_pages += range.pages(self.dir.page()).get();
        self.images.append(range, PageFlags::PRESENT).map(drop)
    }

    fn split(&mut self, moved: Option<SessionImages>) -> Result<()> {
        self.moved = moved;
        if let Some(moved) = &mut self.moved {
            moved.open(self.target, self.wire)?;
        }
        self.each(|rewrite, extent| {
            if is_movable(extent) && rewrite.moved.is_some() {
                rewrite.move_out(extent.range)
            } else if extent.flags.has(PageFlags::PARENT) {
                rewrite.fill(extent.range, extent.flags)
            } else {
                rewrite.keep(extent.range, extent.flags)
            }
        })
    }

    /// The pages stay as they are, but are stored raw.
    fn keep(&mut self, range: PageRange, flags: PageFlags) -> Result<()> {
        let to = self
            .images
            .append(range, flags.without(PageFlags::PAYLOAD_ALIGNED))?;
        self.copy(range, to)
    }

    /// The pages come from the parent.
    fn fill(&mut self, range: PageRange, flags: PageFlags) -> Result<()> {
        self.filled_pages += range.pages(self.dir.page()).get();
        let here = flags.without(PageFlags::PARENT).with(PageFlags::PRESENT);
        self.keep(range, here)
    }

    /// The pages go to the other directory, and a lazy restore leaves them out of this one.
    fn move_out(&mut self, range: PageRange) -> Result<()> {
        self.moved_pages += range.pages(self.dir.page()).get();
        self.images.append(range, PageFlags::LAZY)?;
        let flags = PageFlags::LAZY.with(PageFlags::PRESENT);
        let to = match &mut self.moved {
            Some(moved) => moved.append(range, flags)?,
            None => None,
        };
        self.copy(range, to)
    }

    /// Copies the pages of `range` to their place, if they have one there. Zeros take no room.
    fn copy(&mut self, range: PageRange, to: Option<Destination>) -> Result<()> {
        let Some(to) = to else {
            return Ok(());
        };
        let page = self.dir.page();
        let mut at = range.start();
        while at < range.end() {
            let next = self.chain.find(at);
            let next = next.filter(|found| !matches!(found.place, Place::Absent { .. }));
            let Some(found) = next else {
                return Err(self.lacks(at));
            };
            let end = found.range.end().min(range.end()).get();
            let end = end.min(at.get() + (COPIED_PAGES << page.shift()));
            let bytes = usize::try_from(end - at.get()).expect("a few pages");
            self.buffer.resize(bytes, 0);
            self.chain.read(found.place, &mut self.buffer)?;
            let offset = to.offset + (at.get() - range.start().get());
            write_non_zero(&self.buffer, &to, offset, page)?;
            at = PageRange::new(at.get(), end).end();
        }
        Ok(())
    }

    fn lacks(&self, at: crate::units::Vaddr) -> Error {
        match self.chain.find(at) {
            Some(absent) => self.chain.absence(&absent),
            None => {
                let text = format!("no image has the page of {} at {at}", self.target);
                Error::new(Kind::Image, text)
            }
        }
    }

    /// Gives the images their names, and removes the pages file that they replace.
    fn commit(self) -> Result<()> {
        let old = pages_id_of(self.dir, self.target)?;
        if let Some(moved) = self.moved {
            moved.commit()?;
        }
        drop(self.chain);
        self.images.commit()?;
        for other in self.dir.targets()? {
            if pages_id_of(self.dir, other)? == old {
                return Ok(());
            }
        }
        let path = self.dir.pages_path(old);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::file("remove", &path, error))
            }
            _ => Ok(()),
        }
    }
}

/// Writes pages to their places, but for zeros, which the file has there already.
fn write_non_zero(pages: &[u8], to: &Destination, offset: u64, page: PageSize) -> Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let chunks: Vec<&[u8]> = pages.chunks(page.as_usize()).collect();
    let mut at = 0;
    for run in chunks.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let bytes = run.len() * page.as_usize();
        if !is_zero(run[0]) {
            let written = to
                .part
                .file()
                .write_all_at(&pages[at..at + bytes], offset + at as u64);
            written.map_err(|error| to.part.write_error(error))?;
        }
        at += bytes;
    }
    Ok(())
}

fn pages_id_of(dir: &ImageDir, target: Target) -> Result<u32> {
    Ok(Extents::open(dir, target)?.map_or(0, |extents| extents.pages_id()))
}

fn wire_of(dir: &ImageDir, target: Target) -> Result<Wire> {
    let Some((path, mut reader)) = dir.pagemap(target)? else {
        return Ok(Wire::V2);
    };
    let unreadable = |error| super::dir::unreadable(&path, error);
    reader.read::<PagemapHead>().map_err(unreadable)?;
    let entry = reader.read::<PagemapEntry>().map_err(unreadable)?;
    Ok(entry.map_or(Wire::V2, |entry| entry.wire()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_where_mappings_begin_and_end() {
        let at = |start: u64, end: u64| PageRange::new(start << 12, end << 12);
        let ranges = [at(2, 4), at(4, 6), at(9, 12)];
        let cut = |start, end| pieces(&ranges, at(start, end));
        assert_eq!(cut(0, 2), [(at(0, 2), false)]);
        assert_eq!(
            cut(1, 10),
            [
                (at(1, 2), false),
                (at(2, 4), true),
                (at(4, 6), true),
                (at(6, 9), false),
                (at(9, 10), true)
            ]
        );
        assert_eq!(cut(10, 11), [(at(10, 11), true)]);
        assert!(touches(&ranges, at(5, 7)) && !touches(&ranges, at(6, 9)));
    }
}
