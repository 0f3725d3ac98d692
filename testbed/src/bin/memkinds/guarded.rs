//! Memory with guard regions (MADV_GUARD_INSTALL).

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Result;
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL};

use crate::make::{
    Expect, HUGE_BYTES, Made, PAGES, PRIVATE, SHARED, Span, anonymous, fill, first_of, of, of_file,
    page_bytes,
};
use crate::more;
use crate::partner;

/// Makes one of these kinds, or any other.
pub(crate) fn make_any(kind: &str, dir: &Path) -> Result<Made> {
    let first = first_of(kind);
    match kind {
        "guard-edges" => guards_at_edges(first),
        "guard-many" => many_guards(first),
        "guard-thp" => guards_in_huge_pages(first),
        "guard-locked" => {
            let made = guarded(anonymous(PRIVATE, PAGES)?, PAGES, first, &[(8, 4)])?;
            mappings::lock(made.spans[0].address, PAGES * page_bytes(), true)?;
            Ok(made)
        }
        "guard-wipe" => {
            let at = anonymous(PRIVATE, PAGES)?;
            mappings::advise(at, PAGES * page_bytes(), libc::MADV_WIPEONFORK)?;
            Ok(guarded(at, PAGES, first, &[(8, 4)])?.in_child(Expect::Zero))
        }
        "guard-readonly" => {
            let made = guarded(anonymous(PRIVATE, PAGES)?, PAGES, first, &[(0, 1), (8, 4)])?;
            mappings::protect(made.spans[0].address, PAGES * page_bytes(), libc::PROT_READ)?;
            Ok(made)
        }
        "guard-shared" => guarded(anonymous(SHARED, PAGES)?, PAGES, first, &[(8, 4)]),
        "guard-file" => guards_in_a_file(dir, first),
        "child-guard" => guards_of_one(kind, dir, first, false),
        "parent-guard" => guards_of_one(kind, dir, first, true),
        other => more::make_any(other, dir),
    }
}

/// Fills `pages` pages, and installs guards over some: the first page and how many.
fn guarded(at: usize, pages: usize, first: u64, guards: &[(usize, usize)]) -> Result<Made> {
    fill(at, pages, first)?;
    let mut made = Made::default();
    let mut next = 0;
    let add = |made: &mut Made, from: usize, to: usize, expect| {
        if from < to {
            let address = at + from * page_bytes();
            made.add(address, to - from, first + from as u64, expect);
        }
    };
    for &(from, count) in guards {
        mappings::advise(
            at + from * page_bytes(),
            count * page_bytes(),
            MADV_GUARD_INSTALL,
        )?;
        add(&mut made, next, from, Expect::Content);
        add(&mut made, from, from + count, Expect::Guard);
        next = from + count;
    }
    add(&mut made, next, pages, Expect::Content);
    Ok(made)
}

/// In the first page and the last, and over the border of two mappings that lie side by side.
fn guards_at_edges(first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, 2 * PAGES)?;
    let half = PAGES * page_bytes();
    mappings::advise(at + half, half, libc::MADV_DONTDUMP)?;
    let guards = [(0, 1), (PAGES - 2, 4), (2 * PAGES - 1, 1)];
    guarded(at, 2 * PAGES, first, &guards)
}

/// Every second page.
fn many_guards(first: u64) -> Result<Made> {
    let pages = 8 * PAGES;
    let guards: Vec<(usize, usize)> = (1..pages).step_by(2).map(|n| (n, 1)).collect();
    guarded(anonymous(PRIVATE, pages)?, pages, first, &guards)
}

fn guards_in_huge_pages(first: u64) -> Result<Made> {
    let pages = 3 * HUGE_BYTES / page_bytes();
    let at = anonymous(PRIVATE, pages)?;
    mappings::advise(at, pages * page_bytes(), libc::MADV_HUGEPAGE)?;
    let huge = HUGE_BYTES / page_bytes();
    guarded(
        at,
        pages,
        first,
        &[(huge / 2, 3), (huge, huge), (3 * huge - 1, 1)],
    )
}

/// Over pages that are the file's, and over pages that were written.
fn guards_in_a_file(dir: &Path, first: u64) -> Result<Made> {
    let path = dir.join("guard-file");
    fs::write(&path, of_file(first))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let mut made = of(file.as_fd(), true, first)?;
    for span in &mut made.spans[8..12] {
        mappings::advise(span.address, page_bytes(), MADV_GUARD_INSTALL)?;
        (span.expect, span.in_child) = (Expect::Guard, Expect::Guard);
    }
    Ok(made)
}

/// Guards that this process, or its child, has installed since the fork, and the other one has not.
fn guards_of_one(kind: &str, dir: &Path, first: u64, in_parent: bool) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    let own = first + PAGES as u64;
    // Both write all of it again: nothing is shared any more.
    let guards = |installs: bool, number: u64| -> Result<Vec<Span>> {
        let guards: &[(usize, usize)] = if installs {
            &[(0, 1), (8, 8), (PAGES - 1, 1)]
        } else {
            &[]
        };
        Ok(guarded(at, PAGES, number, guards)?.spans)
    };
    partner::start(kind, dir, || guards(!in_parent, own))?;
    Ok(Made {
        spans: guards(in_parent, first)?,
        ..Made::default()
    })
}
