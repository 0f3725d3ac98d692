//! The directories of a tree, written when all pages have come.
//!
//! ```text
//! tree/1    own pages of members that are based on another one's view
//! tree/2    own pages of members that are based on nobody
//! ```
//!
//! A pagemap names one pages file, and has a place for each page of it. So where a member shares pages with another
//! one, its pagemap has all of that one's entries, and in between holes for the pages that are further down. Entries
//! at addresses that the member has nothing at do no harm: nobody asks for them.
//!
//! Invariants: a pages file stands in one directory; each directory that a member's pages are looked for in has a
//! pagemap of it, and each pagemap's pages file is there.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::super::dir::PARENT_LINK;
use super::super::file::{Magic, MessageWriter};
use super::super::pagemap::encode_entry;
use super::super::proto::PagemapHead;
use super::super::store::{Sync, create_new, pages_name};
use super::names::UP;
use super::views::{Member, Views, without};
use crate::criu::header::PageFlags;
use crate::error::{Error, Result};
use crate::limits::{ENTRY_PAGES_MAX, PAGES_ID_FIRST};
use crate::units::{PageRange, PageSize};

/// Number of the empty pages file that pagemaps name which have holes alone: CRIU opens it.
const NO_PAGES_ID: u32 = PAGES_ID_FIRST - 1;

/// See the module's text.
pub(super) struct Layers<'a> {
    views: &'a Views,
    /// Where the directories are made.
    root: &'a Path,
    page: PageSize,
    sync: Sync,
    /// How many there are.
    count: usize,
}

impl<'a> Layers<'a> {
    /// For the members of `views`, whose own pages files stand in `root`.
    pub(super) fn new(views: &'a Views, root: &'a Path, page: PageSize, sync: Sync) -> Layers<'a> {
        let with_pages = views
            .members()
            .iter()
            .filter(|member| !member.own.is_empty());
        let deepest = with_pages.map(|member| member.depth).max();
        Layers {
            views,
            root,
            page,
            sync,
            count: deepest.unwrap_or(0) + 1,
        }
    }

    /// The directory number `layer`, from 1.
    fn dir(&self, layer: usize) -> PathBuf {
        self.root.join(layer.to_string())
    }

    /// The number of the directory with the own pages of `member`.
    fn layer_of(&self, member: &Member) -> usize {
        self.count - member.depth
    }

    /// Writes the directories. The parent of the last one is what `parent` leads to from the directory that the tree
    /// is in.
    pub(super) fn write(&self, parent: Option<&Path>) -> Result<()> {
        for layer in 1..=self.count {
            let dir = self.dir(layer);
            fs::create_dir(&dir).map_err(|error| Error::file("make the directory", &dir, error))?;
            let target = match parent {
                _ if layer < self.count => Some(Path::new("..").join((layer + 1).to_string())),
                Some(path) if path.is_relative() => Some(Path::new(UP).join(path)),
                absolute_or_none => absolute_or_none.map(Path::to_owned),
            };
            if let Some(target) = target {
                let link = dir.join(PARENT_LINK);
                symlink(target, &link)
                    .map_err(|error| Error::file("make the link", &link, error))?;
            }
        }
        for member in self.views.members() {
            if !member.own.is_empty() {
                let name = pages_name(member.pages_id);
                let (from, to) = (self.root.join(&name), self.dir(self.layer_of(member)));
                fs::rename(&from, to.join(name))
                    .map_err(|error| Error::file("rename", &from, error))?;
            }
        }
        for (index, member) in self.views.members().iter().enumerate() {
            self.write_member(index, member)?;
        }
        match self.sync {
            Sync::None => Ok(()),
            Sync::Close | Sync::Always => self.sync_all(),
        }
    }

    /// Writes the pagemaps of a member, from the first directory down to where all its pages were found.
    fn write_member(&self, index: usize, member: &Member) -> Result<()> {
        let mut line = self.views.line(Some(index)).peekable();
        let mut needed = member.needed.clone();
        for layer in 1..=self.count {
            if needed.is_empty() {
                break;
            }
            let here = |other: &usize| {
                let other = &self.views.members()[*other];
                !other.own.is_empty() && self.layer_of(other) == layer
            };
            while line
                .next_if(|other| self.views.members()[*other].own.is_empty())
                .is_some()
            {}
            let holder = line.next_if(here).map(|other| &self.views.members()[other]);
            let below = match holder {
                Some(holder) => without(&needed, holder.own.ranges()),
                None => needed,
            };
            self.write_pagemap(layer, member, holder, &below)?;
            needed = below;
        }
        Ok(())
    }

    /// Writes the pagemap of `member` in one directory: the pages of `holder`, and `holes`.
    fn write_pagemap(
        &self,
        layer: usize,
        member: &Member,
        holder: Option<&Member>,
        holes: &[PageRange],
    ) -> Result<()> {
        let dir = self.dir(layer);
        let pages_id = holder.map_or(NO_PAGES_ID, |holder| holder.pages_id);
        if holder.is_none() {
            let path = dir.join(pages_name(NO_PAGES_ID));
            match create_new(&path, 0) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(Error::file("create", &path, error));
                }
                _ => {}
            }
        }
        let path = dir.join(member.target.pagemap_name());
        let failed = |error| Error::file("write", &path, error);
        let file = create_new(&path, 0).map_err(|error| Error::file("create", &path, error))?;
        let mut pagemap =
            MessageWriter::new(BufWriter::new(file), Magic::Pagemap).map_err(failed)?;
        pagemap.write(&PagemapHead { pages_id }).map_err(failed)?;
        let here = holder.into_iter().flat_map(|holder| holder.own.ranges());
        let here = here.map(|range| (range, PageFlags::PRESENT.with(PageFlags::LAZY)));
        let holes = holes.iter().map(|range| (*range, PageFlags::PARENT));
        let mut runs: Vec<(PageRange, PageFlags)> = here.chain(holes).collect();
        runs.sort_unstable_by_key(|(range, _)| range.start());
        for (range, flags) in runs {
            for range in pieces(range, self.page) {
                let entry = encode_entry(range, flags, None, member.wire, self.page);
                pagemap.write(&entry).map_err(failed)?;
            }
        }
        let written = pagemap.into_inner().into_inner();
        written
            .map(drop)
            .map_err(|error| failed(error.into_error()))
    }

    fn sync_all(&self) -> Result<()> {
        let sync = |path: &Path| {
            let synced = File::open(path).and_then(|file| file.sync_all());
            synced.map_err(|error| Error::file("sync", path, error))
        };
        for layer in 1..=self.count {
            let dir = self.dir(layer);
            let failed = |error| Error::file("list", &dir, error);
            for entry in fs::read_dir(&dir).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if entry.file_type().map_err(failed)?.is_file() {
                    sync(&entry.path())?;
                }
            }
            sync(&dir)?;
        }
        sync(self.root)
    }
}

/// `range` in pieces as long as an entry may be.
fn pieces(range: PageRange, page: PageSize) -> impl Iterator<Item = PageRange> {
    let (start, end) = (range.start().get(), range.end().get());
    let most = ENTRY_PAGES_MAX << page.shift();
    let pieces = (end - start).div_ceil(most);
    (0..pieces).map(move |piece| {
        let start = start + piece * most;
        PageRange::new(start, end.min(start.saturating_add(most)))
    })
}
