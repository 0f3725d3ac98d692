//! Mappings in whose place one of another kind comes, with the same contents.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::Result;
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::sys::mappings;

use super::{Area, Change, room};
use crate::make::{Expect, HUGE_BYTES, PAGES, PRIVATE, SHARED, Span, content, page_bytes};

/// A kind of mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Private,
    Shared,
    File,
    Memfd,
    MemfdPrivate,
    HugePages,
    ZeroDevice,
    Stack,
}

fn kind(name: &str) -> Option<Kind> {
    Some(match name {
        "shared" => Kind::Shared,
        "file" => Kind::File,
        "memfd" => Kind::Memfd,
        "memfd-private" => Kind::MemfdPrivate,
        "hugetlb" => Kind::HugePages,
        "dev-zero" => Kind::ZeroDevice,
        "growsdown" => Kind::Stack,
        _ => return None,
    })
}

/// Prepares one of these changes; `None` if it is another. `file` is the path of one.
pub(super) fn prepare(name: &str, first: u64, file: &Path) -> Result<Option<Change>> {
    let named = |prefix| name.strip_prefix(prefix).and_then(kind);
    let (from, to) = match (named("c-from-"), named("c-to-")) {
        (Some(from), _) => (from, Kind::Private),
        (_, Some(to)) => (Kind::Private, to),
        _ => return Ok(None),
    };
    let has_huge_pages = [from, to].contains(&Kind::HugePages);
    let bytes = if has_huge_pages {
        HUGE_BYTES
    } else {
        PAGES * page_bytes()
    };
    let at = room(2 * HUGE_BYTES + bytes)?.next_multiple_of(HUGE_BYTES);
    let area = Area {
        at,
        pages: bytes / page_bytes(),
        first,
    };
    let before = map(from, area, file)?;
    let file = file.with_extension("second");
    Change::new(before, move || {
        mappings::unmap(area.at, area.bytes())?;
        map(to, area, &file)
    })
    .map(Some)
}

/// Maps a kind, and tells what it holds: the contents of the area, where the kind can have others those of the file in
/// every second page.
fn map(kind: Kind, area: Area, path: &Path) -> Result<Vec<Span>> {
    let place = |flags, file| mappings::map_kind_at(area.at, area.bytes(), flags, file);
    match kind {
        Kind::Private => place(PRIVATE, None)?,
        Kind::Shared => place(SHARED, None)?,
        Kind::HugePages => place(PRIVATE | libc::MAP_HUGETLB, None)?,
        Kind::Stack => place(PRIVATE | libc::MAP_GROWSDOWN, None)?,
        Kind::ZeroDevice => {
            let zero = File::options().read(true).write(true).open("/dev/zero")?;
            place(PRIVATE, Some(zero.as_fd()))?
        }
        Kind::Memfd => place(SHARED, Some(memfd(area)?.as_fd()))?,
        Kind::MemfdPrivate => {
            place(PRIVATE, Some(memfd(area)?.as_fd()))?;
            return every_second(area);
        }
        Kind::File => {
            fs::write(path, of_file(area))?;
            let file = File::options().read(true).write(true).open(path)?;
            place(PRIVATE, Some(file.as_fd()))?;
            return every_second(area);
        }
    };
    Ok(vec![area.write_again(0, area.pages)?])
}

/// What the file holds: other contents than the area.
fn of_file(area: Area) -> Vec<u8> {
    let numbers = (0..area.pages).map(|n| area.new_span(n, 1).first);
    numbers.flat_map(content).collect()
}

fn memfd(area: Area) -> Result<OwnedFd> {
    let memfd = memfd_create(c"changed", MFdFlags::empty())?;
    let written = nix::unistd::write(&memfd, &of_file(area))?;
    anyhow::ensure!(written == area.bytes(), "a memfd was written in part");
    Ok(memfd)
}

fn every_second(area: Area) -> Result<Vec<Span>> {
    let page = |n: usize| match n % 2 {
        0 => area.write_again(n, 1),
        _ => {
            let span = area.new_span(n, 1);
            Ok(Span::new(span.address, 1, span.first, Expect::Content))
        }
    };
    (0..area.pages).map(page).collect()
}
