//! The post-copy planner against a simulated kernel and source: whatever processes do with their
//! memory and however the source answers, every page that is still mapped ends with its own content.
//!
//! The model keeps each process page by page; the planner keeps runs. A page of the model says what
//! it must hold in the end; each fill is compared with it at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pageferry::lazy::planner::{Planner, Request, SpaceId, Way};
use pageferry::lazy::space::{Class, FaultAnswer, Reach, Space};
use pageferry::units::{PageRange, PageSize, Vaddr};
use proptest::prelude::*;

const PAGE: PageSize = PageSize::KIB_4;
const PAGES: u64 = 96;

/// Largest request of the simulated background stream.
const CHUNK: u64 = 8 << 12;
const GAP: u64 = 2 << 12;

/// One page of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Page {
    /// Missing; must be filled with this page of the dump.
    Missing(u64),
    /// Filled with this page of the dump.
    Filled(u64),
    /// Zero, or the process's own new content: nothing may be installed.
    Own,
}

type Memory = BTreeMap<u64, Page>;

#[derive(Clone, Debug)]
enum Operation {
    Fault {
        process: usize,
        page: u64,
    },
    Fork {
        process: usize,
    },
    Move {
        process: usize,
        from: u64,
        to: u64,
        pages: u64,
    },
    Remove {
        process: usize,
        from: u64,
        pages: u64,
    },
    Unmap {
        process: usize,
        from: u64,
        pages: u64,
    },
    Exit {
        process: usize,
    },
    SendStream,
    /// The source answers the oldest request, with so many pages at most.
    Answer {
        pages: u64,
    },
    ConnectionLost,
    LocalStep,
    /// The local images cannot give these pages now.
    LocalFails {
        process: usize,
        page: u64,
        pages: u64,
    },
    /// They can again, so many of them.
    LocalHeals {
        process: usize,
        pages: u64,
    },
    /// The process can take no page for a while.
    Pause {
        process: usize,
    },
    /// All of them can again.
    Resume,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let process = 0..4usize;
    let one = prop_oneof![
        8 => (process.clone(), 0..PAGES).prop_map(|(process, page)| Operation::Fault { process, page }),
        1 => process.clone().prop_map(|process| Operation::Fork { process }),
        2 => (process.clone(), 0..PAGES, 0..PAGES, 1..24u64)
            .prop_map(|(process, from, to, pages)| Operation::Move { process, from, to, pages }),
        2 => (process.clone(), 0..PAGES, 1..12u64)
            .prop_map(|(process, from, pages)| Operation::Remove { process, from, pages }),
        2 => (process.clone(), 0..PAGES, 1..12u64)
            .prop_map(|(process, from, pages)| Operation::Unmap { process, from, pages }),
        1 => process.clone().prop_map(|process| Operation::Exit { process }),
        2 => (process.clone(), 44..PAGES, 1..8u64)
            .prop_map(|(process, page, pages)| Operation::LocalFails { process, page, pages }),
        2 => (process.clone(), 1..4u64)
            .prop_map(|(process, pages)| Operation::LocalHeals { process, pages }),
        1 => process.prop_map(|process| Operation::Pause { process }),
        1 => Just(Operation::Resume),
        6 => Just(Operation::SendStream),
        8 => (1..12u64).prop_map(|pages| Operation::Answer { pages }),
        1 => Just(Operation::ConnectionLost),
        3 => Just(Operation::LocalStep),
    ];
    prop::collection::vec(one, 1..120)
}

/// The simulated world.
struct World {
    planner: Planner,
    memories: Vec<(SpaceId, Memory)>,
    on_the_way: VecDeque<Request>,
    paused: BTreeSet<SpaceId>,
    /// Pages that the source was asked for.
    asked_pages: u64,
    now_us: u64,
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::new(first << 12, (first + count) << 12)
}

impl World {
    /// Two processes whose memory is partly with the source and partly local, with gaps.
    fn new() -> World {
        let remote = [pages(2, 30), pages(32, 10), pages(60, 20)];
        let local = [pages(45, 10), pages(85, 5)];
        World::of(&remote, &local)
    }

