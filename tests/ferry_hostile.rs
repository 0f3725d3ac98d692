//! Peers that speak ferry and attack: typed errors, no panic, no memory beyond the limits.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;
#[path = "common/ends.rs"]
mod ends;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use common::{FIRST_PAGE, PAGE};
use dump_bytes::dump;
use ends::{LONG, context, far_end, forward, many_pages};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::error::Error;
use pageferry::ferry::batch::{Batch, PageKind};
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdict, Verdicts};
use pageferry::ferry::frame::{self, Header, OpenFrame, Split, split};
use pageferry::ferry::gather::Run;
use pageferry::ferry::hash::{HashKey, PageHash, PageHasher};
use pageferry::ferry::hello::{Fail, Features, Greeting, Hello, Role, SessionId, VERSION, Window};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::link::{Admission, Dialer, RetryPolicy, SessionTable};
use pageferry::ferry::message::{Ack, Fault, Hashes, Open, WantHashes};
use pageferry::ferry::receiver::{Arrival, Receiver};
use pageferry::ferry::sender::Sender;
use pageferry::ferry::unpack::Unpacker;
use pageferry::limits::{FERRY_BATCH_BYTES_MAX, FERRY_BODY_BYTES_MAX, FERRY_STREAMS_MAX};
use pageferry::units::PageRange;
use proptest::prelude::*;

const PID: Target = Target::Process(7);

fn hello(role: Role) -> Hello {
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

const WINDOW: Window = Window {
    frames: 8,
    bytes: 1 << 20,
};

fn hasher() -> PageHasher {
    PageHasher::new(HashKey::default(), PAGE)
}

/// A batch with pages of every kind, as an honest sender packs it.
fn honest_batch() -> Vec<u8> {
    let verdicts = Verdicts {
        pages: vec![
            Verdict::Zero,
            Verdict::Same(PageHash([1; 16])),
            Verdict::Delta(PageHash([2; 16])),
            Verdict::Fresh,
            Verdict::Fresh,
            Verdict::Shared {
                hash: PageHash([3; 16]),
                of: 0,
            },
        ],
        xor: [[0; 4000].as_slice(), &[9; 96]].concat(),
    };
    let mut plain = vec![0; 3 * 4096];
    plain.extend([7; 4096]);
    plain.extend(common::page_content(100));
    plain.extend([8; 4096]);
    let start = FIRST_PAGE * 4096;
    let run = |first: u64, pages: u64, flags| Run {
        range: PageRange::new(start + first * 4096, start + (first + pages) * 4096),
        flags,
    };
    let batch = PlainBatch {
        target: PID,
        runs: &[run(0, 6, PageFlags::PRESENT), run(9, 100, PageFlags::LAZY)],
        plain: &plain,
    };
    let mut body = Vec::new();
    let mut encoder = Encoder::new(PAGE).unwrap();
    let level = Level::Zstd(1);
    let packed = encoder.encode(batch, &verdicts, &hasher(), level, &mut body);
    packed.unwrap();
    body
}

/// Bodies that are noise, or honest ones with changes.
fn bodies() -> impl Strategy<Value = Vec<u8>> {
    let mut honest = vec![honest_batch()];
    for write in [
        &(|out: &mut Vec<u8>| {
            let wire = Wire::V2;
            Open { target: PID, wire }.encode(out);
        }) as &dyn Fn(&mut Vec<u8>),
        &|out: &mut Vec<u8>| Ack::default().encode(out),
        &|out: &mut Vec<u8>| hello(Role::Sender).encode(frame::Kind::Hello, out),
        &|out: &mut Vec<u8>| {
            let runs = [PageRange::new(4096, 3 * 4096)];
            Hashes::encode(PID, PAGE, &runs, &[PageHash::default(); 2], false, out);
        },
    ] {
        let mut frames = Vec::new();
        write(&mut frames);
        // Some are written as whole frames: their bodies are behind the headers.
        honest.push(match split(&frames) {
            Ok(Split::Frame(frame)) => frames[frame.body].to_vec(),
            _ => frames,
        });
    }
    let changed = (
        prop::sample::select(honest),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        prop::option::of(any::<prop::sample::Index>()),
    );
    let changed = changed.prop_map(|(mut body, changes, cut)| {
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len()));
        }
        body
    });
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..400),
        3 => changed,
    ]
}

fn kinds() -> impl Strategy<Value = frame::Kind> {
    use frame::Kind::*;
    prop::sample::select(vec![
        Hello, Welcome, Fail, Open, Pages, Close, WantHashes, Bye, Ack, Hashes, Fault, FaultPages,
    ])
}

