//! One target's memory as the images have it: an image directory and its parents, resolved.
//!
//! ```text
//! DIR           |--here--|--parent--|     |--lazy--|
//! DIR/parent         |-------here----|--parent--|          each a pagemap with its pages file
//! ...parent                          |--here----|
//!
//! resolved      | file 2 | file 1   |     | absent |       sorted, disjoint, O(log n) to find
//! ```
//!
//! A pagemap's entries are laid over what its parent resolved to, deepest parent first, so that a
//! resolved extent says at once in which file and where its bytes are, however long the chain is.
//! Memory is one small record an extent; no list of pages is ever made.
//!
//! Invariants: resolved extents are sorted, do not overlap and are not empty; neighbours that could
//! be one are one; the bytes of every place but `Absent` lay inside its file when that was opened.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blocks::BlockList;
use super::dir::ImageDir;
use super::extents::Extents;
use super::pagemap::{Extent, Payload};
use super::pages::PagesFile;
use crate::criu::header::{PageFlags, Target};
use crate::error::{Error, Kind, Result};
use crate::units::{PageRange, PageSize, Vaddr};

/// A run of pages whose bytes lie in one place, one behind the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The addresses.
    pub range: PageRange,
    /// Whether the entry of the target's own pagemap is LAZY. CRIU leaves just these pages to the
    /// lazy restore and restores the others itself.
    pub lazy: bool,
    /// Where the bytes of the first page are.
    pub place: Place,
}

/// Where bytes are: in a file of the [`Chain`], or nowhere in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// As they are, from `offset` (bytes) of the pages file with this number on.
    Raw {
        /// Number of the pages file in its chain.
        file: u32,
        /// Offset of the first page in bytes.
        offset: u64,
    },
    /// Page by page as CRIU 4.3 compresses them: see [`Chain::stored`].
    Blocks {
        /// Number of the list of blocks in its chain.
        list: u32,
        /// The first page's block in the list.
        first: u32,
    },
    /// In no file.
    Absent {
        /// The reason.
        why: Absence,
        /// Which directory says so: 0 is the image directory, 1 its parent...
        depth: u16,
    },
}

/// Why no file has the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absence {
    /// They stayed with the source: an entry without PRESENT and PARENT.
    WithSource,
    /// They should be in the parent, which lacks them or does not exist.
    NotInParent,
    /// The pages file is missing.
    NoPagesFile,
    /// The pages file ends before them.
    CutShort,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Absence::WithSource => "they were dumped lazily and stayed with the source",
            Absence::NotInParent => "they should be in its parent, which lacks them",
            Absence::NoPagesFile => "the pages file is missing",
            Absence::CutShort => "the pages file is cut short",
        })
    }
}

/// What to do about pages that no file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// Refuse to open the chain, with an error that names the first of them.
    Refuse,
    /// Leave them as [`Place::Absent`]: somebody else may have them.
    Leave,
}

/// How one page is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// Not at all: it is all zeros.
    Zero,
    /// As it is.
    Raw {
        /// Number of the pages file in its chain.
        file: u32,
        /// Offset in bytes.
        offset: u64,
    },
    /// As an LZ4 block without a frame.
    Lz4 {
        /// Number of the pages file in its chain.
        file: u32,
        /// Offset in bytes.
        offset: u64,
        /// Length of the block in bytes, less than a page.
        bytes: usize,
    },
}

/// One target's memory. See the module's text.
#[derive(Debug)]
pub struct Chain {
    target: Target,
    page: PageSize,
    dirs: Vec<PathBuf>,
    files: Vec<PagesFile>,
    lists: Vec<BlockList>,
    extents: Vec<Resolved>,
}

impl Resolved {
    /// The part that covers `range`, which lies inside.
    pub(super) fn part(&self, range: PageRange, page: PageSize) -> Resolved {
        let skipped = range.start().get() - self.range.start().get();
        Resolved {
            range,
            lazy: self.lazy,
            place: self.place.behind(skipped, page),
        }
    }

    /// Whether `next` goes on where this ends, in the address space and in its place.
    fn goes_on_with(&self, next: &Resolved, page: PageSize) -> bool {
        self.range.end() == next.range.start()
            && self.lazy == next.lazy
            && self.place.behind(self.range.bytes(), page) == next.place
    }
}

impl Place {
    /// The place of the page `bytes` (whole pages) further on in the same extent.
    #[must_use]
    pub fn behind(self, bytes: u64, page: PageSize) -> Place {
        match self {
            Place::Raw { file, offset } => Place::Raw {
                file,
                offset: offset + bytes,
            },
            Place::Blocks { list, first } => {
                let pages = u32::try_from(bytes >> page.shift());
                Place::Blocks {
                    list,
                    first: first + pages.expect("a list has fewer than 2^32 blocks"),
                }
            }
            Place::Absent { .. } => self,
        }
    }
}

