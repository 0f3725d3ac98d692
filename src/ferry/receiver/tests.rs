use super::*;
use crate::criu::header::{PageFlags, Wire};
use crate::ferry::encode::{Encoder, PlainBatch, Verdicts};
use crate::ferry::frame::{FrameError, HEADER_BYTES};
use crate::ferry::gather::Run;
use crate::ferry::hash::{HashKey, PageHasher};
use crate::ferry::level_control::Level;
use crate::ferry::message::encode_close;
use crate::units::PageRange;

fn receiver(frames: u32) -> Receiver {
    let bytes = 1 << 20;
    Receiver::new(PageSize::KIB_4, 2, Window { frames, bytes })
}

fn acknowledged(receiver: &mut Receiver, stream: u16) -> Option<u64> {
    match receiver.poll(stream, 0)? {
        Reply::Ack(ack) => Some(ack.safe),
        Reply::Fail(fail) => panic!("{fail}"),
    }
}

#[test]
fn frames_are_handed_out_once_and_in_order() {
    let mut receiver = receiver(10);
    for (number, arrival) in [
        (2, Arrival::Held),
        (3, Arrival::Held),
        (2, Arrival::Again),
        (1, Arrival::Next),
        (1, Arrival::Again),
    ] {
        assert_eq!(receiver.handle_numbered(number, 1), Ok(arrival));
    }
    assert_eq!(receiver.next_held(), Some(2));
    assert_eq!(receiver.handle_numbered(2, 1), Ok(Arrival::Again));
    assert_eq!(receiver.next_held(), Some(3));
    assert_eq!(receiver.next_held(), None);
    assert_eq!(receiver.handle_numbered(4, 1), Ok(Arrival::Next));
}

#[test]
fn nothing_is_held_beyond_the_window() {
    let mut by_frames = receiver(3);
    assert_eq!(by_frames.handle_numbered(3, 1), Ok(Arrival::Held));
    let beyond = SessionError::BeyondWindow { number: 4, safe: 0 };
    assert_eq!(by_frames.handle_numbered(4, 1), Err(beyond));

    let mut by_bytes = receiver(100);
    assert_eq!(by_bytes.handle_numbered(2, 1 << 20), Ok(Arrival::Held));
    let beyond = SessionError::BeyondWindow { number: 3, safe: 0 };
    assert_eq!(by_bytes.handle_numbered(3, 1), Err(beyond));

    // Nor is more handed out than can be applied.
    let mut slow = receiver(3);
    for number in 1..=3 {
        assert_eq!(slow.handle_numbered(number, 1), Ok(Arrival::Next));
    }
    let beyond = SessionError::BeyondWindow { number: 4, safe: 0 };
    assert_eq!(slow.handle_numbered(4, 1), Err(beyond));
    slow.applied(1);
    assert_eq!(
        slow.handle_numbered(4, 1 << 20),
        Err(SessionError::BeyondWindow { number: 4, safe: 1 })
    );
    assert_eq!(slow.handle_numbered(4, 1), Ok(Arrival::Next));
}

#[test]
fn every_connection_hears_what_is_safe_and_only_that() {
    let mut receiver = receiver(10);
    receiver.stream_up(0);
    assert_eq!(acknowledged(&mut receiver, 0), Some(0));
    assert_eq!(acknowledged(&mut receiver, 0), None);
    receiver.handle_numbered(1, 1).expect("within the window");
    assert_eq!(acknowledged(&mut receiver, 0), None, "not applied yet");
    receiver.applied(1);
    assert_eq!(acknowledged(&mut receiver, 0), Some(1));
    assert_eq!(acknowledged(&mut receiver, 1), None, "no connection");
    receiver.stream_up(1);
    assert_eq!(acknowledged(&mut receiver, 1), Some(1));
    receiver.answer(1, 0, StateId::NONE);
    assert_eq!(acknowledged(&mut receiver, 0), Some(1));
    receiver.stream_up(0);
    assert_eq!(acknowledged(&mut receiver, 0), Some(1), "a new connection");
}

