//! The decisions of a post-copy, in one place: what a fault brings, in what order the background stream
//! runs, and when it yields to faults.
//!
//! ```text
//! decision              asked by                 with what is known of                     today (Adaptive)
//! fetch_limits          the engine, per fault    the way that faults take to the source    a block, or a page where faults have
//!                                                                                          a connection for themselves
//! around                Space, per fault         the process's faults so far (Pattern)     ahead of sequential readers and strides
//! reads_upwards         Space, per wake-up       the same                                  three faults upwards in a row
//! stream_from           Space, per request       the working set, the last lone faults,    the working set, by turns with what is around
//!                                                where it stopped                          faults outside it; then ascending
//! yields_until_us       Window, per request      the last faults and answers               100 µs after an answer, while the next fault
//!                                                                                          has lately come within that time
//! ```
//!
//! Everything else is mechanism: [`Space`](super::space::Space) knows which pages are missing,
//! [`Planner`](super::planner::Planner) treats processes in turn, [`Window`](super::window::Window)
//! measures the link. A policy keeps no state: what was observed is kept by [`Pattern`] and
//! [`FaultPrediction`], and each decision is a function of it. A new policy is one more implementation,
//! given to [`Planner::with_policy`](super::planner::Planner::with_policy) and
//! [`Window::with_policy`](super::window::Window::with_policy).
//!
//! [`Recording`] is another policy: each fault brings its page and nothing else, so that every page that is touched is
//! seen. `examples/` has more.
//!
//! No policy can lose a page: what it does not bring stays missing, and the stream comes to it.

use std::fmt::Debug;

use super::answer::FetchLimits;
use super::fault_prediction::FaultPrediction;
use super::pattern::{FaultAround, Pattern, block_bytes};
use crate::limits::FERRY_BATCH_BYTES_MAX;
use crate::units::{PageSize, Vaddr};

/// Brought at most for one fault on a connection for faults alone, bytes.
const SEQUENTIAL_BYTES_MAX: u64 = 256 << 10;

/// Brought for a fault that stands alone beside a push, bytes.
const PUSHED_ALONE_BYTES: u64 = 16 << 10;

/// The way that faults take to the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultPath {
    /// The source pushes the memory over another connection (ferry).
    BesidePush,
    /// A connection for faults alone.
    OwnConnection,
    /// The connection of the background stream: what was asked for before comes before.
    SharedConnection {
        /// The source is on this host or beside it.
        near: bool,
        /// How large a request of the stream is now, bytes.
        chunk_bytes: u64,
    },
}

/// What [`Policy::stream_from`] decides by: the stream of one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamState {
    /// The first missing page of what comes next of the working set, if there is one and something of it is missing.
    pub working_set: Option<Vaddr>,
    /// Whether the last request was for pages of the working set.
    pub working_set_was_last: bool,
    /// The latest lone fault around which pages may be missing. As long as pages of the working set are missing, faults
    /// on those do not count.
    pub last_fault: Option<Vaddr>,
    /// The end of the last request in order of addresses.
    pub stopped: Vaddr,
}

/// Where the background stream goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamFrom {
    /// With the next pages of the working set, and nothing around them.
    WorkingSet,
    /// With what is missing of the block, as long as a request and aligned to it, around the last lone fault.
    LastFault,
    /// With what is missing from this address on; behind the last missing page it begins anew.
    Address(Vaddr),
}

/// See the module's text.
pub trait Policy: Debug + Send + Sync {
    /// How many bytes are fetched for one fault at most. `missing_bytes` were missing in all processes at the start.
    fn fetch_limits(
        &self,
        path: FaultPath,
        page: PageSize,
        missing_bytes: u64,
        on_demand: bool,
    ) -> FetchLimits;

    /// Notes in `history` that a thread touched page number `page`, and says what to bring with it.
    fn around(&self, history: &mut Pattern, page: u64) -> FaultAround;

    /// Whether the thread that waits for page number `page` will need those above it next. If so the pages
    /// above are installed without waking it ([`BatchedWakeup`](super::batched_wakeup::BatchedWakeup)).
    fn reads_upwards(&self, history: &Pattern, page: u64) -> bool;

    /// Where the stream goes on in one process. What `state` does not have cannot be gone on with: then the stream goes
    /// on where it stopped.
    fn stream_from(&self, state: &StreamState) -> StreamFrom;

    /// Until when the stream yields to a fault that waits or is likely to come; `None`: it may go now. Asked
    /// only for a source nearby: on a long link the window alone keeps the queue short.
    fn yields_until_us(&self, faults: &FaultPrediction, now_us: u64) -> Option<u64>;
}

