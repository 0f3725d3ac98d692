//! The planner of post-copy and the plan of a drain, against models.

use std::collections::BTreeSet;

use pageferry::lazy::drain::DrainPlan;
use pageferry::units::{PageCount, PageRange, PageSize};

use crate::{byte, canary, take};

/// The simulated kernel and source of the simulation.
#[allow(dead_code, reason = "the simulation uses more of it")]
#[path = "../../tests/sim_planner/simulation.rs"]
mod simulation;

use simulation::{Operation, PAGES, Page, Simulation};

/// Operations at a time: more take long and find nothing more.
const OPERATIONS_MAX: usize = 200;

fn operation(data: &mut &[u8]) -> Operation {
    let [kind, process, one, two, three] = take(data);
    let process = usize::from(process % 4);
    let page = u64::from(one) % PAGES;
    let pages = u64::from(two) % 11 + 1;
    match kind % 16 {
        0..=3 => Operation::Fault { process, page },
        4 => Operation::Fork { process },
        5 => Operation::Move {
            process,
            from: page,
            to: u64::from(three) % PAGES,
            pages: u64::from(two) % 23 + 1,
        },
        6 => Operation::Remove {
            process,
            from: page,
            pages,
        },
        7 => Operation::Unmap {
            process,
            from: page,
            pages,
        },
        8 => Operation::Exit { process },
        9 => Operation::LocalFails {
            process,
            page: 44 + page % (PAGES - 44),
            pages: pages.min(7),
        },
        10 => Operation::LocalHeals {
            process,
            pages: pages.min(3),
        },
        11 => Operation::Pause { process },
        12 => Operation::Resume,
        13 => Operation::SendStream,
        14 => match one % 4 {
            0 => Operation::ConnectionLost,
            _ => Operation::LocalStep,
        },
        _ => Operation::Answer { pages },
    }
}

/// Whatever processes do with their memory, every page that is still mapped ends with its own content.
pub(crate) fn planner(mut data: &[u8]) {
    let mut simulation = match byte(&mut data) % 2 {
        0 => Simulation::new(),
        _ => Simulation::fragmented(),
    };
    let (mut forks, mut moves) = (0, 0);
    for _ in 0..OPERATIONS_MAX {
        if data.is_empty() {
            break;
        }
        let operation = operation(&mut data);
        forks += u32::from(matches!(operation, Operation::Fork { .. }));
        moves += u32::from(forks > 0 && matches!(operation, Operation::Move { .. }));
        simulation.apply(&operation);
    }
    simulation.drain();
    for (id, memory) in &simulation.memories {
        for (page, state) in memory {
            let came = !matches!(state, Page::Missing(_));
            assert!(came, "page {page} of {id:?} never came");
        }
    }
    assert_eq!(simulation.planner.missing_pages(), 0);
    let settled = simulation.planner.counts().settled();
    assert_eq!(settled, simulation.planner.total_pages());
    canary(moves > 1);
}

/// The plan of a drain against a set of pages.
pub(crate) fn drain(mut data: &[u8]) {
    const PAGE: PageSize = PageSize::KIB_4;
    let mut runs = Vec::new();
    let mut at = 1;
    for _ in 0..byte(&mut data) % 6 {
        let [gap, pages, pid] = take(&mut data);
        let start = at + u64::from(gap % 8);
        at = start + u64::from(pages % 32) + 1;
        runs.push((
            1 + u32::from(pid % 2),
            PageRange::new(start << 12, at << 12),
        ));
    }
    runs.sort_by_key(|(pid, range)| (*pid, range.start()));
    let mut plan = DrainPlan::new(PAGE, runs.iter().copied());
    let total: u64 = runs.iter().map(|(_, range)| range.bytes() >> 12).sum();
    assert_eq!(plan.pages().get(), total);
    let mut here = BTreeSet::new();
    let mut waiting = Vec::new();
    let mut given_back = false;
    while !data.is_empty() {
        let [kind, one, two] = take(&mut data);
        match kind % 4 {
            0 if total > 0 => {
                let first = u64::from(one) % total;
                plan.want(
                    first..(first + u64::from(two % 16)).min(total),
                    two % 2 == 0,
                );
            }
            1 => {
                let most = PageCount(u64::from(one % 64) + 1);
                if let Some((pid, range)) = plan.next_request(most) {
                    assert!(range.pages(PAGE) <= most && !range.is_empty());
                    waiting.push((pid, range));
                }
            }
            2 if !waiting.is_empty() => {
                let (pid, range) = waiting.remove(usize::from(one) % waiting.len());
                for page in range.start().get() >> 12..range.end().get() >> 12 {
                    assert!(here.insert((pid, page)), "a page comes once");
                }
                plan.arrived(pid, range);
            }
            3 if !waiting.is_empty() => {
                let (pid, range) = waiting.remove(usize::from(one) % waiting.len());
                plan.give_back(pid, range);
                given_back = true;
            }
            _ => {}
        }
        assert_eq!(plan.held().get(), here.len() as u64);
    }
    for (pid, range) in waiting {
        plan.give_back(pid, range);
    }
    while let Some((pid, range)) = plan.next_request(PageCount(8)) {
        for page in range.start().get() >> 12..range.end().get() >> 12 {
            assert!(here.insert((pid, page)), "a page comes once");
        }
        plan.arrived(pid, range);
    }
    assert!(plan.is_complete() && here.len() as u64 == total);
    canary(given_back && runs.len() > 2);
}

/// Some operations of each kind.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let of = |step: u8| {
        let byte = |number: u8| number.wrapping_mul(step).wrapping_add(number / 16);
        (0..=250).map(byte).collect()
    };
    [1, 7, 29, 31].into_iter().map(of).collect()
}
