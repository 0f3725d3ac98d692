//! A page server that serves images, over loopback.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
mod server;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::server::{Client, PID, Server, TIMEOUT, loopback};
use common::{
    FIRST_PAGE, Images, PAGE, Run, TARGET, level, naive_memory, page_content, write_target,
};
use pageferry::criu::header::{Op, PageFlags, Target, Wire};
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::error::Kind;
use pageferry::image::dir::ImageDir;
use pageferry::stream::Stream;
use pageferry::units::PageCount;
use proptest::prelude::*;

/// What a correct answer to a GET holds.
fn expected(memory: &BTreeMap<u64, Option<u32>>, page: u64, pages: u64) -> Vec<u8> {
    let seeds = (page..page + pages).map_while(|page| memory.get(&page).copied().flatten());
    seeds.flat_map(page_content).collect()
}

fn one_level(runs: Vec<Run>) -> Images {
    Images::of(&[runs], Wire::V2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Pipelined requests of several clients of both kinds are answered in order, with the right
    /// pages, as many as there are.
    #[test]
    fn every_client_gets_its_answers_in_order(
        levels in prop::collection::vec(level(), 1..4),
        clients in prop::collection::vec(
            (any::<bool>(), prop::collection::vec((0..64u64, 1..40u64), 1..40)), 1..4),
    ) {
        let images = Images::of(&levels, Wire::V2);
        let memory = naive_memory(&levels);
        let server = Server::start(&images.dirs[0], true);
        thread::scope(|scope| {
            for (v1, wanted) in &clients {
                let (server, memory) = (&server, &memory);
                scope.spawn(move || {
                    let mut client = server.connect();
                    client.wire = if *v1 { Wire::V1 } else { Wire::V2 };
                    let wanted = wanted.iter().map(|(page, pages)| (FIRST_PAGE + page, *pages));
                    let served = |(page, pages): (u64, u64)| {
                        let content = expected(memory, page, pages);
                        (!content.is_empty()).then_some((page, pages, content))
                    };
                    let wanted: Vec<_> = wanted.filter_map(served).collect();
                    for (page, pages, _) in &wanted {
                        client.get(*page, *pages);
                    }
                    for (page, _, content) in wanted {
                        assert!(client.answer() == (page, content));
                    }
                    client.close();
                });
            }
        });
    }
}

#[test]
fn long_runs_come_whole_also_between_short_ones() {
    // 2 MiB in one run, and one that a hole cuts off.
    let runs = vec![
        Run::present(FIRST_PAGE, 512, PageFlags::LAZY, 1),
        Run::present(FIRST_PAGE + 600, 3, PageFlags::LAZY, 1),
    ];
    let memory = naive_memory(std::slice::from_ref(&runs));
    let images = one_level(runs);
    let server = Server::start(&images.dirs[0], false);
    let mut client = server.connect();
    let wanted = [
        (0, 512),
        (5, 1),
        (100, 300),
        (511, 9),
        (600, 1000),
        (1, 511),
    ];
    for (page, pages) in wanted {
        client.get(FIRST_PAGE + page, pages);
    }
    for (page, pages) in wanted.map(|(page, pages)| (FIRST_PAGE + page, pages)) {
        assert!(client.answer() == (page, expected(&memory, page, pages)));
    }
    client.close();
    server.outcome().unwrap();
}

/// 512 pages in one run, in a file to cut.
fn one_file() -> (Images, PathBuf, Vec<u8>, BTreeMap<u64, Option<u32>>) {
    let runs = vec![Run::present(FIRST_PAGE, 512, PageFlags::LAZY, 1)];
    let memory = naive_memory(std::slice::from_ref(&runs));
    let images = one_level(runs);
    let path = images.dirs[0].join("pages-1.img");
    let whole = std::fs::read(&path).unwrap();
    (images, path, whole, memory)
}

fn cut(path: &Path, pages: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(pages << PAGE.shift()).unwrap();
}

#[test]
fn a_file_that_is_cut_for_a_while_is_served_whole() {
    // One page is copied, a long run is sent from the file.
    for (page, pages) in [(300, 1), (5, 507)] {
        let (images, path, whole, memory) = one_file();
        let server = Server::start_reading_again(&images.dirs[0], TIMEOUT);
        let mut client = server.connect();
        client.get(FIRST_PAGE, 1);
        client.answer();
        cut(&path, 10);
        client.get(FIRST_PAGE + 3, 1);
        client.get(FIRST_PAGE + page, pages);
        assert_eq!(
            client.answer().1,
            page_content(4),
            "what can be read is not held up"
        );
        std::fs::write(&path, &whole).unwrap();
        let content = expected(&memory, FIRST_PAGE + page, pages);
        assert!(client.answer() == (FIRST_PAGE + page, content));
        client.close();
        server.outcome().unwrap();
    }
}

#[test]
fn a_file_that_stays_cut_costs_its_pages_and_not_the_server() {
    let (images, path, whole, memory) = one_file();
    let server = Server::start_reading_again(&images.dirs[0], Duration::ZERO);
    let mut client = server.connect();
    client.get(FIRST_PAGE, 1);
    client.answer();
    cut(&path, 300);
    client.get(FIRST_PAGE + 290, 100);
    client.expect_cut_off();
    let mut client = server.connect();
    for (page, pages, came) in [(290, 100, 10), (300, 90, 0), (7, 1, 1), (400, 1, 0)] {
        client.get(FIRST_PAGE + page, pages);
        let (header, content) = client.answer_of_any_length();
        assert_eq!(header.pages, PageCount(came), "page {page}");
        assert!(content == expected(&memory, FIRST_PAGE + page, came));
    }
    std::fs::write(&path, &whole).unwrap();
    client.get(FIRST_PAGE + 400, 1);
    assert_eq!(client.answer().1, page_content(401));
    client.close();
    server.outcome().unwrap();
}

#[test]
fn a_server_whose_file_fails_says_which_and_does_not_blame_the_client() {
    let (images, path, ..) = one_file();
    let stream_of = |server: &Server| {
        let client = server.connect();
        let (stream, _) = server.listener.accept().unwrap();
        (client, Stream::plain(stream))
    };
    let listener = loopback();
    listener.listen(1).unwrap();
    let server = Server {
        listener,
        thread: None,
    };
    for (page, pages) in [(300, 1), (5, 507)] {
        let context = ServeContext::new(ImageDir::open(&images.dirs[0], PAGE).unwrap(), None)
            .reading_again(Duration::ZERO);
        let (mut client, stream) = stream_of(&server);
        let served = thread::spawn(move || serve_client(stream, &context).unwrap_err());
        client.get(FIRST_PAGE, 1);
        client.answer();
        let whole = std::fs::read(&path).unwrap();
        cut(&path, 10);
        client.get(FIRST_PAGE + page, pages);
        client.expect_cut_off();
        let error = served.join().unwrap();
        std::fs::write(&path, whole).unwrap();
        assert_eq!(error.kind(), Kind::Io);
        let text = error.to_string();
        assert!(text.contains("pages-1.img"), "{text}");
        assert!(!text.contains("connection"), "{text}");
    }
}

#[test]
fn a_page_that_no_image_has_resets_the_connection_and_is_named() {
    let lazy = PageFlags::LAZY;
    let absent = [
        (FIRST_PAGE + 50, "0x1032000"),
        (FIRST_PAGE + 5, "stayed with the source"),
    ];
    for (page, told) in absent {
        let runs = vec![
            Run::present(FIRST_PAGE, 5, lazy, 1),
            Run::absent(FIRST_PAGE + 5, 5, lazy),
        ];
        let images = one_level(runs);
        let server = Server::start(&images.dirs[0], false);
        let mut client = server.connect();
        client.get(FIRST_PAGE + 4, 3);
        assert_eq!(client.answer().1, page_content(5));
        client.get(page, 1);
        client.expect_reset();
        let error = server.outcome().unwrap_err();
        assert_eq!(error.kind(), Kind::Image);
        let text = error.to_string();
        assert!(text.contains("pid 7") && text.contains(told), "{text}");
    }
}

#[test]
fn a_process_without_images_resets_the_connection() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    let server = Server::start(&images.dirs[0], false);
    let mut client = server.connect();
    client.send(Op::Get, 1, FIRST_PAGE, PID + 1);
    client.expect_reset();
    let error = server.outcome().unwrap_err().to_string();
    assert!(error.contains("pid 8"), "{error}");
}