/// A step of a hostile peer.
fn frames() -> impl Strategy<Value = Vec<(frame::Kind, u64, Vec<u8>)>> {
    let number = prop_oneof![4 => 1..6_u64, 1 => any::<u64>()];
    prop::collection::vec((kinds(), number, bodies()), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Everything that reads the body of a frame says yes or no.
    #[test]
    fn no_body_breaks_its_reader(kind in kinds(), body in bodies()) {
        let _ = Hello::decode(kind, &body);
        let _ = Fail::decode(&body);
        let _ = Open::decode(&body);
        let _ = WantHashes::decode(&body, PAGE);
        let _ = Ack::decode(&body);
        let _ = Fault::decode(&body, PAGE);
        if let Ok(hashes) = Hashes::decode(&body, PAGE) {
            let said: usize = hashes.runs(PAGE).map(|(_, hashes)| hashes.len()).sum();
            prop_assert!(said * 16 <= body.len());
        }
        if let Ok(batch) = Batch::parse(&body, PAGE) {
            let _ = batch.agree(&hasher(), batch.bases().map(|_| PageHash::default()));
            let deltas = batch.pages().filter(|(_, kind)| *kind == PageKind::Delta).count();
            let mut out = Vec::new();
            let bases = vec![0; deltas * 4096];
            let unpacked = Unpacker::default().unpack(&batch, &bases, &mut out);
            prop_assert!(out.capacity() <= 2 * FERRY_BATCH_BYTES_MAX);
            if unpacked.is_ok() {
                prop_assert_eq!(batch.places().count() as u64, batch.present().get());
            }
        }
    }

    /// Headers promise no more than may be allocated for them.
    #[test]
    fn no_header_makes_room_beyond_the_limits(bytes: [u8; 28], kind in any::<u16>(), length: u32) {
        let mut header = bytes;
        header[..4].copy_from_slice(&frame::MAGIC);
        header[4..6].copy_from_slice(&(kind % 64).to_le_bytes());
        header[6..8].fill(0);
        header[16..20].copy_from_slice(&length.to_le_bytes());
        let crc = crc32fast::hash(&header[..24]);
        header[24..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(header) = Header::decode(&header) {
            prop_assert!(header.body_bytes <= FERRY_BODY_BYTES_MAX);
            prop_assert!(header.body_bytes == length as usize);
        }
    }

    /// A receiver holds no more than its window, whatever a sender sends.
    #[test]
    fn no_sender_breaks_a_receiver(frames in frames()) {
        let mut receiver = Receiver::new(PAGE, 2, WINDOW).taking_shared(frames.len().is_multiple_of(2));
        receiver.stream_up(0);
        let (mut here, mut applied) = (0_u64, 0);
        let mut ready = Vec::new();
        for (kind, number, body) in &frames {
            if kind.is_numbered() {
                match receiver.handle_numbered(*number, body.len() as u64) {
                    Ok(Arrival::Next) => ready.push((*number, *kind, body)),
                    Ok(Arrival::Held | Arrival::Again) => {}
                    Err(_) => continue,
                }
                here += body.len() as u64;
                while let Some(number) = receiver.next_held() {
                    ready.push((number, frame::Kind::Pages, body));
                }
            } else {
                let _ = receiver.handle(*kind, body);
            }
            let _ = receiver.poll(0, here);
        }
        prop_assert!(ready.len() <= WINDOW.frames as usize);
        for (number, kind, body) in ready {
            if receiver.read(kind, body).is_err() {
                break;
            }
            applied += 1;
            prop_assert_eq!(applied, number);
            receiver.applied(number);
        }
    }

    /// A sender believes no acknowledgement of what it has not sent, and no hashes unasked.
    #[test]
    fn no_receiver_breaks_a_sender(frames in frames(), sent in 0..5_u64) {
        let mut sender = Sender::new(PAGE, 2, WINDOW);
        sender.stream_up(0);
        for _ in 0..sent {
            sender.submit(frame::Kind::Pages, 1000);
        }
        sender.ask_hashes(PID);
        for (kind, _, body) in &frames {
            let _ = sender.handle(0, *kind, body);
            while sender.poll(0).is_some() {}
        }
        prop_assert_eq!(sender.last(), sent);
    }

    /// Greetings of all sorts, one after another, in both directions.
    #[test]
    fn no_greeting_breaks_a_port_or_a_dialer(
        greetings in prop::collection::vec(
            (0..3_u8, 0..70_u16, 0..70_u16, 0..4_u32, any::<bool>(), 1..5_u16), 1..12),
    ) {
        let time_limit = Duration::from_secs(1);
        let mut table = SessionTable::new(hello(Role::Receiver), &[Role::Receiver], time_limit);
        let times = RetryPolicy {
            pause_first: time_limit,
            pause_max: time_limit,
            give_up_after: time_limit,
        };
        let mut dialer = Dialer::new(hello(Role::Sender), times, Duration::ZERO);
        let _ = dialer.poll_dial(Duration::ZERO);
        let mut connections: Option<Receiver> = None;
        for (session, stream, streams, attempt, opening, role) in greetings {
            let mut greeting = Vec::new();
            let said = Hello {
                session: SessionId([session; 16]),
                role: [Role::Sender, Role::Receiver, Role::Requester, Role::Responder][usize::from(role) - 1],
                stream,
                streams,
                attempt,
                opening,
                ..hello(Role::Sender)
            };
            said.encode(frame::Kind::Hello, &mut greeting);
            let Ok(Split::Frame(framed)) = split(&greeting) else {
                panic!("it was framed");
            };
            let Ok(greeting) = Hello::decode(framed.kind, &greeting[framed.body]) else {
                continue;
            };
            let Greeting::Hello(said) = greeting else {
                panic!("it has this version");
            };
            let _ = dialer.handle_welcome(0, Greeting::Hello(said), Duration::ZERO);
            match table.admit(Greeting::Hello(said), true) {
                Admission::Refused(_) => {}
                // What the engine does with it: a session's connections are made when it is opened.
                Admission::Opened { peer, .. } if peer.session == SessionId([0; 16]) => {
                    let streams = peer.streams.clamp(1, FERRY_STREAMS_MAX);
                    let mut receiver = Receiver::new(PAGE, streams, WINDOW);
                    receiver.stream_up(peer.stream);
                    connections = Some(receiver);
                }
                Admission::Joined { peer, .. } if peer.session == SessionId([0; 16]) => {
                    if let Some(receiver) = &mut connections {
                        receiver.stream_up(peer.stream);
                    }
                }
                Admission::Opened { .. } | Admission::Joined { .. } => {}
            }
        }
    }
}

/// The frames of a hostile peer as bytes, their checksums right.
fn as_bytes(frames: &[(frame::Kind, u64, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, number, body) in frames {
        // Written by hand: an honest hand refuses to write what is beyond the limits.
        let start = bytes.len();
        bytes.extend_from_slice(&frame::MAGIC);
        bytes.extend_from_slice(&(*kind as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
        let crc = crc32fast::hash(&bytes[start..]);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(body);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A sender that greets and then says anything: the far end fails and leaves nothing.
    #[test]
    fn a_far_end_survives_what_follows_a_greeting(frames in frames()) {
        let tmp = tempfile::tempdir().unwrap();
        let far = far_end(tmp.path(), None, Duration::from_millis(200));
        let mut socket = TcpStream::connect(far.address).unwrap();
        let mut greeting = Vec::new();
        hello(Role::Sender).encode(frame::Kind::Hello, &mut greeting);
        socket.write_all(&greeting).unwrap();
        // It may hang up at any word.
        let _ = socket.write_all(&as_bytes(&frames));
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = std::io::copy(&mut socket, &mut std::io::sink());
        prop_assert!(far.finish().is_err());
        prop_assert_eq!(common::files(tmp.path()).len(), 0);
    }

    /// A receiver that welcomes and then says anything: the dump fails.
    #[test]
    fn a_near_end_survives_what_follows_a_welcome(frames in frames()) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let context = context(address, 1, 1 << 20, Duration::from_millis(200));
        let receiver = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            // No one else is let in.
            drop(listener);
            let mut greeting = [0; 28 + 72];
            socket.read_exact(&mut greeting).unwrap();
            let Ok(Split::Frame(framed)) = split(&greeting) else {
                panic!("no greeting");
            };
            let Ok(Greeting::Hello(said)) = Hello::decode(framed.kind, &greeting[framed.body])
            else {
                panic!("no greeting");
            };
            let welcome = Hello {
                role: Role::Receiver,
                window: WINDOW,
                ..said
            };
            let mut words = Vec::new();
            welcome.encode(frame::Kind::Welcome, &mut words);
            let _ = socket.write_all(&words);
            let _ = socket.write_all(&as_bytes(&frames));
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut socket, &mut std::io::sink());
        });
        let bytes = dump(&[(PID, many_pages(1))], Wire::V2);
        let (forwarded, answers) = forward(&context, &bytes, 1 << 20);
        prop_assert!(forwarded.is_err());
        prop_assert!(answers.len() <= 1, "CLOSE was answered");
        receiver.join().unwrap();
    }
}

/// Says `bytes` to a far end and reads until it hangs up; returns the FAIL that came.
fn refusal(bytes: &[u8]) -> (Fail, Error) {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, LONG);
    let mut socket = TcpStream::connect(far.address).unwrap();
    socket.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    let Ok(Split::Frame(frame)) = split(&answer) else {
        panic!("no frame: {answer:?}");
    };
    assert_eq!(frame.kind, frame::Kind::Fail);
    let fail = Fail::decode(&answer[frame.body]).unwrap();
    (fail, far.finish().unwrap_err())
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let mut hello = Vec::new();
    let open = OpenFrame::begin(&mut hello);
    hello.extend_from_slice(&9_u16.to_le_bytes());
    hello.extend_from_slice(&[0xee; 300]);
    open.finish(&mut hello, frame::Kind::Hello, 0);
    let (fail, error) = refusal(&hello);
    for text in [fail.text, error.to_string()] {
        assert!(
            text.contains("version 9") && text.contains("version 1"),
            "{text}"
        );
    }
}
