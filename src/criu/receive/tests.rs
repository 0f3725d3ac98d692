//! Whole sessions, sessions cut anywhere, and what a hostile peer may try.

use proptest::prelude::*;

use super::*;
use crate::criu::header::HEADER_BYTES_MAX;
use crate::units::PageCount;

const PAGE: PageSize = PageSize::KIB_4;

fn header(op: Op, flags: u32, pages: u64, vaddr: u64, target: Target) -> Header {
    Header {
        op,
        flags: PageFlags::from_bits(flags),
        pages: PageCount(pages),
        vaddr: Vaddr(vaddr),
        dst_id: target.dst_id(),
    }
}

fn bytes_of(headers: &[Header], wire: Wire) -> Vec<u8> {
    let mut out = Vec::new();
    for header in headers {
        let mut bytes = [0; HEADER_BYTES_MAX];
        let len = header.encode(wire, &mut bytes);
        out.extend_from_slice(&bytes[..len]);
    }
    out
}

/// Everything that a session gave to its caller, payload gathered.
#[derive(PartialEq, Eq, Debug, Default)]
struct Collected {
    /// Opened targets and named runs.
    runs: Vec<(Target, Option<(PageRange, PageFlags)>)>,
    payload: Vec<u8>,
    asked: Vec<Target>,
    closed: Option<bool>,
}

fn feed(
    session: &mut ReceiveSession,
    input: &[u8],
    collected: &mut Collected,
) -> Result<(), ReceiveError> {
    let mut at = 0;
    while let Some(step) = session.next(input, &mut at)? {
        match step {
            Step::Open { target, .. } => collected.runs.push((target, None)),
            Step::AskParent(target) => collected.asked.push(target),
            Step::Pages { range, flags } => {
                let (target, _) = *collected.runs.last().unwrap();
                collected.runs.push((target, Some((range, flags))));
            }
            Step::Raw(range) | Step::Lz4 { range, .. } => {
                collected.payload.extend_from_slice(&input[range]);
            }
            Step::ZeroPage => collected.payload.extend([0; 4096]),
            Step::Close { hangs_up } => collected.closed = Some(hangs_up),
        }
    }
    Ok(())
}

fn run(headers: &[Header]) -> Result<Collected, ReceiveError> {
    let mut collected = Collected::default();
    for wire in [Wire::V1, Wire::V2] {
        collected = Collected::default();
        let mut session = ReceiveSession::new(None, PAGE);
        feed(&mut session, &bytes_of(headers, wire), &mut collected)?;
        assert_eq!(session.wire(), Some(wire));
    }
    Ok(collected)
}

const PID: Target = Target::Process(7);
const SHMEM: Target = Target::Shmem(7);

#[test]
fn a_whole_session_is_understood() {
    let collected = run(&[
        header(Op::Parent, 0, 0, 0, PID),
        header(Op::Open2, 0, 0, 0, PID),
        header(Op::Hole, 0, 2, 0x1000, PID),
        header(Op::AddFlags, 1, 1, 0x3000, PID),
        header(Op::AddFlags, 2, 1, 0x4000, PID),
        header(Op::Open, 0, 0, 0, SHMEM),
        header(Op::AddFlagsCompressed, 3, 9, 0, SHMEM),
        header(Op::ForceClose, 0, 0, 0, SHMEM),
    ])
    .unwrap();
    let run = |target, start, end, flags| {
        let range = PageRange::new(start, end);
        (target, Some((range, PageFlags::from_bits(flags))))
    };
    assert_eq!(collected.asked, [PID]);
    assert_eq!(
        collected.runs,
        [
            (PID, None),
            run(PID, 0x1000, 0x3000, 1),
            run(PID, 0x3000, 0x4000, 1),
            run(PID, 0x4000, 0x5000, 2),
            (SHMEM, None),
            run(SHMEM, 0, 0x9000, 3),
        ]
    );
    assert_eq!(collected.closed, Some(false));
}

#[test]
fn senders_without_open_switch_targets_by_naming_them() {
    let headers = [
        header(Op::Hole, 0, 1, 0x1000, PID),
        header(Op::Hole, 0, 1, 0x1000, SHMEM),
        header(Op::Close, 0, 0, 0, SHMEM),
    ];
    let mut collected = Collected::default();
    let mut session = ReceiveSession::new(Some(Wire::V1), PAGE);
    feed(&mut session, &bytes_of(&headers, Wire::V1), &mut collected).unwrap();
    let targets: Vec<Target> = collected.runs.iter().map(|(target, _)| *target).collect();
    assert_eq!(targets, [PID, PID, SHMEM, SHMEM]);
    assert_eq!(collected.closed, Some(true));
    assert_eq!(session.handle_end(), Ok(()));
}

