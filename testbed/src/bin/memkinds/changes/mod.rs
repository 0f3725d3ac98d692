//! What becomes of memory between a round and the last dump: each change is made when the process is told to.
//!
//! A tree makes each change twice, in memory that its two processes have since the fork: one that the first process
//! makes, and one of the second. Both look at both.

mod private;
mod replaced;
mod shared;

use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use testbed::sys::{self, mappings};

use crate::make::{Expect, PAGES, PRIVATE, Span, anonymous, fill, first_of, page_bytes};
use crate::partner;

/// Added to a page's number for contents that it had not before.
const NEW: u64 = 1 << 20;

const HALF: usize = PAGES / 2;

/// One change of one process.
pub(crate) struct Change {
    /// What is there until then.
    pub(crate) before: Vec<Span>,
    /// What the other process finds afterwards, if not the same.
    pub(crate) for_others: Option<Vec<Span>>,
    /// Makes the change, and tells what is there then.
    pub(crate) apply: Box<dyn FnOnce() -> Result<Vec<Span>>>,
}

impl Change {
    fn new(
        before: Vec<Span>,
        apply: impl FnOnce() -> Result<Vec<Span>> + 'static,
    ) -> Result<Change> {
        Ok(Change {
            before,
            for_others: None,
            apply: Box::new(apply),
        })
    }

    /// Others find afterwards what the process finds that makes the change.
    fn shared(
        before: Vec<Span>,
        after: Vec<Span>,
        apply: impl FnOnce() -> Result<()> + 'static,
    ) -> Result<Change> {
        let own = after.clone();
        Ok(Change {
            before,
            for_others: Some(after),
            apply: Box::new(move || {
                apply()?;
                Ok(own)
            }),
        })
    }
}

/// Pages of a mapping, with numbers from `first` on.
#[derive(Clone, Copy, Debug)]
struct Area {
    at: usize,
    pages: usize,
    first: u64,
}

impl Area {
    /// Private anonymous memory, filled.
    fn private(first: u64) -> Result<Area> {
        Area::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)
    }

    fn filled(at: usize, pages: usize, first: u64) -> Result<Area> {
        fill(at, pages, first)?;
        Ok(Area { at, pages, first })
    }

    fn address(self, page: usize) -> usize {
        self.at + page * page_bytes()
    }

    fn bytes(self) -> usize {
        self.pages * page_bytes()
    }

    fn span(self, from: usize, pages: usize, expect: Expect) -> Span {
        Span::new(self.address(from), pages, self.first + from as u64, expect)
    }

    fn whole(self) -> Span {
        self.span(0, self.pages, Expect::Content)
    }

    /// What [`Area::write_new`] leaves.
    fn new_span(self, from: usize, pages: usize) -> Span {
        let first = self.first + from as u64 + NEW;
        Span::new(self.address(from), pages, first, Expect::Content)
    }

    /// Writes contents that these pages had not before.
    fn write_new(self, from: usize, pages: usize) -> Result<Span> {
        let span = self.new_span(from, pages);
        fill(span.address, pages, span.first)?;
        Ok(span)
    }

    /// Writes the contents that these pages had.
    fn write_again(self, from: usize, pages: usize) -> Result<Span> {
        let span = self.span(from, pages, Expect::Content);
        fill(span.address, pages, span.first)?;
        Ok(span)
    }

    fn write_zeros(self, from: usize, pages: usize) -> Result<Span> {
        mappings::write(self.address(from), &vec![0; pages * page_bytes()])?;
        Ok(self.span(from, pages, Expect::Zero))
    }

    fn advise(self, from: usize, pages: usize, advice: i32) -> Result<()> {
        Ok(mappings::advise(
            self.address(from),
            pages * page_bytes(),
            advice,
        )?)
    }

    /// Gives pages back.
    fn empty(self, from: usize, pages: usize) -> Result<Span> {
        self.advise(from, pages, libc::MADV_DONTNEED)?;
        Ok(self.span(from, pages, Expect::Zero))
    }
}

/// An address at which so many bytes are free.
fn room(bytes: usize) -> Result<usize> {
    let at = mappings::map(bytes, true, PRIVATE | libc::MAP_NORESERVE, None)?;
    mappings::unmap(at, bytes)?;
    Ok(at)
}

/// Prepares a change that `process` of the tree (0, 1) will make.
pub(crate) fn prepare(name: &str, process: u32, dir: &Path) -> Result<Change> {
    let first = first_of(name) + u64::from(process) * 64 * NEW;
    let private = private::prepare(name, first)?;
    let replaced = match private {
        None => replaced::prepare(name, first, &dir.join(format!("{name}-{process}")))?,
        found => found,
    };
    match replaced {
        Some(change) => return Ok(change),
        None if name == "c-forked" => return forked(first, process, dir),
        None if name == "c-ended" => return ended(first, process),
        None => {}
    }
    let file = dir.join(format!("{name}-{process}"));
    shared::prepare(name, first, &file)?.with_context(|| format!("no change {name}"))
}

/// Name of the child that `process` forks.
pub(crate) fn forked_name(process: u32) -> String {
    format!("c-forked-{process}")
}

/// The child writes every fourth page.
fn forked(first: u64, process: u32, dir: &Path) -> Result<Change> {
    let (area, dir) = (Area::private(first)?, dir.to_owned());
    Change::new(vec![area.whole()], move || {
        partner::start(&forked_name(process), &dir, || {
            let page = |n: usize| match n % 4 {
                0 => area.write_new(n, 1),
                _ => Ok(area.span(n, 1, Expect::Content)),
            };
            (0..area.pages).map(page).collect()
        })?;
        Ok(vec![area.whole()])
    })
}

/// The child has all that was there before, and pages of its own. It is one of the first process.
fn ended(first: u64, process: u32) -> Result<Change> {
    let area = Area::private(first)?;
    if process > 0 {
        return Change::new(vec![area.whole()], move || Ok(vec![area.whole()]));
    }
    let child = match sys::fork()? {
        ForkResult::Child => {
            let _ = partner::end_with_parent().and_then(|()| area.write_new(0, HALF).map(drop));
            loop {
                std::thread::sleep(partner::PAUSE);
            }
        }
        ForkResult::Parent { child } => child,
    };
    Change::new(vec![area.whole()], move || {
        kill(child, Signal::SIGKILL)?;
        waitpid(child, None)?;
        Ok(vec![area.whole()])
    })
}
