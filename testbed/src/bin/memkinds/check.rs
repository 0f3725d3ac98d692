//! Compares all memory with what it must hold, in this process and in a child that it forks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::ForkResult;
use testbed::kinds::KindResults;
use testbed::sys;
use testbed::sys::mappings;

use crate::make::{Expect, Made, Span, content, page_bytes};

/// Kinds whose first span may be wiped in each child, whatever that one was forked from.
const WIPED: &[&str] = &[
    "wipe",
    "wipe-moved",
    "child-wipe",
    "guard-wipe",
    "droppable",
];

/// Pages compared at a time.
const PAGES_AT_ONCE: usize = 64;

/// Checks everything. The child is forked first, while as much as possible is missing, and reads while this
/// process does.
pub(crate) fn check_all(all: &BTreeMap<String, Made>, dir: &Path) -> Result<KindResults> {
    let told = dir.join(format!("child-{}.json", nix::unistd::getpid()));
    let child = match sys::fork().context("fork")? {
        ForkResult::Child => {
            let mut said = said_of(all, |span| span.in_child);
            let written = wiped_again(all, &told, &mut said).and_then(|()| tell(&told, &said));
            let code = i32::from(written.is_err());
            // The last thing it does is to touch a guard, as a stack that overflows does.
            if let Some(guard) = a_guard(all) {
                mappings::load(guard);
            }
            sys::exit_now(code);
        }
        ForkResult::Parent { child } => child,
    };
    let mut said = said_of(all, |span| span.expect);
    let ended = waitpid(child, None).context("waitpid")?;
    take_over(&mut said, &told, "in a child")?;
    let by_guard = matches!(ended, WaitStatus::Signaled(_, Signal::SIGSEGV, _));
    if a_guard(all).is_some() != by_guard {
        let wrong = format!("a child that touched a guard ended by {ended:?}");
        said.insert("guard".into(), Some(wrong));
    }
    Ok(said)
}

fn tell(path: &Path, said: &KindResults) -> Result<()> {
    Ok(fs::write(path, serde_json::to_vec(said)?)?)
}

/// Adds what a child has told to what was `said` before.
fn take_over(said: &mut KindResults, told: &Path, who: &str) -> Result<()> {
    let bytes = fs::read(told).with_context(|| format!("{who}: nothing was said"))?;
    fs::remove_file(told)?;
    let in_child: KindResults = serde_json::from_slice(&bytes)?;
    for (kind, wrong) in in_child {
        let own = said.entry(kind).or_default();
        if own.is_none() {
            *own = wrong.map(|wrong| format!("{who}: {wrong}"));
        }
    }
    Ok(())
}

/// Of a child: writes into memory that was wiped when it was forked, and looks for that in a child of its own.
fn wiped_again(all: &BTreeMap<String, Made>, told: &Path, said: &mut KindResults) -> Result<()> {
    let wiped: BTreeMap<String, &Span> = all
        .iter()
        .filter(|(kind, _)| WIPED.contains(&kind.as_str()))
        .filter_map(|(kind, made)| Some((kind.clone(), made.spans.first()?)))
        .filter(|(_, span)| span.in_child == Expect::Zero)
        .collect();
    if wiped.is_empty() {
        return Ok(());
    }
    for span in wiped.values() {
        mappings::write(span.address, &content(span.first))?;
    }
    let told = told.with_extension("again");
    match sys::fork().context("fork")? {
        ForkResult::Child => {
            let found = wiped.iter();
            let found = found.map(|(kind, span)| (kind.clone(), check(span, Expect::Zero).err()));
            let written = tell(&told, &found.collect());
            sys::exit_now(i32::from(written.is_err()));
        }
        ForkResult::Parent { child } => waitpid(child, None).context("waitpid")?,
    };
    take_over(said, &told, "in a grandchild")
}

fn a_guard(all: &BTreeMap<String, Made>) -> Option<usize> {
    let spans = &all.get("guard")?.spans;
    let guard = spans.iter().find(|span| span.expect == Expect::Guard)?;
    Some(guard.address)
}

fn said_of(all: &BTreeMap<String, Made>, expect: impl Fn(&Span) -> Expect) -> KindResults {
    let say = |(kind, made): (&String, &Made)| (kind.clone(), wrong(made, &expect));
    all.iter().map(say).collect()
}

/// What is wrong with one kind.
fn wrong(made: &Made, expect: impl Fn(&Span) -> Expect) -> Option<String> {
    let spans = made.spans.iter();
    let found = spans
        .filter_map(|span| check(span, expect(span)).err())
        .next();
    // A child has no AIO context.
    let aio = made
        .aio
        .filter(|_| nix::unistd::getsid(None) == Ok(nix::unistd::getpid()));
    let ring = aio.and_then(|context| match mappings::aio_finished(context) {
        Ok(0) => None,
        other => Some(format!("io_getevents: {other:?}")),
    });
    found.or(ring)
}

fn check(span: &Span, expect: Expect) -> Result<(), String> {
    let bytes = span.pages * page_bytes();
    if expect != Expect::Hidden {
        return compare(span, expect);
    }
    let protect =
        |prot| mappings::protect(span.address, bytes, prot).map_err(|errno| errno.to_string());
    if mappings::read(span.address, &mut [0]).is_ok() {
        return Err("it can be read".into());
    }
    protect(libc::PROT_READ)?;
    let compared = compare(span, Expect::Content);
    protect(libc::PROT_NONE)?;
    compared
}

fn compare(span: &Span, expect: Expect) -> Result<(), String> {
    let page = page_bytes();
    for from in (0..span.pages).step_by(PAGES_AT_ONCE) {
        let pages = PAGES_AT_ONCE.min(span.pages - from);
        if matches!(expect, Expect::Guard | Expect::Gone) {
            unreadable(span, from, pages)?;
            continue;
        }
        let mut read = vec![0; pages * page];
        let address = span.address + from * page;
        mappings::read(address, &mut read).map_err(|errno| format!("{address:#x}: {errno}"))?;
        for (n, bytes) in read.chunks(page).enumerate() {
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            let right = match expect {
                Expect::Zero => is_zero,
                Expect::ContentOrZero if is_zero => true,
                _ => bytes == content(span.first + (from + n) as u64),
            };
            if !right {
                let what = if is_zero { "zero" } else { "another content" };
                return Err(format!("page {} of {}: {what}", from + n, span.pages));
            }
        }
    }
    Ok(())
}

fn unreadable(span: &Span, from: usize, pages: usize) -> Result<(), String> {
    for n in from..from + pages {
        let read = mappings::read(span.address + n * page_bytes(), &mut [0]);
        if read != Err(Errno::EFAULT) {
            return Err(format!("page {n} of {} can be read", span.pages));
        }
    }
    Ok(())
}
