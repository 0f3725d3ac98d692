//! The post-copy brain: every process's missing memory, and who is served next.
//!
//! The engine tells it what happens (faults, the kernel's events, answers) and asks what to do:
//!
//! ```text
//! handle_fault, handle_remap, ... -> Space -> next_urgent   (faults: first, round robin)
//! settle, gone, give_back         ->       -> next_stream   (background: when the window has room)
//!                                          -> next_local    (background from local images)
//! ```
//!
//! Nothing is lost: a page is asked for, on the way, installed or gone, and a page that was asked
//! for and did not come is asked for again.

use std::collections::{BTreeMap, VecDeque};

pub use super::answer::SpaceId;
use super::extents::Piece;
use super::space::{Class, FaultAnswer, Reach, Served, Space, Wanted};
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages to ask the source for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Who needs them.
    pub space: SpaceId,
    /// Whose they were in the dump.
    pub pid: u32,
    /// Their addresses in the dump.
    pub image: PageRange,
    /// Why.
    pub class: Class,
}

/// How a page came to be where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Brought from the source for this request.
    Fetched(Class),
    /// Installed from a local image.
    Local,
    /// No image had it.
    Zero,
    /// Unmapped or removed by its process, or its process ended.
    Gone,
    /// It could not be brought; its readers are told by SIGBUS.
    Poisoned,
}

/// Pages by the way they came.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, serde::Serialize)]
pub struct Counts {
    /// Pages that a thread waited for and that were fetched for it.
    pub fault: u64,
    /// Pages fetched along with a fault.
    pub around: u64,
    /// Pages brought by the background stream.
    pub stream: u64,
    /// Pages installed from local images.
    pub local: u64,
    /// Faults on pages that no image has.
    pub zero: u64,
    /// Pages that were unmapped, removed or whose process ended before they came.
    pub gone: u64,
    /// Pages lost with the source and poisoned.
    pub poisoned: u64,
}

impl Counts {
    /// Pages brought from the source.
    pub fn fetched(&self) -> u64 {
        self.fault + self.around + self.stream
    }

