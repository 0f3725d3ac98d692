//! The memory of a dump that is held here: drained page by page, and given out as it comes. Or it stays where it is,
//! and is read in the processes that the dump has stopped.
//!
//! ```text
//! drain ── next_request ──> plan <── want ── who serves clients
//!   └───── store ──> file ──────────────> find: places of pages that are there
//! ```
//!
//! Page number n of the plan lies at n pages into the file. A page is read only after it was marked
//! as held, and is written once.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::frozen_tree::FrozenTree;
use super::memory_file::MemoryFile;
use crate::criu::header::Target;
use crate::engine::ferry::lock;
use crate::engine::serve::memory::Memory;
use crate::error::{Error, Kind, Result};
use crate::ferry::message::Fault;
use crate::ferry::push_planner::{self, Found, PUSH_BYTES};
use crate::image::chain::{Absence, Chain, Missing, Place, Resolved};
use crate::image::dir::ImageDir;
use crate::lazy::drain::DrainPlan;
use crate::limits::{DUMP_PAGES_MAX, WANTED_PAGES_MAX};
use crate::stream::Stream;
use crate::sync::{Condvar, Mutex};
use crate::units::{PageCount, PageRange, PageSize};

/// Asked of the dump with one request at most, bytes. A fault waits behind those that are on their
/// way, so they are short.
const REQUEST_BYTES: u64 = 256 << 10;

/// Requests for as many pages and fewer come from faults, larger ones from a client's stream.
const FAULT_PAGES_MAX: u64 = 16;

/// See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct DumpMemory {
    page: PageSize,
    file: MemoryFile,
    /// Where the pages are read, if not in what has been drained.
    processes: Option<FrozenTree>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    plan: DrainPlan,
    /// Nothing more comes from the dump, and why.
    failure: Option<String>,
    /// What threads wait for.
    awaited: Vec<Range<u64>>,
    /// Came since all who wait were last woken, pages.
    untold: u64,
}

impl State {
    fn new(plan: DrainPlan) -> State {
        State {
            plan,
            failure: None,
            awaited: Vec::new(),
            untold: 0,
        }
    }

    /// The pages `numbers` have come. Returns whether those who wait are to be woken: if it is what one of them waits
    /// for, when as much has come as is pushed together, and at the end.
    fn arrived(&mut self, pid: u32, range: PageRange, numbers: &Range<u64>) -> bool {
        self.plan.arrived(pid, range);
        self.untold += numbers.end - numbers.start;
        let plan = &self.plan;
        let has_come = |awaited: &Range<u64>| {
            awaited.start < numbers.end
                && numbers.start < awaited.end
                && plan.held_part(awaited.clone()) == *awaited
        };
        let enough = self.untold << plan.page().shift() >= PUSH_BYTES;
        let tells = enough || self.awaited.iter().any(has_come) || plan.is_complete();
        if tells {
            self.untold = 0;
        }
        tells
    }

    /// Nobody waits for `needed` any more, or one fewer.
    fn forget_awaited(&mut self, needed: &Range<u64>) {
        let at = self.awaited.iter().position(|one| one == needed);
        if let Some(at) = at {
            self.awaited.swap_remove(at);
        }
    }
}

impl DumpMemory {
    /// Room for all pages that stayed with the dump whose images `dir` has; in a file in `spill`, if that
    /// is given.
    pub(super) fn new(dir: &ImageDir, spill: Option<&Path>) -> Result<DumpMemory> {
        let page = dir.page();
        let mut pids = dir.processes()?;
        pids.sort_unstable();
        pids.dedup();
        let mut runs = Vec::new();
        let mut pages = 0;
        for pid in pids {
            let target = Target::Process(pid);
            if !dir.has_pagemap(target) {
                continue;
            }
            let chain = Chain::open(dir, target, Missing::Leave)?;
            for range in lazy_runs(&chain) {
                // Before the plan is made, which takes memory for each page.
                pages += range.pages(page).get();
                if pages > DUMP_PAGES_MAX {
                    let text = format!(
                        "{} says that {pages} pages and more stayed with the dump, which no dump has",
                        dir.path().join(target.pagemap_name()).display()
                    );
                    return Err(Error::new(Kind::Image, text));
                }
                runs.push((pid, range));
            }
        }
        let plan = DrainPlan::new(page, runs);
        Ok(DumpMemory {
            page,
            file: MemoryFile::new(pages << page.shift(), spill)?,
            processes: None,
            state: Mutex::new(State::new(plan)),
            changed: Condvar::new(),
        })
    }

