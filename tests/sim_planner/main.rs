//! The post-copy planner against a simulated kernel and source: whatever processes do with their
//! memory and however the source answers, every page that is still mapped ends with its own content.
//!
//! The model keeps each process page by page; the planner keeps runs. A page of the model says what
//! it must hold in the end; each fill is compared with it at once.

#[path = "../common/seeds.rs"]
mod seeds;
mod simulation;

use std::collections::VecDeque;

use pageferry::lazy::planner::{PageOutcome, Planner, Request};
use pageferry::lazy::space::{Class, FetchLimits, Space};
use pageferry::units::{PageRange, Vaddr};
use proptest::prelude::*;

use crate::simulation::{CHUNK, Operation, PAGE, PAGES, Page, Simulation, pages};

/// How many lists of operations are tried.
const SEEDS: u64 = 512;

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

#[test]
fn every_page_ends_with_its_own_content() {
    let strategy = (operations(), any::<bool>());
    seeds::for_each(SEEDS, &strategy, |(operations, fragmented)| {
        let mut simulation = match fragmented {
            true => Simulation::fragmented(),
            false => Simulation::new(),
        };
        for operation in &operations {
            simulation.apply(operation);
        }
        simulation.drain();
        for (id, memory) in &simulation.memories {
            for (page, state) in memory {
                prop_assert!(
                    !matches!(state, Page::Missing(_)),
                    "page {} of {:?} never came",
                    page,
                    id
                );
            }
        }
        prop_assert_eq!(simulation.planner.missing_pages(), 0);
        prop_assert_eq!(
            simulation.planner.counts().settled(),
            simulation.planner.total_pages()
        );
        // The planner owns no clock and no chance: the same operations end in the same state.
        let mut again = match fragmented {
            true => Simulation::fragmented(),
            false => Simulation::new(),
        };
        for operation in &operations {
            again.apply(operation);
        }
        again.drain();
        prop_assert_eq!(&again.memories, &simulation.memories);
        prop_assert_eq!(again.asked_pages, simulation.asked_pages);
        prop_assert_eq!(again.planner.counts(), simulation.planner.counts());
        Ok(())
    });
}

/// A process forks children all the time, each of which reads a page and ends after a while.
fn storm(forks: u64, lifetime: usize, stream_every: u64) -> Simulation {
    let mut simulation = Simulation::new();
    let parent = simulation.memories[0].0;
    simulation
        .planner
        .handle_exit(simulation.memories.remove(1).0);
    let mut children = VecDeque::new();
    for fork in 0..forks {
        let memory = simulation.memories[0].1.clone();
        let child = simulation
            .planner
            .handle_fork(parent)
            .expect("the parent lives");
        simulation.memories.push((child, memory));
        children.push_back(child);
        simulation.apply(&Operation::Fault {
            process: simulation.memories.len() - 1,
            page: fork * 7 % PAGES,
        });
        if fork % stream_every == 0 {
            simulation.apply(&Operation::SendStream);
        }
        simulation.apply(&Operation::Answer { pages: PAGES });
        if children.len() > lifetime {
            let ended = children.pop_front().expect("a child");
            simulation.memories.retain(|(id, _)| *id != ended);
            simulation.planner.handle_exit(ended);
        }
    }
    simulation
}

#[test]
fn children_that_end_soon_cost_the_source_nothing() {
    let alone = storm(0, 0, 1).planner.total_pages();
    for lifetime in [0, 1, 5, 12] {
        let mut simulation = storm(500, lifetime, 9);
        let living = simulation.memories.len() as u64;
        assert!(living <= lifetime as u64 + 1, "{living} live");
        assert_eq!(simulation.planner.total_pages(), alone, "pages count once");
        simulation.drain();
        // All of it is asked for once; a little twice, as it has not been sent for when a child is forked.
        let remote = 2 * (30 + 10 + 20);
        assert!(
            simulation.asked_pages * 10 <= remote * 11 / 2 + CHUNK,
            "{} pages of {} were asked for with {lifetime} children",
            simulation.asked_pages,
            remote / 2
        );
        assert_eq!(simulation.planner.counts().settled(), alone);
    }
}

#[test]
fn many_children_get_what_they_wait_for() {
    // More than get all that comes.
    let mut simulation = storm(300, 60, 9);
    assert_eq!(simulation.memories.len(), 61);
    simulation.drain();
    for (id, memory) in &simulation.memories {
        let missing = memory.values().any(|page| matches!(page, Page::Missing(_)));
        assert!(!missing, "{id:?} lacks a page");
    }
}

#[test]
fn the_oldest_child_is_counted_when_its_parent_has_ended() {
    let mut simulation = Simulation::new();
    let (parent, total) = (simulation.memories[0].0, simulation.planner.total_pages());
    for _ in 0..2 {
        simulation.apply(&Operation::Fork { process: 0 });
    }
    let copied = simulation.planner.counts().copied;
    simulation.memories.remove(0);
    simulation.planner.handle_exit(parent);
    assert_eq!(simulation.planner.total_pages(), total);
    assert_eq!(
        simulation.planner.counts().gone,
        0,
        "somebody still needs them"
    );
    simulation.drain();
    assert_eq!(simulation.planner.counts().settled(), total);
    assert!(
        simulation.planner.counts().copied > copied,
        "the other child"
    );
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
        planner.settle(id, piece.at, PageOutcome::Fetched(request.class), |_| {});
        steps += 1;
    }
    while let Some((id, piece)) = planner.next_local(64 << 10) {
        planner.settle(id, piece.at, PageOutcome::Local, |_| {});
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
        planner.settle(child, pages(16 + 2 * n, 1), PageOutcome::Gone, |_| {});
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
    let limits = FetchLimits {
        alone_bytes: 256 << 10,
        sequential_bytes: 256 << 10,
    };
    planner.handle_fault(id, Vaddr(2000 << 12), limits, 0);
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
