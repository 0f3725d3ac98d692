//! Two page servers and ferry between them: whatever a dump says at the near end is in the images
//! at the far end, or both ends say that it is not.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;
#[path = "common/ends.rs"]
mod ends;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{
    FIRST_PAGE, PAGE, Run, check_images, files, level, tls_args, with_large_runs, with_true_holes,
};
use dump_bytes::dump;
use ends::{
    FarEnd, LONG, context, expected, far_end, far_end_at, far_end_over_tls, forward, many_pages,
};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::engine::forward::{ForwardContext, forward_client};
use pageferry::engine::listening::stop::Stop;
use pageferry::error::Kind;
use pageferry::stream::Stream;
use pageferry::tls::Tls;
use proptest::prelude::*;
use testbed::pki::{Authority, Host};
use testbed::proxy::{ImpairmentKind, Link, Proxy};

const PID: Target = Target::Process(7);
const OTHER: Target = Target::Process(8);
const SHMEM: Target = Target::Shmem(9);

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
            // Those that are not LAZY do not travel either, but are stored again.
            assert_eq!(received.pages.in_parent, 340);
            assert_eq!(received.pages.received, 200);
        }
    }
    check_images(&tmp.path().join("new"), PID, &expected(&[second]));
}

#[test]
fn pages_that_are_stored_from_the_parent_leave_those_that_came_alone() {
    let tmp = tempfile::tempdir().unwrap();
    // Neither LAZY nor shared: what equals the parent's is stored again, beside pages that were compressed.
    let first = vec![Run::present(FIRST_PAGE, 60, PageFlags::default(), 101)];
    let mut second = first.clone();
    for seed in second[0].seeds.iter_mut().skip(10).step_by(10) {
        *seed += 502;
    }
    for (dir, previous, runs) in [("old", None, &first), ("new", Some("../old"), &second)] {
        let far = far_end(&tmp.path().join(dir), previous, LONG);
        let context = context(far.address, 1, 1 << 20, LONG);
        let (forwarded, _) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 1 << 20);
        let sent = forwarded.unwrap().sent;
        assert_eq!(far.finish().unwrap().pages.in_parent, 0);
        if previous.is_some() {
            assert_eq!(sent.pages.same, 55);
            assert!(sent.pages.packed + sent.pages.delta > 0, "{sent}");
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
    let sender = context(address, 1, 1 << 24, LONG).sender;
    let context = ForwardContext::new(sender, None, PAGE, true);
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

#[test]
fn a_far_end_gives_up_by_itself() {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, Duration::from_millis(500));
    let (connection, impairment) = (Link::default(), None);
    let proxy = Proxy::start(far.address, connection, impairment).unwrap();
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
    assert!(error.contains("did not reconnect"), "{error}");
    assert_eq!(files(tmp.path()).len(), 0);
    drop(socket);
    forwarder.join().unwrap().1.unwrap_err();
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

/// A forwarder through a link, of whose dump the start has come.
struct Begun {
    proxy: Proxy,
    stop: Stop,
    dump: UnixStream,
    forwarder: std::thread::JoinHandle<pageferry::error::Result<()>>,
}

fn begin(far: &FarEnd) -> Begun {
    let proxy = Proxy::start(far.address, Link::default(), None).unwrap();
    let context = context(proxy.address(), 2, 0, LONG);
    let stop = context.sender.stop.clone();
    let (ours, mut dump) = UnixStream::pair().unwrap();
    let forwarder = std::thread::spawn(move || forward_client(Stream::plain(ours), &context).1);
    dump.write_all(&bytes_of_a_dump()[..1000]).unwrap();
    // The far end has opened it.
    dump.read_exact(&mut [7]).unwrap();
    Begun {
        proxy,
        stop,
        dump,
        forwarder,
    }
}

fn bytes_of_a_dump() -> Vec<u8> {
    dump(&[(PID, many_pages(1))], Wire::V2)
}

#[test]
fn a_failure_is_told_over_a_new_connection_when_the_old_ones_are_gone() {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, LONG);
    let begun = begin(&far);
    begun.proxy.cut(ImpairmentKind::Reset);
    drop(begun.dump);
    begun.forwarder.join().unwrap().unwrap_err();
    let error = far.finish().unwrap_err().to_string();
    assert!(error.contains("far end has failed"), "{error}");
}

#[test]
fn an_end_that_is_stopped_says_so() {
    for far_stops in [true, false] {
        let tmp = tempfile::tempdir().unwrap();
        let far = far_end(tmp.path(), None, LONG);
        let mut begun = begin(&far);
        match far_stops {
            true => far.stop.request(),
            false => begun.stop.request(),
        }
        let message = far.finish().unwrap_err().to_string();
        assert!(message.contains("stopped by a signal"), "{message}");
        // The dump goes on until it is reset.
        let _ = begun.dump.write_all(&bytes_of_a_dump()[1000..]);
        let message = begun.forwarder.join().unwrap().unwrap_err().to_string();
        assert!(message.contains("stopped by a signal"), "{message}");
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

#[test]
fn ferry_goes_over_tls() {
    let tmp = tempfile::tempdir().unwrap();
    let credentials = Authority::new(tmp.path(), "ca")
        .unwrap()
        .issue(&Host::LOOPBACK)
        .unwrap();
    let tls = Tls::load(&tls_args(&credentials)).unwrap();
    let dir = tmp.path().join("images");
    let far = far_end_over_tls(&dir, tls.clone());
    let mut context = context(far.address, 3, 1 << 20, LONG);
    context.sender.tls = tls;
    let runs = many_pages(100);
    let (forwarded, _) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 60_000);
    assert_eq!(forwarded.unwrap().sent.page_count(), 540);
    far.finish().unwrap();
    check_images(&dir, PID, &expected(&[runs]));
}

#[test]
fn a_dump_that_says_nothing_is_given_up() {
    for bytes in [0, 25, 100_000] {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("images");
        let far = far_end(&dir, None, LONG);
        let context = context(far.address, 1, 0, LONG).ending_idle(Some(Duration::from_millis(20)));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let bytes_of_dump = dump(&[(PID, many_pages(1))], Wire::V2);
        theirs.write_all(&bytes_of_dump[..bytes]).unwrap();
        let error = forward_client(Stream::plain(ours), &context).1.unwrap_err();
        assert!(error.to_string().contains("--idle-timeout"), "{error}");
        far.finish().unwrap_err();
        assert_eq!(files(&dir).len(), 0);
    }
}

#[test]
fn an_end_without_tls_is_not_talked_to() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    let credentials = Authority::new(tmp.path(), "ca")
        .unwrap()
        .issue(&Host::LOOPBACK)
        .unwrap();
    let far = far_end(&dir, None, LONG);
    let mut context = context(far.address, 1, 0, Duration::from_secs(1));
    context.sender.tls = Tls::load(&tls_args(&credentials)).unwrap();
    let (forwarded, answers) = forward(&context, &dump(&[(PID, many_pages(1))], Wire::V2), 1 << 20);
    forwarded.unwrap_err();
    assert!(answers.is_empty());
    far.stop.request();
    far.finish().unwrap_err();
    assert_eq!(files(&dir).len(), 0);
}
