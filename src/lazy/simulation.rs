//! A post-copy without processes: touches of memory, a policy, and a link that is computed.
//!
//! ```text
//! touches (a trace, or made up) -> Planner with a policy -> requests -> link -> answers -> Planner
//! ```
//!
//! The link carries one answer after the other at a fixed rate, half a round trip after it was asked for and half a round
//! trip before it arrives. Touches follow each other as if one thread made all of them: each comes the given time
//! after the one before was served. So two policies can be compared on the same touches, and a run is always the
//! same. When the stream yields to faults is not part of it: that takes a real source.
//!
//! ```
//! use pageferry::lazy::policy::{ADAPTIVE, RECORDING};
//! use pageferry::lazy::simulation::{Link, Simulation, Touch};
//! use pageferry::units::{PageRange, PageSize, Vaddr};
//!
//! // 4 MiB of one process, of which a thread reads every page, one each 20 µs.
//! let memory = [(7, vec![PageRange::new(0x40_0000, 0x80_0000)])];
//! let link = Link { round_trip_us: 1000, bytes_per_s: 100 << 20 };
//! let waits = |policy| {
//!     let mut simulation = Simulation::new(policy, PageSize::KIB_4, &memory, link);
//!     for page in 0..1024 {
//!         let address = Vaddr(0x40_0000 + page * 4096);
//!         simulation.touch(Touch { after_us: 20, pid: 7, address });
//!     }
//!     simulation.finish().waits
//! };
//! // Where each fault brings its page alone, it still meets the stream.
//! assert!(waits(&ADAPTIVE) <= waits(&RECORDING));
//! ```

use std::collections::{BTreeMap, VecDeque};

use super::answer::Class;
use super::planner::{PageOutcome, Planner, Request, SpaceId};
use super::policy::{FaultPath, Policy};
use super::space::{FaultAnswer, Space};
use crate::units::{PageRange, PageSize, Vaddr};

/// Bytes that the stream asks for at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// Over what the stream goes on rather than asking again, bytes.
const GAP_BYTES: u64 = 32 << 10;

/// A source that answers sooner than this, µs, is nearby for the policy.
const NEAR_US: u64 = 300;

/// What lies between process and source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// From a request to the first byte of its answer, µs.
    pub round_trip_us: u64,
    /// Bytes a second, at least 1.
    pub bytes_per_s: u64,
}

impl Link {
    fn transfer_us(self, bytes: u64) -> u64 {
        bytes.saturating_mul(1_000_000) / self.bytes_per_s.max(1)
    }

    /// Bytes that keep it full.
    fn window_bytes(self) -> u64 {
        let product = self.bytes_per_s.saturating_mul(self.round_trip_us) / 1_000_000;
        product.saturating_add(CHUNK_BYTES)
    }
}

/// A thread touches memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Touch {
    /// How long after the touch before was served, µs.
    pub after_us: u64,
    /// Whose memory it is.
    pub pid: u32,
    /// What it touches.
    pub address: Vaddr,
}

/// What a policy has asked the source for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sent {
    /// When, µs from the start.
    pub time_us: u64,
    /// The request.
    pub request: Request,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Touches that had to wait for their page.
    pub waits: u64,
    /// How long they waited together, µs.
    pub waited_us: u64,
    /// When the last page came, µs from the start.
    pub complete_us: u64,
    /// All requests, in order.
    pub sent: Vec<Sent>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Simulation {
    policy: &'static dyn Policy,
    page: PageSize,
    link: Link,
    planner: Planner,
    ids: BTreeMap<u32, SpaceId>,
    missing_bytes: u64,
    now_us: u64,
    /// Until when the link is busy.
    busy_us: u64,
    /// What is on the way, with the time when it arrives.
    on_the_way: VecDeque<(u64, Request)>,
    streamed_bytes: u64,
    outcome: Outcome,
}