/// Each frame that a peer may not send, and a word of the error.
#[test]
fn forbidden_frames_are_refused_and_named() {
    let open = header(Op::Open2, 0, 0, 0, PID);
    let bad = |op, flags, pages, vaddr| header(op, flags, pages, vaddr, PID);
    let unknown = Header {
        dst_id: 7 << 8 | 3,
        ..open
    };
    let cases = [
        (bad(Op::AddFlags, 0, 1, 0x1000), "flags 0x0"),
        (bad(Op::AddFlags, 5, 1, 0x1000), "flags 0x5"),
        (bad(Op::AddFlags, 8, 1, 0x1000), "flags 0x8"),
        (bad(Op::AddFlags, 12, 1, 0x1000), "flags 0xc"),
        (bad(Op::AddFlagsCompressed, 7, 1, 0x1000), "flags 0x7"),
        (bad(Op::AddFlags, 4, 0, 0x1000), "0 pages"),
        (bad(Op::Add, 0, 0, 0x1000), "0 pages"),
        (bad(Op::Hole, 0, 1, 0x1001), "0x1001"),
        (bad(Op::Hole, 0, 2, !0xfff), "0xfffffffffffff000"),
        (
            bad(Op::Hole, 0, FRAME_PAGES_MAX + 1, 0x1000),
            "16777217 pages",
        ),
        (bad(Op::Get, 0, 1, 0x1000), "--lazy-pages"),
        (open, "pid 7 is opened a second time"),
        (unknown, "0x703"),
    ];
    for (frame, word) in cases {
        let error = run(&[open, frame]).unwrap_err().to_string();
        assert!(error.contains(word), "{error} lacks {word}");
    }
    let backwards = [
        open,
        bad(Op::Hole, 0, 2, 0x5000),
        bad(Op::Hole, 0, 1, 0x6000),
    ];
    let error = run(&backwards).unwrap_err().to_string();
    assert!(error.contains("pid 7 at 0x6000"), "{error}");
    let frame = bytes_of(&[open, bad(Op::AddFlagsCompressed, 4, 1, 0x1000)], Wire::V2);
    let mut session = ReceiveSession::new(None, PAGE);
    let input = [frame.as_slice(), &4097u32.to_le_bytes()].concat();
    let error = feed(&mut session, &input, &mut Collected::default()).unwrap_err();
    assert!(matches!(error, ReceiveError::BlockTooLong { bytes: 4097 }));
}

#[test]
fn the_number_of_targets_is_capped() {
    let mut session = ReceiveSession::new(Some(Wire::V2), PAGE);
    let count = u32::try_from(SESSION_TARGETS_MAX).unwrap();
    for pid in 1..=count {
        let open = bytes_of(&[header(Op::Open, 0, 0, 0, Target::Process(pid))], Wire::V2);
        feed(&mut session, &open, &mut Collected::default()).unwrap();
    }
    let open = bytes_of(&[header(Op::Open, 0, 0, 0, SHMEM)], Wire::V2);
    assert_eq!(
        feed(&mut session, &open, &mut Collected::default()),
        Err(ReceiveError::TooManyTargets)
    );
}

#[test]
fn hanging_up_is_allowed_only_after_close() {
    let whole = bytes_of(
        &[
            header(Op::Open2, 0, 0, 0, PID),
            header(Op::Hole, 0, 1, 0x1000, PID),
            header(Op::Close, 0, 0, 0, PID),
        ],
        Wire::V2,
    );
    for cut in 0..=whole.len() {
        let mut session = ReceiveSession::new(None, PAGE);
        feed(&mut session, &whole[..cut], &mut Collected::default()).unwrap();
        match session.handle_end() {
            Ok(()) => assert_eq!(cut, whole.len()),
            Err(ReceiveError::NoClose) => assert_eq!(cut % 32, 0),
            Err(ReceiveError::CutFrame) => assert_ne!(cut % 32, 0),
            Err(other) => panic!("{other}"),
        }
    }
}

/// A run of pages with what the wire carries for it.
#[derive(Clone, Debug)]
struct Run {
    gap: u64,
    kind: RunKind,
}

#[derive(Clone, Debug)]
enum RunKind {
    Named { pages: u64, flags: u32 },
    Raw { pages: u64, old: bool },
    Compressed(Vec<u16>),
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    let kind = prop_oneof![
        (1..1000u64, prop::sample::select(vec![1u32, 2, 3]))
            .prop_map(|(pages, flags)| RunKind::Named { pages, flags }),
        (1..3u64, any::<bool>()).prop_map(|(pages, old)| RunKind::Raw { pages, old }),
        prop::collection::vec(prop::sample::select(vec![0u16, 1, 77, 4095, 4096]), 1..4)
            .prop_map(RunKind::Compressed),
    ];
    prop::collection::vec(
        (0..3u64, kind).prop_map(|(gap, kind)| Run { gap, kind }),
        0..6,
    )
}

