//! The simulated kernel and source: processes whose memory is kept page by page.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pageferry::lazy::planner::{PageOutcome, Planner, Request, SpaceId};
use pageferry::lazy::space::{Class, FaultAnswer, FetchLimits, Space};
use pageferry::units::{PageRange, PageSize, Vaddr};

/// Pages of one process.
pub(crate) const PAGES: u64 = 96;

pub(crate) const PAGE: PageSize = PageSize::KIB_4;

/// Largest request of the simulated background stream.
pub(crate) const CHUNK: u64 = 8 << 12;
const GAP: u64 = 2 << 12;

/// One page of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Page {
    /// Missing; must be filled with this page of the dump.
    Missing(u64),
    /// Filled with this page of the dump.
    Filled(u64),
    /// Zero, or the process's own new content: nothing may be installed.
    Own,
}

pub(crate) type Memory = BTreeMap<u64, Page>;

#[derive(Clone, Debug)]
pub(crate) enum Operation {
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

/// The simulation.
pub(crate) struct Simulation {
    pub(crate) planner: Planner,
    pub(crate) memories: Vec<(SpaceId, Memory)>,
    pub(crate) on_the_way: VecDeque<Request>,
    pub(crate) paused: BTreeSet<SpaceId>,
    /// Pages that the source was asked for.
    pub(crate) asked_pages: u64,
    pub(crate) now_us: u64,
}

pub(crate) fn pages(first: u64, count: u64) -> PageRange {
    PageRange::new(first << 12, (first + count) << 12)
}

impl Simulation {
    /// Two processes whose memory is partly with the source and partly local, with gaps.
    pub(crate) fn new() -> Simulation {
        let remote = [pages(2, 30), pages(32, 10), pages(60, 20)];
        let local = [pages(45, 10), pages(85, 5)];
        Simulation::of(&remote, &local)
    }

    /// The same in single pages, of which every second one is missing.
    pub(crate) fn fragmented() -> Simulation {
        let every_second = |first: u64, end: u64| -> Vec<PageRange> {
            (first..end).step_by(2).map(|page| pages(page, 1)).collect()
        };
        Simulation::of(&every_second(2, 60), &every_second(61, PAGES))
    }

    /// Two processes of which the source and local images have these pages.
    pub(crate) fn of(remote: &[PageRange], local: &[PageRange]) -> Simulation {
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
        Simulation {
            planner,
            memories,
            on_the_way: VecDeque::new(),
            paused: BTreeSet::new(),
            asked_pages: 0,
            now_us: 0,
        }
    }

    pub(crate) fn pick(&self, process: usize) -> Option<usize> {
        (!self.memories.is_empty()).then(|| process % self.memories.len())
    }

    /// The process that an operation means by its number.
    fn picked(&self, process: usize) -> Option<SpaceId> {
        Some(self.memories[self.pick(process)?].0)
    }