impl Simulation {
    /// Processes that miss all of `memory`, by pid, with `policy`. Their ranges are disjoint and by address.
    pub fn new(
        policy: &'static dyn Policy,
        page: PageSize,
        memory: &[(u32, Vec<PageRange>)],
        link: Link,
    ) -> Simulation {
        let mut planner = Planner::with_policy(page, policy);
        let mut ids = BTreeMap::new();
        for (pid, ranges) in memory {
            let space = Space::new(*pid, page, ranges.iter().copied(), []);
            ids.insert(*pid, planner.add(space));
        }
        Simulation {
            policy,
            page,
            link,
            missing_bytes: planner.total_pages() << page.shift(),
            planner,
            ids,
            now_us: 0,
            busy_us: 0,
            on_the_way: VecDeque::new(),
            streamed_bytes: 0,
            outcome: Outcome {
                waits: 0,
                waited_us: 0,
                complete_us: 0,
                sent: Vec::new(),
            },
        }
    }

    /// Lets the pages `order` of `pid` come before all others, in this order: a working set. Returns how many of them are
    /// missing.
    pub fn stream_first(&mut self, pid: u32, order: Vec<PageRange>) -> u64 {
        let id = self.ids.get(&pid).copied();
        id.map_or(0, |id| self.planner.stream_first(id, order))
    }

    /// Lets time pass until `touch`, and serves it. Returns how long it waited, µs: 0 if its page was there, or is none of
    /// the memory.
    pub fn touch(&mut self, touch: Touch) -> u64 {
        self.pass_until(self.now_us.saturating_add(touch.after_us));
        let start = self.page.floor(touch.address.get());
        let page = PageRange::new(start, start.saturating_add(self.page.bytes()));
        let Some(id) = self.ids.get(&touch.pid).copied() else {
            return 0;
        };
        if !self.lacks(id, page) {
            return 0;
        }
        let path = FaultPath::SharedConnection {
            near: self.link.round_trip_us < NEAR_US,
            chunk_bytes: CHUNK_BYTES,
        };
        let limits = self
            .policy
            .fetch_limits(path, self.page, self.missing_bytes, false);
        let answer = self
            .planner
            .handle_fault(id, touch.address, limits, self.now_us);
        if answer != FaultAnswer::Wait {
            return 0;
        }
        while let Some(request) = self.planner.next_urgent() {
            self.send(request);
        }
        let since_us = self.now_us;
        while self.lacks(id, page) && self.arrive() {}
        let waited_us = self.now_us - since_us;
        self.outcome.waits += 1;
        self.outcome.waited_us += waited_us;
        waited_us
    }

    /// Lets everything come that is still missing.
    pub fn finish(mut self) -> Outcome {
        self.stream();
        while self.arrive() {}
        self.outcome.complete_us = self.now_us;
        self.outcome
    }

    /// How the pages came that have come so far.
    pub fn planner(&self) -> &Planner {
        &self.planner
    }

    fn lacks(&self, id: SpaceId, range: PageRange) -> bool {
        let space = self.planner.space(id);
        space.is_some_and(|space| space.lacks(range))
    }

    fn pass_until(&mut self, until_us: u64) {
        self.stream();
        while let Some((arrives_us, _)) = self.on_the_way.front()
            && *arrives_us <= until_us
        {
            self.arrive();
        }
        self.now_us = self.now_us.max(until_us);
    }

    /// The next answer arrives; says whether there was one.
    fn arrive(&mut self) -> bool {
        let Some((arrives_us, request)) = self.on_the_way.pop_front() else {
            return false;
        };
        self.now_us = self.now_us.max(arrives_us);
        if request.class == Class::Stream {
            self.streamed_bytes -= request.image.bytes();
        }
        let (id, outcome) = (request.space, PageOutcome::Fetched(request.class));
        while let Some(piece) = self.planner.arrived(id, request.image) {
            self.planner.settle(id, piece.at, outcome, |_| {});
        }
        self.stream();
        true
    }

