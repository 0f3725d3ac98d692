//! Peers that attack a serving server over real sockets: each is ended or held off, gets no page, and an honest client is
//! served meanwhile. Memory and descriptors of the server stay below what docs/security.md says.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod hostile;
mod place;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::{FIRST_PAGE, PAGE, Run, TARGET, page_content, write_target};
use hostile::{
    End, FLOOD, SERVING_DESCRIPTORS_MAX, allow_descriptors, attack, claim, connect, expect_logged,
    expect_within, handshake, is_ended, opened, pages,
};
use pageferry::criu::header::{Op, PageFlags, Wire};
use pageferry::limits::{CLIENTS_MAX, FRAME_PAGES_MAX};
use place::Place;
use testbed::wait::{GENEROUS, until};

/// A place with images that are served.
fn served() -> Place {
    let place = Place::new();
    let runs = [Run::present(FIRST_PAGE, 600, PageFlags::LAZY, 1)];
    write_target(&place.images(), TARGET, Wire::V2, 1, &runs);
    place
}

/// Asks for a page as an honest client does.
fn fetch(stream: &mut TcpStream, page: u64) {
    let request = claim(Op::Get, PageFlags::default(), 1, (FIRST_PAGE + page) << 12);
    stream.write_all(&request).unwrap();
    let mut answer = vec![0; request.len() + PAGE.as_usize()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[request.len()..], page_content(1 + page as u32));
}

#[test]
fn whatever_a_hostile_client_says_the_others_are_served() {
    let place = served();
    let server = place.start(&["--keep", "--lazy-pages"]);
    let mut honest = place.connect();
    let first = FIRST_PAGE << 12;
    let none = PageFlags::default();
    let cases: [(&str, Vec<u8>, End); 9] = [
        ("noise", vec![0xa5; 4096], End::Waits),
        (
            "more pages than a frame may have",
            claim(Op::Get, none, FRAME_PAGES_MAX + 1, first),
            End::Waits,
        ),
        (
            "as many pages as can be said",
            claim(Op::Get, none, u64::MAX, first),
            End::Waits,
        ),
        (
            "an address that overflows",
            claim(Op::Get, none, 2, u64::MAX << 12),
            End::Waits,
        ),
        (
            "an address within a page",
            claim(Op::Get, none, 1, first + 1),
            End::Waits,
        ),
        ("pages to be stored", pages(FIRST_PAGE, 2), End::Waits),
        ("a dump", opened(&[pages(FIRST_PAGE, 2)]), End::Waits),
        (
            "a request that is cut",
            claim(Op::Get, none, 1, first)[..9].to_vec(),
            End::HalfClosed,
        ),
        ("a handshake of TLS", handshake(), End::Waits),
    ];
    for (number, (what, bytes, end)) in cases.into_iter().enumerate() {
        let (peer, received) = attack(place.connect(), &bytes, end);
        // Less than a page: it got none.
        assert!(
            received.len() < PAGE.as_usize(),
            "{what}: {} bytes",
            received.len()
        );
        expect_logged(&place, what, peer);
        fetch(&mut honest, number as u64);
    }
    expect_within(&server, SERVING_DESCRIPTORS_MAX);
    drop(server);
}

/// A client that asks and asks and takes no answer: the server stops reading, and holds no answers for it.
#[test]
fn answers_that_nobody_takes_are_not_gathered() {
    let place = served();
    let server = place.start(&["--keep", "--lazy-pages"]);
    let mut honest = place.connect();
    fetch(&mut honest, 0);
    let request = claim(Op::Get, PageFlags::default(), 512, FIRST_PAGE << 12);
    let requests = request.repeat(4096);
    let greedy: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = place.connect();
            stream.set_nonblocking(true).unwrap();
            // Until neither end takes more.
            until("the server to stop reading", GENEROUS, || {
                Ok(match stream.write(&requests) {
                    Ok(_) => None,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Some(()),
                    Err(error) => return Err(error.into()),
                })
            })
            .unwrap();
            stream
        })
        .collect();
    for page in 0..100 {
        fetch(&mut honest, page);
    }
    expect_within(&server, SERVING_DESCRIPTORS_MAX);
    drop((greedy, server));
}

#[test]
fn two_thousand_connections_leave_a_client_alone() {
    allow_descriptors(2 * FLOOD);
    let place = served();
    let server = place.start(&["--keep", "--lazy-pages"]);
    let mut honest = place.connect();
    fetch(&mut honest, 0);
    let mut flood = Vec::new();
    for number in 0..FLOOD {
        flood.extend(connect(&place));
        if number % 100 == 0 {
            fetch(&mut honest, (number / 100) as u64);
        }
    }
    let refused = || {
        let refused = flood.iter().filter(|stream| is_ended(stream)).count();
        Ok((refused + CLIENTS_MAX > flood.len()).then_some(()))
    };
    until("the others to be refused", GENEROUS, refused).unwrap();
    fetch(&mut honest, 1);
    expect_within(&server, SERVING_DESCRIPTORS_MAX);
    drop((flood, server));
}
