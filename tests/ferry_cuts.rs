//! Impairments between two page servers: both ends agree on how it went, and the images are exact or
//! are not there.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;
#[path = "common/ends.rs"]
mod ends;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{FIRST_PAGE, Run, check_images, files};
use dump_bytes::dump;
use ends::{LONG, SHORT, context, expected, far_end, forward, many_pages};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::ferry::frame::{HEADER_BYTES, Split, split};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Link, Proxy};

const PID: Target = Target::Process(7);

/// Forwards through a proxy that does `kind` to every connection, and checks that both ends agree:
/// the images are exact, or there are none. Returns whether it went well.
fn with_impairment(impairment: Impairment, streams: u16, time_limit: Duration) -> bool {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    let mut runs = many_pages(100);
    runs.push(Run::present(
        FIRST_PAGE + 3000,
        1000,
        PageFlags::default(),
        7000,
    ));
    let far = far_end(&dir, None, time_limit);
    let proxy = Proxy::start(far.address, Link::default(), Some(impairment)).unwrap();
    let context = context(proxy.address(), streams, 1 << 20, time_limit);
    let (forwarded, answers) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 60_000);
    if forwarded.is_err() {
        // It may never have heard of a session.
        far.stop.request();
    }
    let received = far.finish();
    if forwarded.is_ok() {
        assert_eq!(answers, [0, 0, 0, 0, 0], "{impairment:?}");
        received.unwrap();
        check_images(&dir, PID, &expected(&[runs]));
        return true;
    }
    assert!(answers.len() <= 1, "{impairment:?}: CLOSE was answered");
    if received.is_ok() {
        // The far end has everything, but the near end never heard of it: the source is not impaired.
        check_images(&dir, PID, &expected(&[runs]));
    } else {
        assert_eq!(
            files(&dir).len(),
            0,
            "{impairment:?}: {:?}",
            files(&dir).keys()
        );
    }
    false
}

#[test]
fn connections_that_break_anywhere_beyond_a_batch_are_resumed() {
    let mut step = 40_000;
    for kind in [
        ImpairmentKind::Reset,
        ImpairmentKind::End,
        ImpairmentKind::FlipBit,
    ] {
        for streams in [1, 3] {
            // Some batches further on: a reset takes along what the far end has not read yet.
            let impairment = Impairment {
                direction: Direction::ToServer,
                after_bytes: 900_000 + step,
                kind,
            };
            assert!(with_impairment(impairment, streams, LONG), "{impairment:?}");
            step += 12_345;
        }
    }
}

#[test]
fn the_way_back_may_break_as_well() {
    for (kind, after_bytes) in [
        // WELCOME and a first ACK have 176 bytes: each connection says what is safe, and no more.
        (ImpairmentKind::Reset, 180),
        (ImpairmentKind::End, 240),
        (ImpairmentKind::FlipBit, 190),
        (ImpairmentKind::FlipBit, 400),
    ] {
        let impairment = Impairment {
            direction: Direction::ToClient,
            after_bytes,
            kind,
        };
        assert!(with_impairment(impairment, 1, LONG), "{impairment:?}");
    }
}

#[test]
fn connections_that_never_get_anywhere_are_given_up_at_both_ends() {
    for (direction, kind, after_bytes) in [
        (Direction::ToServer, ImpairmentKind::Reset, 0),
        (Direction::ToServer, ImpairmentKind::End, 60),
        (Direction::ToServer, ImpairmentKind::FlipBit, 99),
        (Direction::ToServer, ImpairmentKind::FlipBit, 20_000),
        (Direction::ToClient, ImpairmentKind::Reset, 99),
        (Direction::ToClient, ImpairmentKind::FlipBit, 3),
        (Direction::ToServer, ImpairmentKind::Reset, 100_000),
    ] {
        let impairment = Impairment {
            direction,
            after_bytes,
            kind,
        };
        assert!(!with_impairment(impairment, 1, SHORT), "{impairment:?}");
    }
}

#[test]
fn a_connection_that_falls_silent_is_made_again() {
    let impairment = Impairment {
        direction: Direction::ToServer,
        after_bytes: 1_300_000,
        kind: ImpairmentKind::Silence,
    };
    assert!(with_impairment(impairment, 1, LONG));
}

/// Pages of a few batches that take their room whatever the level of compression.
fn few_pages() -> Vec<Run> {
    vec![
        Run::present(FIRST_PAGE, 2, PageFlags::LAZY, 100),
        Run::absent(FIRST_PAGE + 3, 10, PageFlags::LAZY),
        noise(FIRST_PAGE + 100, 200),
    ]
}

