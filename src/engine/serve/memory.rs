//! Memory of one process that can be served page by page, wherever it lies.

use std::fmt::Debug;
use std::fs::File;
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::image::chain::{Chain, Place, Resolved};
use crate::limits::ANSWER_EXTENTS_MAX;
use crate::units::{PageCount, PageRange};

/// See the module's text.
pub(in crate::engine) trait Memory: Debug + Send + Sync {
    /// Appends to `runs`, which is empty, where the pages `wanted` are, up to the first that is not to
    /// be had, and returns how many they are. Fails if that is the very first.
    fn find_runs(&self, wanted: PageRange, runs: &mut Vec<Resolved>) -> Result<PageCount>;

    /// Reads the whole pages from `place` on, all of one run, into `out`.
    fn read(&self, place: Place, out: &mut [u8]) -> Result<()>;

    /// The file with this number, and its name for messages.
    fn file(&self, file: u32) -> (&File, &Path);
}

impl Memory for Chain {
    fn find_runs(&self, wanted: PageRange, runs: &mut Vec<Resolved>) -> Result<PageCount> {
        let mut at = wanted.start();
        for extent in self.extents_from(at).take(ANSWER_EXTENTS_MAX) {
            let Some(range) = extent.range.intersect(wanted) else {
                break;
            };
            let absent = matches!(extent.place, Place::Absent { .. });
            if absent && runs.is_empty() && range.start() == at {
                return Err(self.absence(&Resolved { range, ..extent }));
            }
            if absent || range.start() != at {
                break;
            }
            runs.push(Resolved { range, ..extent });
            at = range.end();
        }
        if runs.is_empty() {
            let (dir, target) = (self.dir().display(), self.target());
            let text = format!("no image in {dir} or its parents has {target}'s page at {at}");
            return Err(Error::new(Kind::Image, text));
        }
        let pages = (at.get() - wanted.start().get()) >> self.page().shift();
        Ok(PageCount(pages))
    }

    fn read(&self, place: Place, out: &mut [u8]) -> Result<()> {
        Chain::read(self, place, out)
    }

    fn file(&self, file: u32) -> (&File, &Path) {
        let file = Chain::file(self, file);
        (file.file(), file.path())
    }
}
