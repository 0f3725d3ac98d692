//! Changes of memory that a process has for itself.

use anyhow::Result;
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};

use super::{Area, Change, HALF, room};
use crate::make::{Expect, HUGE_BYTES, PAGES, PRIVATE, Span, anonymous, fill, page_bytes};

/// MADV_COLLAPSE (Linux 6.1).
const MADV_COLLAPSE: i32 = 25;

/// Prepares one of these changes; `None` if it is another.
pub(super) fn prepare(name: &str, first: u64) -> Result<Option<Change>> {
    let area = || Area::private(first);
    let change = match name {
        "c-zero" => zeroed(area()?),
        "c-first-written" => first_written(first),
        "c-dontneed" | "c-dontneed-read" | "c-dontneed-same" => given_back(name, area()?),
        "c-free" => freed(area()?),
        "c-moved" | "c-moved-new" => moved(area()?, name == "c-moved-new"),
        "c-swapped" => swapped(first),
        "c-unmapped" => unmapped(area()?),
        "c-mapped-anew" => mapped_anew(area()?),
        "c-grown" => grown(first),
        "c-shrunk" => shrunk(area()?),
        "c-prot-none" => hidden(area()?),
        "c-readonly" => read_only(area()?),
        "c-guard" => guarded(area()?),
        "c-guard-removed" => guard_removed(area()?),
        "c-locked" => locked(area()?),
        "c-unlocked" => unlocked(area()?),
        "c-wipe" => advised(area()?, libc::MADV_WIPEONFORK, Expect::Zero),
        "c-dontfork" => advised(area()?, libc::MADV_DONTFORK, Expect::Gone),
        "c-collapsed" => collapsed(first),
        "c-thp-holes" => huge_holes(first),
        "c-huge-given-back" => huge_given_back(first),
        _ => return Ok(None),
    };
    change.map(Some)
}

/// Every second page.
fn zeroed(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        let page = |n: usize| match n % 2 {
            0 => area.write_zeros(n, 1),
            _ => Ok(area.span(n, 1, Expect::Content)),
        };
        (0..area.pages).map(page).collect()
    })
}

/// The page of zeros was mapped; half of them are written.
fn first_written(first: u64) -> Result<Change> {
    let area = Area {
        at: anonymous(PRIVATE, PAGES)?,
        pages: PAGES,
        first,
    };
    for n in 0..PAGES {
        mappings::load(area.address(n));
    }
    let rest = area.span(HALF, HALF, Expect::Zero);
    Change::new(vec![area.span(0, PAGES, Expect::Zero)], move || {
        Ok(vec![area.write_again(0, HALF)?, rest])
    })
}

fn given_back(name: &str, area: Area) -> Result<Change> {
    let (reads, writes) = (name == "c-dontneed-read", name == "c-dontneed-same");
    Change::new(vec![area.whole()], move || {
        let mut spans = vec![area.span(0, HALF, Expect::Content), area.empty(HALF, HALF)?];
        if reads {
            for n in HALF..PAGES {
                mappings::load(area.address(n));
            }
        }
        if writes {
            spans[1] = area.write_again(HALF, HALF / 2)?;
            spans.push(area.span(HALF + HALF / 2, HALF / 2, Expect::Zero));
        }
        Ok(spans)
    })
}

fn freed(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        area.advise(0, PAGES, libc::MADV_FREE)?;
        let rest = area.span(HALF, HALF, Expect::ContentOrZero);
        Ok(vec![area.write_new(0, HALF)?, rest])
    })
}

/// To where nothing was; in its place is nothing, or a new mapping of which half is written.
fn moved(area: Area, replaced: bool) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        let to = room(area.bytes())?;
        mappings::resize(area.at, area.bytes(), area.bytes(), Some(to))?;
        let mut spans = vec![Area { at: to, ..area }.whole()];
        if replaced {
            mappings::map_at(area.at, area.bytes())?;
            spans.push(area.write_new(0, HALF)?);
            spans.push(area.span(HALF, HALF, Expect::Zero));
        }
        Ok(spans)
    })
}

fn swapped(first: u64) -> Result<Change> {
    let (a, b) = (
        Area::private(first)?,
        Area::private(first + 2 * PAGES as u64)?,
    );
    Change::new(vec![a.whole(), b.whole()], move || {
        let (bytes, aside) = (a.bytes(), room(a.bytes())?);
        for (from, to) in [(a.at, aside), (b.at, a.at), (aside, b.at)] {
            mappings::resize(from, bytes, bytes, Some(to))?;
        }
        let (now_b, now_a) = (Area { at: b.at, ..a }, Area { at: a.at, ..b });
        Ok(vec![now_b.whole(), now_a.whole()])
    })
}

fn unmapped(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        mappings::unmap(area.address(HALF / 2), HALF * page_bytes())?;
        Ok(vec![
            area.span(0, HALF / 2, Expect::Content),
            area.span(HALF + HALF / 2, HALF / 2, Expect::Content),
        ])
    })
}

fn mapped_anew(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        mappings::unmap(area.at, area.bytes())?;
        mappings::map_at(area.at, area.bytes())?;
        Ok(vec![area.span(0, PAGES, Expect::Zero)])
    })
}

/// What stands behind it makes room for it.
fn grown(first: u64) -> Result<Change> {
    let area = Area::filled(anonymous(PRIVATE, 3 * PAGES)?, PAGES, first)?;
    Change::new(vec![area.whole()], move || {
        mappings::unmap(area.address(PAGES), 2 * area.bytes())?;
        mappings::resize(area.at, area.bytes(), 2 * area.bytes(), None)?;
        Ok(vec![
            area.whole(),
            area.write_new(PAGES, HALF)?,
            area.span(PAGES + HALF, HALF, Expect::Zero),
        ])
    })
}

