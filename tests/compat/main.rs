//! What builds before this one have written and sent is read by this one: images, and captures of ferry.
//!
//! ```text
//! tests/compat/8da3145/    made by the programs of that revision (`make.rs`, README.md)
//!   v1/ v2/ child/ compressed/       images
//!   round-1, round-2, post-copy      what both ends of a connection sent, *.sender and *.receiver
//! ```
//!
//! `cargo xtask exchange DIR` tries more, with a real CRIU, where the programs themselves can be had.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/dump_bytes.rs"]
mod dump_bytes;
#[path = "../common/ends.rs"]
mod ends;
#[path = "../common/ferry_client.rs"]
mod ferry_client;
#[path = "../common/forwarding.rs"]
mod forwarding;
mod make;
mod samples;
#[allow(dead_code, reason = "its own tests use the rest")]
#[path = "../serve/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{PAGE, TARGET, check_images, naive_memory, page_content};
use ends::{LONG, far_end};
use pageferry::criu::header::Wire;
use pageferry::ferry::batch::{Batch, PageKind, Place};
use pageferry::ferry::frame::{Kind, Split, split};
use pageferry::ferry::hash::PageHasher;
use pageferry::ferry::hello::{Features, Greeting, Hello, Role};
use pageferry::ferry::message::{Ack, Fault, Hashes, Open, WantHashes, decode_close};
use pageferry::ferry::unpack::Unpacker;
use samples::{Image, images, round, whole};
use server::Server;

/// Where the samples of a build lie.
fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/8da3145")
}

/// What one end of a connection sent.
fn recorded(name: &str) -> Vec<u8> {
    std::fs::read(dir().join(name)).unwrap()
}

#[test]
fn images_of_an_earlier_build_have_all_their_pages() {
    for Image { name, levels, .. } in images() {
        check_images(&dir().join(name), TARGET, &naive_memory(&levels));
    }
}

#[test]
fn images_of_an_earlier_build_are_served() {
    for Image { name, levels, .. } in images() {
        let server = Server::start(&dir().join(name), false);
        let mut client = server.connect();
        let known = naive_memory(&levels);
        let present = known
            .iter()
            .filter_map(|(page, seed)| Some((page, (*seed)?)));
        let mut asked = 0;
        for (page, seed) in present {
            client.get(*page, 1);
            let (first, content) = client.answer();
            assert_eq!(first, *page);
            assert!(content == page_content(seed), "{name}: page {page:#x}");
            asked += 1;
        }
        assert!(asked > 5, "{name}: {asked} pages");
        client.close();
        server.outcome().unwrap();
    }
}

#[test]
fn images_of_an_earlier_build_are_inspected() {
    for Image {
        name, wire, levels, ..
    } in images()
    {
        let program = testbed::workspace::binary("pageferry").unwrap();
        let output = Command::new(program)
            .arg("inspect")
            .arg(dir().join(name))
            .arg("--json")
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {problem}");
        let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        let pagemap = &report["directories"][0]["pagemaps"][0];
        let layout = match wire {
            Wire::V1 => "v1",
            Wire::V2 => "v2",
        };
        let pages: u64 = levels[0].iter().map(|run| run.pages).sum();
        assert_eq!(
            (&pagemap["layout"], &pagemap["pages"], &pagemap["damage"]),
            (&layout.into(), &pages.into(), &serde_json::Value::Null),
            "{name}: {stdout}"
        );
    }
}

#[test]
fn a_capture_of_an_earlier_sender_is_received() {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, LONG);
    let sent = recorded("round-1.sender");
    let mut stream = TcpStream::connect(far.address).unwrap();
    let mut received = Vec::new();
    for (frame, bytes) in frames(&sent) {
        stream.write_all(bytes).unwrap();
        // A sender sends no more before it has received this.
        let awaited = |received: &[CapturedFrame<'_>]| match frame.kind {
            Kind::Hello => received.iter().any(|sent| sent.kind == Kind::Ack),
            Kind::Open | Kind::Close => received.iter().any(|sent| {
                sent.kind == Kind::Ack && Ack::decode(sent.body).unwrap().answer.to == frame.number
            }),
            _ => true,
        };
        while !awaited(&whole_frames(&received)) {
            let mut bytes = [0; 4096];
            let came = stream.read(&mut bytes).unwrap();
            assert!(came > 0, "the receiver hung up");
            received.extend_from_slice(&bytes[..came]);
        }
    }
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    far.finish().unwrap();
    check_images(tmp.path(), TARGET, &naive_memory(&[round(1)]));
}