/// The bytes of a session with `runs`, and what it must tell.
fn session_of(runs: &[Run], wire: Wire) -> (Vec<u8>, Collected) {
    let open = header(Op::Open2, 0, 0, 0, PID);
    let mut out = bytes_of(&[open], wire);
    let mut collected = Collected {
        runs: vec![(PID, None)],
        closed: Some(true),
        ..Collected::default()
    };
    let mut at = 0x10_0000;
    for (number, run) in runs.iter().enumerate() {
        let fill = u8::try_from(number + 1).unwrap();
        at += run.gap * 4096;
        let (op, flags, pages) = match &run.kind {
            RunKind::Named { pages, flags } => (Op::AddFlags, *flags, *pages),
            RunKind::Raw { pages, old: true } => (Op::Add, 4, *pages),
            RunKind::Raw { pages, old: false } => (Op::AddFlags, 6, *pages),
            RunKind::Compressed(blocks) => (Op::AddFlagsCompressed, 4, blocks.len() as u64),
        };
        out.extend(bytes_of(&[header(op, flags, pages, at, PID)], wire));
        match &run.kind {
            RunKind::Named { .. } => {}
            RunKind::Raw { pages, .. } => {
                let raw = vec![fill; usize::try_from(*pages * 4096).unwrap()];
                out.extend_from_slice(&raw);
                collected.payload.extend_from_slice(&raw);
            }
            RunKind::Compressed(blocks) => {
                for bytes in blocks {
                    out.extend_from_slice(&u32::from(*bytes).to_le_bytes());
                    let block = vec![fill; usize::from(*bytes)];
                    out.extend_from_slice(&block);
                    collected
                        .payload
                        .extend(if *bytes == 0 { vec![0; 4096] } else { block });
                }
            }
        }
        let range = PageRange::new(at, at + pages * 4096);
        collected
            .runs
            .push((PID, Some((range, PageFlags::from_bits(flags)))));
        at = range.end().get();
    }
    out.extend(bytes_of(&[header(Op::Close, 0, 0, 0, PID)], wire));
    (out, collected)
}

#[test]
fn every_split_point_tells_the_same() {
    let kinds = [
        RunKind::Named { pages: 3, flags: 1 },
        RunKind::Raw {
            pages: 1,
            old: false,
        },
        RunKind::Compressed(vec![0, 77, 4096]),
    ];
    let runs = kinds.map(|kind| Run { gap: 1, kind });
    for wire in [Wire::V1, Wire::V2] {
        let (bytes, expected) = session_of(&runs, wire);
        for cut in 0..=bytes.len() {
            let mut session = ReceiveSession::new(None, PAGE);
            let mut collected = Collected::default();
            feed(&mut session, &bytes[..cut], &mut collected).unwrap();
            feed(&mut session, &bytes[cut..], &mut collected).unwrap();
            assert_eq!(collected, expected, "cut at {cut}");
        }
    }
}

proptest! {
    /// However a session is cut into buffers, it tells the same.
    #[test]
    fn any_cuts_tell_the_same(runs in runs(), v1: bool, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..9)) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        let (bytes, expected) = session_of(&runs, wire);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.push(bytes.len());
        cuts.sort_unstable();
        let mut session = ReceiveSession::new(None, PAGE);
        let mut collected = Collected::default();
        let mut from = 0;
        for cut in cuts {
            feed(&mut session, &bytes[from..cut], &mut collected).unwrap();
            from = cut;
        }
        prop_assert_eq!(collected, expected);
        prop_assert_eq!(session.handle_end(), Ok(()));
    }

    /// Garbage gives steps or an error, and what the steps say is checked.
    #[test]
    fn garbage_is_survived(start in prop::collection::vec(any::<u8>(), 0..200), spoilt in any::<(prop::sample::Index, u8)>(), runs in runs(), garbled: bool) {
        let (mut bytes, _) = session_of(&runs, Wire::V2);
        if garbled {
            bytes = start;
        } else {
            let at = spoilt.0.index(bytes.len());
            bytes[at] ^= spoilt.1;
        }
        let mut session = ReceiveSession::new(None, PAGE);
        let mut at = 0;
        let mut end = 0;
        while let Ok(Some(step)) = session.next(&bytes, &mut at) {
            match step {
                Step::Open { .. } => end = 0,
                Step::Pages { range, flags } => {
                    prop_assert!(range.start().get() >= end && !range.is_empty());
                    prop_assert!(flags.bits() != 0 && flags.bits() < 8);
                    end = range.end().get();
                }
                Step::Raw(range) | Step::Lz4 { range, .. } => prop_assert!(range.end <= bytes.len()),
                Step::AskParent(_) | Step::ZeroPage | Step::Close { .. } => {}
            }
        }
    }
}

