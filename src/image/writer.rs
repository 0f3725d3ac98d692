//! The images of one session while they are received: appended to, whole or absent afterwards.
//!
//! ```text
//! append(range, flags)  ->  entries of .pagemap-N.img.part     (runs that go on are joined)
//!                       ->  (file, offset): where the caller puts the bytes
//! commit                ->  pages files renamed, then pagemaps, then the caller may answer CLOSE
//! drop                  ->  every part removed
//! ```
//!
//! Bytes of pages do not pass through here: [`SessionImages::append`] says where they go, and an
//! engine writes them when and how it likes, before it commits. A place where nothing is written
//! reads as zero.
//!
//! Invariants: entries are in the order of their addresses (the caller's promise, checked in
//! `criu::receive` for what peers say); a page that is said to be in the parent is there; memory does
//! not grow with the number of pages.

use std::fs::File;
use std::io::{self, BufWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::dir::ImageDir;
use super::extents::Extents;
use super::file::{Magic, MessageWriter};
use super::pagemap::encode_entry;
use super::parents::{Parent, punch_out_of_parents};
use super::proto::{CompressedBlocks, PagemapHead};
use super::store::{ImageStore, Sync, create_new, pages_name, remove};
use crate::criu::header::{PageFlags, Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::limits::{ENTRY_PAGES_MAX, PAGES_ID_FIRST};
use crate::units::{PageRange, PageSize, Vaddr};

/// A pages file that is being written. An operation in flight keeps it open.
#[derive(Debug)]
pub struct PagesPart {
    file: File,
    path: PathBuf,
}

impl AsFd for PagesPart {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PagesPart {
    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The error for a write that failed: names the file, and the usual way out.
    pub fn write_error(&self, error: impl Into<io::Error>) -> Error {
        let error = error.into();
        let doing = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "store more pages (make room on the disk and dump again) in"
            }
            _ => "write",
        };
        Error::file(doing, &self.path, error)
    }
}

/// Where the bytes of appended pages go.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The pages file.
    pub part: Arc<PagesPart>,
    /// Offset of the first page in bytes.
    pub offset: u64,
}

/// The images of one session. See the module's text.
#[derive(Debug)]
pub struct SessionImages {
    store: Arc<ImageStore>,
    current: Option<TargetImages>,
    /// Targets whose last page was named, in the order in which they came.
    finished: Vec<Finished>,
    committed: bool,
}

/// The images of a session that are whole now.
#[derive(Debug)]
pub struct CommittedImages {
    store: Arc<ImageStore>,
    targets: Vec<Target>,
}

impl CommittedImages {
    /// Takes the pages of the session out of the parents' files, as CRIU's `--auto-dedup`. Returns how
    /// many bytes that freed.
    pub fn punch_out_of_parents(&self) -> Result<u64> {
        let mut punched = 0;
        for target in &self.targets {
            punched += punch_out_of_parents(self.store.dir(), *target)?;
        }
        Ok(punched)
    }
}

/// A target's two parts, complete.
#[derive(Debug)]
struct Finished {
    target: Target,
    pages_id: u32,
}

impl SessionImages {
    pub(super) fn new(store: Arc<ImageStore>) -> SessionImages {
        SessionImages {
            store,
            current: None,
            finished: Vec::new(),
            committed: false,
        }
    }

    /// Whether the parent directory has the pagemap of `target`: the answer to PARENT and OPEN2.
    pub fn has_parent(&self, target: Target) -> Result<bool> {
        let parent = self.store.dir().parent()?;
        Ok(parent.is_some_and(|dir| dir.has_pagemap(target)))
    }

    /// From now on pages are those of `target`, for a sender that speaks `wire`.
    ///
    /// # Errors
    ///
    /// The parts cannot be made; [`Kind::Usage`] if another session is receiving the same target.
    pub fn open(&mut self, target: Target, wire: Wire) -> Result<()> {
        self.finish_current()?;
        self.current = Some(TargetImages::create(&self.store, target, wire)?);
        Ok(())
    }