/// A frame of a capture.
struct CapturedFrame<'a> {
    kind: Kind,
    number: u64,
    body: &'a [u8],
}

/// The frames that are whole, each with all its bytes.
fn split_all(mut sent: &[u8]) -> (Vec<(CapturedFrame<'_>, &[u8])>, &[u8]) {
    let mut frames = Vec::new();
    while let Split::Frame(frame) = split(sent).unwrap() {
        let (bytes, rest) = sent.split_at(frame.end());
        let (kind, number) = (frame.kind, frame.number);
        let body = &bytes[frame.body];
        frames.push((CapturedFrame { kind, number, body }, bytes));
        sent = rest;
    }
    (frames, sent)
}

/// The frames of what has come so far.
fn whole_frames(received: &[u8]) -> Vec<CapturedFrame<'_>> {
    split_all(received)
        .0
        .into_iter()
        .map(|(frame, _)| frame)
        .collect()
}

/// All frames of a capture; nothing is left over.
fn frames(sent: &[u8]) -> Vec<(CapturedFrame<'_>, &[u8])> {
    let (frames, rest) = split_all(sent);
    assert!(rest.is_empty(), "a frame is cut");
    frames
}

/// The same without their bytes.
fn decoded(sent: &[u8]) -> Vec<CapturedFrame<'_>> {
    frames(sent).into_iter().map(|(frame, _)| frame).collect()
}