    /// The same in single pages, of which every second one is missing.
    fn fragmented() -> World {
        let every_second = |first: u64, end: u64| -> Vec<PageRange> {
            (first..end).step_by(2).map(|page| pages(page, 1)).collect()
        };
        World::of(&every_second(2, 60), &every_second(61, PAGES))
    }

    /// Two processes of which the source and local images have these pages.
    fn of(remote: &[PageRange], local: &[PageRange]) -> World {
        let mut planner = Planner::new(PAGE);
        let mut memories = Vec::new();
        for pid in [10, 20] {
            let mut memory: Memory = (0..PAGES).map(|page| (page, Page::Own)).collect();
            for range in remote.iter().chain(local) {
                let first = range.start().get() >> 12;
                memory.extend(
                    (first..first + (range.bytes() >> 12)).map(|page| (page, Page::Missing(page))),
                );
            }
            let (remote, local) = (remote.iter().copied(), local.iter().copied());
            let id = planner.add(Space::new(pid, PAGE, remote, local));
            memories.push((id, memory));
        }
        World {
            planner,
            memories,
            on_the_way: VecDeque::new(),
            paused: BTreeSet::new(),
            asked_pages: 0,
            now_us: 0,
        }
    }

    fn pick(&self, process: usize) -> Option<usize> {
        (!self.memories.is_empty()).then(|| process % self.memories.len())
    }

    fn apply(&mut self, operation: &Operation) {
        self.now_us += 10;
        match *operation {
            Operation::Fault { process, page } => self.fault(process, page),
            Operation::Fork { process } => {
                let Some(index) = self.pick(process) else {
                    return;
                };
                let (id, memory) = self.memories[index].clone();
                if self.memories.len() < 6 {
                    let child = self.planner.handle_fork(id).expect("the parent lives");
                    self.memories.push((child, memory));
                }
            }
            Operation::Move {
                process,
                from,
                to,
                pages: count,
            } => self.relocate(process, from, to, count),
            Operation::Remove {
                process,
                from,
                pages: count,
            } => self.lose_pages(process, from, count, |memory, page| {
                memory.entry(page).and_modify(|page| *page = Page::Own);
            }),
            Operation::Unmap {
                process,
                from,
                pages: count,
            } => self.lose_pages(process, from, count, |memory, page| {
                memory.remove(&page);
            }),
            Operation::Exit { process } => {
                let Some(index) = self.pick(process) else {
                    return;
                };
                let (id, _) = self.memories.remove(index);
                self.planner.handle_exit(id);
            }
            Operation::SendStream => {
                if let Some(next) = self.planner.next_stream(CHUNK, GAP) {
                    self.send(next);
                }
            }
            Operation::Answer { pages } => self.answer(pages),
            Operation::ConnectionLost => {
                self.on_the_way.clear();
                self.planner.give_back_all();
            }
            Operation::LocalStep => self.local_step(),
            Operation::LocalFails {
                process,
                page,
                pages: count,
            } => {
                if let Some(index) = self.pick(process) {
                    let id = self.memories[index].0;
                    self.planner.set_unreadable(id, pages(page, count));
                }
            }
            Operation::LocalHeals { process, pages } => {
                if let Some(index) = self.pick(process) {
                    let id = self.memories[index].0;
                    let pid = self.planner.space(id).expect("it lives").pid();
                    self.heal(pid, pages);
                }
            }
            Operation::Pause { process } => {
                if let Some(index) = self.pick(process) {
                    let id = self.memories[index].0;
                    self.planner.pause(id);
                    self.paused.insert(id);
                }
            }
            Operation::Resume => {
                for id in std::mem::take(&mut self.paused) {
                    self.planner.resume(id);
                }
            }
        }
        while let Some(request) = self.planner.next_urgent() {
            assert_ne!(request.class, Class::Stream);
            self.send(request);
        }
    }

    fn send(&mut self, request: Request) {
        assert!(!self.paused.contains(&request.space), "it is paused");
        self.asked_pages += request.image.bytes() >> 12;
        self.planner.sent(&request);
        self.on_the_way.push_back(request);
    }

