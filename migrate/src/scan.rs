//! Pagemaps as they stand in one directory, entry by entry, whatever is wrong with them.

use std::path::PathBuf;

use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::error::{Error, Kind, Result};
use pageferry::image::dir::ImageDir;
use pageferry::image::pagemap::{Extent, PagemapDecoder, Payload};
use pageferry::image::proto::{PagemapEntry, PagemapHead};

/// What one pagemap file says.
#[derive(Debug)]
pub(crate) struct Pagemap {
    pub(crate) target: Target,
    pub(crate) path: PathBuf,
    /// The number of its pages file; `None` if not even the head can be read.
    pub(crate) pages_id: Option<u32>,
    /// Whose page counts the entries have; `None` if there is no entry.
    pub(crate) layout: Option<Wire>,
    /// Entries that could be read.
    pub(crate) entries: u64,
    /// How many of them cover no page.
    pub(crate) empty_entries: u64,
    pub(crate) pages: Pages,
    /// Bytes of the pages file up to the end of the last page.
    pub(crate) stored_bytes: u64,
    /// What cannot be read, if that is so. Entries behind it are not counted.
    pub(crate) damage: Option<Error>,
}

/// Pages of a pagemap by what its entries say of them.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Pages {
    pub(crate) total: u64,
    /// In the pages file.
    pub(crate) here: u64,
    /// Of those in the pages file: in an entry that may be compressed.
    pub(crate) compressed: u64,
    /// Holes to the parent.
    pub(crate) in_parent: u64,
    /// Dumped lazily: they stayed with the source.
    pub(crate) with_source: u64,
    /// Those that a lazy restore can do without, wherever they are.
    pub(crate) lazy: u64,
}

/// Reads the pagemap of `target` in `dir` and hands each entry to `each`; `None` if there is no such file.
pub(crate) fn scan(
    dir: &ImageDir,
    target: Target,
    each: &mut dyn FnMut(&PagemapEntry, &Extent),
) -> Option<Pagemap> {
    let path = dir.path().join(target.pagemap_name());
    let mut pagemap = Pagemap {
        target,
        path,
        pages_id: None,
        layout: None,
        entries: 0,
        empty_entries: 0,
        pages: Pages::default(),
        stored_bytes: 0,
        damage: None,
    };
    let read = match dir.pagemap(target) {
        Ok(None) => return None,
        Ok(Some((_, mut reader))) => pagemap.read(dir, &mut reader, each),
        Err(error) => Err(error),
    };
    pagemap.damage = read.err();
    Some(pagemap)
}

impl Pagemap {
    fn read(
        &mut self,
        dir: &ImageDir,
        reader: &mut pageferry::image::dir::ImageReader,
        each: &mut dyn FnMut(&PagemapEntry, &Extent),
    ) -> Result<()> {
        let path = self.path.clone();
        let damaged = |error: Box<dyn std::error::Error + Send + Sync>| {
            let text = format!("{} is damaged", path.display());
            Error::wrap(Kind::Image, text, error)
        };
        let head: Option<PagemapHead> = reader.read().map_err(|error| damaged(error.into()))?;
        let Some(head) = head else {
            return Err(damaged("it has no head".into()));
        };
        self.pages_id = Some(head.pages_id);
        let mut decoder = PagemapDecoder::new(dir.page());
        while let Some(entry) = reader
            .read::<PagemapEntry>()
            .map_err(|error| damaged(error.into()))?
        {
            self.entries += 1;
            self.layout.get_or_insert(entry.wire());
            if entry.pages() == 0 {
                self.empty_entries += 1;
                continue;
            }
            let extent = decoder.decode(&entry);
            let extent = extent.map_err(|error| damaged(error.into()))?;
            self.count(dir, &extent);
            each(&entry, &extent);
        }
        Ok(())
    }

    fn count(&mut self, dir: &ImageDir, extent: &Extent) {
        let pages = extent.range.pages(dir.page()).get();
        let flags = extent.flags;
        self.pages.total += pages;
        if flags.has(PageFlags::LAZY) {
            self.pages.lazy += pages;
        }
        match &extent.payload {
            Payload::None if flags.has(PageFlags::PARENT) => self.pages.in_parent += pages,
            Payload::None => self.pages.with_source += pages,
            Payload::Raw { offset } => {
                self.pages.here += pages;
                self.stored_bytes = offset + extent.range.bytes();
            }
            Payload::Blocks { offset, ends } => {
                self.pages.here += pages;
                self.pages.compressed += pages;
                self.stored_bytes = offset + ends.last().copied().unwrap_or(0);
            }
        }
    }
}
