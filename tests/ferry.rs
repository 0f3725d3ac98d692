//! Two page servers and ferry between them: whatever a dump says at the near end is in the images
//! at the far end, or both ends say that it is not.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/sender.rs"]
mod sender;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{
    FIRST_PAGE, PAGE, Run, check_images, files, level, naive_memory, with_large_runs,
    with_true_holes,
};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::engine::driver::Io;
use pageferry::engine::ferry::PusherConfig;
use pageferry::engine::ferry::port::{FerryPort, Handled};
use pageferry::engine::forward::{ForwardContext, forward_client};
use pageferry::engine::ingest::ReceiveContext;
use pageferry::engine::sessions::{Rules, Stay, run_sessions};
use pageferry::engine::stop::Stop;
use pageferry::engine::stores::{StoreOptions, Stores};
use pageferry::engine::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::frame::{self, OpenFrame, Split, split};
use pageferry::ferry::hello::Fail;
use pageferry::image::store::Sync;
use pageferry::observe::ferried::Forwarded;
use pageferry::observe::received::Received;
use pageferry::stream::Stream;
use proptest::prelude::*;
use sender::{dump, send};
use socket2::Socket;
use testbed::proxy::{Accident, Harm, Link, Proxy, Way};

const PID: Target = Target::Process(7);
const OTHER: Target = Target::Process(8);
const SHMEM: Target = Target::Shmem(9);

/// Patience of both ends in tests of what cannot be repaired.
const SHORT: Duration = Duration::from_secs(2);
/// Patience of both ends in all others.
const LONG: Duration = Duration::from_secs(60);

/// A page server that takes one session.
struct FarEnd {
    address: SocketAddr,
    stop: Stop,
    thread: JoinHandle<Result<Received>>,
}

fn far_end(dir: &Path, previous: Option<&str>, patience: Duration) -> FarEnd {
    far_end_at((Ipv4Addr::LOCALHOST, 0).into(), dir, previous, patience)
}

fn far_end_at(
    address: SocketAddr,
    dir: &Path,
    previous: Option<&str>,
    patience: Duration,
) -> FarEnd {
    std::fs::create_dir_all(dir).unwrap();
    let options = StoreOptions {
        dir: dir.to_owned(),
        page: PAGE,
        previous: previous.map(PathBuf::from),
        sync: Sync::None,
    };
    let context = ReceiveContext::new(Stores::open(options, None).unwrap(), Io::Epoll);
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = Stop::default();
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        let listener = Socket::from(listener);
        let port = FerryPort::new(&context, &stop, patience, true)?;
        let rules = Rules {
            stay: Stay::UntilShutDown,
            most: 100,
            allowed: Vec::new(),
        };
        let session = std::sync::Mutex::new(None);
        let ran = run_sessions(&listener, &rules, &stop, |mut stream| {
            if !stream.begins_with(frame::MAGIC).unwrap_or(false) {
                // It broke before it said anything.
                return Ok(());
            }
            let handled = port.handle(stream, true);
            if !matches!(handled, Ok(Handled::Lane)) {
                // Gone already if the session is not the first.
                let _ = listener.shutdown(Shutdown::Both);
            }
            match handled? {
                Handled::Lane => Ok(()),
                Handled::Session(received, ended) => {
                    *session.lock().unwrap() = Some(*received);
                    ended
                }
            }
        });
        ran?;
        let received = session.into_inner().unwrap();
        received.ok_or_else(|| Error::new(Kind::PeerLost, "no session came"))
    });
    FarEnd {
        address,
        stop: stopped,
        thread,
    }
}

impl FarEnd {
    fn finish(self) -> Result<Received> {
        self.thread.join().unwrap()
    }
}

fn context(far_end: SocketAddr, streams: u16, cache: u64, patience: Duration) -> ForwardContext {
    let pusher = PusherConfig {
        peer: Peer::parse(&far_end.to_string()).unwrap(),
        streams,
        reconnect_timeout: patience,
        delta_cache_bytes: cache,
        tls: None,
        stop: Stop::default(),
        traffic: Arc::default(),
    };
    ForwardContext::new(pusher, None, PAGE, false)
}

