//! Where a session's pages were written, for targets that are opened later: a page that processes of a tree have in
//! common comes once, and is then named.
//!
//! Memory is one small record for each run that lies in one piece in its file. Files are opened again to be read, a few
//! at a time, so that a session of many processes does not hold them all open.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::criu::header::Target;
use crate::error::{Error, Result};
use crate::image::writer::Destination;
use crate::units::{PageRange, PageSize, Vaddr};

/// Files that are open at a time.
const OPEN_FILES_MAX: usize = 4;

/// Pages that lie one behind the other in a file.
#[derive(Clone, Copy, Debug)]
struct Extent {
    end: u64,
    /// Which of the target's files.
    file: usize,
    /// Offset of the first page in it, bytes.
    offset: u64,
}

#[derive(Debug)]
struct TargetPages {
    target: Target,
    files: Vec<PathBuf>,
    /// By the address of the first page.
    extents: BTreeMap<u64, Extent>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct SessionPages {
    page: PageSize,
    /// In the order in which they were opened.
    targets: Vec<TargetPages>,
    reading: Vec<(PathBuf, File)>,
}

impl SessionPages {
    /// A session without targets.
    pub(super) fn new(page: PageSize) -> SessionPages {
        SessionPages {
            page,
            targets: Vec::new(),
            reading: Vec::new(),
        }
    }

    /// The next pages are those of `target`.
    pub(super) fn open(&mut self, target: Target) {
        self.targets.push(TargetPages {
            target,
            files: Vec::new(),
            extents: BTreeMap::new(),
        });
    }

    /// The open target's pages `range` are written to `to`.
    pub(super) fn wrote(&mut self, range: PageRange, to: &Destination) {
        let Some(target) = self.targets.last_mut() else {
            return;
        };
        let path = to.part.path();
        let file = match target.files.iter().position(|file| file == path) {
            Some(file) => file,
            None => {
                target.files.push(path.to_owned());
                target.files.len() - 1
            }
        };
        let (start, end) = (range.start().get(), range.end().get());
        if let Some(mut last) = target.extents.last_entry() {
            let (from, last) = (*last.key(), last.get_mut());
            let goes_on = last.file == file && last.offset + (last.end - from) == to.offset;
            if last.end == start && goes_on {
                last.end = end;
                return;
            }
        }
        let offset = to.offset;
        target.extents.insert(start, Extent { end, file, offset });
    }

    /// The target with this number, in the order in which they were opened.
    pub(super) fn target(&self, number: u16) -> Option<Target> {
        let pages = self.targets.get(usize::from(number))?;
        Some(pages.target)
    }

    /// Reads the page at `vaddr` of the target with this number. Returns whether it was written.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub(super) fn read(&mut self, number: u16, vaddr: Vaddr, out: &mut [u8]) -> Result<bool> {
        let Some(pages) = self.targets.get(usize::from(number)) else {
            return Ok(false);
        };
        let Some((start, extent)) = pages.extents.range(..=vaddr.get()).next_back() else {
            return Ok(false);
        };
        if vaddr.get() + self.page.bytes() > extent.end {
            return Ok(false);
        }
        let offset = extent.offset + (vaddr.get() - start);
        let path = &pages.files[extent.file];
        let failed = |error| Error::file("read", path, error);
        let file = opened(&mut self.reading, path).map_err(failed)?;
        file.read_exact_at(out, offset).map_err(failed)?;
        Ok(true)
    }
}

/// The file at `path`, open.
fn opened<'a>(reading: &'a mut Vec<(PathBuf, File)>, path: &Path) -> std::io::Result<&'a File> {
    let place = match reading.iter().position(|(open, _)| open == path) {
        Some(place) => place,
        None => {
            let file = File::open(path)?;
            if reading.len() == OPEN_FILES_MAX {
                reading.remove(0);
            }
            reading.push((path.to_owned(), file));
            reading.len() - 1
        }
    };
    Ok(&reading[place].1)
}
