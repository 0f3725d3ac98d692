//! Ferry: frames, batches, messages.

use arbitrary::Unstructured;
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::ferry::batch::{Batch, PageKind};
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdict, Verdicts};
use pageferry::ferry::frame::{Kind, MAGIC, Split, split};
use pageferry::ferry::gather::Run;
use pageferry::ferry::hash::{HashKey, PageHash, PageHasher};
use pageferry::ferry::hello::{
    Fail, FailCode, Features, Greeting, Hello, Role, SessionId, VERSION, Window,
};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::{Ack, Fault, Hashes, Open, WantHashes};
use pageferry::ferry::receiver::Receiver;
use pageferry::ferry::unpack::Unpacker;
use pageferry::limits::{FERRY_BATCH_BYTES_MAX, FERRY_BODY_BYTES_MAX};
use pageferry::units::{PageRange, PageSize};

use crate::{byte, canary, take};

pub(crate) const PAGE: PageSize = PageSize::KIB_4;

pub(crate) const PID: Target = Target::Process(7);

pub(crate) const WINDOW: Window = Window {
    frames: 8,
    bytes: 1 << 20,
};

/// All kinds of frames.
const KINDS: [Kind; 13] = [
    Kind::Hello,
    Kind::Welcome,
    Kind::Fail,
    Kind::Open,
    Kind::Pages,
    Kind::Close,
    Kind::WantHashes,
    Kind::Bye,
    Kind::Ack,
    Kind::Hashes,
    Kind::Fault,
    Kind::FaultPages,
    Kind::FaultInPush,
];

fn kind(code: u8) -> Kind {
    KINDS[usize::from(code) % KINDS.len()]
}

fn code(kind: Kind) -> u8 {
    let place = KINDS.iter().position(|other| *other == kind);
    u8::try_from(place.expect("all are there")).expect("there are few")
}

pub(crate) fn hasher() -> PageHasher {
    PageHasher::new(HashKey::default(), PAGE)
}

/// A frame that a peer sends, which need not be one that may be sent.
pub(crate) struct PeerFrame<'d> {
    pub(crate) kind: Kind,
    pub(crate) number: u64,
    pub(crate) body: &'d [u8],
}

/// Bytes as frames: kind, number, length of the body (two bytes), body.
pub(crate) fn frames_of(mut data: &[u8]) -> Vec<PeerFrame<'_>> {
    let mut frames = Vec::new();
    while data.len() >= 4 {
        let [code, number, low, high] = take(&mut data);
        let len = usize::from(u16::from_le_bytes([low, high])).min(data.len());
        let (body, rest) = data.split_at(len);
        data = rest;
        let number = match number {
            255 => u64::MAX,
            number => u64::from(number),
        };
        frames.push(PeerFrame {
            kind: kind(code),
            number,
            body,
        });
    }
    frames
}

