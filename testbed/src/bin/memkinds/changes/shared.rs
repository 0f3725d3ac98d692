//! Changes of memory that processes share, and of files.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::sys::mappings;

use super::{Area, Change, HALF, NEW};
use crate::make::{Expect, PAGES, PRIVATE, SHARED, Span, anonymous, content, page_bytes};

/// Prepares one of these changes; `None` if it is another. `file` is the path of one.
pub(super) fn prepare(name: &str, first: u64, file: &Path) -> Result<Option<Change>> {
    let change = match name.strip_prefix("c-").unwrap_or_default() {
        "shared-written" => written(first),
        "shared-zero" => zeroed(first),
        "shared-removed" => removed(first),
        "shared-replaced" => replaced(first),
        "memfd-punched" => punched(first),
        "memfd-cut" => cut(first, false),
        "memfd-regrown" => cut(first, true),
        "memfd-grown" => grown(first),
        "memfd-by-call" => by_call(first),
        "file-dontneed" => file_given_back(first, file),
        "file-cut" => file_cut(first, file, false),
        "file-regrown" => file_cut(first, file, true),
        "file-rewritten" => rewritten(first, file),
        _ => return Ok(None),
    };
    change.map(Some)
}

fn anonymous_shared(first: u64) -> Result<Area> {
    Area::filled(anonymous(SHARED, PAGES)?, PAGES, first)
}

/// A mapped memfd, filled.
fn memfd(first: u64) -> Result<(File, Area)> {
    let memfd = File::from(memfd_create(c"changes", MFdFlags::empty())?);
    memfd.set_len((PAGES * page_bytes()) as u64)?;
    let at = mappings::map(PAGES * page_bytes(), true, SHARED, Some(memfd.as_fd()))?;
    Ok((memfd, Area::filled(at, PAGES, first)?))
}

fn half_kept(area: Area, rest: Expect) -> Vec<Span> {
    vec![
        area.span(0, HALF, Expect::Content),
        area.span(HALF, HALF, rest),
    ]
}

fn written(first: u64) -> Result<Change> {
    let area = anonymous_shared(first)?;
    let after = vec![
        area.new_span(0, HALF),
        area.span(HALF, HALF, Expect::Content),
    ];
    Change::shared(vec![area.whole()], after, move || {
        area.write_new(0, HALF).map(drop)
    })
}

fn zeroed(first: u64) -> Result<Change> {
    let area = anonymous_shared(first)?;
    let after = half_kept(area, Expect::Zero);
    Change::shared(vec![area.whole()], after, move || {
        area.write_zeros(HALF, HALF).map(drop)
    })
}

fn removed(first: u64) -> Result<Change> {
    let area = anonymous_shared(first)?;
    let after = half_kept(area, Expect::Zero);
    Change::shared(vec![area.whole()], after, move || {
        area.advise(HALF, HALF, libc::MADV_REMOVE)
    })
}

/// The other process has what was there.
fn replaced(first: u64) -> Result<Change> {
    let area = anonymous_shared(first)?;
    Change::new(vec![area.whole()], move || {
        mappings::unmap(area.at, area.bytes())?;
        mappings::map_kind_at(area.at, area.bytes(), SHARED, None)?;
        let again = area.write_again(0, HALF / 2)?;
        let new = area.write_new(HALF / 2, HALF / 2)?;
        Ok(vec![again, new, area.span(HALF, HALF, Expect::Zero)])
    })
}

fn punched(first: u64) -> Result<Change> {
    let (memfd, area) = memfd(first)?;
    let after = half_kept(area, Expect::Zero);
    Change::shared(vec![area.whole()], after, move || {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let half = i64::try_from(HALF * page_bytes())?;
        Ok(fallocate(&memfd, flags, half, half)?)
    })
}

fn cut(first: u64, grows_again: bool) -> Result<Change> {
    let (memfd, area) = memfd(first)?;
    let after = match grows_again {
        true => half_kept(area, Expect::Zero),
        false => half_kept(area, Expect::Gone),
    };
    Change::shared(vec![area.whole()], after, move || {
        memfd.set_len((HALF * page_bytes()) as u64)?;
        if grows_again {
            memfd.set_len(area.bytes() as u64)?;
        }
        Ok(())
    })
}

