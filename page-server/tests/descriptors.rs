//! Too few descriptors, at each place where one is opened: a server is started with every limit of open files, from the
//! first that it starts with to the first that is enough. It says what to do, nothing is left that looks whole, and who
//! was told of success has whole images. Whoever comes later is served once others are gone.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use common::{PAGE, page_content, write_target};
use dump_bytes::{bytes_of, header};
use nix::sys::signal::Signal;
use pageferry::criu::header::{Header, Op, PageFlags, Wire};
use pageferry::criu::serve::CLOSE_STATUS;
use place::{PID, Place, run, whole_dump};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};

/// The least limit: the loader of programs itself opens files.
const LEAST: usize = 5;

/// More than a server with one client needs.
const MOST: usize = 60;

/// What says what to do.
const ADVICE: &str = "ulimit -n, LimitNOFILE=";

/// What a server says that cannot accept a connection.
const NOT_NOW: &str = "cannot be accepted now";

/// A server with at most `files` open files, standard ones among them.
fn start(place: &Place, files: usize, options: &[&str]) -> Spawned {
    let _ = fs::remove_file(place.work().join("port"));
    let limited = place.command(&[&["--local-timeout", "0"], options].concat());
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n \"$0\" && exec \"$@\"", &files.to_string()])
        .arg(limited.get_program())
        .args(limited.get_args())
        .stdin(Stdio::null())
        .stderr(File::create(place.work().join("stderr")).unwrap());
    let log = place.work().join("log");
    Spawned::start("page-server", &mut command, Some(log)).unwrap()
}

/// All that the server has logged.
fn log_of(place: &Place) -> String {
    let stderr = fs::read_to_string(place.work().join("stderr"));
    place.log() + &stderr.unwrap_or_default()
}

/// Connects to a server, unless it ends before it listens.
fn connect(place: &Place, server: &mut Spawned) -> Option<TcpStream> {
    let port = until("the port, or an end", GENEROUS, || {
        let port = fs::read_to_string(place.work().join("port")).ok();
        let ended = server.ended()?.is_some();
        Ok((ended || port.is_some()).then_some(port))
    });
    let port = port.unwrap()?.trim().parse().unwrap();
    TcpStream::connect(("127.0.0.1", port)).ok()
}

/// Says `words` and returns what is answered, until the connection ends or the server cannot accept it.
fn talk(place: &Place, mut stream: TcpStream, words: &[u8]) -> Vec<u8> {
    // The log says more than an error here.
    let _ = stream.write_all(words);
    let _ = stream.shutdown(Shutdown::Write);
    stream.set_nonblocking(true).unwrap();
    let mut answers = Vec::new();
    until("an answer, or its refusal", GENEROUS, || {
        match stream.read_to_end(&mut answers) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Ok(place.log().contains(NOT_NOW).then_some(()))
            }
            _ => Ok(Some(())),
        }
    })
    .unwrap();
    answers
}

/// Has a server with so many open files asked something. True if it has answered that; if not, it has said what to do.
fn is_answered(place: &Place, files: usize, options: &[&str], asked: &[u8], right: &[u8]) -> bool {
    let mut server = start(place, files, options);
    let stream = connect(place, &mut server);
    let answers = stream.map(|stream| talk(place, stream, asked));
    let is_right = answers.is_some_and(|answers| answers == right);
    if !is_right {
        // It may wait for its client to come back.
        let _ = server.signal(Signal::SIGTERM);
    }
    let ended = server.wait(GENEROUS).unwrap();
    let log = log_of(place);
    assert_eq!(ended.status.signal(), None, "{files}: {log}");
    assert_ne!(ended.status.code(), Some(101), "{files}: {log}");
    assert!(!log.contains("panicked"), "{files}: {log}");
    assert_eq!(ended.status.success(), is_right, "{files}: {log}");
    // The loader has words of its own.
    let is_loader = ended.status.code() == Some(127);
    assert!(
        is_right || is_loader || log.contains(ADVICE),
        "{files}: {log}"
    );
    is_right
}

/// The least limit with which a server answers; with each one below it fails as it should.
fn least(attempt: impl Fn(usize) -> bool) -> usize {
    let enough = (LEAST..MOST).find(|files| attempt(*files));
    let enough = enough.expect("there are enough descriptors in the end");
    println!("{enough} open files are enough");
    assert!(enough > LEAST + 3, "some limits are too low");
    enough
}

/// Whether a dump is received whole, by the driver that `options` name; if not, nothing is left of it.
fn received(files: usize, options: &[&str]) -> bool {
    let place = Place::new();
    let whole = is_answered(&place, files, options, &whole_dump(), &[0; 5]);
    match whole {
        true => place.check_images(),
        false => assert_eq!(place.image_names(), Vec::<String>::new()),
    }
    whole
}

#[test]
fn a_dump_is_whole_or_absent_with_any_number_of_descriptors() {
    for options in [&["--io", "epoll"][..], &[]] {
        least(|files| received(files, options));
    }
}

#[test]
fn a_tree_is_whole_or_absent_with_any_number_of_descriptors() {
    least(|files| {
        let place = Place::new();
        let options = ["--io", "epoll", "--dedup-tree"];
        let whole = is_answered(&place, files, &options, &whole_dump(), &[0; 5]);
        match whole {
            true => place.check_images(),
            false => assert_eq!(place.image_names(), Vec::<String>::new()),
        }
        whole
    });
}

#[test]
fn images_are_served_with_any_number_of_descriptors() {
    let start = run().range().start().get();
    let get = Header {
        dst_id: 7,
        ..header(Op::Get, PageFlags::default(), 1, start, PID)
    };
    let close = header(Op::Close, PageFlags::default(), 0, 0, PID);
    let close = Header { dst_id: 0, ..close };
    let asked = [bytes_of(&get, Wire::V2), bytes_of(&close, Wire::V2)].concat();
    let answer = Header {
        op: Op::AddFlags,
        flags: PageFlags::PRESENT,
        ..get
    };
    let page = page_content(run().seeds[0]);
    let right = [bytes_of(&answer, Wire::V2), page, CLOSE_STATUS.to_vec()].concat();
    assert!(right.len() > PAGE.as_usize());
    least(|files| {
        let place = Place::new();
        write_target(&place.images(), PID, Wire::V2, 1, &[run()]);
        is_answered(&place, files, &["--lazy-pages"], &asked, &right)
    });
}

#[test]
fn who_comes_later_is_received_once_others_are_gone() {
    const OTHERS: usize = 12;
    let enough = least(|files| received(files, &["--io", "epoll"]));
    let place = Place::new();
    let mut server = start(&place, enough + 2, &["--io", "epoll", "--keep"]);
    let first = connect(&place, &mut server).unwrap();
    let others: Vec<TcpStream> = (0..OTHERS).map(|_| place.connect()).collect();
    until("want of descriptors", GENEROUS, || {
        Ok(log_of(&place).contains(NOT_NOW).then_some(()))
    })
    .unwrap();
    assert!(log_of(&place).contains(ADVICE), "{}", log_of(&place));
    drop((first, others));
    // Until the last of them has given its descriptors back, a dump may fail.
    until("a dump", GENEROUS, || {
        let mut stream = place.connect();
        let _ = stream.write_all(&whole_dump());
        let _ = stream.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        let _ = stream.read_to_end(&mut answers);
        Ok((answers == [0; 5]).then_some(()))
    })
    .unwrap();
    place.check_images();
    server.signal(Signal::SIGTERM).unwrap();
    server.wait(GENEROUS).unwrap();
}