    fn current(&mut self, at: Vaddr) -> Result<(&mut TargetImages, &ImageDir)> {
        let current = self.current.as_mut().ok_or_else(|| {
            let text = format!("pages at {at} belong to no process");
            Error::new(Kind::Protocol, text)
        })?;
        Ok((current, self.store.dir()))
    }

    /// Appends the pages of `range`. With PRESENT returns where their bytes go. Pages with PARENT are
    /// looked for in the parent.
    ///
    /// # Errors
    ///
    /// The parent lacks a page, or a file cannot be read or written. Nothing was opened:
    /// [`Kind::Protocol`].
    pub fn append(&mut self, range: PageRange, flags: PageFlags) -> Result<Option<Destination>> {
        let (current, dir) = self.current(range.start())?;
        if flags.has(PageFlags::PARENT) {
            current.find_in_parent(dir, range)?;
        }
        current.append(range, flags)
    }

    /// Appends the pages of `range` as CRIU 4.3 compresses them: `sizes` says how many bytes each is
    /// stored in, 0 for a zero page, a page's size for a raw one. Returns where these bytes go, one
    /// page behind the other.
    ///
    /// # Errors
    ///
    /// As for [`SessionImages::append`]; [`Kind::Unsupported`] if the sender is a CRIU that could not
    /// read such images.
    pub fn append_blocks(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        sizes: Vec<u32>,
    ) -> Result<Destination> {
        let (current, _) = self.current(range.start())?;
        current.append_blocks(range, flags, sizes)
    }

    /// Whether the page at `vaddr` has just these `bytes` in the parent directory.
    pub fn equals_parent(&mut self, vaddr: Vaddr, bytes: &[u8]) -> Result<bool> {
        let (current, dir) = self.current(vaddr)?;
        match current.parent(dir)? {
            Some(parent) => parent.equals(vaddr, bytes),
            None => Ok(false),
        }
    }

    /// Gives every image its name. All bytes must have been written.
    ///
    /// # Errors
    ///
    /// Something cannot be synced or renamed. Then none of the session's images is left.
    pub fn commit(mut self) -> Result<CommittedImages> {
        self.finish_current()?;
        if self.store.sync() != Sync::None {
            self.sync_parts()?;
        }
        let superseded = self.superseded()?;
        let mut renamed = Vec::new();
        if let Err(error) = self.rename(&mut renamed) {
            for path in renamed {
                // The first error is the one to tell; what is left keeps an unknown name.
                let _ = remove(&path);
            }
            return Err(error);
        }
        self.committed = true;
        for path in superseded {
            remove(&path)?;
        }
        if self.store.sync() != Sync::None {
            self.store.sync_names()?;
        }
        Ok(CommittedImages {
            store: Arc::clone(&self.store),
            targets: self.finished.iter().map(|done| done.target).collect(),
        })
    }

    fn finish_current(&mut self) -> Result<()> {
        if let Some(current) = self.current.take() {
            // On failure, too, its parts are to be removed in the end.
            self.finished.push(Finished {
                target: current.target,
                pages_id: current.pages_id,
            });
            current.finish()?;
        }
        Ok(())
    }