/// Sends `bytes` as a dump through `context`; returns the answers as well.
fn forward(context: &ForwardContext, bytes: &[u8], piece: usize) -> (Result<Forwarded>, Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let dump = send(theirs, bytes.to_vec(), piece);
    let (forwarded, ended) = forward_client(Stream::plain(ours), context);
    (ended.map(|()| forwarded), dump.join().unwrap())
}

/// Pages enough for several batches, of all kinds.
fn many_pages(first_seed: u32) -> Vec<Run> {
    let lazy = PageFlags::LAZY;
    vec![
        Run::present(FIRST_PAGE, 40, lazy, first_seed),
        Run::present(FIRST_PAGE + 50, 200, PageFlags::default(), first_seed + 40),
        Run::absent(FIRST_PAGE + 300, 1000, lazy),
        Run::present(FIRST_PAGE + 2000, 300, lazy, first_seed + 300),
    ]
}

fn expected(levels: &[Vec<Run>]) -> BTreeMap<u64, Option<u32>> {
    naive_memory(levels)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// A dump and the next one on top of it: the images have what was said.
    #[test]
    fn the_far_end_has_what_was_said(
        first in level(), second in level(), shmem in level(), large in 30..200_u64, v1: bool,
        streams in 1..4_u16,
        cache in prop::sample::select(vec![0, 20_000, 1 << 20, 1 << 30]),
        piece in prop::sample::select(vec![1000_usize, 60_000, 1 << 20]),
    ) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        let first = with_true_holes(with_large_runs(first, large), &BTreeMap::new());
        let memory = expected(std::slice::from_ref(&first));
        let second = with_true_holes(with_large_runs(second, large), &memory);
        let shmem = with_true_holes(shmem, &BTreeMap::new());
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        for (dir, previous, targets) in [
            (&old, None, vec![(PID, first.clone()), (SHMEM, shmem.clone())]),
            (&new, Some("../old"), vec![(PID, second.clone()), (OTHER, first.clone())]),
        ] {
            let far = far_end(dir, previous, LONG);
            let context = context(far.address, streams, cache, LONG);
            let (forwarded, answers) = forward(&context, &dump(&targets, wire), piece);
            forwarded.unwrap();
            // Of a parent at the far end no dump is told.
            prop_assert_eq!(&answers[..], &[0, 0, 0, 0, 0, 0]);
            let received = far.finish().unwrap();
            prop_assert_eq!(received.wire, Some(wire));
        }
        check_images(&old, PID, &memory);
        check_images(&old, SHMEM, &expected(&[shmem]));
        check_images(&new, PID, &expected(&[second, first.clone()]));
        check_images(&new, OTHER, &expected(&[first]));
    }
}

#[test]
fn what_the_parent_has_is_not_sent_again_and_not_stored_again() {
    let tmp = tempfile::tempdir().unwrap();
    let first = many_pages(100);
    let mut second = many_pages(100);
    second[1].seeds[7] = 77;
    for (dir, previous, runs) in [("old", None, &first), ("new", Some("../old"), &second)] {
        let dir = tmp.path().join(dir);
        let far = far_end(&dir, previous, LONG);
        let context = context(far.address, 2, 1 << 20, LONG);
        let (forwarded, _) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 1 << 20);
        let (sent, received) = (forwarded.unwrap().sent, far.finish().unwrap());
        if previous.is_some() {
            assert_eq!((sent.pages.same, sent.hashes_learned), (539, 540));
            assert!(sent.frame_bytes < 10_000, "{} bytes", sent.frame_bytes);
            assert_eq!(received.pages.in_parent, 539);
            assert_eq!(received.pages.received, 1);
        }
    }
    check_images(&tmp.path().join("new"), PID, &expected(&[second]));
}

