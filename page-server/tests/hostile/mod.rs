//! Peers that attack, and an honest dump beside them.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pageferry::criu::header::{Op, PageFlags, Target, Wire};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};

use crate::common::{FIRST_PAGE, Run, check_images, naive_memory};
use crate::dump_bytes::{bare, bytes_of, frame, header};
use crate::place::Place;

/// Most memory that a server has resident, whoever connects, bytes: docs/security.md.
pub(crate) const MEMORY_BYTES_MAX: u64 = 128 << 20;

/// Most descriptors of a receiving server: docs/security.md.
pub(crate) const RECEIVING_DESCRIPTORS_MAX: usize = 1024;

/// Most descriptors of a serving one.
pub(crate) const SERVING_DESCRIPTORS_MAX: usize = 512;

/// Connections of a flood.
pub(crate) const FLOOD: usize = 2000;

pub(crate) const HONEST: Target = Target::Process(77);
pub(crate) const ATTACKED: Target = Target::Process(7);

/// Pages of the honest dump that are sent at once.
pub(crate) const PIECE: u64 = 3;

pub(crate) fn descriptors(server: &Spawned) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.pid()))
        .unwrap()
        .count()
}

/// A dump that goes on, a few pages at a time, and must be whole in the end.
pub(crate) struct Honest {
    stream: TcpStream,
    runs: Vec<Run>,
}

impl Honest {
    pub(crate) fn open(mut stream: TcpStream) -> Honest {
        stream
            .write_all(&bytes_of(&bare(Op::Open2, HONEST), Wire::V2))
            .unwrap();
        stream.read_exact(&mut [9]).unwrap();
        let runs = Vec::new();
        Honest { stream, runs }
    }

    pub(crate) fn go_on(&mut self) {
        let at = self
            .runs
            .last()
            .map_or(FIRST_PAGE, |run| run.start_page + run.pages + 1);
        let run = Run::present(at, PIECE, PageFlags::default(), at as u32);
        self.stream
            .write_all(&frame(HONEST, &run, Wire::V2))
            .unwrap();
        self.runs.push(run);
    }

    pub(crate) fn close(mut self, place: &Place) {
        let close = bytes_of(&bare(Op::Close, HONEST), Wire::V2);
        self.stream.write_all(&close).unwrap();
        let mut status = [9; 4];
        self.stream.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
        check_images(&place.images(), HONEST, &naive_memory(&[self.runs]));
    }
}

/// How a hostile peer ends what it says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// It waits for the server to end the connection.
    Waits,
    /// It says that nothing follows, and waits.
    HalfClosed,
}

/// Sends `bytes`, and waits until the server has ended the connection. Returns the peer's address and what it received.
pub(crate) fn attack(mut stream: TcpStream, bytes: &[u8], end: End) -> (SocketAddr, Vec<u8>) {
    let peer = stream.local_addr().unwrap();
    let mut answers = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        // A reset is an end as well.
        let _ = answers.read_to_end(&mut received);
        received
    });
    // The server may have ended it before all is said.
    let _ = stream.write_all(bytes);
    if end == End::HalfClosed {
        let _ = stream.shutdown(Shutdown::Write);
    }
    (peer, reader.join().unwrap())
}

/// Frames after the OPEN of a process.
pub(crate) fn opened(rest: &[Vec<u8>]) -> Vec<u8> {
    let open = bytes_of(&bare(Op::Open2, ATTACKED), Wire::V2);
    [&[open], rest].concat().concat()
}

pub(crate) fn pages(first: u64, pages: u64) -> Vec<u8> {
    frame(
        ATTACKED,
        &Run::present(first, pages, PageFlags::default(), 1),
        Wire::V2,
    )
}

/// A frame's header with any address and count, and nothing behind it.
pub(crate) fn claim(op: Op, flags: PageFlags, pages: u64, vaddr: u64) -> Vec<u8> {
    let mut header = header(op, flags, pages, vaddr, ATTACKED);
    if op == Op::Get {
        // Requests name the pid alone.
        header.dst_id = 7;
    }
    bytes_of(&header, Wire::V2)
}

pub(crate) fn expect_logged(place: &Place, what: &str, peer: SocketAddr) {
    let peer = peer.to_string();
    let logged = until(what, GENEROUS, || {
        let log = place.log();
        let mut lines = log.lines();
        let is_wanted = |line: &&str| {
            line.contains(&peer) && (line.contains("error: ") || line.contains("warning: "))
        };
        Ok(lines.find(is_wanted).map(str::to_owned))
    });
    eprintln!(
        "{what}: {}",
        logged.unwrap_or_else(|_| panic!("{what}: {}", place.log()))
    );
}

pub(crate) fn expect_within(server: &Spawned, descriptors_max: usize) {
    let (bytes, descriptors) = (server.peak_rss_bytes().unwrap(), descriptors(server));
    eprintln!("{bytes} bytes at most, {descriptors} descriptors");
    assert!(bytes <= MEMORY_BYTES_MAX, "{bytes} bytes");
    assert!(descriptors <= descriptors_max, "{descriptors} descriptors");
}

pub(crate) fn allow_descriptors(count: usize) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard as usize > count, "the limit of open files is {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Whether the other end has ended a connection on which it says nothing.
pub(crate) fn is_ended(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let ended = match stream.peek(&mut [0]) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    };
    stream.set_nonblocking(false).unwrap();
    ended
}

/// How a client of TLS begins.
pub(crate) fn handshake() -> Vec<u8> {
    [&[0x16, 3, 1, 2, 0, 1][..], &[0; 600]].concat()
}

/// A connection of a flood, unless it is ended before it is known to be there.
pub(crate) fn connect(place: &Place) -> Option<TcpStream> {
    let port: u16 = place.wait_for("port").trim().parse().unwrap();
    TcpStream::connect(("127.0.0.1", port)).ok()
}