    /// Size of a page.
    pub(in crate::engine) fn page(&self) -> PageSize {
        self.page
    }

    /// Reads in the processes that the dump at the other end of `stream` has stopped, if they are found.
    pub(super) fn read_processes_of(&mut self, stream: &Stream) {
        let runs = Vec::from_iter(lock(&self.state).plan.runs());
        self.processes = FrozenTree::find(stream, self.page, &runs);
        if self.processes.is_some() {
            let plan = &mut lock(&self.state).plan;
            runs.iter()
                .for_each(|(pid, range)| plan.arrived(*pid, *range));
        }
    }

    /// Whether nothing has to be drained.
    pub(super) fn reads_processes(&self) -> bool {
        self.processes.is_some()
    }

    /// All pages, by whose they are.
    pub(in crate::engine) fn runs(&self) -> Vec<(Target, PageRange)> {
        let state = lock(&self.state);
        let runs = state.plan.runs();
        runs.map(|(pid, range)| (Target::Process(pid), range))
            .collect()
    }

    /// Whose pages there are, in their order.
    pub(in crate::engine) fn pids(&self) -> Vec<u32> {
        let state = lock(&self.state);
        let mut pids = Vec::from_iter(state.plan.runs().map(|(pid, _)| pid));
        pids.dedup();
        pids
    }

    /// How many pages have come, and how many there are.
    pub(in crate::engine) fn progress(&self) -> (PageCount, PageCount) {
        let state = lock(&self.state);
        (state.plan.held(), state.plan.pages())
    }

    /// The next pages to ask the dump for.
    pub(super) fn next_request(&self) -> Option<(u32, PageRange)> {
        let most = PageCount(REQUEST_BYTES >> self.page.shift());
        lock(&self.state).plan.next_request(most)
    }

