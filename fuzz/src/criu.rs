//! CRIU's protocol: the deframer, and the sessions of a receiver, a server and a client, in both layouts.

use pageferry::criu::deframer::{Deframer, Piece};
use pageferry::criu::fetch::{Fetcher, Step as FetchStep};
use pageferry::criu::header::{Header, Op, PageFlags, Wire};
use pageferry::criu::receive::{ReceiveSession, Step};
use pageferry::criu::serve::{Request, Requests};
use pageferry::limits::{FRAME_PAGES_MAX, SESSION_TARGETS_MAX};
use pageferry::units::{PageRange, PageSize};

use crate::{byte, canary, frames, take};

const PAGE: PageSize = PageSize::KIB_4;

/// How a stream is read: the layout that is asked for, and how many bytes come at a time.
struct Reading {
    given: Option<Wire>,
    chunk: usize,
}

/// The stream of a dump: bytes as they are, or frames that are made of fewer ones.
fn stream(data: &mut &[u8]) -> Vec<u8> {
    match byte(data) % 4 {
        0 => data.to_vec(),
        1 => frames::spoken(data, Wire::V1),
        _ => frames::spoken(data, Wire::V2),
    }
}

impl Reading {
    fn take(data: &mut &[u8]) -> Reading {
        let how = byte(data);
        Reading {
            given: match how % 3 {
                0 => None,
                1 => Some(Wire::V1),
                _ => Some(Wire::V2),
            },
            chunk: usize::from(how / 3) + 1,
        }
    }
}

/// What was read of a stream, the same wherever it was cut.
#[derive(PartialEq, Debug)]
enum Seen {
    Header(Header),
    Raw(u64),
    BlockLength(u32),
    Block(u64, bool),
    Step(Step),
    Failed(String),
}

/// Appends what was seen; payload is put together.
fn see(seen: &mut Vec<Seen>, next: Seen) {
    match (seen.last_mut(), next) {
        (Some(Seen::Raw(bytes)), Seen::Raw(more)) => *bytes += more,
        (Some(Seen::Block(bytes, ends @ false)), Seen::Block(more, now)) => {
            *bytes += more;
            *ends = now;
        }
        (_, next) => seen.push(next),
    }
}

/// The deframer, told what follows as a session would.
pub(crate) fn deframer(mut data: &[u8]) {
    let reading = Reading::take(&mut data);
    let stream = stream(&mut data);
    let whole = pieces(&stream, reading.given, stream.len().max(1));
    let cut = pieces(&stream, reading.given, reading.chunk);
    assert_eq!(whole, cut, "it does not matter where the bytes are cut");
    // The seeds' blocks are shorter.
    canary(
        whole
            .iter()
            .any(|seen| matches!(seen, Seen::Block(4.., true))),
    );
}

fn pieces(data: &[u8], given: Option<Wire>, chunk: usize) -> Vec<Seen> {
    let mut deframer = Deframer::detecting(Wire::detect_receive, given);
    let mut seen = Vec::new();
    for input in data.chunks(chunk) {
        let mut at = 0;
        loop {
            let before = at;
            let piece = match deframer.next(input, &mut at) {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(error) => {
                    seen.push(Seen::Failed(error.to_string()));
                    return seen;
                }
            };
            assert!(before <= at && at <= input.len(), "it stays in its input");
            match piece {
                Piece::Header(header) => {
                    seen.push(Seen::Header(header));
                    // Behind a first CLOSE, whose layout nothing tells, nothing is read.
                    if matches!(header.op, Op::Close | Op::ForceClose) {
                        return seen;
                    }
                    let has_pages = header.flags.has(PageFlags::PRESENT);
                    let bytes = header.pages.get().saturating_mul(PAGE.bytes());
                    match header.op {
                        Op::AddFlagsCompressed if has_pages => {
                            deframer.expect_blocks(header.pages.get());
                        }
                        Op::AddFlags if has_pages => deframer.expect_raw(bytes),
                        Op::Add => deframer.expect_raw(bytes),
                        _ => {}
                    }
                }
                Piece::Raw(range) => {
                    assert!(range.end <= input.len() && !range.is_empty());
                    see(&mut seen, Seen::Raw(range.len() as u64));
                }
                Piece::BlockLength(bytes) => {
                    seen.push(Seen::BlockLength(bytes));
                    deframer.expect_block_bytes(bytes % 5000);
                }
                Piece::Block { range, ends } => {
                    assert!(range.end <= input.len());
                    see(&mut seen, Seen::Block(range.len() as u64, ends));
                }
            }
        }
        assert_eq!(at, input.len(), "what holds no piece is used up");
    }
    seen
}

