use super::*;
use crate::ferry::frame::{Split, split};

const PAGE: PageSize = PageSize::KIB_4;

fn body_of(frame: &[u8]) -> &[u8] {
    match split(frame) {
        Ok(Split::Frame(found)) => &frame[found.body],
        other => panic!("no frame: {other:?}"),
    }
}

/// Every strict prefix of a body is refused, as is one byte too many.
fn refuses_other_lengths<T>(body: &[u8], decode: impl Fn(&[u8]) -> Result<T, FrameError>) {
    for cut in 0..body.len() {
        assert!(decode(&body[..cut]).is_err(), "cut at {cut}");
    }
    assert!(decode(&[body, &[0]].concat()).is_err(), "one byte more");
}

#[test]
fn numbered_bodies_come_back_as_they_were() {
    let open = Open {
        target: Target::Shmem(7),
        wire: Wire::V1,
    };
    let mut body = Vec::new();
    open.encode(&mut body);
    assert_eq!(Open::decode(&body), Ok(open));
    refuses_other_lengths(&body, Open::decode);

    body.clear();
    encode_close(PageCount(1 << 40), &mut body);
    assert_eq!(decode_close(&body), Ok(PageCount(1 << 40)));
    refuses_other_lengths(&body, decode_close);
}

#[test]
fn an_acknowledgement_comes_back_as_it_was() {
    let ack = Ack {
        safe: 77,
        answer: Answer {
            to: 70,
            value: -2,
            state: StateId([9; 16]),
        },
        complete: true,
        bye_received: false,
        arrived: 1 << 33,
    };
    let mut frame = Vec::new();
    ack.encode(&mut frame);
    assert_eq!(Ack::decode(body_of(&frame)), Ok(ack));
    refuses_other_lengths(body_of(&frame), Ack::decode);
}

#[test]
fn hashes_come_back_with_their_runs() {
    let runs = [
        PageRange::new(0x1000, 0x3000),
        PageRange::new(0x8000, 0x9000),
    ];
    let hashes: Vec<_> = (1..=3).map(|n| PageHash([n; 16])).collect();
    let mut frame = Vec::new();
    Hashes::encode(Target::Process(4), PAGE, &runs, &hashes, true, &mut frame);
    let body = body_of(&frame);
    let read = Hashes::decode(body, PAGE).expect("well-formed");
    assert_eq!((read.target, read.last), (Target::Process(4), true));
    assert_eq!(read.end(), Some(Vaddr(0x9000)));
    let seen: Vec<_> = read.runs(PAGE).collect();
    assert_eq!(seen[0], (runs[0], &[[1; 16], [2; 16]][..]));
    assert_eq!(seen[1], (runs[1], &[[3; 16]][..]));
    refuses_other_lengths(body, |body| Hashes::decode(body, PAGE).map(|_| ()));
}

#[test]
fn hashes_out_of_order_are_refused() {
    let runs = [
        PageRange::new(0x8000, 0x9000),
        PageRange::new(0x1000, 0x2000),
    ];
    let mut frame = Vec::new();
    Hashes::encode(
        Target::Process(4),
        PAGE,
        &runs,
        &[PageHash::default(); 2],
        true,
        &mut frame,
    );
    assert!(matches!(
        Hashes::decode(body_of(&frame), PAGE),
        Err(FrameError::Field {
            field: "vaddr",
            value: 0x1000,
            ..
        })
    ));
}

#[test]
fn a_fault_must_lie_among_its_neighbours() {
    let mut fault = Fault {
        target: Target::Process(4),
        vaddr: Vaddr(0x5000),
        around: PageRange::new(0x4000, 0x8000),
        in_full: true,
        once_more: false,
    };
    let mut frame = Vec::new();
    fault.encode(9, PAGE, &mut frame);
    assert_eq!(Fault::decode(body_of(&frame), PAGE), Ok(fault));
    refuses_other_lengths(body_of(&frame), |body| Fault::decode(body, PAGE));
    (fault.in_full, fault.once_more) = (false, true);
    frame.clear();
    fault.encode(9, PAGE, &mut frame);
    assert_eq!(Fault::decode(body_of(&frame), PAGE), Ok(fault));
    for vaddr in [0x3000, 0x8000, 0x5001] {
        fault.vaddr = Vaddr(vaddr);
        frame.clear();
        fault.encode(9, PAGE, &mut frame);
        assert!(Fault::decode(body_of(&frame), PAGE).is_err(), "{vaddr:#x}");
    }
}