    /// The pages `range` of `pid`, which were asked for, are `bytes`.
    pub(super) fn store(&self, pid: u32, range: PageRange, bytes: &[u8]) -> Result<()> {
        let numbers = lock(&self.state).plan.locate(pid, range);
        let numbers =
            numbers.filter(|numbers| numbers.end - numbers.start == range.pages(self.page).get());
        let numbers = numbers.expect("only what the plan has is asked for");
        self.file.write(bytes, numbers.start << self.page.shift())?;
        // Small pages come by the ten thousand: to wake everybody for each would take longer than all else.
        if lock(&self.state).arrived(pid, range, &numbers) {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// The pages `range` of `pid` did not come with their answer.
    pub(super) fn give_back(&self, pid: u32, range: PageRange) {
        lock(&self.state).plan.give_back(pid, range);
    }

    /// Nothing more comes from the dump.
    pub(super) fn fail(&self, why: &str) {
        lock(&self.state)
            .failure
            .get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }

    /// All pages have come.
    pub(super) fn complete(&self) -> Result<()> {
        self.file.seal()
    }

    /// Waits until the first pages of `range` of `pid` are there, as many as one may wait for, and says
    /// which numbers are. Fails if the dump does not have the first one, or is lost.
    pub(in crate::engine) fn wait_for(&self, pid: u32, range: PageRange) -> Result<Range<u64>> {
        let Some(numbers) = self.with_plan(|plan| plan.locate(pid, range)) else {
            let text = format!(
                "the dump has not kept the page at {} of pid {pid} for a lazy restore",
                range.start()
            );
            return Err(Error::new(Kind::Image, text));
        };
        let pages = (numbers.end - numbers.start).min(WANTED_PAGES_MAX);
        let awaited = numbers.start..numbers.start + pages;
        if self.reads_processes() {
            return self.copy_to_file(awaited.clone()).map(|()| awaited);
        }
        self.wait(|plan| match plan.held_part(awaited.clone()) == awaited {
            true => Ok(plan.held_part(numbers.clone())),
            false => Err(awaited.clone()),
        })
    }

    /// Waits until the page is there that a thread waits for, and says which numbers and addresses are to be
    /// sent with it: none if the dump does not have it.
    pub(in crate::engine) fn find(&self, fault: &Fault) -> Result<(Range<u64>, PageRange)> {
        self.wait(|plan| match push_planner::find(plan, self.page, fault) {
            Found::Nothing => Ok((0..0, PageRange::new(0, 0))),
            Found::Pages(numbers, range) => Ok((numbers, range)),
            Found::Awaited(numbers) => Err(numbers),
        })
    }

    /// Waits until `found` finds something instead of the pages that it still needs.
    fn wait<T>(
        &self,
        mut found: impl FnMut(&DrainPlan) -> std::result::Result<T, Range<u64>>,
    ) -> Result<T> {
        let mut state = lock(&self.state);
        let mut wanted = None;
        loop {
            let needed = match found(&state.plan) {
                Ok(found) => return Ok(found),
                Err(needed) => needed,
            };
            if let Some(why) = &state.failure {
                return Err(Error::new(Kind::PeerLost, why.clone()));
            }
            if wanted.as_ref() != Some(&needed) {
                let from_fault = needed.end - needed.start <= FAULT_PAGES_MAX;
                state.plan.want(needed.clone(), from_fault);
                wanted = Some(needed.clone());
            }
            state.awaited.push(needed.clone());
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.forget_awaited(&needed);
        }
    }

    /// Asks the plan something.
    pub(in crate::engine) fn with_plan<T>(&self, ask: impl FnOnce(&DrainPlan) -> T) -> T {
        ask(&lock(&self.state).plan)
    }

    /// Waits for a while, or until as many more pages have come as are pushed together.
    pub(in crate::engine) fn wait_for_more(&self, most: Duration) -> Result<()> {
        let state = lock(&self.state);
        if let Some(why) = &state.failure {
            return Err(Error::new(Kind::PeerLost, why.clone()));
        }
        // Woken or not, the caller looks again.
        drop(self.changed.wait_timeout(state, most));
        Ok(())
    }

    /// Reads the pages `numbers`, which are there.
    pub(in crate::engine) fn read(&self, numbers: Range<u64>, out: &mut [u8]) -> Result<()> {
        let Some(processes) = &self.processes else {
            return self.file.read(out, numbers.start << self.page.shift());
        };
        let (mut rest, mut at) = (out, numbers.start);
        while at < numbers.end {
            let (pid, range) = self.with_plan(|plan| plan.addresses(at, numbers.end));
            let bytes = usize::try_from(range.bytes()).expect("no more than the buffer");
            let (front, behind) = rest.split_at_mut(bytes);
            processes.read(pid, range, front)?;
            (rest, at) = (behind, at + range.pages(self.page).get());
        }
        Ok(())
    }

    /// Copies the pages `numbers` from the processes to where clients of CRIU's protocol are sent them from.
    fn copy_to_file(&self, numbers: Range<u64>) -> Result<()> {
        let mut contents = Vec::new();
        let step = REQUEST_BYTES >> self.page.shift();
        for start in (numbers.start..numbers.end).step_by(usize::try_from(step).unwrap_or(1)) {
            let part = start..numbers.end.min(start + step);
            let bytes = (part.end - part.start) << self.page.shift();
            contents.resize(usize::try_from(bytes).expect("a step is small"), 0);
            self.read(part, &mut contents)?;
            self.file.write(&contents, start << self.page.shift())?;
        }
        Ok(())
    }
}

/// The pages that only the dump has.
fn lazy_runs(chain: &Chain) -> impl Iterator<Item = PageRange> + '_ {
    chain.extents().iter().filter_map(|extent| {
        let with_source = matches!(
            extent.place,
            Place::Absent {
                why: Absence::WithSource,
                ..
            }
        );
        (extent.lazy && with_source).then_some(extent.range)
    })
}

/// The memory of one process that is held.
#[derive(Debug)]
pub(super) struct ProcessMemory {
    pub(super) dump_memory: Arc<DumpMemory>,
    pub(super) pid: u32,
}

impl Memory for ProcessMemory {
    fn find_runs(&self, wanted: PageRange, runs: &mut Vec<Resolved>) -> Result<PageCount> {
        let numbers = self.dump_memory.wait_for(self.pid, wanted)?;
        let shift = self.dump_memory.page.shift();
        let pages = numbers.end - numbers.start;
        let start = wanted.start().get();
        runs.push(Resolved {
            range: PageRange::new(start, start + (pages << shift)),
            lazy: true,
            place: Place::Raw {
                file: 0,
                offset: numbers.start << shift,
            },
        });
        Ok(PageCount(pages))
    }