    /// The first unreadable pages of the family of `pid` can be read after all, one after the other.
    fn heal(&mut self, pid: u32, count: u64) {
        for _ in 0..count {
            let Some((_, piece)) = self.planner.first_unreadable(pid, pages(0, PAGES)) else {
                return;
            };
            let image = PageRange::new(piece.image.get(), piece.image.get() + (1 << 12));
            self.install_in_family(pid, image, Way::Local);
        }
    }

    /// What has come for one is for all that lack it.
    fn install_in_family(&mut self, pid: u32, image: PageRange, way: Way) {
        let mut next = self.planner.next_sibling(pid, None);
        while let Some(id) = next {
            if self.planner.shares(id, image) {
                while let Some(piece) = self.planner.arrived(id, image) {
                    self.fill(id, piece.at, piece.image, way);
                }
            }
            next = self.planner.next_sibling(pid, Some(id));
        }
    }

    /// A process gives pages back, which `lose` does to each of them in the model.
    fn lose_pages(
        &mut self,
        process: usize,
        from: u64,
        count: u64,
        lose: impl Fn(&mut Memory, u64),
    ) {
        let Some(index) = self.pick(process) else {
            return;
        };
        let (id, memory) = &mut self.memories[index];
        (from..from + count).for_each(|page| lose(memory, page));
        self.planner
            .settle(*id, pages(from, count), Way::Gone, |_| {});
    }

    fn fault(&mut self, process: usize, page: u64) {
        let Some(index) = self.pick(process) else {
            return;
        };
        let (id, memory) = &self.memories[index];
        let id = *id;
        // Every size in turn, from a single page on.
        let reach = Reach {
            alone_bytes: 1 << (12 + self.now_us / 10 % 4),
            sequential_bytes: CHUNK,
        };
        let Some(state) = memory.get(&page).copied() else {
            return;
        };
        match self
            .planner
            .handle_fault(id, Vaddr((page << 12) + 123), reach, self.now_us)
        {
            FaultAnswer::Zero => {
                assert!(
                    !matches!(state, Page::Missing(_)),
                    "page {page} must not be filled with zeros"
                );
                self.planner.settle(id, pages(page, 1), Way::Zero, |_| {});
            }
            FaultAnswer::Wait => assert!(
                matches!(state, Page::Missing(_)),
                "nobody brings page {page}"
            ),
            FaultAnswer::Local(piece) => {
                assert_eq!(
                    piece.at.start(),
                    Vaddr(page << 12),
                    "the faulting page comes first"
                );
                self.fill(id, piece.at, piece.image, Way::Local);
            }
        }
    }

    fn relocate(&mut self, process: usize, from: u64, to: u64, count: u64) {
        let overlap = from < to + count && to < from + count;
        let Some(index) = self.pick(process).filter(|_| !overlap) else {
            return;
        };
        let (id, memory) = &mut self.memories[index];
        memory.retain(|page, _| !(to..to + count).contains(page));
        let moved: Vec<_> = (from..from + count)
            .filter_map(|page| memory.remove_entry(&page))
            .collect();
        memory.extend(
            moved
                .into_iter()
                .map(|(page, state)| (page - from + to, state)),
        );
        self.planner
            .settle(*id, pages(to, count), Way::Gone, |_| {});
        self.planner
            .handle_remap(*id, pages(from, count), Vaddr(to << 12), |_| {});
    }

    /// The source answers the oldest request with `count` pages at most; the rest is asked again.
    fn answer(&mut self, count: u64) {
        let Some(request) = self.on_the_way.pop_front() else {
            return;
        };
        let asked = request.image.bytes() >> 12;
        let first = request.image.start().get() >> 12;
        let got = count.min(asked);
        let image = pages(first, got);
        // Whoever asked comes first.
        let way = Way::Fetched(request.class);
        self.planner.pushed(request.space, image);
        while let Some(piece) = self.planner.arrived(request.space, image) {
            self.fill(request.space, piece.at, piece.image, way);
        }
        self.install_in_family(request.pid, image, way);
        if got < asked {
            self.planner
                .give_back(request.pid, pages(first + got, asked - got));
        }
    }