/// Any first frame that a peer may send, of which each layout has its own bytes.
fn first_frames() -> impl Strategy<Value = Header> {
    let target = prop_oneof![
        (1..=4_194_304u32).prop_map(Target::Process),
        prop_oneof![Just(0), any::<u32>().prop_map(u64::from), any::<u64>()]
            .prop_map(|id| Target::Shmem(id >> 8)),
    ];
    let named = prop::sample::select(vec![Op::Parent, Op::Open, Op::Open2]);
    let pages = prop::sample::select(vec![
        Op::Add,
        Op::Hole,
        Op::AddFlags,
        Op::AddFlagsCompressed,
    ]);
    let closes = prop::sample::select(vec![Op::Close, Op::ForceClose]);
    let flags = prop::sample::select(vec![1u32, 2, 3, 4, 6]);
    let range = (0..1u64 << 35, 1..=FRAME_PAGES_MAX).prop_map(|(page, pages)| (page << 12, pages));
    prop_oneof![
        (named, target.clone()).prop_map(|(op, target)| header(op, 0, 0, 0, target)),
        (pages, flags, range, target).prop_map(|(op, flags, (vaddr, pages), target)| header(
            op, flags, pages, vaddr, target
        )),
        (closes, any::<u64>()).prop_map(|(op, dst_id)| Header {
            dst_id,
            ..header(op, 0, 0, 0, PID)
        }),
        // What it is said not to be, however its layout is filled.
        (1u32..1 << 22, 1u64..1 << 35, 1u64..4096).prop_map(|(pid, page, pages)| Header {
            dst_id: pid.into(),
            ..header(Op::Get, 0, pages, page << 12, PID)
        }),
    ]
}

proptest! {
    /// A peer that has said a whole frame waits for what comes of it. Whatever frame is its first, in
    /// either layout and however it is cut, it is acted upon when its last byte is there.
    #[test]
    fn a_first_frame_is_understood_with_its_last_byte(frame in first_frames(), v1: bool, is_given: bool) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        prop_assume!(!v1 || frame.pages.get() <= u64::from(u32::MAX));
        let bytes = bytes_of(&[frame], wire);
        for cut in 0..bytes.len() {
            let mut session = ReceiveSession::new(is_given.then_some(wire), PAGE);
            let mut steps = 0;
            let mut outcome = Ok(());
            let mut closed = false;
            for part in [&bytes[..cut], &bytes[cut..]] {
                let mut at = 0;
                while outcome.is_ok() && !closed {
                    match session.next(part, &mut at) {
                        Ok(None) => break,
                        Ok(Some(step)) => {
                            steps += 1;
                            closed = matches!(step, Step::Close { .. });
                        }
                        Err(error) => outcome = Err(error),
                    }
                }
            }
            match frame.op {
                Op::Get => {
                    let expected = ReceiveError::Get { pid: frame.dst_id, vaddr: frame.vaddr };
                    prop_assert_eq!(outcome, Err(expected));
                }
                Op::Close | Op::ForceClose => {
                    prop_assert_eq!((outcome, steps > 0), (Ok(()), true));
                    prop_assert_eq!(session.handle_end(), Ok(()));
                    let left = session.header_bytes_open();
                    let expected = if v1 { 8 } else if cut >= 24 { 32 - cut } else { 0 };
                    prop_assert_eq!(left, expected);
                }
                _ => {
                    prop_assert!(outcome.is_ok(), "{outcome:?}");
                    prop_assert!(steps > 0, "it waits");
                    prop_assert_eq!(session.wire(), Some(wire));
                }
            }
        }
    }

    /// What is no frame at all is refused with the word that shows it.
    #[test]
    fn an_unknown_operation_is_refused_at_once(number in 9u16..0x1000, rest: [u8; 28], cut in 4usize..32) {
        let bytes = [number.to_le_bytes().as_slice(), &rest].concat();
        for wire in [None, Some(Wire::V1), Some(Wire::V2)] {
            let mut session = ReceiveSession::new(wire, PAGE);
            let refused = session.next(&bytes[..cut.min(bytes.len())], &mut 0);
            prop_assert!(matches!(refused, Err(ReceiveError::Header(_))), "{refused:?}");
        }
    }
}

#[test]
fn a_layout_that_was_not_asked_for_is_named() {
    for (given, found) in [(Wire::V1, Wire::V2), (Wire::V2, Wire::V1)] {
        let bytes = bytes_of(&[header(Op::Open2, 0, 0, 0, Target::Shmem(0))], found);
        let mut session = ReceiveSession::new(Some(given), PAGE);
        let error = session.next(&bytes, &mut 0).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(&format!("--wire {}", given.name())),
            "{error}"
        );
    }
}