    fn read(&self, place: Place, out: &mut [u8]) -> Result<()> {
        match place {
            Place::Raw { offset, .. } => self.dump_memory.file.read(out, offset),
            Place::Blocks { .. } | Place::Absent { .. } => {
                unreachable!("held pages are there, as they are")
            }
        }
    }

    fn file(&self, _: u32) -> (&File, &Path) {
        (self.dump_memory.file.file(), self.dump_memory.file.name())
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::header::{PageFlags, Wire};
    use crate::image::file::{Magic, MessageWriter};
    use crate::image::pagemap::encode_entry;
    use crate::image::proto::{PagemapHead, PstreeEntry};

    const PAGE: PageSize = PageSize::KIB_4;

    /// Images of pid 7, named twice, of which so many pages stayed with the dump.
    fn images(dir: &Path, pages: u64) -> ImageDir {
        let create = |name: &str| File::create(dir.join(name)).unwrap();
        let mut tree = MessageWriter::new(create("pstree.img"), Magic::Pstree).unwrap();
        for _ in 0..2 {
            tree.write(&PstreeEntry {
                pid: 7,
                ..PstreeEntry::default()
            })
            .unwrap();
        }
        let map = create(&Target::Process(7).pagemap_name());
        let mut map = MessageWriter::new(map, Magic::Pagemap).unwrap();
        map.write(&PagemapHead { pages_id: 1 }).unwrap();
        let range = PageRange::new(0x1000, 0x1000 + (pages << PAGE.shift()));
        let entry = encode_entry(range, PageFlags::LAZY, None, Wire::V2, PAGE);
        map.write(&entry).unwrap();
        ImageDir::open(dir, PAGE).unwrap()
    }

    #[test]
    fn who_waits_is_woken_for_what_it_waits_for_and_for_whole_batches() {
        let range = |first: u64, pages: u64| PageRange::new(first << 12, (first + pages) << 12);
        let plan = DrainPlan::new(PAGE, (0..100).map(|n| (7, range(10 + 2 * n, 1))));
        let mut state = State::new(plan);
        let arrives = |state: &mut State, n: u64| {
            let one = n..n + 1;
            state.arrived(7, range(10 + 2 * n, 1), &one)
        };
        let batch = PUSH_BYTES >> 12;
        let full = (0..2 * batch).filter(|n| arrives(&mut state, *n));
        assert_eq!(full.collect::<Vec<_>>(), [batch - 1, 2 * batch - 1]);
        state.awaited = vec![90..91, 50..52];
        assert!(!arrives(&mut state, 50), "the other one is missing");
        assert!(arrives(&mut state, 51));
        state.forget_awaited(&(50..52));
        assert!(arrives(&mut state, 90));
        state.forget_awaited(&(90..91));
        assert!(state.awaited.is_empty());
        let full = (2 * batch..100).filter(|n| arrives(&mut state, *n));
        assert_eq!(full.last(), Some(99), "the last one");
    }

    #[test]
    fn room_is_made_for_no_more_pages_than_a_dump_can_have() {
        let tmp = tempfile::tempdir().unwrap();
        let dump_memory = DumpMemory::new(&images(tmp.path(), 20), None).unwrap();
        assert_eq!(dump_memory.progress(), (PageCount(0), PageCount(20)));
        // A bit for each of these pages would take 64 TiB.
        let error = DumpMemory::new(&images(tmp.path(), 1 << 49), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Image);
        assert!(error.to_string().contains("pagemap-7.img"), "{error}");
    }
}