/// The session of a receiving page server.
pub(crate) fn receive(mut data: &[u8]) {
    let reading = Reading::take(&mut data);
    let stream = stream(&mut data);
    let whole = steps(&stream, reading.given, stream.len().max(1));
    let cut = steps(&stream, reading.given, reading.chunk);
    assert_eq!(whole, cut, "it does not matter where the bytes are cut");
    check(&whole);
    // The seeds' blocks are shorter.
    canary(
        whole
            .iter()
            .any(|seen| matches!(seen, Seen::Block(4.., true))),
    );
}

fn steps(data: &[u8], given: Option<Wire>, chunk: usize) -> Vec<Seen> {
    let mut session = ReceiveSession::new(given, PAGE);
    let mut seen = Vec::new();
    for input in data.chunks(chunk) {
        let mut at = 0;
        loop {
            match session.next(input, &mut at) {
                Ok(None) => break,
                Ok(Some(Step::Raw(range))) => {
                    assert!(range.end <= at && at <= input.len());
                    if !range.is_empty() {
                        see(&mut seen, Seen::Raw(range.len() as u64));
                    }
                }
                Ok(Some(Step::Lz4 { range, ends })) => {
                    assert!(range.end <= at && at <= input.len());
                    see(&mut seen, Seen::Block(range.len() as u64, ends));
                }
                Ok(Some(step)) => {
                    let closes = matches!(step, Step::Close { .. });
                    seen.push(Seen::Step(step));
                    if closes {
                        session.handle_end().expect("it may end here");
                        return seen;
                    }
                }
                Err(error) => {
                    seen.push(Seen::Failed(error.to_string()));
                    return seen;
                }
            }
        }
        assert!(!session.whereabouts().is_empty());
    }
    session.handle_end().expect_err("there was no CLOSE");
    seen
}

/// What a session lets through keeps the promises of its module.
fn check(seen: &[Seen]) {
    let mut opened = 0;
    let mut last_end = None;
    for step in seen {
        match step {
            Seen::Step(Step::Open { .. }) => {
                opened += 1;
                last_end = Some(0);
            }
            Seen::Step(Step::Pages { range, .. }) => {
                let end = last_end.expect("pages come behind an OPEN");
                assert!(range.start().get() >= end, "pages come in their order");
                let pages = range.pages(PAGE).get();
                assert!(pages > 0 && pages <= FRAME_PAGES_MAX);
                last_end = Some(range.end().get());
            }
            _ => {}
        }
    }
    assert!(opened <= SESSION_TARGETS_MAX);
}

/// A dump in each layout, whole and without its end, cut at several places.
pub(crate) fn stream_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (wire, code) in [(Wire::V1, 1), (Wire::V2, 2)] {
        let dump = frames::dump(wire);
        for how in [code, 3 * 70] {
            seeds.push([&[how, 0], dump.as_slice()].concat());
        }
        seeds.push([&[code, 0], &dump[..120]].concat());
        for how in [0, code, 3 * 9 + code] {
            seeds.push([&[how, code], frames::DUMP].concat());
        }
        seeds.push([&[0, code], frames::OLD_DUMP].concat());
    }
    seeds
}

/// The requests that a page server with `--lazy-pages` is asked.
pub(crate) fn serve(mut data: &[u8]) {
    let reading = Reading::take(&mut data);
    let (whole, _) = requests(data, reading.given, data.len().max(1));
    let (cut, asked) = requests(data, reading.given, reading.chunk);
    assert_eq!(whole, cut, "it does not matter where the bytes are cut");
    canary(asked >= 2 && whole.last().is_some_and(|last| last.contains("Close")));
}