#[test]
fn a_dump_that_wants_to_send_is_told_so() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    for wire in [Wire::V1, Wire::V2] {
        let server = Server::start(&images.dirs[0], false);
        let mut client = server.connect();
        client.wire = wire;
        client.send(Op::Open2, 0, 0, Target::Process(7).dst_id());
        client.expect_reset();
        let error = server.outcome().unwrap_err();
        assert_eq!(error.kind(), Kind::Protocol);
        assert!(error.to_string().contains("--lazy-pages"), "{error}");
    }
}

#[test]
fn a_client_that_vanishes_ends_its_session_alone() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    let server = Server::start(&images.dirs[0], false);
    let mut vanishing = server.connect();
    vanishing.get(FIRST_PAGE, 5);
    vanishing.answer();
    let mut staying = server.connect();
    staying.get(FIRST_PAGE, 1);
    staying.answer();
    drop(vanishing);
    staying.get(FIRST_PAGE + 1, 1);
    assert_eq!(staying.answer().1, page_content(2));
    staying.close();
    let error = server.outcome().unwrap_err();
    assert_eq!(error.kind(), Kind::PeerLost);

    let server = Server::start(&images.dirs[0], true);
    drop(server.connect());
    for _ in 0..2 {
        let mut client = server.connect();
        client.get(FIRST_PAGE, 2);
        assert_eq!(client.answer().1.len(), 2 * PAGE.as_usize());
        client.close();
    }
    server.listener.shutdown(Shutdown::Both).unwrap();
    server.outcome().unwrap();
}