/// Today's policy: it follows what each process's faults show.
#[derive(Clone, Copy, Default, Debug)]
pub struct Adaptive;

/// [`Adaptive`], as what is used if nothing else is said.
pub static ADAPTIVE: Adaptive = Adaptive;

impl Policy for Adaptive {
    /// Where faults share the connection with the stream, each request costs the source about the same
    /// whatever its size. So a fault brings a block: on a slow link a small one, else the larger the more
    /// memory there is, which bounds the number of faults. On a connection of their own nothing but the page
    /// itself is in a fault's way.
    fn fetch_limits(
        &self,
        path: FaultPath,
        page: PageSize,
        missing_bytes: u64,
        on_demand: bool,
    ) -> FetchLimits {
        match path {
            FaultPath::BesidePush => FetchLimits {
                alone_bytes: match on_demand {
                    true => page.bytes(),
                    false => PUSHED_ALONE_BYTES.max(page.bytes()),
                },
                sequential_bytes: FERRY_BATCH_BYTES_MAX as u64,
            },
            FaultPath::SharedConnection { near, chunk_bytes } if !on_demand => {
                let block = block_bytes(missing_bytes);
                FetchLimits {
                    alone_bytes: if near { block } else { block.min(chunk_bytes) },
                    sequential_bytes: chunk_bytes,
                }
            }
            FaultPath::OwnConnection | FaultPath::SharedConnection { .. } => FetchLimits {
                alone_bytes: page.bytes(),
                sequential_bytes: SEQUENTIAL_BYTES_MAX,
            },
        }
    }

    fn around(&self, history: &mut Pattern, page: u64) -> FaultAround {
        history.observe(page)
    }

    fn reads_upwards(&self, history: &Pattern, page: u64) -> bool {
        history.reads_up_to(page)
    }

    /// The working set comes first. A fault outside of it shows that it does not say all: what is around such faults
    /// comes by turns with it, so that a recording of another program costs half of the rate at most.
    fn stream_from(&self, state: &StreamState) -> StreamFrom {
        match (state.working_set, state.last_fault) {
            (Some(_), Some(_)) if state.working_set_was_last => StreamFrom::LastFault,
            (Some(_), _) => StreamFrom::WorkingSet,
            (None, Some(_)) => StreamFrom::LastFault,
            (None, None) => StreamFrom::Address(state.stopped),
        }
    }

    fn yields_until_us(&self, faults: &FaultPrediction, now_us: u64) -> Option<u64> {
        faults.holds_until_us(now_us)
    }
}

/// For a restore whose touches are recorded: a fault brings its page alone, whatever is known. The caller holds the
/// stream back.
#[derive(Clone, Copy, Default, Debug)]
pub struct Recording;

/// [`Recording`], to be given to a planner.
pub static RECORDING: Recording = Recording;

impl Policy for Recording {
    fn fetch_limits(&self, _: FaultPath, page: PageSize, _: u64, _: bool) -> FetchLimits {
        FetchLimits {
            alone_bytes: page.bytes(),
            sequential_bytes: page.bytes(),
        }
    }

    fn around(&self, history: &mut Pattern, page: u64) -> FaultAround {
        // What comes after the recording begins with what was seen.
        history.observe(page);
        FaultAround::Alone
    }

    fn reads_upwards(&self, _: &Pattern, _: u64) -> bool {
        false
    }

    fn stream_from(&self, state: &StreamState) -> StreamFrom {
        ADAPTIVE.stream_from(state)
    }

