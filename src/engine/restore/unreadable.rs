//! Pages that the local images should have and cannot give: a disk that fails, a file that was cut, a compressed page
//! that does not decode.
//!
//! ```text
//! a read fails -> page by page: what can be read is installed, the rest is noted here
//!              -> the source is asked, if there is one         -> it has them: installed
//!              -> read again, after longer and longer pauses   -> readable again: installed
//!              -> for too long: poisoned, counted, all else goes on
//! ```
//!
//! Adjoining runs are one record, and only its first page is tried again. So a file that cannot be read at all costs one
//! read at a time, however long it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Restore;
use super::install::offset;
use super::links::Question;
use crate::criu::fetch::FetchError;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Chain;
use crate::lazy::planner::{PageOutcome, Request, SpaceId};
use crate::lazy::space::Class;
use crate::units::{PageRange, Vaddr};

/// The first pause before the images are read again, µs; each one after it is twice as long.
const PAUSE_US: u64 = 20_000;

/// The longest pause, µs.
const PAUSE_US_MAX: u64 = 1_000_000;

/// Read or asked for at once, bytes.
const STEP_BYTES: u64 = 64 << 10;

/// A run of pages that cannot be read.
#[derive(Clone, Copy, Debug)]
struct Run {
    end: u64,
    since_us: u64,
    until_us: u64,
    pause_us: u64,
    /// The source was asked for them.
    asked: bool,
}

/// See the module's text. Runs are by pid and address in the dump.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    runs: BTreeMap<(u32, u64), Run>,
    /// The same, by when they are tried again.
    due: BTreeSet<(u64, u32, u64)>,
    /// What the source was asked for and has not answered: ends by beginnings.
    asked: BTreeMap<(u32, u64), u64>,
    /// Why a page could not be read at last.
    last_error: Option<Error>,
}

impl Unreadable {
    /// When the next run is to be tried again, µs.
    pub(super) fn until_us(&self) -> Option<u64> {
        self.due.first().map(|(until_us, _, _)| *until_us)
    }

    /// Everything is tried once more, at once, and the source is not waited for.
    pub(super) fn try_now(&mut self) {
        self.asked.clear();
        let keys: Vec<(u32, u64)> = self.runs.keys().copied().collect();
        for key in keys {
            if let Some(mut run) = self.take(key) {
                (run.until_us, run.pause_us) = (0, PAUSE_US);
                self.put(key, run);
            }
        }
    }

    /// The pages `image` cannot be read. They join a run that ends where they begin.
    fn note(&mut self, pid: u32, image: PageRange, now_us: u64) {
        let (start, end) = (image.start().get(), image.end().get());
        let before = self.runs.range(..=(pid, start)).next_back();
        let before = before
            .map(|(key, run)| (*key, *run))
            .filter(|((of, _), run)| *of == pid && run.end >= start);
        if let Some((key, mut run)) = before {
            if run.end < end && !run.asked {
                self.take(key);
                (run.end, run.since_us) = (end, now_us);
                self.put(key, run);
            }
            if run.end >= end {
                return;
            }
        }
        let run = Run {
            end,
            since_us: now_us,
            until_us: now_us + PAUSE_US,
            pause_us: PAUSE_US,
            asked: false,
        };
        self.put((pid, start), run);
    }

    fn put(&mut self, key: (u32, u64), run: Run) {
        self.due.insert((run.until_us, key.0, key.1));
        self.runs.insert(key, run);
    }

    fn take(&mut self, key: (u32, u64)) -> Option<Run> {
        let run = self.runs.remove(&key)?;
        self.due.remove(&(run.until_us, key.0, key.1));
        Some(run)
    }

    /// Takes a run that is to be tried now.
    fn take_due(&mut self, now_us: u64) -> Option<((u32, u64), Run)> {
        let (until_us, pid, start) = *self.due.first()?;
        if until_us > now_us {
            return None;
        }
        let key = (pid, start);
        Some((key, self.take(key)?))
    }

    /// Whether the source has not answered yet for the page at `start`.
    fn awaits_source(&self, pid: u32, start: u64) -> bool {
        let before = self.asked.range(..=(pid, start)).next_back();
        before.is_some_and(|((of, _), end)| *of == pid && *end > start)
    }
}

impl Restore {
    /// A read of the pages at `at` of `id`, which are `image` in `chain`, has failed: installs those that can
    /// be read and notes the others.
    pub(super) fn read_single_pages(
        &mut self,
        id: SpaceId,
        at: PageRange,
        image: Vaddr,
        chain: &Chain,
    ) -> Result<()> {
        let page = self.images.page().bytes();
        let Some(pid) = self.processes.pid(id) else {
            return Ok(());
        };
        let mut room = vec![0; offset(page)];
        for skipped in (0..at.bytes()).step_by(offset(page)) {
            let start = at.start().get() + skipped;
            let one = PageRange::new(start, start + page);
            let from = image.get() + skipped;
            match read_page(chain, Vaddr(from), &mut room) {
                Ok(()) => self.fill_local(id, one, &mut page.clone(), &room)?,
                Err(error) => {
                    self.planner.set_unreadable(id, one);
                    let now_us = self.clock.now_us();
                    self.unreadable
                        .note(pid, PageRange::new(from, from + page), now_us);
                    self.log_image_error(&error);
                }
            }
        }
        Ok(())
    }

