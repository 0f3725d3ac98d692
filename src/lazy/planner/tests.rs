use super::*;

const PAGE: PageSize = PageSize::KIB_4;
const SINGLE: FetchLimits = FetchLimits {
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
fn a_child_forked_after_the_loss_asks_for_nothing() {
    let (mut planner, ids) = planner(1);
    planner.lose();
    let child = planner.handle_fork(ids[0]).unwrap();
    let touched = Vaddr(1 << 32);
    planner.handle_fault(child, touched, SINGLE, 0);
    assert!(planner.next_urgent().is_none());
    let missing = planner.space(child).unwrap().first_remote().unwrap();
    assert_eq!(missing.at.start(), touched);
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
    let limits = FetchLimits {
        alone_bytes: 256 << 10,
        sequential_bytes: 4096,
    };
    let asked_for = |planner: &mut Planner, offset: u64| {
        planner.handle_fault(ids[0], Vaddr((1 << 32) + offset), limits, 0);
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
            planner.settle(
                ids[0],
                piece.at,
                PageOutcome::Fetched(request.class),
                |_| {},
            );
        }
    }
    assert_eq!(bytes, 8 << 30);
    assert!(planner.is_complete());
    assert_eq!(planner.counts().stream, 8 << 18);
}

#[test]
fn what_a_fork_wipes_is_followed_and_forgotten_when_it_came() {
    let mut space = Space::new(1, PAGE, [PageRange::new(0x1000, 0x9000)], []);
    space.wipe_on_fork(&[PageRange::new(0x2000, 0x6000)]);
    space.settle(PageRange::new(0x2000, 0x3000), |_| {});
    space.remap(PageRange::new(0x4000, 0x7000), Vaddr(0x1_4000), |_| {});
    let wiped = [(0x3000, 0x4000), (0x1_4000, 0x1_6000)];
    let wiped = wiped.map(|(start, end)| PageRange::new(start, end));
    assert_eq!(space.wiped_on_fork(), wiped);
    assert!(space.fork().wiped_on_fork().is_empty());
}
