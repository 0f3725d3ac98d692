//! The second process of a tree: all that the first one has, as a fork leaves it, and pages that it wrote.

use std::collections::BTreeMap;

use anyhow::Result;
use testbed::sys::mappings;

use crate::make::{Expect, Made, Span, fill, page_bytes};

/// Added to the numbers of pages that it writes.
const OWN: u64 = 1 << 40;

/// Memory of these is its own since the fork, and it may write it. That of MLOCK_ONFAULT is left out: CRIU restores no pages
/// there lazily which the first process has not.
const WRITTEN: &[&str] = &[
    "private",
    "sparse",
    "zero-read",
    "remapped",
    "dontdump",
    "named",
    "vdso",
    "hugetlb-private",
    "hugetlb-sparse",
    "hugetlb-memfd-private",
    "thp",
    "thp-holes",
    "mlock",
    "wipe",
    "droppable",
    "growsdown",
    "prot-none",
    "file-private",
    "deleted-private",
    "dev-zero",
    "memfd-private",
    "ksm",
    "guard",
    "guard-edges",
    "guard-many",
    "guard-thp",
    "guard-wipe",
    "guard-file",
    "left-empty",
    "lowest",
    "highest",
    "thp-zero",
    "wipe-moved",
    "growsdown-grown",
    "file-offset",
    "reservation",
    "reservation-none",
];

/// Writes every third page of what it may write, and tells what it has.
///
/// # Errors
/// Memory that it should have cannot be written.
pub(crate) fn inherit(all: &BTreeMap<String, Made>) -> Result<BTreeMap<String, Made>> {
    let mut own = BTreeMap::new();
    for (name, made) in all {
        let mut spans = Vec::new();
        if name == "dontfork" {
            // It has no such mapping, and what it maps may come to be there.
            continue;
        }
        for span in &made.spans {
            let inherited = Span {
                expect: span.in_child,
                ..*span
            };
            match WRITTEN.contains(&name.as_str()) {
                true => spans.extend(written(name, inherited)?),
                false => spans.push(inherited),
            }
        }
        let made = Made {
            spans,
            ..Made::default()
        };
        own.insert(name.clone(), made);
    }
    Ok(own)
}

fn written(kind: &str, span: Span) -> Result<Vec<Span>> {
    use Expect::{Content, ContentOrZero, Hidden, Zero};

    let is_hidden = span.expect == Hidden;
    if !is_hidden && !matches!(span.expect, Content | Zero) {
        return Ok(vec![span]);
    }
    let bytes = span.pages * page_bytes();
    let protect = |prot| mappings::protect(span.address, bytes, prot);
    if is_hidden {
        protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    let mut spans = Vec::new();
    for n in 0..span.pages {
        let (address, first) = (span.address + n * page_bytes(), span.first + n as u64);
        if n % 3 != 1 {
            spans.push(Span {
                address,
                pages: 1,
                first,
                ..span
            });
            continue;
        }
        fill(address, 1, first + OWN)?;
        // What the advice says of its own children.
        let (expect, in_child) = match kind {
            "wipe" | "wipe-moved" | "guard-wipe" if span.expect == Zero => (Content, Zero),
            "droppable" => (ContentOrZero, Zero),
            _ if is_hidden => (Hidden, Hidden),
            _ => (Content, Content),
        };
        let own = Span::new(address, 1, first + OWN, expect);
        spans.push(own.in_child(in_child));
    }
    if is_hidden {
        protect(libc::PROT_NONE)?;
    }
    Ok(spans)
}