impl Chain {
    /// Opens the memory of `target` in `dir`. Fails with [`Kind::Image`] if `dir` has no pagemap of
    /// it, if an image is damaged, or if `missing` says so.
    pub fn open(dir: &ImageDir, target: Target, missing: Missing) -> Result<Chain> {
        let mut chain = Chain {
            target,
            page: dir.page(),
            dirs: Vec::new(),
            files: Vec::new(),
            lists: Vec::new(),
            extents: Vec::new(),
        };
        // As for CRIU, a parent without this pagemap ends the chain.
        let mut chain_dirs = dir.chain_dirs()?;
        let levels = chain_dirs
            .iter()
            .take_while(|dir| dir.has_pagemap(target))
            .count();
        chain_dirs.truncate(levels.max(1));
        chain.dirs = chain_dirs.iter().map(|dir| dir.path().to_owned()).collect();
        for (depth, dir) in chain_dirs.iter().enumerate().rev() {
            chain.lay_over(dir, depth)?;
        }
        chain.extents.shrink_to_fit();
        let absent = |extent: &&Resolved| matches!(extent.place, Place::Absent { .. });
        match chain.extents.iter().find(absent) {
            Some(first) if missing == Missing::Refuse => Err(chain.absence(first)),
            _ => Ok(chain),
        }
    }

    /// Whose memory this is.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The image directory that it was opened in, without its parents.
    pub fn dir(&self) -> &Path {
        &self.dirs[0]
    }

    /// The page size of the images.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// All extents, by address.
    pub fn extents(&self) -> &[Resolved] {
        &self.extents
    }

    /// The extent that `addr` lies in, from `addr` (the address of a page) on.
    pub fn find(&self, addr: Vaddr) -> Option<Resolved> {
        let extent = self.extents_from(addr).next()?;
        extent.range.contains(addr).then_some(extent)
    }

    /// The extents from `addr` (the address of a page) on, the first one cut there.
    pub fn extents_from(&self, addr: Vaddr) -> impl Iterator<Item = Resolved> + '_ {
        let first = self
            .extents
            .partition_point(|extent| extent.range.end() <= addr);
        self.extents[first..].iter().map(move |extent| {
            let start = extent.range.start().max(addr);
            let range = PageRange::new(start.get(), extent.range.end().get());
            extent.part(range, self.page)
        })
    }

    /// The pages file with this number.
    pub fn file(&self, file: u32) -> &PagesFile {
        &self.files[file as usize]
    }

    /// The `len` bytes from a raw place on, straight from the page cache, for system calls alone
    /// (see [`crate::sys::mapping`]). `None` if the place is not raw or its extent is shorter.
    /// `whole` is the file that was found whole a moment ago, so that many small places cost one look.
    pub fn mapped(&self, place: Place, len: usize, whole: &mut Option<u32>) -> Option<&[u8]> {
        let Place::Raw { file, offset } = place else {
            return None;
        };
        let pages = self.file(file);
        if *whole != Some(file) {
            *whole = pages.is_whole().then_some(file);
        }
        whole.and_then(|_| pages.mapped(offset, len))
    }

    /// How the first page of `place` is stored, `None` if it is absent.
    pub fn stored(&self, place: Place) -> Option<Stored> {
        match place {
            Place::Raw { file, offset } => Some(Stored::Raw { file, offset }),
            Place::Blocks { list, first } => {
                let list = &self.lists[list as usize];
                let file = list.file;
                let (start, bytes) = list.block(first as usize);
                let offset = list.offset + start;
                Some(match bytes {
                    0 => Stored::Zero,
                    full if full == self.page.as_usize() => Stored::Raw { file, offset },
                    bytes => Stored::Lz4 {
                        file,
                        offset,
                        bytes,
                    },
                })
            }
            Place::Absent { .. } => None,
        }
    }

    /// Reads the whole pages from `place` on, all of one extent, into `out`, decompressing them
    /// where need be.
    pub fn read(&self, place: Place, out: &mut [u8]) -> Result<()> {
        match place {
            Place::Raw { file, offset } => self.file(file).read_at(out, offset),
            Place::Blocks { list, first } => {
                let list = &self.lists[list as usize];
                list.read(self.file(list.file), first as usize, out, self.page)
            }
            Place::Absent { why, depth } => {
                let text = format!("pages of {}: {}", self.target, self.reason(why, depth));
                Err(Error::new(Kind::Image, text))
            }
        }
    }

    /// Where in which file the bytes of `extent` are stored: number of the file, offset and length in bytes;
    /// `None` if they are absent.
    pub fn span(&self, extent: &Resolved) -> Option<(u32, u64, u64)> {
        match extent.place {
            Place::Raw { file, offset } => Some((file, offset, extent.range.bytes())),
            Place::Blocks { list, first } => {
                let list = &self.lists[list as usize];
                let pages = extent.range.bytes() >> self.page.shift();
                let (start, bytes) = list.span(first as usize, pages);
                Some((list.file, list.offset + start, bytes))
            }
            Place::Absent { .. } => None,
        }
    }

    /// The error that says why no image has the pages of `extent`, an absent one.
    pub fn absence(&self, extent: &Resolved) -> Error {
        let Place::Absent { why, depth } = extent.place else {
            unreachable!("asked why pages are absent that are there");
        };
        let pages = extent.range.pages(self.page);
        let start = extent.range.start();
        let text = format!(
            "no image has the {pages} pages of {} from {start} on: {}",
            self.target,
            self.reason(why, depth)
        );
        Error::new(Kind::Image, text)
    }

    fn reason(&self, why: Absence, depth: u16) -> String {
        let name = self.target.pagemap_name();
        let pagemap = self.dirs[usize::from(depth)].join(name);
        format!("after {}, {why}", pagemap.display())
    }
}