fn requests(data: &[u8], given: Option<Wire>, chunk: usize) -> (Vec<String>, u32) {
    let mut requests = Requests::new(PAGE, given);
    let mut seen = Vec::new();
    let mut asked = 0;
    let (mut at, mut end) = (0, 0);
    loop {
        match requests.read(&data[at..end]) {
            Ok(None) if end == data.len() => return (seen, asked),
            Ok(None) => end = (end + chunk).min(data.len()),
            Ok(Some((request, len))) => {
                assert!(len > 0 && len <= end - at, "it goes on, within its bytes");
                at += len;
                seen.push(format!("{request:?}"));
                let Request::Get(get) = request else {
                    return (seen, asked);
                };
                let pages = get.range.pages(PAGE).get();
                assert!(pages > 0 && pages <= FRAME_PAGES_MAX);
                asked += 1;
            }
            Err(error) => {
                seen.push(error.to_string());
                return (seen, asked);
            }
        }
    }
}

/// Two requests and a CLOSE in each layout.
pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let none = PageFlags::default();
    let of = |(wire, code): (Wire, u8)| {
        let mut out = vec![code];
        for vaddr in [0x1000, 0x8000] {
            frames::header(&mut out, wire, (Op::Get, none), (2, vaddr), 7);
        }
        frames::header(&mut out, wire, (Op::Close, none), (0, 0), 0);
        out
    };
    let readings = [
        (Wire::V1, 0),
        (Wire::V1, 1),
        (Wire::V2, 3 * 4),
        (Wire::V2, 2),
    ];
    readings.into_iter().map(of).collect()
}

/// A client that has asked for some pages, and what a source answers.
pub(crate) fn fetch(mut data: &[u8]) {
    let wire = match byte(&mut data) % 2 {
        0 => Wire::V1,
        _ => Wire::V2,
    };
    let mut fetcher = Fetcher::new(wire, PAGE);
    let mut asked = Vec::new();
    let mut out = Vec::new();
    for tag in 0..usize::from(byte(&mut data) % 5) {
        let [page, pages] = take(&mut data);
        let start = (u64::from(page) + 1) << 12;
        let range = PageRange::new(start, start + ((u64::from(pages) % 40 + 1) << 12));
        fetcher.get(7, range, tag, &mut out);
        asked.push(range);
    }
    assert_eq!(out.len(), asked.len() * fetcher.header_bytes());
    if byte(&mut data) % 2 == 1 {
        fetcher.close(&mut out);
    }
    let answers = match byte(&mut data) % 2 {
        0 => data.to_vec(),
        _ => frames::spoken(data, wire),
    };
    let mut data = answers.as_slice();
    let mut got = vec![0; asked.len()];
    let mut complete = 0;
    while let Ok((used, step)) = fetcher.next(data) {
        assert!(used <= data.len(), "it stays within the unread bytes");
        match step {
            FetchStep::Incomplete => break,
            FetchStep::Closed(status) => {
                canary(status == 0 && complete >= 2);
                break;
            }
            FetchStep::Answer { tag } => assert_eq!(got[tag], 0),
            FetchStep::Pages { tag, image, bytes } => {
                assert_eq!(image.bytes(), bytes.len() as u64);
                assert_eq!(image.start().get(), asked[tag].start().get() + got[tag]);
                assert!(bytes.end <= used);
                got[tag] += image.bytes();
                assert!(
                    got[tag] <= asked[tag].bytes(),
                    "no more comes than was asked for"
                );
            }
            FetchStep::Complete { tag, rest, .. } => {
                let rest = rest.map_or(0, PageRange::bytes);
                assert_eq!(got[tag] + rest, asked[tag].bytes());
                complete += 1;
            }
            FetchStep::Unavailable { tag, .. } => assert_eq!(got[tag], 0),
        }
        data = &data[used..];
    }
}

/// Two questions with an answer, and with both and the end.
pub(crate) fn answer_seeds() -> Vec<Vec<u8>> {
    let of = |(wire, code): (Wire, u8)| {
        let asked = [code, 2, 0, 0, 15, 1, 1];
        let mut whole = [asked.as_slice(), &[0]].concat();
        let kind = (Op::AddFlags, PageFlags::PRESENT);
        frames::header(&mut whole, wire, kind, (1, 0x1000), 7);
        whole.extend_from_slice(&[9; 4096]);
        [whole, [asked.as_slice(), &[1], frames::ANSWERS].concat()]
    };
    let wires = [(Wire::V1, 0), (Wire::V2, 1)];
    wires.into_iter().flat_map(of).collect()
}