/// The one that changes it has a mapping of all; the other sees what it saw.
fn grown(first: u64) -> Result<Change> {
    let (memfd, area) = memfd(first)?;
    Change::new(vec![area.whole()], move || {
        memfd.set_len(2 * area.bytes() as u64)?;
        let at = mappings::map(2 * area.bytes(), true, SHARED, Some(memfd.as_fd()))?;
        let larger = Area { at, ..area };
        larger.write_new(PAGES, HALF)?;
        Ok(vec![
            area.whole(),
            larger.whole(),
            larger.new_span(PAGES, HALF),
            larger.span(PAGES + HALF, HALF, Expect::Zero),
        ])
    })
}

fn by_call(first: u64) -> Result<Change> {
    let (memfd, area) = memfd(first)?;
    let after = vec![
        area.span(0, HALF, Expect::Content),
        area.new_span(HALF, HALF),
    ];
    Change::shared(vec![area.whole()], after, move || {
        write_new(&memfd, area, HALF, HALF)
    })
}

/// As [`Area::write_new`], into the file.
fn write_new(file: &File, area: Area, from: usize, pages: usize) -> Result<()> {
    let numbers = (from..from + pages).map(|n| area.new_span(n, 1).first);
    let bytes: Vec<u8> = numbers.flat_map(content).collect();
    Ok(file.write_all_at(&bytes, (from * page_bytes()) as u64)?)
}

/// A private mapping of a file whose contents are the area's; every second page of it is written, with contents that are
/// twice [`NEW`] behind.
struct PrivateFile {
    file: File,
    area: Area,
}

impl PrivateFile {
    fn new(first: u64, path: &Path) -> Result<PrivateFile> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let bytes: Vec<u8> = (0..PAGES as u64).flat_map(|n| content(first + n)).collect();
        file.write_all_at(&bytes, 0)?;
        let at = mappings::map(PAGES * page_bytes(), true, PRIVATE, Some(file.as_fd()))?;
        let area = Area {
            at,
            pages: PAGES,
            first,
        };
        let own = PrivateFile { file, area };
        for n in (0..PAGES).step_by(2) {
            own.written().write_new(n, 1)?;
        }
        Ok(own)
    }

    /// The same pages as those that were written.
    fn written(&self) -> Area {
        Area {
            first: self.area.first + NEW,
            ..self.area
        }
    }

    fn page(&self, n: usize) -> Span {
        match n % 2 {
            0 => self.written().new_span(n, 1),
            _ => self.area.span(n, 1, Expect::Content),
        }
    }

    fn pages(&self, from: usize, count: usize) -> Vec<Span> {
        (from..from + count).map(|n| self.page(n)).collect()
    }
}

fn file_given_back(first: u64, path: &Path) -> Result<Change> {
    let own = PrivateFile::new(first, path)?;
    Change::new(own.pages(0, PAGES), move || {
        own.area.empty(HALF, HALF)?;
        let mut spans = own.pages(0, HALF);
        spans.push(own.area.span(HALF, HALF, Expect::Content));
        Ok(spans)
    })
}

/// Its own copies of what is cut off are gone too, in all processes.
fn file_cut(first: u64, path: &Path, grows_again: bool) -> Result<Change> {
    let own = PrivateFile::new(first, path)?;
    let mut after = own.pages(0, HALF);
    let rest = if grows_again {
        Expect::Zero
    } else {
        Expect::Gone
    };
    after.push(own.area.span(HALF, HALF, rest));
    Change::shared(own.pages(0, PAGES), after, move || {
        own.file.set_len((HALF * page_bytes()) as u64)?;
        if grows_again {
            own.file.set_len(own.area.bytes() as u64)?;
        }
        Ok(())
    })
}

/// Processes see it where they have not written.
fn rewritten(first: u64, path: &Path) -> Result<Change> {
    let own = PrivateFile::new(first, path)?;
    let mut after = own.pages(0, HALF);
    for n in HALF..PAGES {
        after.push(match n % 2 {
            0 => own.page(n),
            _ => own.area.new_span(n, 1),
        });
    }
    Change::shared(own.pages(0, PAGES), after, move || {
        write_new(&own.file, own.area, HALF, HALF)
    })
}