fn shrunk(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        let half = area.bytes() / 2;
        mappings::resize(area.at, area.bytes(), half, None)?;
        mappings::resize(area.at, half, area.bytes(), None)?;
        let behind = area.span(HALF, HALF, Expect::Zero);
        Ok(vec![area.span(0, HALF, Expect::Content), behind])
    })
}

/// The other process has it as it was, and is not asked: CRIU restores it there without PROT_READ, which loads do not
/// notice and process_vm_readv does.
fn hidden(area: Area) -> Result<Change> {
    let change = Change::new(vec![area.whole()], move || {
        let span = area.write_new(0, PAGES)?;
        mappings::protect(area.at, area.bytes(), libc::PROT_NONE)?;
        let hidden = Span::new(span.address, span.pages, span.first, Expect::Hidden);
        Ok(vec![hidden])
    })?;
    Ok(Change {
        for_others: Some(Vec::new()),
        ..change
    })
}

/// Which makes a mapping of each page.
fn read_only(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        let page = |n: usize| {
            if n.is_multiple_of(2) {
                return Ok(area.span(n, 1, Expect::Content));
            }
            let span = area.write_new(n, 1)?;
            mappings::protect(area.address(n), page_bytes(), libc::PROT_READ)?;
            Ok(span)
        };
        (0..PAGES).map(page).collect()
    })
}

fn guarded(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        area.advise(HALF, HALF / 2, MADV_GUARD_INSTALL)?;
        let last = HALF + HALF / 2;
        Ok(vec![
            area.span(0, HALF, Expect::Content),
            area.span(HALF, HALF / 2, Expect::Guard),
            area.span(last, PAGES - last, Expect::Content),
        ])
    })
}

fn guard_removed(area: Area) -> Result<Change> {
    area.advise(HALF, HALF, MADV_GUARD_INSTALL)?;
    let before = [Expect::Content, Expect::Guard];
    let before = [0, HALF].into_iter().zip(before);
    let before = before.map(|(from, expect)| area.span(from, HALF, expect));
    Change::new(before.collect(), move || {
        area.advise(HALF, HALF, MADV_GUARD_REMOVE)?;
        let last = HALF + HALF / 2;
        Ok(vec![
            area.span(0, HALF, Expect::Content),
            area.write_new(HALF, HALF / 2)?,
            area.span(last, PAGES - last, Expect::Zero),
        ])
    })
}

/// A part of it is written.
fn locked(area: Area) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        mappings::lock(area.at, area.bytes(), false)?;
        let span = area.write_new(0, HALF / 2)?;
        let rest = area.span(HALF / 2, PAGES - HALF / 2, Expect::Content);
        Ok(vec![span, rest])
    })
}

fn unlocked(area: Area) -> Result<Change> {
    mappings::lock(area.at, area.bytes(), false)?;
    Change::new(vec![area.whole()], move || {
        mappings::unlock(area.at, area.bytes())?;
        let kept = area.span(0, HALF, Expect::Content);
        Ok(vec![kept, area.empty(HALF, HALF)?])
    })
}

fn advised(area: Area, advice: i32, in_child: Expect) -> Result<Change> {
    Change::new(vec![area.whole()], move || {
        area.advise(0, PAGES, advice)?;
        Ok(vec![area.whole().in_child(in_child)])
    })
}

/// Two huge pages' worth, at their boundary.
fn room_for_huge_pages(first: u64) -> Result<Area> {
    let at = room(3 * HUGE_BYTES)?.next_multiple_of(HUGE_BYTES);
    mappings::map_at(at, 2 * HUGE_BYTES)?;
    let pages = 2 * HUGE_BYTES / page_bytes();
    Ok(Area { at, pages, first })
}

/// Small pages before, in the first half of them.
fn collapsed(first: u64) -> Result<Change> {
    let area = room_for_huge_pages(first)?;
    area.advise(0, area.pages, libc::MADV_NOHUGEPAGE)?;
    let half = area.pages / 2;
    let spans = vec![
        area.write_again(0, half - 1)?,
        area.span(half - 1, half + 1, Expect::Zero),
    ];
    Change::new(spans.clone(), move || {
        area.advise(0, area.pages, libc::MADV_HUGEPAGE)?;
        // Without a huge page to be had (EAGAIN) the contents are the same.
        let _ = area.advise(0, half, MADV_COLLAPSE);
        Ok(spans)
    })
}

/// Every eighth page, and a written one beside each.
fn huge_holes(first: u64) -> Result<Change> {
    let area = room_for_huge_pages(first)?;
    area.advise(0, area.pages, libc::MADV_HUGEPAGE)?;
    area.write_again(0, area.pages)?;
    Change::new(vec![area.whole()], move || {
        let mut spans = Vec::new();
        for n in (0..area.pages).step_by(8) {
            spans.push(area.empty(n, 1)?);
            spans.push(area.write_new(n + 1, 1)?);
            spans.push(area.span(n + 2, 6, Expect::Content));
        }
        Ok(spans)
    })
}

/// Of three the first, and the second is all zeros.
fn huge_given_back(first: u64) -> Result<Change> {
    let each = HUGE_BYTES / page_bytes();
    let at = mappings::map(3 * HUGE_BYTES, true, PRIVATE | libc::MAP_HUGETLB, None)?;
    fill(at, 3 * each, first)?;
    let area = Area {
        at,
        pages: 3 * each,
        first,
    };
    Change::new(vec![area.whole()], move || {
        Ok(vec![
            area.empty(0, each)?,
            area.write_zeros(each, each)?,
            area.span(2 * each, each, Expect::Content),
        ])
    })
}
