//! The two images of one target while they are received: its pagemap and its pages file.
//!
//! ```text
//! append(range, flags)  ->  run so far, or a new one   ->  entries of .pagemap-N.img.part
//!                       ->  the next bytes of .pages-N.img.part, for the caller to fill
//! finish                ->  both have their whole length
//! ```
//!
//! Invariants: an entry is written when the next range does not go on with it, so that it is as long as
//! CRIU's would be; places in the pages file are given out once and in order.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::sync::Arc;

use super::super::dir::ImageDir;
use super::super::file::{Magic, MessageWriter};
use super::super::pagemap::encode_entry;
use super::super::pages_part::{Destination, PagesPart};
use super::super::parents::Parent;
use super::super::proto::{CompressedBlocks, PagemapHead};
use super::super::store::{ImageStore, create_new, pages_name, remove};
use crate::criu::header::{PageFlags, Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::limits::ENTRY_PAGES_MAX;
use crate::units::{PageRange, PageSize};

/// The two parts of one target.
#[derive(Debug)]
pub(super) struct TargetImages {
    pub(super) target: Target,
    page: PageSize,
    pub(super) wire: Wire,
    pub(super) pages_id: u32,
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
    pub(super) fn create(store: &ImageStore, target: Target, wire: Wire) -> Result<TargetImages> {
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
            pages: Arc::new(PagesPart::new(pages, store.part(&pages_name(pages_id)))),
            pages_bytes: 0,
            pagemap_path,
            pagemap,
            run: None,
            parent: None,
        })
    }

    pub(super) fn append(
        &mut self,
        range: PageRange,
        flags: PageFlags,
    ) -> Result<Option<Destination>> {
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

    pub(super) fn append_blocks(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        sizes: Vec<u32>,
    ) -> Result<Destination> {
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
    pub(super) fn parent(&mut self, dir: &ImageDir) -> Result<Option<&mut Parent>> {
        if self.parent.is_none() {
            self.parent = Some(Parent::open(dir, self.target)?);
        }
        Ok(self.parent.as_mut().and_then(Option::as_mut))
    }

    pub(super) fn find_in_parent(&mut self, dir: &ImageDir, range: PageRange) -> Result<()> {
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
    pub(super) fn finish(mut self) -> Result<()> {
        self.end_run()?;
        let failed = |error| Error::file("write", &self.pagemap_path, error);
        let buffered = self.pagemap.into_inner();
        buffered
            .into_inner()
            .map_err(|error| failed(error.into_error()))?;
        let sized = self.pages.file().set_len(self.pages_bytes);
        sized.map_err(|error| self.pages.write_error(error))
    }
}