    fn yields_until_us(&self, faults: &FaultPrediction, now_us: u64) -> Option<u64> {
        ADAPTIVE.yields_until_us(faults, now_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lazy::planner::{PageOutcome, Planner, SpaceId};
    use crate::lazy::space::{FaultAnswer, Space};
    use crate::units::PageRange;

    /// Brings the page alone, and streams in the order of addresses.
    #[derive(Debug)]
    struct InOrder;

    impl Policy for InOrder {
        fn fetch_limits(&self, _: FaultPath, page: PageSize, _: u64, _: bool) -> FetchLimits {
            FetchLimits {
                alone_bytes: page.bytes(),
                sequential_bytes: page.bytes(),
            }
        }

        fn around(&self, _: &mut Pattern, _: u64) -> FaultAround {
            FaultAround::Alone
        }

        fn reads_upwards(&self, _: &Pattern, _: u64) -> bool {
            false
        }

        fn stream_from(&self, state: &StreamState) -> StreamFrom {
            StreamFrom::Address(state.stopped)
        }

        fn yields_until_us(&self, _: &FaultPrediction, _: u64) -> Option<u64> {
            None
        }
    }

    /// What the stream asks for first after a fault in the middle of the memory.
    fn streamed_after_a_fault(policy: &'static dyn Policy) -> PageRange {
        let page = PageSize::new(4096).unwrap();
        let mut planner = Planner::with_policy(page, policy);
        let id = planner.add(Space::new(7, page, [PageRange::new(0, 1 << 24)], []));
        let limits = policy.fetch_limits(FaultPath::OwnConnection, page, 1 << 24, false);
        planner.handle_fault(id, Vaddr(9 << 20), limits, 0);
        assert_eq!(planner.next_urgent().unwrap().image.bytes(), 4096);
        planner.next_stream(1 << 20, 0).unwrap().image
    }

    #[test]
    fn another_policy_streams_in_another_order() {
        let around = streamed_after_a_fault(&ADAPTIVE);
        assert_eq!(around.start(), Vaddr((9 << 20) + 4096), "behind the fault");
        assert_eq!(streamed_after_a_fault(&InOrder).start(), Vaddr(0));
    }
    /// A process of 64 pages from page 16 on, of which the pages 40, 41 and 20 come first.
    fn with_a_working_set() -> (Planner, SpaceId) {
        let page = PageSize::KIB_4;
        let mut planner = Planner::new(page);
        let pages = |first: u64, count: u64| PageRange::new(first << 12, (first + count) << 12);
        let mut space = Space::new(7, page, [pages(16, 64)], []);
        let named = space.stream_first(vec![pages(40, 2), pages(500, 9), pages(20, 1)]);
        assert_eq!(named, 3, "those that are missing");
        let id = planner.add(space);
        (planner, id)
    }

    /// Numbers of the first pages that the stream asks for next, and how many.
    fn next(planner: &mut Planner) -> (u64, u64) {
        let image = planner.next_stream(8 << 12, 0).unwrap().image;
        (image.start().get() >> 12, image.bytes() >> 12)
    }

    #[test]
    fn the_working_set_comes_first_and_alone() {
        let (mut planner, _) = with_a_working_set();
        let order: Vec<_> = (0..4).map(|_| next(&mut planner)).collect();
        assert_eq!(order, [(40, 2), (20, 1), (16, 4), (21, 8)]);
    }

    #[test]
    fn what_is_around_other_faults_comes_by_turns_with_it() {
        let (mut planner, id) = with_a_working_set();
        let limits =
            RECORDING.fetch_limits(FaultPath::OwnConnection, PageSize::KIB_4, 1 << 18, false);
        // Of the working set, and not.
        for page in [40, 66] {
            planner.handle_fault(id, Vaddr(page << 12), limits, 0);
            assert_eq!(planner.next_urgent().unwrap().image.bytes(), 4096);
        }
        let order: Vec<_> = (0..4).map(|_| next(&mut planner)).collect();
        assert_eq!(order, [(41, 1), (64, 2), (20, 1), (67, 8)]);
    }

    #[test]
    fn a_child_goes_on_with_the_working_set_when_its_parent_has_ended() {
        let (mut planner, id) = with_a_working_set();
        planner.handle_fork(id).unwrap();
        assert_eq!(next(&mut planner), (40, 2));
        planner.handle_exit(id);
        assert_eq!(
            next(&mut planner),
            (40, 2),
            "it was on the way for the parent alone"
        );
    }

    #[test]
    fn while_a_restore_is_recorded_each_page_faults() {
        let page = PageSize::KIB_4;
        let pages = |first: u64| PageRange::new(first << 12, (first + 64) << 12);
        let mut planner = Planner::with_policy(page, &RECORDING);
        let id = planner.add(Space::new(7, page, [pages(0)], [pages(100)]));
        let limits = RECORDING.fetch_limits(FaultPath::BesidePush, page, 1 << 30, false);
        for at in [0, 1, 2, 3, 4, 10, 12, 14, 16] {
            planner.handle_fault(id, Vaddr(at << 12), limits, 0);
            assert_eq!(planner.next_urgent().unwrap().image.bytes(), 4096);
            assert_eq!(planner.next_urgent(), None);
            let FaultAnswer::Local(piece) =
                planner.handle_fault(id, Vaddr((100 + at) << 12), limits, 0)
            else {
                panic!("it is here");
            };
            assert_eq!(piece.at.bytes(), 4096);
            planner.settle(id, piece.at, PageOutcome::Local, |_| {});
        }
    }
}