/// The bytes that [`frames_of`] reads as these frames.
pub(crate) fn bytes_of_frames(frames: &[(Kind, u8, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, number, body) in frames {
        let len = u16::try_from(body.len()).expect("a short body");
        out.extend_from_slice(&[code(*kind), *number]);
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(body);
    }
    out
}

/// The frame on the wire, its checksums right.
pub(crate) fn on_wire(frame: &PeerFrame<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    let len = u32::try_from(frame.body.len()).expect("a short body");
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&(frame.kind as u16).to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&frame.number.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(frame.body).to_le_bytes());
    let crc = crc32fast::hash(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(frame.body);
}

/// A stream of frames: bytes as they are, or frames whose checksums hold.
pub(crate) fn frames(mut data: &[u8]) {
    let mut stream = Vec::new();
    match byte(&mut data) % 2 {
        0 => stream.extend_from_slice(data),
        _ => frames_of(data)
            .iter()
            .for_each(|frame| on_wire(frame, &mut stream)),
    }
    let (mut at, mut pages) = (0, 0);
    while at < stream.len() {
        match split(&stream[at..]) {
            Ok(Split::Frame(frame)) => {
                assert!(frame.body.len() <= FERRY_BODY_BYTES_MAX);
                assert!(at + frame.body.end <= stream.len());
                pages += u32::from(frame.kind == Kind::Pages);
                at += frame.body.end;
            }
            Ok(Split::Need(bytes)) => {
                assert!(bytes > 0 && bytes <= FERRY_BODY_BYTES_MAX);
                break;
            }
            Err(_) => break,
        }
    }
    canary(pages >= 2 && at == stream.len());
}

/// A stream of honest frames.
pub(crate) fn frame_seeds() -> Vec<Vec<u8>> {
    let session = session_seeds();
    let mut wire = vec![0];
    frames_of(&session[0])
        .iter()
        .for_each(|frame| on_wire(frame, &mut wire));
    vec![wire, [&[1], session[0].as_slice()].concat()]
}

/// The body of a batch, unpacked as a receiver does; or one that an honest sender packs.
pub(crate) fn batch(mut data: &[u8]) {
    if byte(&mut data) % 2 == 1 {
        return packed(data);
    }
    let Ok(batch) = Batch::parse_behind(data, PAGE, usize::from(OTHERS)) else {
        return;
    };
    let _ = batch.agree(&hasher(), batch.bases().map(|_| PageHash::default()));
    let deltas = batch
        .pages()
        .filter(|(_, kind)| *kind == PageKind::Delta)
        .count();
    let mut out = Vec::new();
    let unpacked = Unpacker::default().unpack(&batch, &vec![0; deltas * 4096], &mut out);
    assert!(out.capacity() <= 2 * FERRY_BATCH_BYTES_MAX);
    if unpacked.is_ok() {
        assert_eq!(batch.places().count() as u64, batch.present().get());
        assert!(batch.shared().all(|(_, of)| of < OTHERS));
    }
}

/// Targets whose pages a batch may name.
const OTHERS: u16 = 3;

/// Any pages with any verdicts come back as they were.
fn packed(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let verdicts: Vec<u8> = input.arbitrary().unwrap_or_default();
    let verdicts: Vec<u8> = verdicts.into_iter().take(16).collect();
    if verdicts.is_empty() {
        return;
    }
    let mut plain = Vec::new();
    let mut xor = Vec::new();
    let mut judged = Vec::new();
    for verdict in &verdicts {
        let fill: u8 = input.arbitrary().unwrap_or(1);
        let page = [fill; 4096];
        judged.push(match verdict % 5 {
            0 => {
                plain.extend([0; 4096]);
                Verdict::Zero
            }
            1 => {
                plain.extend(page);
                Verdict::Same(PageHash([fill; 16]))
            }
            2 => {
                plain.extend(page);
                xor.extend(page.map(|byte| byte ^ 0x55));
                Verdict::Delta(PageHash([fill; 16]))
            }
            3 => {
                plain.extend(page);
                Verdict::Shared {
                    hash: PageHash([fill; 16]),
                    of: u16::from(fill) % OTHERS,
                }
            }
            _ => {
                plain.extend(page);
                Verdict::Fresh
            }
        });
    }
    let end = 0x10_000 + plain.len() as u64;
    let run = Run {
        range: PageRange::new(0x10_000, end),
        flags: PageFlags::PRESENT,
    };
    let plain_batch = PlainBatch {
        target: PID,
        runs: &[run],
        plain: &plain,
    };
    let level = match input.arbitrary().unwrap_or(0) % 3_u8 {
        0 => Level::None,
        level => Level::Zstd(i32::from(level)),
    };
    let verdicts = Verdicts { pages: judged, xor };
    let mut body = Vec::new();
    let mut encoder = Encoder::new(PAGE).expect("an encoder is made");
    let encoded = encoder.encode(plain_batch, &verdicts, &hasher(), level, &mut body);
    encoded.expect("an honest batch is packed");
    let read =
        Batch::parse_behind(&body, PAGE, usize::from(OTHERS)).expect("what was packed is read");
    assert_eq!(read.present().get(), verdicts.pages.len() as u64);
    let deltas = read
        .pages()
        .filter(|(_, kind)| *kind == PageKind::Delta)
        .count();
    let mut out = Vec::new();
    let unpacked = Unpacker::default().unpack(&read, &vec![0x55; deltas * 4096], &mut out);
    unpacked.expect("what was packed is unpacked");
    let mut pairs = verdicts.pages.windows(2);
    canary(pairs.any(|two| matches!(two, [Verdict::Delta(_), Verdict::Zero])));
}

/// A body with pages of every kind.
fn honest_batch(kinds: &[u8]) -> Vec<u8> {
    honest_batch_at(0x10_000, kinds)
}

fn honest_batch_at(start: u64, kinds: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut pages = Vec::new();
    let mut xor = Vec::new();
    for kind in kinds {
        pages.push(match kind {
            0 => Verdict::Zero,
            1 => Verdict::Same(PageHash([1; 16])),
            2 => Verdict::Delta(PageHash([2; 16])),
            4 => Verdict::Shared {
                hash: PageHash([4; 16]),
                of: 1,
            },
            _ => Verdict::Fresh,
        });
        if *kind == 2 {
            xor.extend([[0; 4000].as_slice(), &[9; 96]].concat());
        }
        plain.extend([if *kind == 0 { 0 } else { 7 }; 4096]);
    }
    let end = start + plain.len() as u64;
    let run = |start, end, flags| Run {
        range: PageRange::new(start, end),
        flags,
    };
    let batch = PlainBatch {
        target: PID,
        runs: &[
            run(start, end, PageFlags::PRESENT),
            run(end + 0x4000, end + 0x9000, PageFlags::LAZY),
        ],
        plain: &plain,
    };
    let mut body = Vec::new();
    let mut encoder = Encoder::new(PAGE).expect("an encoder is made");
    let verdicts = Verdicts { pages, xor };
    let packed = encoder.encode(batch, &verdicts, &hasher(), Level::Zstd(1), &mut body);
    packed.expect("an honest batch is packed");
    body
}

/// Bodies of batches, and pages to be packed.
pub(crate) fn batch_seeds() -> Vec<Vec<u8>> {
    let bodies = [
        vec![0, 0],
        vec![0, 1, 3],
        vec![1, 2, 3, 3],
        vec![3],
        vec![4, 3, 4],
    ];
    let mut seeds: Vec<Vec<u8>> = bodies
        .iter()
        .map(|kinds| [&[0], honest_batch(kinds).as_slice()].concat())
        .collect();
    seeds.push((1..=120).map(|byte| byte * 2 + 1).collect());
    seeds
}

/// Everything that reads the body of a frame says yes or no.
pub(crate) fn messages(mut data: &[u8]) {
    let kind = kind(byte(&mut data));
    match kind {
        Kind::Hello | Kind::Welcome => {
            if let Ok(Greeting::Hello(said)) = Hello::decode(kind, data) {
                let mut words = Vec::new();
                said.encode(kind, &mut words);
                let again = Hello::decode(kind, body_of(&words));
                assert!(matches!(again, Ok(Greeting::Hello(again)) if again == said));
                canary(said.streams > 1);
            }
        }
        Kind::Fail => drop(Fail::decode(data)),
        Kind::Open => {
            if let Ok(open) = Open::decode(data) {
                let mut body = Vec::new();
                open.encode(&mut body);
                assert_eq!(Open::decode(&body), Ok(open), "it comes back as it was");
            }
        }
        Kind::WantHashes => drop(WantHashes::decode(data, PAGE)),
        Kind::Ack => drop(Ack::decode(data)),
        Kind::Fault => {
            if let Ok(fault) = Fault::decode(data, PAGE) {
                assert!(fault.around.contains(fault.vaddr));
            }
        }
        Kind::Hashes => {
            if let Ok(hashes) = Hashes::decode(data, PAGE) {
                let mut end = 0;
                let mut said = 0;
                for (range, hashes) in hashes.runs(PAGE) {
                    assert!(range.start().get() >= end);
                    end = range.end().get();
                    said += hashes.len();
                }
                assert!(said * 16 <= data.len());
                canary(said >= 2);
            }
        }
        _ => {
            let mut receiver = Receiver::new(PAGE, 1, WINDOW);
            receiver.stream_up(0);
            let _ = receiver.handle(kind, data);
        }
    }
}

/// The body of a whole frame.
pub(crate) fn body_of(frame: &[u8]) -> &[u8] {
    match split(frame) {
        Ok(Split::Frame(found)) => &frame[found.body],
        other => panic!("no frame: {other:?}"),
    }
}

pub(crate) fn hello(role: Role) -> Hello {
    Hello {
        version: VERSION,
        role,
        page: PAGE,
        features: Features::HASHES.with(Features::DELTA),
        session: SessionId([7; 16]),
        stream: 0,
        streams: 2,
        attempt: 1,
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    }
}

/// Honest bodies by kind.
fn bodies() -> Vec<(Kind, Vec<u8>)> {
    let frame = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut words = Vec::new();
        write(&mut words);
        match split(&words) {
            Ok(Split::Frame(found)) => words[found.body].to_vec(),
            _ => words,
        }
    };
    let runs = [PageRange::new(4096, 3 * 4096)];
    let open = Open {
        target: PID,
        wire: Wire::V2,
    };
    let fault = Fault {
        target: PID,
        vaddr: runs[0].start(),
        around: runs[0],
        in_full: false,
        once_more: false,
    };
    let want = WantHashes {
        target: PID,
        from: runs[0].start(),
    };
    vec![
        (
            Kind::Hello,
            frame(&|out| hello(Role::Sender).encode(Kind::Hello, out)),
        ),
        (
            Kind::Fail,
            frame(&|out| Fail::new(FailCode::Busy, "no").encode(out)),
        ),
        (Kind::Open, frame(&|out| open.encode(out))),
        (Kind::Pages, honest_batch(&[0, 3, 0])),
        (Kind::Close, frame(&|out| out.extend([0; 4]))),
        (Kind::WantHashes, frame(&|out| want.encode(out))),
        (Kind::Bye, Vec::new()),
        (Kind::Ack, frame(&|out| Ack::default().encode(out))),
        (
            Kind::Hashes,
            frame(&|out| Hashes::encode(PID, PAGE, &runs, &[PageHash::default(); 2], false, out)),
        ),
        (Kind::Fault, frame(&|out| fault.encode(1, PAGE, out))),
        (Kind::FaultPages, honest_batch(&[3])),
    ]
}

