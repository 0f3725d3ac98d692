//! Peers that attack a receiving server over real sockets: each is ended or held off, leaves nothing in the images, and an
//! honest dump goes on meanwhile. Memory and descriptors of the server stay below what docs/security.md says.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod hostile;
mod place;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;

use common::FIRST_PAGE;
use dump_bytes::{bare, bytes_of};
use hostile::{
    ATTACKED, End, FLOOD, Honest, RECEIVING_DESCRIPTORS_MAX, allow_descriptors, attack, claim,
    connect, expect_logged, expect_within, handshake, is_ended, opened, pages,
};
use pageferry::criu::header::{Op, PageFlags, Target, Wire};
use pageferry::limits::{FRAME_PAGES_MAX, RECEIVE_SESSIONS_MAX, SESSION_TARGETS_MAX};
use place::{Place, send_dump};
use testbed::wait::{GENEROUS, until};

/// A whole dump, and something behind it.
const AFTER_CLOSE: &str = "more after CLOSE";

/// What a hostile dump says before it hangs up.
type Said = (&'static str, Vec<u8>);

/// What is no dump at all, or breaks the order of one.
fn disorder() -> Vec<Said> {
    let close = bytes_of(&bare(Op::Close, ATTACKED), Wire::V2);
    let whole = opened(&[pages(FIRST_PAGE, 2), close]);
    let get = claim(Op::Get, PageFlags::default(), 1, FIRST_PAGE << 12);
    let cut = |bytes: usize| opened(&[pages(FIRST_PAGE, 2)[..bytes].to_vec()]);
    vec![
        ("noise", vec![0xa5; 4096]),
        (
            "a request for web pages",
            b"GET / HTTP/1.1\r\n\r\n".repeat(9),
        ),
        ("a handshake of TLS", handshake()),
        ("pages before an OPEN", pages(FIRST_PAGE, 1)),
        ("a process twice", opened(&[opened(&[])])),
        ("a request for pages", opened(&[get])),
        ("a header that is cut", cut(7)),
        ("pages that are cut", cut(6000)),
        ("an end without CLOSE", opened(&[pages(FIRST_PAGE, 2)])),
        (
            AFTER_CLOSE,
            [whole, opened(&[pages(FIRST_PAGE, 1)])].concat(),
        ),
    ]
}

/// Counts and addresses that cannot be.
fn impossible_pages() -> Vec<Said> {
    let first = FIRST_PAGE << 12;
    let present = PageFlags::PRESENT;
    let add = |pages, vaddr| opened(&[claim(Op::AddFlags, present, pages, vaddr)]);
    let two = |one: Vec<u8>, other: Vec<u8>| opened(&[one, other]);
    let hole = opened(&[claim(Op::AddFlags, PageFlags::PARENT, 1, first)]);
    let mut block = opened(&[claim(Op::AddFlagsCompressed, present, 1, first)]);
    block.extend(u32::MAX.to_le_bytes());
    vec![
        (
            "more pages than a frame may have",
            add(FRAME_PAGES_MAX + 1, first),
        ),
        ("as many pages as can be said", add(u64::MAX, first)),
        ("an address that overflows", add(2, u64::MAX << 12)),
        ("an address within a page", add(1, first + 1)),
        (
            "overlapping pages",
            two(pages(FIRST_PAGE, 4), pages(FIRST_PAGE + 2, 4)),
        ),
        (
            "pages in no order",
            two(pages(FIRST_PAGE + 9, 1), pages(FIRST_PAGE, 1)),
        ),
        (
            "the same pages twice",
            two(pages(FIRST_PAGE, 1), pages(FIRST_PAGE, 1)),
        ),
        ("a hole to no parent", hole),
        ("a block of 4 GiB", block),
    ]
}

/// Names of what is not the honest dump's.
fn left_behind(place: &Place) -> Vec<String> {
    let names = place.image_names().into_iter();
    names.filter(|name| name.contains("pagemap-7.")).collect()
}

#[test]
fn whatever_a_hostile_dump_says_the_others_go_on() {
    for io in ["--io=uring", "--io=epoll"] {
        let place = Place::new();
        let server = place.start(&["--keep", io]);
        let mut honest = Honest::open(place.connect());
        for (what, bytes) in impossible_pages().into_iter().chain(disorder()) {
            let (peer, _) = attack(place.connect(), &bytes, End::HalfClosed);
            // A whole dump is one, whatever is said behind it.
            if what != AFTER_CLOSE {
                expect_logged(&place, what, peer);
                until(what, GENEROUS, || {
                    Ok(left_behind(&place).is_empty().then_some(()))
                })
                .unwrap();
            }
            honest.go_on();
        }
        expect_within(&server, RECEIVING_DESCRIPTORS_MAX);
        honest.close(&place);
        // It takes further dumps.
        fs::remove_file(place.images().join(ATTACKED.pagemap_name())).unwrap();
        send_dump(&mut place.connect());
        drop(server);
    }
}

/// Each byte of a dump comes alone, and between any two of them another one goes on: nobody waits for the slow one.
#[test]
fn a_peer_that_says_one_byte_at_a_time_holds_up_nobody() {
    let place = Place::new();
    let server = place.start(&["--keep"]);
    let mut honest = Honest::open(place.connect());
    let mut slow = place.connect();
    slow.set_nodelay(true).unwrap();
    for byte in &opened(&[pages(FIRST_PAGE, 1)])[..80] {
        slow.write_all(&[*byte]).unwrap();
        honest.go_on();
    }
    honest.close(&place);
    slow.shutdown(Shutdown::Write).unwrap();
    let _ = slow.read_to_end(&mut Vec::new());
    expect_logged(
        &place,
        "a slow peer that hangs up",
        slow.local_addr().unwrap(),
    );
    drop(server);
}

/// More processes than a dump may have: each makes files.
#[test]
#[ignore = "makes 131,074 files, minutes: cargo nextest run -p page-server --test hostile_dumps --run-ignored all"]
fn a_flood_of_opens_ends_at_the_limit() {
    let place = Place::new();
    let server = place.start(&["--keep"]);
    let mut honest = Honest::open(place.connect());
    let opens: Vec<u8> = (1000..=1000 + SESSION_TARGETS_MAX as u32)
        .flat_map(|pid| bytes_of(&bare(Op::Open2, Target::Process(pid)), Wire::V2))
        .collect();
    let (peer, received) = attack(place.connect(), &opens, End::HalfClosed);
    assert!(
        received.len() <= SESSION_TARGETS_MAX,
        "{} answers",
        received.len()
    );
    expect_logged(&place, "too many processes", peer);
    honest.go_on();
    expect_within(&server, RECEIVING_DESCRIPTORS_MAX);
    let gone = || Ok((place.image_names().len() < 10).then_some(()));
    until("its files to be removed", GENEROUS, gone).unwrap();
    honest.close(&place);
    drop(server);
}

#[test]
fn two_thousand_silent_connections_leave_a_running_dump_alone() {
    allow_descriptors(2 * FLOOD);
    let place = Place::new();
    let server = place.start(&["--keep"]);
    let mut honest = Honest::open(place.connect());
    let mut flood = Vec::new();
    for number in 0..FLOOD {
        flood.extend(connect(&place));
        if number % 100 == 0 {
            honest.go_on();
        }
    }
    // All but those that are sessions are ended at once.
    let refused = || {
        let refused = flood.iter().filter(|stream| is_ended(stream)).count();
        Ok((refused + RECEIVE_SESSIONS_MAX > flood.len()).then_some(()))
    };
    until("the others to be refused", GENEROUS, refused).unwrap();
    honest.go_on();
    expect_within(&server, RECEIVING_DESCRIPTORS_MAX);
    honest.close(&place);
    drop(flood);
    // As soon as there is room again.
    until("a dump to be let in", GENEROUS, || {
        let mut stream = place.connect();
        let open = bytes_of(&bare(Op::Open2, ATTACKED), Wire::V2);
        let answered = stream
            .write_all(&open)
            .and_then(|()| stream.read_exact(&mut [0]));
        Ok(answered.ok())
    })
    .unwrap();
    drop(server);
}
