//! A server that lacks something for a while: memory, the CPU. What it has begun it ends.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use common::{FIRST_PAGE, PAGE};
use dump_bytes::{bare, bytes_of, header};
use nix::sys::signal::Signal;
use pageferry::criu::header::{Op, PageFlags, Wire};
use place::{PID, Place, whole_dump};
use testbed::gate;
use testbed::memory_group::MemoryGroup;
use testbed::wait::{GENEROUS, until};

/// Sends what is left of a dump, and returns all that is answered.
fn finish(mut stream: TcpStream, rest: &[u8]) -> Vec<u8> {
    // The log says more than an error here.
    let _ = stream.write_all(rest);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    let _ = stream.read_to_end(&mut answers);
    answers
}

/// has_parent, and the status of CLOSE.
const SUCCESS: [u8; 5] = [0; 5];

#[test]
fn a_server_that_was_stopped_goes_on() {
    let place = Place::new();
    let mut server = place.start(&[]);
    let (dump, mut stream) = (whole_dump(), place.connect());
    let (before, after) = dump.split_at(dump.len() / 2);
    stream.write_all(before).unwrap();
    server.signal(Signal::SIGSTOP).unwrap();
    let stat = format!("/proc/{}/stat", server.pid());
    until("the stop", GENEROUS, || {
        Ok(fs::read_to_string(&stat)?.contains(") T ").then_some(()))
    })
    .unwrap();
    let rest = after.to_vec();
    let dump = thread::spawn(move || finish(stream, &rest));
    server.signal(Signal::SIGCONT).unwrap();
    assert_eq!(dump.join().unwrap(), SUCCESS, "{}", place.log());
    server.succeed(GENEROUS).unwrap();
    place.check_images();
}

#[test]
fn a_dump_may_be_larger_than_the_memory_of_its_server() {
    const GROUP_BYTES: u64 = 32 << 20;
    const FRAMES: u64 = 128;
    const FRAME_PAGES: u64 = 256;
    let Some(group) = gate::need("a memory control group", MemoryGroup::new(GROUP_BYTES)) else {
        return;
    };
    let place = Place::new();
    let mut server = place.start(&[]);
    place.wait_for("port");
    group.put_in(server.pid()).unwrap();
    let mut stream = place.connect();
    stream
        .write_all(&bytes_of(&bare(Op::Open2, PID), Wire::V2))
        .unwrap();
    for frame in 0..FRAMES {
        let vaddr = (FIRST_PAGE + frame * FRAME_PAGES) << PAGE.shift();
        let header = header(Op::AddFlags, PageFlags::PRESENT, FRAME_PAGES, vaddr, PID);
        stream.write_all(&bytes_of(&header, Wire::V2)).unwrap();
        let bytes = vec![frame as u8 + 1; PAGE.as_usize() * FRAME_PAGES as usize];
        stream.write_all(&bytes).unwrap();
    }
    let answers = finish(stream, &bytes_of(&bare(Op::Close, PID), Wire::V2));
    assert_eq!(answers, SUCCESS, "{}", place.log());
    server.succeed(GENEROUS).unwrap();
    let names = place.image_names();
    let name = names.iter().find(|name| name.starts_with("pages-"));
    let bytes = fs::read(place.images().join(name.unwrap())).unwrap();
    assert_eq!(bytes.len() as u64, FRAMES * FRAME_PAGES * PAGE.bytes());
    assert!(bytes.len() as u64 > 3 * GROUP_BYTES);
    let frame_bytes = (FRAME_PAGES * PAGE.bytes()) as usize;
    for (number, frame) in (1..).zip(bytes.chunks(frame_bytes)) {
        assert!(frame.iter().all(|byte| *byte == number), "frame {number}");
    }
}