    fn names(&self) -> impl Iterator<Item = String> + '_ {
        // Pages first: a pagemap must never be there before what it points to.
        let pages = self.finished.iter().map(|done| pages_name(done.pages_id));
        let pagemaps = self.finished.iter().map(|done| done.target.pagemap_name());
        pages.chain(pagemaps)
    }

    fn sync_parts(&self) -> Result<()> {
        for name in self.names() {
            let part = self.store.part(&name);
            let synced = File::open(&part).and_then(|file| file.sync_all());
            synced.map_err(|error| Error::file("sync", &part, error))?;
        }
        Ok(())
    }

    fn rename(&self, renamed: &mut Vec<PathBuf>) -> Result<()> {
        for name in self.names() {
            let part = self.store.part(&name);
            let path = self.store.dir().path().join(name);
            std::fs::rename(&part, &path).map_err(|error| Error::file("rename", &part, error))?;
            renamed.push(path);
        }
        Ok(())
    }

    /// Pages files of earlier sessions that no pagemap will need once this session's are there.
    fn superseded(&self) -> Result<Vec<PathBuf>> {
        let dir = self.store.dir();
        let (mut replaced, mut kept) = (Vec::new(), Vec::new());
        let received = |target: &Target| self.finished.iter().any(|done| done.target == *target);
        let already_there: Vec<Target> = dir.targets()?;
        if !already_there.iter().any(received) {
            return Ok(replaced);
        }
        for target in already_there {
            let pages_id = pages_id_of(dir, target);
            let list = if received(&target) {
                &mut replaced
            } else {
                &mut kept
            };
            list.extend(pages_id.map(|id| dir.pages_path(id)));
        }
        replaced.retain(|path| !kept.contains(path) && path.exists());
        Ok(replaced)
    }
}

impl Drop for SessionImages {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if let Some(current) = self.current.take() {
            self.finished.push(Finished {
                target: current.target,
                pages_id: current.pages_id,
            });
        }
        for name in self.names() {
            let part = self.store.part(&name);
            if let Err(error) = std::fs::remove_file(&part)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("cannot remove {}: {error}", part.display());
            }
        }
    }
}

/// The number of the pages file that a page server wrote for `target`, if its pagemap can be read.
fn pages_id_of(dir: &ImageDir, target: Target) -> Option<u32> {
    let pages_id = Extents::open(dir, target).ok()??.pages_id();
    (pages_id >= PAGES_ID_FIRST).then_some(pages_id)
}

/// The two parts of one target.
#[derive(Debug)]
struct TargetImages {
    target: Target,
    page: PageSize,
    wire: Wire,
    pages_id: u32,
    pages: Arc<PagesPart>,
    /// Bytes of the pages file that are spoken for.
    pages_bytes: u64,
    pagemap_path: PathBuf,
    pagemap: MessageWriter<BufWriter<File>>,
    /// The last run, which the next one may go on.
    run: Option<(PageRange, PageFlags)>,
    /// The target in the parent, once that was looked for.
    parent: Option<Option<Parent>>,
}