    fn log_image_error(&mut self, error: &Error) {
        let Some(left_out) = self.losses.may_log(self.clock.now_us()) else {
            return;
        };
        let else_asked = match self.config.source.is_some() && !self.config.ferry {
            true => "asking the source for its pages and ",
            false => "",
        };
        tracing::warn!(
            "{error}; {else_asked}trying again for {} s{left_out}",
            self.config.local_timeout.as_secs()
        );
    }

    /// The source cannot read the first page of `asked`: it is asked again as for a page that the images here
    /// should have, and the rest at once.
    pub(super) fn source_lacks(&mut self, request: &Request, asked: PageRange) -> Result<()> {
        let start = asked.start().get();
        if self.planner.counts().fetched() == 0 {
            return Err(self.bad_source(FetchError::NoPages {
                vaddr: asked.start(),
                pid: request.pid,
            }));
        }
        let first = PageRange::new(start, start + self.images.page().bytes());
        let rest = PageRange::new(first.end().get(), asked.end().get());
        for id in self.planner.ids_of(request.pid) {
            self.planner.pushed(id, first);
            while let Some(piece) = self.planner.on_the_way(id, first) {
                self.planner.set_unreadable(id, piece.at);
            }
        }
        let now_us = self.clock.now_us();
        self.unreadable.note(request.pid, first, now_us);
        let text = format!(
            "the source at {} cannot read {first} of pid {}",
            self.links.peer(),
            request.pid
        );
        self.log_image_error(&Error::new(Kind::Image, text));
        if !rest.is_empty() {
            self.planner.give_back(request.pid, rest);
        }
        self.send_requests()
    }

    /// Tries a run of unreadable pages again, if it is time, and installs what the source has sent.
    pub(super) fn retry_unreadable(&mut self) -> Result<()> {
        self.take_fallback_answers()?;
        let now_us = self.clock.now_us();
        let Some(((pid, start), mut run)) = self.unreadable.take_due(now_us) else {
            return Ok(());
        };
        let image = PageRange::new(start, run.end);
        let tried = Duration::from_micros(now_us.saturating_sub(run.since_us));
        let expired = tried >= self.losses.local_retry_time();
        let in_vain = run.asked && !self.unreadable.awaits_source(pid, start);
        // A source that cannot read them either is not asked for ever.
        let again = in_vain && !expired && self.is_with_source(pid, start);
        let may_ask = !run.asked || again;
        if may_ask && self.ask_fallback(pid, image) {
            run.asked = true;
        }
        let Some((id, piece)) = self.planner.first_unreadable(pid, image) else {
            // It has come otherwise, or nobody lives who lacks it.
            return Ok(());
        };
        // What lies before the first page that is missing still is not.
        let start = piece.image.get();
        let chain = self.processes.get(id).and_then(|one| one.chain.clone());
        let left = self.read_again(pid, PageRange::new(start, run.end), chain.as_deref())?;
        if left.start().get() > start {
            run.until_us = now_us;
            run.pause_us = PAUSE_US;
        } else {
            run.until_us = now_us + run.pause_us;
            run.pause_us = (run.pause_us * 2).min(PAUSE_US_MAX);
        }
        if !left.is_empty() {
            let key = (pid, left.start().get());
            let stuck = left.start().get() == start && !self.unreadable.awaits_source(pid, start);
            self.unreadable.put(key, run);
            if stuck && expired {
                self.give_up_unreadable(key)?;
            }
        }
        Ok(())
    }

    /// Installs what can be read of the start of `image`, wherever it is missing. Returns the rest.
    fn read_again(
        &mut self,
        pid: u32,
        image: PageRange,
        chain: Option<&Chain>,
    ) -> Result<PageRange> {
        let page = self.images.page().bytes();
        let start = image.start().get();
        let end = image.end().get().min(start + STEP_BYTES);
        let mut bytes = vec![0; offset(end - start)];
        let mut read = 0;
        for room in bytes.chunks_mut(offset(page)) {
            let Some(chain) = chain else {
                break;
            };
            match read_page(chain, Vaddr(start + read), room) {
                Ok(()) => read += page,
                Err(error) => {
                    self.unreadable.last_error = Some(error);
                    break;
                }
            }
        }
        if read > 0 {
            let read_now = PageRange::new(start, start + read);
            self.install_in_family(
                pid,
                None,
                read_now,
                &bytes[..offset(read)],
                PageOutcome::Local,
            )?;
        }
        Ok(PageRange::new(start + read, image.end().get()))
    }