#[test]
fn a_forwarder_that_stays_sends_differences() {
    let tmp = tempfile::tempdir().unwrap();
    let page = |seed: u32| common::page_content(seed);
    let differs = |a: Vec<u8>, b: Vec<u8>| a.iter().zip(&b).filter(|(a, b)| a != b).count();
    // Odd seeds have 64 noisy bytes and are uniform behind: seeds 251 apart differ only there.
    assert!(differs(page(101), page(101 + 502)) <= 64);
    let before = vec![Run::present(FIRST_PAGE, 100, PageFlags::LAZY, 101)];
    let mut after = before.clone();
    for seed in after[0].seeds.iter_mut().step_by(10) {
        *seed += 502;
    }
    let dirs = ["old", "new"].map(|name| tmp.path().join(name));
    let far = far_end(&dirs[0], None, LONG);
    let address = far.address;
    let pusher = context(address, 1, 1 << 24, LONG).pusher;
    let context = ForwardContext::new(pusher, None, PAGE, true);
    let (forwarded, _) = forward(&context, &dump(&[(PID, before)], Wire::V2), 1 << 20);
    assert_eq!(forwarded.unwrap().sent.pages.delta, 0);
    far.finish().unwrap();
    // Another process, with another key, at the same address.
    let far = far_end_at(address, &dirs[1], Some("../old"), LONG);
    let (forwarded, _) = forward(&context, &dump(&[(PID, after.clone())], Wire::V2), 1 << 20);
    let sent = forwarded.unwrap().sent;
    assert_eq!((sent.pages.delta, sent.pages.same), (10, 90));
    far.finish().unwrap();
    check_images(&dirs[1], PID, &expected(&[after]));
}

/// Forwards through a proxy that does `harm` to every connection, and checks that both ends agree:
/// the images are exact, or there are none. Returns whether it went well.
fn with_accident(accident: Accident, streams: u16, patience: Duration) -> bool {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    let mut runs = many_pages(100);
    runs.push(Run::present(
        FIRST_PAGE + 3000,
        1000,
        PageFlags::default(),
        7000,
    ));
    let far = far_end(&dir, None, patience);
    let proxy = Proxy::start(far.address, Link::default(), Some(accident)).unwrap();
    let context = context(proxy.address(), streams, 1 << 20, patience);
    let (forwarded, answers) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 60_000);
    if forwarded.is_err() {
        // It may never have heard of a session.
        far.stop.pull();
    }
    let received = far.finish();
    if forwarded.is_ok() {
        assert_eq!(answers, [0, 0, 0, 0, 0], "{accident:?}");
        received.unwrap();
        check_images(&dir, PID, &expected(&[runs]));
        return true;
    }
    assert!(answers.len() <= 1, "{accident:?}: CLOSE was answered");
    if received.is_ok() {
        // The far end has everything, but the near end never heard of it: no harm to the source.
        check_images(&dir, PID, &expected(&[runs]));
    } else {
        assert_eq!(
            files(&dir).len(),
            0,
            "{accident:?}: {:?}",
            files(&dir).keys()
        );
    }
    false
}

#[test]
fn connections_that_break_anywhere_beyond_a_batch_are_resumed() {
    let mut step = 40_000;
    for harm in [Harm::Reset, Harm::End, Harm::FlipBit] {
        for streams in [1, 3] {
            // Some batches further on: a reset takes along what the far end has not read yet.
            let accident = Accident {
                way: Way::ToServer,
                after_bytes: 900_000 + step,
                harm,
            };
            assert!(with_accident(accident, streams, LONG), "{accident:?}");
            step += 12_345;
        }
    }
}

#[test]
fn the_way_back_may_break_as_well() {
    for (harm, after_bytes) in [
        // WELCOME and a first ACK have 176 bytes: each connection says what is safe, and no more.
        (Harm::Reset, 180),
        (Harm::End, 240),
        (Harm::FlipBit, 190),
        (Harm::FlipBit, 400),
    ] {
        let accident = Accident {
            way: Way::ToClient,
            after_bytes,
            harm,
        };
        assert!(with_accident(accident, 1, LONG), "{accident:?}");
    }
}