impl TargetImages {
    fn create(store: &ImageStore, target: Target, wire: Wire) -> Result<TargetImages> {
        let pagemap_path = store.part(&target.pagemap_name());
        let file = create_new(&pagemap_path, 0).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                let path = pagemap_path.display();
                let text = format!("another session is receiving {target}: {path} is there");
                return Error::new(Kind::Usage, text);
            }
            Error::file("create", &pagemap_path, error)
        })?;
        let begun = store.create_pages().and_then(|(pages_id, pages)| {
            let failed = |error| Error::file("write", &pagemap_path, error);
            let mut pagemap =
                MessageWriter::new(BufWriter::new(file), Magic::Pagemap).map_err(failed)?;
            pagemap.write(&PagemapHead { pages_id }).map_err(failed)?;
            Ok((pages_id, pages, pagemap))
        });
        let (pages_id, pages, pagemap) = begun.inspect_err(|_| {
            // The error that led here is the one to tell.
            let _ = remove(&pagemap_path);
        })?;
        Ok(TargetImages {
            target,
            page: store.dir().page(),
            wire,
            pages_id,
            pages: Arc::new(PagesPart {
                file: pages,
                path: store.part(&pages_name(pages_id)),
            }),
            pages_bytes: 0,
            pagemap_path,
            pagemap,
            run: None,
            parent: None,
        })
    }

    fn append(&mut self, range: PageRange, flags: PageFlags) -> Result<Option<Destination>> {
        match self.run {
            Some((run, run_flags)) if self.goes_on(run, run_flags, range, flags) => {
                let joined = PageRange::new(run.start().get(), range.end().get());
                self.run = Some((joined, flags));
            }
            _ => {
                self.end_run()?;
                self.run = Some((range, flags));
            }
        }
        if !flags.has(PageFlags::PRESENT) {
            return Ok(None);
        }
        self.take(range.bytes()).map(Some)
    }

    fn append_blocks(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        sizes: Vec<u32>,
    ) -> Result<Destination> {
        if self.wire == Wire::V1 {
            let text = "--compress: CRIU up to 4.1.1, which sends this, cannot read such images";
            return Err(Error::new(Kind::Unsupported, text));
        }
        self.end_run()?;
        let raw = |size: &u32| u64::from(*size) == self.page.bytes();
        let mut flags = flags;
        if sizes.first().is_some_and(raw) {
            flags = flags.with(PageFlags::PAYLOAD_ALIGNED);
            self.pages_bytes = self.pages_bytes.next_multiple_of(self.page.bytes());
        }
        let bytes = sizes.iter().map(|size| u64::from(*size)).sum::<u64>();
        let blocks = (!sizes.iter().all(raw)).then_some(CompressedBlocks {
            block_sizes: sizes,
            total_payload_size: Some(bytes),
            pages_per_block: Some(1),
        });
        self.write_entry(range, flags, blocks)?;
        self.take(bytes)
    }

    /// Takes the next `bytes` bytes of the pages file.
    fn take(&mut self, bytes: u64) -> Result<Destination> {
        let offset = self.pages_bytes;
        self.pages_bytes = offset.checked_add(bytes).ok_or_else(|| {
            let text = format!("{}: more pages than a file can hold", self.target);
            Error::new(Kind::Protocol, text)
        })?;
        Ok(Destination {
            part: Arc::clone(&self.pages),
            offset,
        })
    }

    fn write_entry(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        blocks: Option<CompressedBlocks>,
    ) -> Result<()> {
        let entry = encode_entry(range, flags, blocks, self.wire, self.page);
        self.pagemap
            .write(&entry)
            .map_err(|error| Error::file("write", &self.pagemap_path, error))
    }

    fn goes_on(
        &self,
        run: PageRange,
        run_flags: PageFlags,
        range: PageRange,
        flags: PageFlags,
    ) -> bool {
        let pages = run.pages(self.page).get() + range.pages(self.page).get();
        run.end() == range.start() && run_flags == flags && pages <= ENTRY_PAGES_MAX
    }

    /// Writes the last run's entries.
    fn end_run(&mut self) -> Result<()> {
        let Some((run, flags)) = self.run.take() else {
            return Ok(());
        };
        let most = ENTRY_PAGES_MAX << self.page.shift();
        let mut start = run.start().get();
        while start < run.end().get() {
            let end = run.end().get().min(start.saturating_add(most));
            let range = PageRange::new(start, end);
            self.write_entry(range, flags, None)?;
            start = end;
        }
        Ok(())
    }

    /// The target in the parent, opened when it is first asked for.
    fn parent(&mut self, dir: &ImageDir) -> Result<Option<&mut Parent>> {
        if self.parent.is_none() {
            self.parent = Some(Parent::open(dir, self.target)?);
        }
        Ok(self.parent.as_mut().and_then(Option::as_mut))
    }

    fn find_in_parent(&mut self, dir: &ImageDir, range: PageRange) -> Result<()> {
        let target = self.target;
        match self.parent(dir)? {
            Some(parent) => parent.must_have(range),
            None => Err(Error::new(
                Kind::Image,
                format!(
                    "the dump says that pages of {target} at {} are in the parent, but {} has no \
                     parent with its pagemap (give --prev-images-dir)",
                    range.start(),
                    dir.path().display()
                ),
            )),
        }
    }

    /// Writes what is left. The pages file gets its whole length, wherever writes still are.
    fn finish(mut self) -> Result<()> {
        self.end_run()?;
        let failed = |error| Error::file("write", &self.pagemap_path, error);
        let buffered = self.pagemap.into_inner();
        buffered
            .into_inner()
            .map_err(|error| failed(error.into_error()))?;
        let sized = self.pages.file.set_len(self.pages_bytes);
        sized.map_err(|error| self.pages.write_error(error))
    }
}

#[cfg(test)]
mod tests;
