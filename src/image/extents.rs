//! The extents of one pagemap file, read one after the other.

use std::path::PathBuf;

use super::dir::{ImageDir, ImageReader, unreadable};
use super::pagemap::{Extent, PagemapDecoder};
use super::proto::{PagemapEntry, PagemapHead};
use crate::criu::header::Target;
use crate::error::{Error, Kind, Result};

/// A pagemap file behind its head.
pub(super) struct Extents {
    path: PathBuf,
    reader: ImageReader,
    decoder: PagemapDecoder,
    pages_id: u32,
}

impl Extents {
    /// Opens the pagemap of `target` in `dir`; `None` if it has none.
    pub(super) fn open(dir: &ImageDir, target: Target) -> Result<Option<Extents>> {
        let Some((path, mut reader)) = dir.pagemap(target)? else {
            return Ok(None);
        };
        let head: Option<PagemapHead> = reader.read().map_err(|error| unreadable(&path, error))?;
        Ok(Some(Extents {
            path,
            reader,
            decoder: PagemapDecoder::new(dir.page()),
            pages_id: head.map_or(0, |head| head.pages_id),
        }))
    }

    /// The number of the pages file.
    pub(super) fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The next extent, `None` behind the last. Entries without a page are skipped, as by CRIU.
    pub(super) fn next(&mut self) -> Result<Option<Extent>> {
        let entry = loop {
            let entry: Option<PagemapEntry> = self
                .reader
                .read()
                .map_err(|error| unreadable(&self.path, error))?;
            if entry.as_ref().is_none_or(|entry| entry.pages() > 0) {
                break entry;
            }
        };
        let extent = entry.map(|entry| self.decoder.decode(&entry)).transpose();
        extent.map_err(|error| {
            let text = format!("{} is damaged", self.path.display());
            Error::wrap(Kind::Image, text, error)
        })
    }
}