    /// Asks for what the window has room for.
    fn stream(&mut self) {
        while self.streamed_bytes < self.link.window_bytes()
            && let Some(request) = self.planner.next_stream(CHUNK_BYTES, GAP_BYTES)
        {
            self.streamed_bytes += request.image.bytes();
            self.send(request);
        }
    }

    fn send(&mut self, request: Request) {
        let half_us = self.link.round_trip_us / 2;
        self.busy_us =
            self.busy_us.max(self.now_us + half_us) + self.link.transfer_us(request.image.bytes());
        self.on_the_way.push_back((self.busy_us + half_us, request));
        self.planner.sent(&request);
        self.outcome.sent.push(Sent {
            time_us: self.now_us,
            request,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lazy::policy::{ADAPTIVE, RECORDING};

    const LINK: Link = Link {
        round_trip_us: 1000,
        bytes_per_s: 32 << 20,
    };

    fn memory() -> Vec<(u32, Vec<PageRange>)> {
        let of = |start: u64| vec![PageRange::new(start << 12, (start + 1000) << 12)];
        vec![(7, of(100)), (9, of(5000))]
    }

    #[test]
    fn the_first_touch_waits_for_a_round_trip_and_its_bytes() {
        let mut simulation = Simulation::new(&RECORDING, PageSize::KIB_4, &memory(), LINK);
        let touch = Touch {
            after_us: 0,
            pid: 9,
            address: Vaddr(5500 << 12),
        };
        // The stream has asked for two chunks before.
        let before_us = LINK.transfer_us(128 << 10);
        let waited_us = simulation.touch(touch);
        let least = 1000 + before_us;
        assert!((least..least + 500).contains(&waited_us), "{waited_us}");
        assert_eq!(simulation.touch(touch), 0, "it is there");
        let outside = Touch { pid: 8, ..touch };
        assert_eq!(simulation.touch(outside), 0);
        let outcome = simulation.finish();
        assert_eq!((outcome.waits, outcome.waited_us), (1, waited_us));
        let asked = outcome.sent.iter().map(|sent| sent.request.image.bytes());
        // The stream asks for a page that is there rather than around it.
        assert_eq!(asked.sum::<u64>(), 2001 << 12);
    }

    #[test]
    fn a_working_set_spares_waits() {
        // Every tenth page, from the last one down.
        let hot: Vec<PageRange> = (0..100)
            .rev()
            .map(|number| PageRange::new((105 + number * 10) << 12, (106 + number * 10) << 12))
            .collect();
        let waits = |first: bool| {
            let mut simulation = Simulation::new(&ADAPTIVE, PageSize::KIB_4, &memory(), LINK);
            if first {
                assert_eq!(simulation.stream_first(7, hot.clone()), 100);
            }
            for range in &hot {
                simulation.touch(Touch {
                    after_us: 200,
                    pid: 7,
                    address: range.start(),
                });
            }
            simulation.finish().waits
        };
        let (with, without) = (waits(true), waits(false));
        assert!(with * 4 <= without, "{with} waits with, {without} without");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_page_is_asked_for_and_comes(
            touches in prop::collection::vec((0..5000u64, 0..2u32, 0..1000u64), 0..60),
        ) {
            for policy in [&ADAPTIVE as &'static dyn Policy, &RECORDING] {
                let mut simulation = Simulation::new(policy, PageSize::KIB_4, &memory(), LINK);
                for (after_us, process, page) in &touches {
                    let (pid, first) = [(7, 100), (9, 5000)][*process as usize];
                    let address = Vaddr((first + page) << 12);
                    let touch = Touch { after_us: *after_us, pid, address };
                    simulation.touch(touch);
                    prop_assert_eq!(simulation.touch(Touch { after_us: 0, ..touch }), 0);
                }
                let outcome = simulation.finish();
                prop_assert!(outcome.waits <= touches.len() as u64);
                let least = LINK.transfer_us(2000 << 12);
                prop_assert!(outcome.complete_us >= least, "{} µs", outcome.complete_us);
            }
        }
    }
}