/// A run of pages that cannot be compressed.
fn noise(start: u64, pages: u64) -> Run {
    let mut run = Run::present(start, pages, PageFlags::default(), 1000);
    for (seed, number) in run.seeds.iter_mut().zip(0u32..) {
        // Even seeds are noise to the end of the page.
        *seed = 1000 + 2 * number;
    }
    run
}

/// Where the frames to the far end begin, in bytes from the beginning of the connection, and where
/// the last ends: listened to while nothing goes wrong.
fn frame_borders(runs: &[Run]) -> Vec<u64> {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(&tmp.path().join("images"), None, LONG);
    let (address, heard) = eavesdrop(far.address);
    let context = context(address, 1, 1 << 20, LONG);
    let (forwarded, _) = forward(&context, &dump(&[(PID, runs.to_vec())], Wire::V2), 60_000);
    forwarded.unwrap();
    far.finish().unwrap();
    let heard = heard.lock().unwrap();
    let mut borders = vec![0];
    let mut at = 0;
    while let Ok(Split::Frame(frame)) = split(&heard[at..]) {
        at += frame.end();
        borders.push(at as u64);
    }
    assert_eq!(at, heard.len(), "frames and nothing else");
    borders
}

/// Carries one connection to `server`; tells its own address and what the client said.
fn eavesdrop(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let writes = Arc::clone(&heard);
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(server).unwrap();
        let (mut back, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        thread::spawn(move || {
            // Whoever ends it first, what was said is kept.
            let _ = std::io::copy(&mut back, &mut to_client);
            let _ = to_client.shutdown(Shutdown::Both);
        });
        let mut piece = vec![0; 64 << 10];
        while let Ok(bytes @ 1..) = client.read(&mut piece) {
            writes.lock().unwrap().extend_from_slice(&piece[..bytes]);
            if server.write_all(&piece[..bytes]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Write);
    });
    (address, heard)
}

/// Forwards `few_pages` through a proxy that impairs the first connection, and checks the
/// images. Returns whether it went well.
fn with_one_impairment(impairment: Impairment, streams: u16) -> bool {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    let runs = few_pages();
    let far = far_end(&dir, None, SHORT);
    let link = Link::default();
    let proxy = Proxy::start_with_impaired(far.address, link, impairment, 1).unwrap();
    let context = context(proxy.address(), streams, 1 << 20, SHORT);
    let (forwarded, answers) = forward(&context, &dump(&[(PID, runs.clone())], Wire::V2), 60_000);
    if let Err(error) = forwarded {
        assert!(answers.len() <= 1, "{impairment:?}: {error}");
        far.stop.request();
        if let Err(far_error) = far.finish() {
            assert_eq!(files(&dir).len(), 0, "{impairment:?}: {error}");
            eprintln!("{impairment:?}: {error}; {far_error}");
            return false;
        }
    } else {
        assert_eq!(answers, [0, 0, 0, 0, 0], "{impairment:?}");
        // The far end may have waited in vain for a goodbye: what it has is whole.
        far.finish().unwrap();
    }
    check_images(&dir, PID, &expected(&[runs]));
    true
}

/// At every border of a batch, just before and behind it, in the header and inside the body.
#[test]
fn one_impairment_anywhere_on_the_way_there_is_survived() {
    let borders = frame_borders(&few_pages());
    assert!(borders.len() > 7, "{borders:?}");
    for pair in borders.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        let header = HEADER_BYTES as u64;
        for after_bytes in [
            start,
            start + 9,
            start + header,
            start.midpoint(end),
            end - 1,
        ] {
            for (kind, streams) in [
                (ImpairmentKind::Reset, 1),
                (ImpairmentKind::End, 2),
                (ImpairmentKind::FlipBit, 1),
            ] {
                let impairment = Impairment {
                    direction: Direction::ToServer,
                    after_bytes,
                    kind,
                };
                let well = with_one_impairment(impairment, streams);
                // Who does not say PFRY first is no ferry, and who says nothing is nobody.
                assert!(well || after_bytes < 4, "{impairment:?}");
            }
        }
    }
}

#[test]
fn one_impairment_anywhere_on_the_way_back_is_survived() {
    for after_bytes in (0..700).step_by(23) {
        for (kind, streams) in [
            (ImpairmentKind::Reset, 1),
            (ImpairmentKind::End, 2),
            (ImpairmentKind::FlipBit, 1),
        ] {
            let impairment = Impairment {
                direction: Direction::ToClient,
                after_bytes,
                kind,
            };
            assert!(with_one_impairment(impairment, streams), "{impairment:?}");
        }
    }
}