/// Resolving.
impl Chain {
    /// Lays the pagemap of `dir` over what its parents resolved to.
    fn lay_over(&mut self, dir: &ImageDir, depth: usize) -> Result<()> {
        let Some(mut extents) = Extents::open(dir, self.target)? else {
            let dir = dir.path().display();
            let text = format!("{dir} has no pagemap of {}", self.target);
            return Err(Error::new(Kind::Image, text));
        };
        let file = match PagesFile::open(&dir.pages_path(extents.pages_id()))? {
            Some(file) => {
                self.files.push(file);
                self.files.len().checked_sub(1)
            }
            None => None,
        };
        let mut level = Level {
            depth: u16::try_from(depth).expect("PARENT_DEPTH_MAX bounds the depth"),
            file: file.map(|file| u32::try_from(file).expect("one file a level")),
            parent: std::mem::take(&mut self.extents).into_iter().peekable(),
        };
        while let Some(extent) = extents.next()? {
            self.lay_extent(&mut level, &extent);
        }
        Ok(())
    }

    fn lay_extent(&mut self, level: &mut Level, extent: &Extent) {
        let lazy = extent.flags.has(PageFlags::LAZY);
        if extent.flags.has(PageFlags::PARENT) {
            return self.lay_parents(level, extent.range, lazy);
        }
        let place = match &extent.payload {
            Payload::None => level.absent(Absence::WithSource),
            payload => self.place(level, payload, extent.range.bytes()),
        };
        let range = extent.range;
        self.push(Resolved { range, lazy, place });
    }

    /// The parents' places for `range`, and absence where they have none.
    fn lay_parents(&mut self, level: &mut Level, range: PageRange, lazy: bool) {
        let place = level.absent(Absence::NotInParent);
        let absent = |start: Vaddr, end: Vaddr| Resolved {
            range: PageRange::new(start.get(), end.get()),
            lazy,
            place,
        };
        let mut at = range.start();
        while let Some(parent) = level.parent.peek() {
            if let Some(common) = parent.range.intersect(range) {
                if at < common.start() {
                    self.push(absent(at, common.start()));
                }
                let part = parent.part(common, self.page);
                self.push(Resolved { lazy, ..part });
                at = common.end();
            }
            if parent.range.end() > range.end() {
                break;
            }
            level.parent.next();
        }
        if at < range.end() {
            self.push(absent(at, range.end()));
        }
    }

    /// Where the payload of an entry with PRESENT is.
    fn place(&mut self, level: &Level, payload: &Payload, raw_bytes: u64) -> Place {
        let Some(file) = level.file else {
            return level.absent(Absence::NoPagesFile);
        };
        let (offset, bytes) = match payload {
            Payload::None => (0, 0),
            Payload::Raw { offset } => (*offset, raw_bytes),
            Payload::Blocks { offset, ends } => (*offset, ends.last().copied().unwrap_or(0)),
        };
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > self.file(file).len()) {
            return level.absent(Absence::CutShort);
        }
        let Payload::Blocks { ends, .. } = payload else {
            return Place::Raw { file, offset };
        };
        self.lists.push(BlockList {
            file,
            offset,
            ends: Arc::clone(ends),
        });
        let list = u32::try_from(self.lists.len() - 1).expect("2^32 lists would not fit in memory");
        Place::Blocks { list, first: 0 }
    }

    fn push(&mut self, next: Resolved) {
        match self.extents.last_mut() {
            Some(last) if last.goes_on_with(&next, self.page) => {
                let start = last.range.start().get();
                last.range = PageRange::new(start, next.range.end().get());
            }
            _ => self.extents.push(next),
        }
    }
}

/// A directory of the chain while its pagemap is laid over its parents.
struct Level {
    depth: u16,
    /// Number of its pages file, if that is there.
    file: Option<u32>,
    /// What the parents resolved to and no later entry can be below.
    parent: std::iter::Peekable<std::vec::IntoIter<Resolved>>,
}

impl Level {
    fn absent(&self, why: Absence) -> Place {
        let depth = self.depth;
        Place::Absent { why, depth }
    }
}