    fn local_step(&mut self) {
        if let Some((id, piece)) = self.planner.next_local(CHUNK) {
            assert!(!self.paused.contains(&id), "it is paused");
            self.fill(id, piece.at, piece.image, Way::Local);
        }
    }

    fn fill(&mut self, id: SpaceId, at: PageRange, image: Vaddr, way: Way) {
        let index = self
            .memories
            .iter()
            .position(|(other, _)| *other == id)
            .expect("a living process");
        let memory = &mut self.memories[index].1;
        for offset in 0..at.bytes() >> 12 {
            let page = (at.start().get() >> 12) + offset;
            let content = (image.get() >> 12) + offset;
            let state = memory.get_mut(&page).expect("a mapped page");
            assert_eq!(
                *state,
                Page::Missing(content),
                "page {page} is filled with page {content}"
            );
            *state = Page::Filled(content);
        }
        self.planner.settle(id, at, way, |_| {});
    }

    /// Lets everything come that is still missing.
    fn drain(&mut self) {
        self.apply(&Operation::Resume);
        for _ in 0..10_000 {
            for pid in [10, 20] {
                self.heal(pid, 1);
            }
            if self.planner.is_complete() {
                return;
            }
            self.apply(&Operation::SendStream);
            self.apply(&Operation::LocalStep);
            self.apply(&Operation::Answer { pages: 3 });
        }
        panic!("pages are missing that nobody brings: {:?}", self.memories);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_page_ends_with_its_own_content(operations in operations(), fragmented: bool) {
        let mut world = match fragmented {
            true => World::fragmented(),
            false => World::new(),
        };
        for operation in &operations {
            world.apply(operation);
        }
        world.drain();
        for (id, memory) in &world.memories {
            for (page, state) in memory {
                prop_assert!(!matches!(state, Page::Missing(_)), "page {} of {:?} never came", page, id);
            }
        }
        prop_assert_eq!(world.planner.missing_pages(), 0);
        prop_assert_eq!(world.planner.counts().settled(), world.planner.total_pages());
    }
}

/// A process forks children all the time, each of which reads a page and ends after a while.
fn storm(forks: u64, lifetime: usize, stream_every: u64) -> World {
    let mut world = World::new();
    let parent = world.memories[0].0;
    world.planner.handle_exit(world.memories.remove(1).0);
    let mut children = VecDeque::new();
    for fork in 0..forks {
        let memory = world.memories[0].1.clone();
        let child = world.planner.handle_fork(parent).expect("the parent lives");
        world.memories.push((child, memory));
        children.push_back(child);
        world.apply(&Operation::Fault {
            process: world.memories.len() - 1,
            page: fork * 7 % PAGES,
        });
        if fork % stream_every == 0 {
            world.apply(&Operation::SendStream);
        }
        world.apply(&Operation::Answer { pages: PAGES });
        if children.len() > lifetime {
            let ended = children.pop_front().expect("a child");
            world.memories.retain(|(id, _)| *id != ended);
            world.planner.handle_exit(ended);
        }
    }
    world
}

#[test]
fn children_that_end_soon_cost_the_source_nothing() {
    let alone = storm(0, 0, 1).planner.total_pages();
    for lifetime in [0, 1, 5, 12] {
        let mut world = storm(500, lifetime, 9);
        let living = world.memories.len() as u64;
        assert!(living <= lifetime as u64 + 1, "{living} live");
        assert_eq!(world.planner.total_pages(), alone, "pages count once");
        world.drain();
        // All of it is asked for once; a little twice, as it has not been sent for when a child is forked.
        let remote = 2 * (30 + 10 + 20);
        assert!(
            world.asked_pages * 10 <= remote * 11 / 2 + CHUNK,
            "{} pages of {} were asked for with {lifetime} children",
            world.asked_pages,
            remote / 2
        );
        assert_eq!(world.planner.counts().settled(), alone);
    }
}

#[test]
fn many_children_get_what_they_wait_for() {
    // More than get all that comes.
    let mut world = storm(300, 60, 9);
    assert_eq!(world.memories.len(), 61);
    world.drain();
    for (id, memory) in &world.memories {
        let missing = memory.values().any(|page| matches!(page, Page::Missing(_)));
        assert!(!missing, "{id:?} lacks a page");
    }
}

#[test]
fn the_oldest_child_is_counted_when_its_parent_has_ended() {
    let mut world = World::new();
    let (parent, total) = (world.memories[0].0, world.planner.total_pages());
    for _ in 0..2 {
        world.apply(&Operation::Fork { process: 0 });
    }
    let copied = world.planner.counts().copied;
    world.memories.remove(0);
    world.planner.handle_exit(parent);
    assert_eq!(world.planner.total_pages(), total);
    assert_eq!(world.planner.counts().gone, 0, "somebody still needs them");
    world.drain();
    assert_eq!(world.planner.counts().settled(), total);
    assert!(world.planner.counts().copied > copied, "the other child");
}

/// Runs of single pages, as many as a process may have mappings and more.
const FRAGMENTS: u64 = 100_000;

/// Every second page missing, half of them with the source and half in local images.
fn fragments() -> (Vec<PageRange>, Vec<PageRange>) {
    let run = |n: u64| pages(16 + 2 * n, 1);
    let (remote, local) = (0..FRAGMENTS / 2, FRAGMENTS / 2..FRAGMENTS);
    (remote.map(run).collect(), local.map(run).collect())
}

#[test]
fn each_fragment_is_asked_for_and_installed_once() {
    let (remote, local) = fragments();
    let mut planner = Planner::new(PAGE);
    let id = planner.add(Space::new(1, PAGE, remote, local));
    let mut steps = 0;
    while let Some(request) = planner.next_stream(64 << 10, 32 << 10) {
        let piece = planner.arrived(id, request.image).expect("it is missing");
        planner.settle(id, piece.at, Way::Fetched(request.class), |_| {});
        steps += 1;
    }
    while let Some((id, piece)) = planner.next_local(64 << 10) {
        planner.settle(id, piece.at, Way::Local, |_| {});
        steps += 1;
    }
    assert_eq!(steps, FRAGMENTS);
    assert!(planner.is_complete());
    assert_eq!(planner.counts().settled(), FRAGMENTS);
}

#[test]
fn fragments_move_fork_and_vanish_as_whole_memory_does() {
    let (remote, local) = fragments();
    let mut planner = Planner::new(PAGE);
    let id = planner.add(Space::new(1, PAGE, remote, local));
    // Moved piece by piece, up and down again.
    let (low, high) = (16, 16 + 4 * FRAGMENTS);
    for (from, to) in [(low, high), (high, low)] {
        for block in 0..2 * FRAGMENTS / 64 {
            let (from, to) = (from + block * 64, (to + block * 64) << 12);
            planner.handle_remap(id, pages(from, 64), Vaddr(to), |_| {});
        }
    }
    assert_eq!(planner.missing_pages(), FRAGMENTS);
    let child = planner.handle_fork(id).expect("its parent lives");
    for n in 0..FRAGMENTS {
        planner.settle(child, pages(16 + 2 * n, 1), Way::Gone, |_| {});
    }
    assert_eq!(planner.missing_pages(), FRAGMENTS);
    assert_eq!(planner.counts().gone, 0, "its parent has them still");
    planner.handle_exit(id);
    assert_eq!(planner.counts().gone, FRAGMENTS);
    assert!(planner.is_complete());
}

#[test]
fn a_fault_among_fragments_brings_some_of_its_neighbours() {
    let (remote, local) = fragments();
    let mut planner = Planner::new(PAGE);
    let id = planner.add(Space::new(1, PAGE, remote, local));
    let reach = Reach {
        alone_bytes: 256 << 10,
        sequential_bytes: 256 << 10,
    };
    planner.handle_fault(id, Vaddr(2000 << 12), reach, 0);
    let asked: Vec<Request> = std::iter::from_fn(|| planner.next_urgent()).collect();
    assert_eq!(
        asked[0].image,
        pages(2000, 1),
        "what is awaited comes first"
    );
    assert_eq!(asked[0].class, Class::Fault);
    assert!((8..=17).contains(&asked.len()), "{} requests", asked.len());
    assert!(
        asked[1..]
            .iter()
            .all(|request| request.class == Class::Around)
    );
}
