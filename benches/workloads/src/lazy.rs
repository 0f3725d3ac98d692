//! Decisions of post-copy: the planner with a million extents, and the window.

use pageferry::lazy::planner::{PageOutcome, Planner, Request, SpaceId};
use pageferry::lazy::space::{FetchLimits, Space};
use pageferry::lazy::window::Window;
use pageferry::units::{PageRange, PageSize, Vaddr};

use crate::Run;

const PAGE: PageSize = PageSize::KIB_4;

/// Runs of memory, each a page, with a hole behind it.
const EXTENTS: u64 = 1 << 20;

/// Faults, or requests of the stream, of one piece of work.
const STEPS: u64 = 1000;

/// Answers of one piece of work of the window.
const ANSWERS: u64 = 20_000;

fn extent(number: u64) -> PageRange {
    let start = 0x1000_0000 + ((2 * number) << PAGE.shift());
    PageRange::new(start, start + PAGE.bytes())
}

fn planner() -> (Planner, SpaceId) {
    let mut planner = Planner::new(PAGE);
    let id = planner.add(Space::new(7, PAGE, (0..EXTENTS).map(extent), []));
    (planner, id)
}

pub(crate) fn planner_build() -> Run {
    Box::new(|| planner().0.total_pages())
}

/// The pages have come and are installed.
fn settle(planner: &mut Planner, request: Request) -> u64 {
    let mut bytes = 0;
    while let Some(piece) = planner.on_the_way(request.space, request.image) {
        bytes += piece.at.bytes();
        let outcome = PageOutcome::Fetched(request.class);
        planner.settle(request.space, piece.at, outcome, |_| {});
    }
    bytes
}

pub(crate) fn planner_faults() -> Run {
    let (mut planner, id) = planner();
    let mut rng = fastrand::Rng::with_seed(6);
    let limits = FetchLimits {
        alone_bytes: 64 << 10,
        sequential_bytes: 256 << 10,
    };
    let mut now_us = 0;
    Box::new(move || {
        let mut bytes = 0;
        for _ in 0..STEPS {
            now_us += 100;
            let at: Vaddr = extent(rng.u64(0..EXTENTS)).start();
            planner.handle_fault(id, at, limits, now_us);
            while let Some(request) = planner.next_urgent() {
                planner.sent(&request);
                bytes += settle(&mut planner, request);
            }
        }
        bytes
    })
}

pub(crate) fn planner_stream() -> Run {
    let (mut planner, _) = planner();
    Box::new(move || {
        let mut bytes = 0;
        for _ in 0..STEPS {
            if let Some(request) = planner.next_stream(64 << 10, 16 << 10) {
                planner.sent(&request);
                bytes += settle(&mut planner, request);
            }
        }
        bytes
    })
}

pub(crate) fn window() -> Run {
    Box::new(|| {
        let mut window = Window::default();
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut now_us, mut sum) = (0, 0);
        for number in 0..ANSWERS {
            let asked = window.chunk_bytes(now_us);
            let ticket = window.sent(asked, now_us);
            sum += u64::from(window.has_room(now_us)) + window.gap_bytes();
            now_us += rng.u64(50..200);
            window.answered(ticket, now_us);
            now_us += rng.u64(50..200);
            window.completed(ticket, asked, asked, now_us);
            if number % 16 == 0 {
                window.faulted(now_us);
                window.fault_answered(now_us + 40);
            }
        }
        sum
    })
}