    /// The first page of a run cannot be had: it is poisoned wherever it is missing.
    fn give_up_unreadable(&mut self, key: (u32, u64)) -> Result<()> {
        let Some(mut run) = self.unreadable.take(key) else {
            return Ok(());
        };
        let (pid, start) = key;
        let next = start + self.images.page().bytes();
        if next < run.end {
            let rest = Run { until_us: 0, ..run };
            self.unreadable.put((pid, next), rest);
        }
        run.end = next;
        let why = match self.unreadable.last_error.take() {
            _ if self.is_with_source(pid, start) => {
                format!("the source at {} cannot read them", self.links.peer())
            }
            Some(error) => error.to_string(),
            None => "their images cannot be read".to_owned(),
        };
        while let Some((id, piece)) = self
            .planner
            .first_unreadable(pid, PageRange::new(start, next))
        {
            if let Err(error) = self.give_up_pages(id, piece.at, &why) {
                self.unreadable.put(key, run);
                return self.hold_pages(error);
            }
        }
        Ok(())
    }

    /// Whether the source has the page at `start` of `pid` according to the images.
    fn is_with_source(&self, pid: u32, start: u64) -> bool {
        let id = self.planner.next_sibling(pid, None);
        let space = id.and_then(|id| self.planner.space(id));
        space.is_some_and(|space| space.is_with_source(Vaddr(start)))
    }

    /// Asks the source for the pages `image` of `pid`, if there is one that may have them.
    fn ask_fallback(&mut self, pid: u32, image: PageRange) -> bool {
        if self.losses.is_source_lost() {
            return false;
        }
        let (timeout, unreadable) = (self.config.local_timeout, &mut self.unreadable);
        let pages = (pid, image);
        self.links
            .ask_fallback(pages, STEP_BYTES, timeout, |image| {
                let key = (pid, image.start().get());
                unreadable.asked.insert(key, image.end().get());
            })
    }

    fn take_fallback_answers(&mut self) -> Result<()> {
        while let Some((Question { pid, image }, answer)) = self.links.fallback_answer() {
            self.unreadable.asked.remove(&(pid, image.start().get()));
            match answer {
                Ok(bytes) => {
                    let outcome = PageOutcome::Fetched(Class::Around);
                    self.install_in_family(pid, None, image, &bytes, outcome)?;
                }
                Err(error) => {
                    tracing::debug!("the source does not have {image} of pid {pid}: {error}");
                }
            }
        }
        Ok(())
    }
}

/// Reads one page of `chain`, which has it.
fn read_page(chain: &Chain, image: Vaddr, room: &mut [u8]) -> Result<()> {
    let Some(extent) = chain.find(image) else {
        let text = format!("the images lack the page at {image}");
        return Err(Error::new(Kind::Image, text));
    };
    chain.read(extent.place, room)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(first << 12, (first + count) << 12)
    }

    #[test]
    fn pages_that_adjoin_are_one_run() {
        let mut unreadable = Unreadable::default();
        for page in [5, 6, 7, 20, 6] {
            unreadable.note(1, pages(page, 1), 0);
        }
        unreadable.note(2, pages(8, 1), 0);
        let runs: Vec<_> = unreadable
            .runs
            .iter()
            .map(|((pid, start), run)| (*pid, start >> 12, run.end >> 12))
            .collect();
        assert_eq!(runs, [(1, 5, 8), (1, 20, 21), (2, 8, 9)]);
        assert_eq!(unreadable.due.len(), 3);
    }

    #[test]
    fn a_run_is_due_after_its_pause_or_when_it_is_to_be_tried_now() {
        let mut unreadable = Unreadable::default();
        unreadable.note(1, pages(5, 1), 1000);
        assert!(unreadable.take_due(1000).is_none());
        assert_eq!(unreadable.until_us(), Some(1000 + PAUSE_US));
        let (key, run) = unreadable.take_due(1000 + PAUSE_US).unwrap();
        assert_eq!(key, (1, 5 << 12));
        assert!(unreadable.runs.is_empty());
        unreadable.put(key, run);
        unreadable.try_now();
        assert!(unreadable.take_due(0).is_some());
    }

    #[test]
    fn what_the_source_was_asked_for_is_waited_for() {
        let mut unreadable = Unreadable::default();
        unreadable.asked.insert((1, 5 << 12), 9 << 12);
        let waits = [4, 5, 8, 9].map(|page| unreadable.awaits_source(1, page << 12));
        assert_eq!(waits, [false, true, true, false]);
        assert!(!unreadable.awaits_source(2, 5 << 12));
    }
}