    /// Pages that are settled, whatever the way; zero pages were never missing.
    pub fn settled(&self) -> u64 {
        self.fetched() + self.local + self.gone + self.poisoned
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Planner {
    page: PageSize,
    spaces: BTreeMap<SpaceId, Space>,
    next_id: u32,
    /// Whose turn it is: urgent requests, stream, local images.
    turns: [VecDeque<SpaceId>; 3],
    counts: Counts,
    /// Pages that were missing at the start or came with a fork.
    total_pages: u64,
}

#[derive(Clone, Copy)]
enum Turn {
    Urgent = 0,
    Stream = 1,
    Local = 2,
}

impl Planner {
    /// A planner without processes.
    pub fn new(page: PageSize) -> Planner {
        Planner {
            page,
            spaces: BTreeMap::new(),
            next_id: 0,
            turns: Default::default(),
            counts: Counts::default(),
            total_pages: 0,
        }
    }

    /// A process to care for.
    pub fn add(&mut self, space: Space) -> SpaceId {
        let id = SpaceId(self.next_id);
        self.next_id += 1;
        self.total_pages += space.missing_bytes() >> self.page.shift();
        self.spaces.insert(id, space);
        self.turns.iter_mut().for_each(|turn| turn.push_back(id));
        id
    }

    /// The process of `id`, as long as it lives.
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(&id)
    }

    /// The process that the images call `pid`, and the children that it forked since.
    pub fn ids_of(&self, pid: u32) -> Vec<SpaceId> {
        let spaces = self.spaces.iter();
        let own = spaces.filter(|(_, space)| space.pid() == pid);
        own.map(|(id, _)| *id).collect()
    }

    /// All processes.
    pub fn spaces(&self) -> impl Iterator<Item = (SpaceId, &Space)> {
        self.spaces.iter().map(|(id, space)| (*id, space))
    }

    /// What only the source had at the start, by the images' pids.
    pub fn origins(&self) -> BTreeMap<u32, Vec<PageRange>> {
        let spaces = self.spaces.values();
        spaces
            .map(|space| (space.pid(), space.origins().to_vec()))
            .collect()
    }

    /// Whether every page of every process is installed or gone.
    pub fn is_complete(&self) -> bool {
        self.spaces.values().all(Space::is_complete)
    }

    /// Pages by way so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Pages that were missing at the start or came with a fork.
    pub fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// How many processes there have been.
    pub fn added(&self) -> u64 {
        u64::from(self.next_id)
    }

    /// Pages that are not there yet.
    pub fn missing_pages(&self) -> u64 {
        self.spaces
            .values()
            .map(|space| space.missing_bytes() >> self.page.shift())
            .sum()
    }

    /// A thread of `id` touched `addr`.
    pub fn handle_fault(
        &mut self,
        id: SpaceId,
        addr: Vaddr,
        reach: Reach,
        now_us: u64,
    ) -> FaultAnswer {
        self.spaces
            .get_mut(&id)
            .map_or(FaultAnswer::Zero, |space| space.fault(addr, reach, now_us))
    }

    /// `parent` forked.
    pub fn handle_fork(&mut self, parent: SpaceId) -> Option<SpaceId> {
        let child = self.spaces.get(&parent)?.fork();
        Some(self.add(child))
    }

    /// Memory moved. `served` sees the threads that must be woken.
    pub fn handle_remap(
        &mut self,
        id: SpaceId,
        from: PageRange,
        to: Vaddr,
        served: impl FnMut(Served),
    ) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.remap(from, to, served);
        }
    }

    /// The process ended.
    pub fn handle_exit(&mut self, id: SpaceId) {
        if let Some(space) = self.spaces.remove(&id) {
            self.counts.gone += space.missing_bytes() >> self.page.shift();
            self.turns
                .iter_mut()
                .for_each(|turn| turn.retain(|other| *other != id));
        }
    }

    /// The pages at `range` are settled in this `way`. `served` sees the threads that waited.
    pub fn settle(
        &mut self,
        id: SpaceId,
        range: PageRange,
        way: Way,
        mut served: impl FnMut(Served),
    ) {
        let Some(space) = self.spaces.get_mut(&id) else {
            return;
        };
        let mut waited = 0;
        let bytes = space.settle(range, |thread| {
            waited += 1;
            served(thread);
        });
        let pages = bytes >> self.page.shift();
        match way {
            Way::Fetched(Class::Stream) => self.counts.stream += pages,
            Way::Fetched(Class::Around) => self.counts.around += pages,
            Way::Fetched(Class::Fault | Class::Sequential) => {
                let awaited = pages.min(waited);
                self.counts.fault += awaited;
                self.counts.around += pages - awaited;
            }
            Way::Local => self.counts.local += pages,
            Way::Zero => self.counts.zero += 1,
            Way::Gone => self.counts.gone += pages,
            Way::Poisoned => self.counts.poisoned += pages,
        }
    }

    /// Where the first of the pages `image`, fetched for `id`, is to be installed now; `None` when
    /// all of them are there or gone.
    pub fn arrived(&self, id: SpaceId, image: PageRange) -> Option<Piece> {
        self.spaces.get(&id)?.arrived(image)
    }

    /// The source sends the pages `image` to `id` without having been asked.
    pub fn pushed(&mut self, id: SpaceId, image: PageRange) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.pushed(image);
        }
    }

    /// An answer ended before `image`, the rest of its request.
    pub fn give_back(&mut self, id: SpaceId, image: PageRange) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.give_back(image);
        }
    }

    /// The connection is gone with everything on the way.
    pub fn give_back_all(&mut self) {
        self.spaces.values_mut().for_each(Space::give_back_all);
    }

    /// The next request that a thread waits for, or that goes with one.
    pub fn next_urgent(&mut self) -> Option<Request> {
        self.next_request(Turn::Urgent, Space::next_urgent)
    }

    /// The next request of the background stream, of at most `chunk` bytes.
    pub fn next_stream(&mut self, chunk: u64, gap: u64) -> Option<Request> {
        self.next_request(Turn::Stream, |space| space.next_stream(chunk, gap))
    }

    /// The next piece to install from local images, of at most `chunk` bytes.
    pub fn next_local(&mut self, chunk: u64) -> Option<(SpaceId, Piece)> {
        self.next_in_turn(Turn::Local, |space| space.next_local(chunk))
    }

    /// The source is gone for good: what only it had stays missing until it is settled.
    pub fn lose(&mut self) {
        self.spaces.values_mut().for_each(Space::lose);
    }

    /// The source is back after all.
    pub fn recover(&mut self) {
        self.spaces.values_mut().for_each(Space::recover);
    }

    fn next_request(
        &mut self,
        turn: Turn,
        mut next: impl FnMut(&mut Space) -> Option<Wanted>,
    ) -> Option<Request> {
        let (space, (pid, wanted)) =
            self.next_in_turn(turn, |space| Some((space.pid(), next(space)?)))?;
        Some(Request {
            space,
            pid,
            image: wanted.image,
            class: wanted.class,
        })
    }

    fn next_in_turn<T>(
        &mut self,
        turn: Turn,
        mut next: impl FnMut(&mut Space) -> Option<T>,
    ) -> Option<(SpaceId, T)> {
        let turns = &mut self.turns[turn as usize];
        for _ in 0..turns.len() {
            let id = turns.pop_front()?;
            turns.push_back(id);
            let space = self.spaces.get_mut(&id)?;
            if let Some(found) = next(space) {
                return Some((id, found));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;
    const SINGLE: Reach = Reach {
        alone_bytes: 4096,
        sequential_bytes: 4096,
    };

    /// A planner with processes of 8 GiB each, all of it with the source.
    fn planner(processes: u32) -> (Planner, Vec<SpaceId>) {
        let mut planner = Planner::new(PAGE);
        let everything = [PageRange::new(1 << 32, 3 << 32)];
        let ids = (0..processes)
            .map(|pid| planner.add(Space::new(pid + 1, PAGE, everything, [])))
            .collect();
        (planner, ids)
    }

    #[test]
    fn a_storm_of_faults_does_not_starve_another_process() {
        let (mut planner, ids) = planner(2);
        for fault in 0..1000 {
            planner.handle_fault(ids[0], Vaddr((1 << 32) + fault * 0x10_0000), SINGLE, 0);
        }
        planner.handle_fault(ids[1], Vaddr(2 << 32), SINGLE, 0);
        let first_two = [planner.next_urgent(), planner.next_urgent()];
        assert!(
            first_two
                .iter()
                .flatten()
                .any(|request| request.space == ids[1])
        );
    }

    #[test]
    fn the_stream_goes_round_between_processes() {
        let (mut planner, ids) = planner(3);
        let order: Vec<_> = (0..6)
            .filter_map(|_| planner.next_stream(1 << 16, 32 << 10))
            .map(|request| request.space)
            .collect();
        assert_eq!(order, [ids[0], ids[1], ids[2], ids[0], ids[1], ids[2]]);
    }

    #[test]
    fn many_threads_on_one_page_ask_once() {
        let (mut planner, ids) = planner(1);
        for _ in 0..100 {
            let answer = planner.handle_fault(ids[0], Vaddr(5 << 30), SINGLE, 0);
            assert_eq!(answer, FaultAnswer::Wait);
        }
        assert!(planner.next_urgent().is_some());
        assert_eq!(planner.next_urgent(), None);
    }

    #[test]
    fn what_lies_far_in_front_of_an_awaited_page_is_asked_for_behind_it() {
        let (mut planner, ids) = planner(1);
        let reach = Reach {
            alone_bytes: 256 << 10,
            sequential_bytes: 4096,
        };
        let asked_for = |planner: &mut Planner, offset: u64| {
            planner.handle_fault(ids[0], Vaddr((1 << 32) + offset), reach, 0);
            let requests = std::iter::from_fn(|| planner.next_urgent());
            let kib = |addr: Vaddr| (addr.get() - (1 << 32)) >> 10;
            requests
                .map(|request| (kib(request.image.start()), kib(request.image.end())))
                .collect::<Vec<_>>()
        };
        assert_eq!(asked_for(&mut planner, 64 << 10), [(64, 256), (0, 64)]);
        // Far away, so that nobody seems to read in order.
        let near_the_front = (40 << 20) + (8 << 10);
        assert_eq!(
            asked_for(&mut planner, near_the_front),
            [(40 << 10, (40 << 10) + 256)]
        );
    }

    #[test]
    fn ranges_of_more_than_two_gibibytes_are_streamed_whole() {
        let (mut planner, ids) = planner(1);
        let mut bytes = 0;
        while let Some(request) = planner.next_stream(1 << 20, 32 << 10) {
            bytes += request.image.bytes();
            while let Some(piece) = planner.arrived(ids[0], request.image) {
                planner.settle(ids[0], piece.at, Way::Fetched(request.class), |_| {});
            }
        }
        assert_eq!(bytes, 8 << 30);
        assert!(planner.is_complete());
        assert_eq!(planner.counts().stream, 8 << 18);
    }
}