#[test]
fn a_client_that_does_not_read_holds_up_no_other() {
    let pages = 2048;
    let images = one_level(vec![Run::present(FIRST_PAGE, pages, PageFlags::LAZY, 1)]);
    let server = Server::start(&images.dirs[0], true);
    let mut slow = server.connect();
    // 64 MiB of answers: more than any socket buffers.
    for _ in 0..8 {
        slow.get(FIRST_PAGE, pages);
    }
    let mut quick = server.connect();
    for page in 0..pages {
        quick.get(FIRST_PAGE + page, 1);
        assert_eq!(quick.answer().0, FIRST_PAGE + page);
    }
    quick.close();
    for _ in 0..8 {
        assert_eq!(slow.answer().1.len(), pages as usize * PAGE.as_usize());
    }
    slow.close();
}

#[test]
fn a_client_that_never_asks_is_ended() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    let server = Server::start_impatient(&images.dirs[0], false);
    server.connect().expect_reset();
    let error = server.outcome().unwrap_err().to_string();
    assert!(error.contains("--idle-timeout"), "{error}");
}

#[test]
fn a_client_that_stops_within_a_request_is_ended() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    let server = Server::start_impatient(&images.dirs[0], false);
    let mut client = server.connect();
    client.get(FIRST_PAGE, 1);
    client.answer();
    client.stream.write_all(&[7, 0, 0]).unwrap();
    client.expect_reset();
    let error = server.outcome().unwrap_err().to_string();
    assert!(error.contains("--idle-timeout"), "{error}");
}

#[test]
fn a_client_that_takes_no_answers_is_ended() {
    let pages = 2048;
    // Sent from the file, and copied.
    for pages_at_once in [pages, 7] {
        let images = one_level(vec![Run::present(FIRST_PAGE, pages, PageFlags::LAZY, 1)]);
        let server = Server::start_impatient(&images.dirs[0], false);
        let mut client = server.connect();
        // 32 MiB of answers, which is more than any socket buffers, to requests that one does.
        let asked = (0..4 * pages).step_by(pages_at_once as usize);
        let request = |page| client.request(Op::Get, pages_at_once, FIRST_PAGE + page % pages, PID);
        let requests: Vec<u8> = asked.flat_map(request).collect();
        client.stream.write_all(&requests).unwrap();
        let error = server.outcome().unwrap_err().to_string();
        assert!(error.contains("no answers"), "{error}");
    }
}

#[test]
fn a_restore_may_be_idle() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 5, PageFlags::LAZY, 1)]);
    let server = Server::start_impatient(&images.dirs[0], true);
    let mut client = server.connect();
    client.get(FIRST_PAGE, 1);
    client.answer();
    // Its host's connection for faults, which has not been needed yet.
    let mut for_faults = server.connect();
    for _ in 0..3 {
        // Ended once the server's time limit is over: those two have been silent for longer.
        server.connect_from("127.0.0.2").expect_reset();
    }
    for client in [&mut for_faults, &mut client] {
        client.get(FIRST_PAGE + 1, 1);
        assert!(client.answer().1 == page_content(2));
    }
    client.close();
    // Nobody of that host asks any more.
    for_faults.close();
    server.connect().expect_reset();
}

#[test]
fn images_that_were_replaced_are_read_anew_by_the_next_session() {
    let runs = |seed| vec![Run::present(FIRST_PAGE, 1, PageFlags::LAZY, seed)];
    let images = one_level(runs(1));
    let server = Server::start(&images.dirs[0], true);
    let mut over = Vec::new();
    for seed in [2, 3] {
        write_target(&images.dirs[0], TARGET, Wire::V2, seed, &runs(seed));
        let mut client = server.connect();
        client.get(FIRST_PAGE, 1);
        assert!(client.answer().1 == page_content(seed), "images {seed}");
        client.say(Op::Close);
        // A client may take its time to hang up.
        over.push(client);
    }
}

#[test]
fn a_local_socket_serves_as_well() {
    let images = one_level(vec![Run::present(FIRST_PAGE, 100, PageFlags::LAZY, 1)]);
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("socket");
    let server = Server::start_unix(&images.dirs[0], &path);
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut client = Client {
        stream,
        wire: Wire::V2,
    };
    client.get(FIRST_PAGE, 100);
    assert_eq!(client.answer().1.len(), 100 * PAGE.as_usize());
    client.say(Op::ForceClose);
    server.outcome().unwrap();
}