/// A body of each kind.
pub(crate) fn message_seeds() -> Vec<Vec<u8>> {
    let of = |(kind, body): (Kind, Vec<u8>)| [&[code(kind)], body.as_slice()].concat();
    bodies().into_iter().map(of).collect()
}

/// The same for a sender that has sent nothing, and one that has sent three frames.
pub(crate) fn sender_seeds() -> Vec<Vec<u8>> {
    let of = |seed: &Vec<u8>| [0, 3].map(|sent| [&[sent], seed.as_slice()].concat());
    session_seeds().iter().flat_map(of).collect()
}

/// A session of each half: OPEN, pages, CLOSE; and words of a receiver.
pub(crate) fn session_seeds() -> Vec<Vec<u8>> {
    let bodies = bodies();
    let body = |kind: Kind, number: u8| match (kind, number) {
        // Behind the pages of the frame before.
        (Kind::Pages, 3) => honest_batch_at(0x80_000, &[3, 0]),
        _ => {
            let found = bodies.iter().find(|(other, _)| *other == kind);
            found.map_or(Vec::new(), |(_, body)| body.clone())
        }
    };
    let of = |said: &[(Kind, u8)]| {
        let frames: Vec<_> = said
            .iter()
            .map(|(kind, number)| (*kind, *number, body(*kind, *number)))
            .collect();
        bytes_of_frames(&frames)
    };
    use Kind::{
        Ack, Bye, Close, Fail, FaultPages, Hashes, Hello, Open, Pages, WantHashes, Welcome,
    };
    vec![
        of(&[(Open, 1), (Pages, 2), (Pages, 3), (Close, 4), (Bye, 0)]),
        of(&[(Pages, 2), (Open, 1), (Close, 3)]),
        of(&[(WantHashes, 0), (Open, 1), (Pages, 2), (FaultPages, 1)]),
        of(&[(Ack, 0), (Hashes, 0), (Ack, 0), (Fail, 0)]),
        // Orders to a receiver of a post-copy among them: install, ask.
        of(&[
            (Welcome, 0),
            (Open, 1),
            (Pages, 2),
            (Hello, 0),
            (FaultPages, 1),
            (Close, 3),
        ]),
    ]
}