/// Reads each frame as its kind says, and returns the greeting.
fn expect_understood(sent: &[CapturedFrame<'_>]) -> Hello {
    let mut greeting = None;
    for CapturedFrame { kind, body, .. } in sent {
        match kind {
            Kind::Hello | Kind::Welcome => match Hello::decode(*kind, body).unwrap() {
                Greeting::Hello(hello) => greeting = Some(hello),
                other => panic!("{other:?}"),
            },
            Kind::Open => assert_eq!(Open::decode(body).unwrap().target, TARGET),
            Kind::Pages | Kind::FaultPages => drop(Batch::parse(body, PAGE).unwrap()),
            Kind::Close => drop(decode_close(body).unwrap()),
            Kind::WantHashes => drop(WantHashes::decode(body, PAGE).unwrap()),
            Kind::Hashes => drop(Hashes::decode(body, PAGE).unwrap()),
            Kind::Ack => drop(Ack::decode(body).unwrap()),
            Kind::Fault => drop(Fault::decode(body, PAGE).unwrap()),
            Kind::Bye | Kind::FaultInPush => assert!(body.is_empty()),
            Kind::Fail => panic!("the session of the capture failed"),
        }
    }
    greeting.expect("a greeting")
}

/// The contents of all pages of the batches, by page number. Bases are those of `base`; hashes are compared under the
/// key of the receiver.
fn contents(
    sent: &[CapturedFrame<'_>],
    base: &BTreeMap<u64, Option<u32>>,
    hasher: &PageHasher,
) -> (BTreeMap<u64, Vec<u8>>, Vec<PageKind>) {
    let (mut pages, mut kinds) = (BTreeMap::new(), Vec::new());
    let of_base = |number: u64| page_content(base[&number].unwrap());
    let batches = sent
        .iter()
        .filter(|frame| matches!(frame.kind, Kind::Pages | Kind::FaultPages));
    for frame in batches {
        let batch = Batch::parse(frame.body, PAGE).unwrap();
        let bases: Vec<(u64, PageKind)> = batch
            .bases()
            .map(|(at, kind)| (at.get() >> PAGE.shift(), kind))
            .collect();
        let hashes = bases
            .iter()
            .map(|(number, _)| hasher.hash(&of_base(*number)));
        batch.agree(hasher, hashes).unwrap();
        let deltas = bases.iter().filter(|(_, kind)| *kind == PageKind::Delta);
        let deltas: Vec<u8> = deltas.flat_map(|(number, _)| of_base(*number)).collect();
        let mut unpacked = Vec::new();
        Unpacker::default()
            .unpack(&batch, &deltas, &mut unpacked)
            .unwrap();
        kinds.extend(batch.pages().map(|(_, kind)| kind));
        for (at, place) in batch.places() {
            let number = at.get() >> PAGE.shift();
            let content = match place {
                Place::Zero => vec![0; PAGE.as_usize()],
                Place::Same => of_base(number),
                Place::Body(range) => frame.body[range].to_vec(),
                Place::Unpacked(range) => unpacked[range].to_vec(),
                Place::Shared(_) => panic!("both ends are older"),
            };
            pages.insert(number, content);
        }
    }
    (pages, kinds)
}

/// Compares the pages of a capture with what they were.
fn expect_pages(pages: &BTreeMap<u64, Vec<u8>>, expected: &BTreeMap<u64, Option<u32>>) {
    let present: Vec<_> = expected
        .iter()
        .filter_map(|(page, seed)| Some((*page, (*seed)?)))
        .collect();
    assert_eq!(pages.len(), present.len());
    for (page, seed) in present {
        assert!(pages[&page] == page_content(seed), "page {page:#x}");
    }
}

#[test]
fn captures_of_two_rounds_are_decoded() {
    let mut before = BTreeMap::new();
    let mut seen = Vec::new();
    for number in [1, 2] {
        let [sender, receiver] =
            ["sender", "receiver"].map(|end| recorded(&format!("round-{number}.{end}")));
        let (sender, receiver) = (decoded(&sender), decoded(&receiver));
        assert_eq!(expect_understood(&sender).role, Role::Sender);
        let welcome = expect_understood(&receiver);
        let hasher = PageHasher::new(welcome.hash_key, PAGE);
        let (pages, kinds) = contents(&sender, &before, &hasher);
        before = naive_memory(&[round(number)]);
        expect_pages(&pages, &before);
        seen.extend(kinds);
        let numbers: Vec<u64> = sender
            .iter()
            .map(|frame| frame.number)
            .filter(|n| *n > 0)
            .collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
        assert_eq!(sender.last().unwrap().kind, Kind::Bye);
    }
    // Each way in which a page can travel.
    for kind in [
        PageKind::Zero,
        PageKind::Same,
        PageKind::Raw,
        PageKind::Packed,
        PageKind::Delta,
    ] {
        assert!(seen.contains(&kind), "no {kind:?} page");
    }
}

#[test]
fn a_capture_of_a_post_copy_is_decoded() {
    let [sender, faults] = ["post-copy.sender", "post-copy-faults.sender"].map(recorded);
    let (sender, faults) = (decoded(&sender), decoded(&faults));
    assert_eq!(expect_understood(&sender).role, Role::Sender);
    assert_eq!(expect_understood(&faults).role, Role::Responder);
    for end in ["post-copy.receiver", "post-copy-faults.receiver"] {
        let _hello = expect_understood(&decoded(&recorded(end)));
    }
    let client = ferry_client::hello(Role::Receiver, ferry_client_features(), 1);
    let hasher = PageHasher::new(client.hash_key, PAGE);
    let none = BTreeMap::new();
    let (mut pages, _) = contents(&sender, &none, &hasher);
    let (asked, _) = contents(&faults, &none, &hasher);
    assert!(!asked.is_empty(), "the fault was not answered");
    pages.extend(asked);
    expect_pages(&pages, &naive_memory(&[whole()]));
}

/// What the client of the capture can do.
fn ferry_client_features() -> Features {
    Features::FAULTS.with(Features::CONFIRMS_BYE)
}