#[test]
fn frames_keep_to_the_order_of_a_session() {
    let mut receiver = receiver(10);
    let mut body = Vec::new();
    encode_close(PageCount(1), &mut body);
    let error = receiver
        .read(Kind::Close, &body)
        .expect_err("a wrong count");
    let counted = SessionError::PageCount {
        announced: 1,
        came: 0,
    };
    assert!(matches!(error, ReadError::Session(found) if found == counted));
    body.clear();
    encode_close(PageCount(0), &mut body);
    assert!(receiver.read(Kind::Close, &body).is_ok());
    body.clear();
    let wire = Wire::V2;
    let target = Target::Process(1);
    Open { target, wire }.encode(&mut body);
    let error = receiver.read(Kind::Open, &body).expect_err("behind CLOSE");
    let closed = SessionError::Closed(Kind::Open);
    assert!(matches!(error, ReadError::Session(found) if found == closed));
}

fn open(receiver: &mut Receiver, target: Target) -> Result<(), ReadError> {
    let mut body = Vec::new();
    let wire = Wire::V2;
    Open { target, wire }.encode(&mut body);
    receiver.read(Kind::Open, &body).map(drop)
}

/// Reads a batch that names `pages` without contents from `vaddr` on.
fn pages(receiver: &mut Receiver, target: Target, vaddr: u64) -> Result<(), ReadError> {
    let range = PageRange::new(vaddr, vaddr + 2 * 4096);
    let run = Run {
        range,
        flags: PageFlags::LAZY,
    };
    let batch = PlainBatch {
        target,
        runs: &[run],
        plain: &[],
    };
    let hasher = PageHasher::new(HashKey::default(), PageSize::KIB_4);
    let mut encoder = Encoder::new(PageSize::KIB_4).expect("zstd works");
    let mut body = Vec::new();
    let verdicts = Verdicts::default();
    encoder
        .encode(batch, &verdicts, &hasher, Level::None, &mut body)
        .expect("nothing to compress");
    receiver.read(Kind::Pages, &body).map(drop)
}

#[test]
fn pages_come_in_the_order_of_their_addresses() {
    let mut receiver = receiver(10);
    let (one, two) = (Target::Process(1), Target::Process(2));
    open(&mut receiver, one).expect("the first target");
    pages(&mut receiver, one, 0x4000).expect("the first pages");
    pages(&mut receiver, one, 0x6000).expect("the next ones");
    for vaddr in [0x1000, 0x6000, 0x7000] {
        let error = pages(&mut receiver, one, vaddr).expect_err("pages that came before");
        let order = SessionError::Order {
            target: one,
            vaddr: Vaddr(vaddr),
            previous_end: Vaddr(0x8000),
        };
        assert!(matches!(error, ReadError::Session(found) if found == order));
    }
    open(&mut receiver, two).expect("another target");
    pages(&mut receiver, two, 0x1000).expect("its own addresses");
}

#[test]
fn a_target_is_opened_once_and_not_too_many_are() {
    let mut receiver = receiver(10);
    for pid in 1..=u32::try_from(SESSION_TARGETS_MAX).expect("a small number") {
        open(&mut receiver, Target::Process(pid)).expect("few enough");
    }
    let again = open(&mut receiver, Target::Shmem(1)).expect_err("one too many");
    assert!(matches!(
        again,
        ReadError::Session(SessionError::TooManyTargets)
    ));
    let mut receiver = self::receiver(10);
    open(&mut receiver, Target::Shmem(1)).expect("the first");
    let again = open(&mut receiver, Target::Shmem(1)).expect_err("the same");
    let reopened = SessionError::Reopened(Target::Shmem(1));
    assert!(matches!(again, ReadError::Session(found) if found == reopened));
}

#[test]
fn hashes_are_asked_for_from_a_page_on() {
    let mut receiver = receiver(10);
    let mut frame = Vec::new();
    let wanted = WantHashes {
        target: Target::Process(1),
        from: Vaddr(0x1800),
    };
    wanted.encode(&mut frame);
    let asked = receiver.handle(Kind::WantHashes, &frame[HEADER_BYTES..]);
    let field = FrameError::Field {
        kind: Kind::WantHashes,
        field: "address",
        value: 0x1800,
    };
    assert_eq!(asked, Err(SessionError::Frame(field)));
}

#[test]
fn a_failure_is_told_instead_of_everything_else() {
    let mut receiver = receiver(10);
    receiver.stream_up(0);
    let fail = Fail::new(crate::ferry::hello::FailCode::Receiver, "disk full");
    receiver.fail(fail.clone());
    assert!(!receiver.has_sent_failure());
    assert_eq!(receiver.poll(0, 0), Some(Reply::Fail(fail)));
    assert_eq!(receiver.poll(0, 0), None);
    assert!(receiver.has_sent_failure());
}