    pub(crate) fn apply(&mut self, operation: &Operation) {
        self.now_us += 10;
        match *operation {
            Operation::Fault { .. }
            | Operation::Fork { .. }
            | Operation::Move { .. }
            | Operation::Remove { .. }
            | Operation::Unmap { .. }
            | Operation::Exit { .. } => self.apply_of_process(operation),
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
                if let Some(id) = self.picked(process) {
                    self.planner.set_unreadable(id, pages(page, count));
                }
            }
            Operation::LocalHeals { process, pages } => {
                if let Some(id) = self.picked(process) {
                    let pid = self.planner.space(id).expect("it lives").pid();
                    self.heal(pid, pages);
                }
            }
            Operation::Pause { process } => {
                if let Some(id) = self.picked(process) {
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

    /// What a process does, or what its userfaultfd tells of it.
    fn apply_of_process(&mut self, operation: &Operation) {
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
            _ => unreachable!("`apply` carries it out"),
        }
    }

    pub(crate) fn send(&mut self, request: Request) {
        assert!(!self.paused.contains(&request.space), "it is paused");
        self.asked_pages += request.image.bytes() >> 12;
        self.planner.sent(&request);
        self.on_the_way.push_back(request);
    }

    /// The first unreadable pages of the family of `pid` can be read after all, one after the other.
    pub(crate) fn heal(&mut self, pid: u32, count: u64) {
        for _ in 0..count {
            let Some((_, piece)) = self.planner.first_unreadable(pid, pages(0, PAGES)) else {
                return;
            };
            let image = PageRange::new(piece.image.get(), piece.image.get() + (1 << 12));
            self.install_in_family(pid, image, PageOutcome::Local);
        }
    }

    /// What has come for one is for all that lack it.
    pub(crate) fn install_in_family(&mut self, pid: u32, image: PageRange, outcome: PageOutcome) {
        let mut next = self.planner.next_sibling(pid, None);
        while let Some(id) = next {
            if self.planner.shares(id, image) {
                while let Some(piece) = self.planner.arrived(id, image) {
                    self.fill(id, piece.at, piece.image, outcome);
                }
            }
            next = self.planner.next_sibling(pid, Some(id));
        }
    }

    /// A process gives pages back, which `lose` does to each of them in the model.
    pub(crate) fn lose_pages(
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
            .settle(*id, pages(from, count), PageOutcome::Gone, |_| {});
    }

    pub(crate) fn fault(&mut self, process: usize, page: u64) {
        let Some(index) = self.pick(process) else {
            return;
        };
        let (id, memory) = &self.memories[index];
        let id = *id;
        // Every size in turn, from a single page on.
        let limits = FetchLimits {
            alone_bytes: 1 << (12 + self.now_us / 10 % 4),
            sequential_bytes: CHUNK,
        };
        let Some(state) = memory.get(&page).copied() else {
            return;
        };
        match self
            .planner
            .handle_fault(id, Vaddr((page << 12) + 123), limits, self.now_us)
        {
            FaultAnswer::Zero => {
                assert!(
                    !matches!(state, Page::Missing(_)),
                    "page {page} must not be filled with zeros"
                );
                self.planner
                    .settle(id, pages(page, 1), PageOutcome::Zero, |_| {});
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
                self.fill(id, piece.at, piece.image, PageOutcome::Local);
            }
        }
    }

    pub(crate) fn relocate(&mut self, process: usize, from: u64, to: u64, count: u64) {
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
            .settle(*id, pages(to, count), PageOutcome::Gone, |_| {});
        self.planner
            .handle_remap(*id, pages(from, count), Vaddr(to << 12), |_| {});
    }

    /// The source answers the oldest request with `count` pages at most; the rest is asked again.
    pub(crate) fn answer(&mut self, count: u64) {
        let Some(request) = self.on_the_way.pop_front() else {
            return;
        };
        let asked = request.image.bytes() >> 12;
        let first = request.image.start().get() >> 12;
        let got = count.min(asked);
        let image = pages(first, got);
        // Whoever asked comes first.
        let outcome = PageOutcome::Fetched(request.class);
        self.planner.pushed(request.space, image);
        while let Some(piece) = self.planner.arrived(request.space, image) {
            self.fill(request.space, piece.at, piece.image, outcome);
        }
        self.install_in_family(request.pid, image, outcome);
        if got < asked {
            self.planner
                .give_back(request.pid, pages(first + got, asked - got));
        }
    }

    pub(crate) fn local_step(&mut self) {
        if let Some((id, piece)) = self.planner.next_local(CHUNK) {
            assert!(!self.paused.contains(&id), "it is paused");
            self.fill(id, piece.at, piece.image, PageOutcome::Local);
        }
    }

    pub(crate) fn fill(&mut self, id: SpaceId, at: PageRange, image: Vaddr, outcome: PageOutcome) {
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
        self.planner.settle(id, at, outcome, |_| {});
    }

    /// Lets everything come that is still missing.
    pub(crate) fn drain(&mut self) {
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