#[test]
fn connections_that_never_get_anywhere_are_given_up_at_both_ends() {
    for (way, harm, after_bytes) in [
        (Way::ToServer, Harm::Reset, 0),
        (Way::ToServer, Harm::End, 60),
        (Way::ToServer, Harm::FlipBit, 99),
        (Way::ToServer, Harm::FlipBit, 20_000),
        (Way::ToClient, Harm::Reset, 99),
        (Way::ToClient, Harm::FlipBit, 3),
        (Way::ToServer, Harm::Reset, 100_000),
    ] {
        let accident = Accident {
            way,
            after_bytes,
            harm,
        };
        assert!(!with_accident(accident, 1, SHORT), "{accident:?}");
    }
}

#[test]
fn a_far_end_gives_up_by_itself() {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, Duration::from_millis(500));
    let (connection, accident) = (Link::default(), None);
    let proxy = Proxy::start(far.address, connection, accident).unwrap();
    let context = context(proxy.address(), 1, 0, LONG);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let forwarder = std::thread::spawn(move || forward_client(Stream::plain(ours), &context));
    // A dump that opens a target, and goes on when nobody is there any more.
    let bytes = dump(&[(PID, many_pages(1))], Wire::V2);
    let mut socket = theirs;
    socket.write_all(&bytes[..1000]).unwrap();
    let mut has_parent = [7];
    socket.read_exact(&mut has_parent).unwrap();
    drop(proxy);
    let error = far.finish().unwrap_err().to_string();
    assert!(error.contains("did not come back"), "{error}");
    assert_eq!(files(tmp.path()).len(), 0);
    drop(socket);
    forwarder.join().unwrap().1.unwrap_err();
}

#[test]
fn a_connection_that_falls_silent_is_made_again() {
    let accident = Accident {
        way: Way::ToServer,
        after_bytes: 1_300_000,
        harm: Harm::Silence,
    };
    assert!(with_accident(accident, 1, LONG));
}

#[test]
fn a_far_end_that_does_not_exist_fails_the_dump_in_time() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let context = context(address, 1, 0, Duration::from_millis(300));
    let (forwarded, answers) = forward(&context, &dump(&[(PID, many_pages(1))], Wire::V2), 1 << 20);
    let error = forwarded.unwrap_err();
    assert_eq!(error.kind(), Kind::PeerLost);
    let text = error.to_string();
    assert!(
        text.contains(&address.to_string()) && text.contains("refused"),
        "{text}"
    );
    assert!(answers.is_empty());
}

#[test]
fn a_dump_that_breaks_off_leaves_nothing_at_the_far_end() {
    let tmp = tempfile::tempdir().unwrap();
    let bytes = dump(&[(PID, many_pages(1))], Wire::V2);
    for cut in [bytes.len() - 1, bytes.len() / 2, 40] {
        let dir = tmp.path().join(cut.to_string());
        let far = far_end(&dir, None, LONG);
        let context = context(far.address, 2, 0, LONG);
        let (forwarded, _) = forward(&context, &bytes[..cut], 1 << 20);
        assert_eq!(forwarded.unwrap_err().kind(), Kind::PeerLost);
        let error = far.finish().unwrap_err().to_string();
        assert!(error.contains("far end has failed"), "{error}");
        assert_eq!(files(&dir).len(), 0);
    }
}

#[test]
fn a_hole_that_the_parent_lacks_fails_both_ends_with_its_address() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    let far = far_end(&dir, None, LONG);
    let context = context(far.address, 1, 0, LONG);
    let runs = vec![Run::absent(FIRST_PAGE, 3, PageFlags::PARENT)];
    let (forwarded, answers) = forward(&context, &dump(&[(PID, runs)], Wire::V2), 1 << 20);
    for error in [forwarded.unwrap_err(), far.finish().unwrap_err()] {
        let text = error.to_string();
        assert!(
            text.contains("pid 7") && text.contains("0x1000000"),
            "{text}"
        );
    }
    assert_eq!(answers, [0]);
    assert_eq!(files(&dir).len(), 0);
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
