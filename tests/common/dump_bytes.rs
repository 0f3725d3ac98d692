//! What a dump says to a page server, as bytes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Target, Wire};
use pageferry::units::{PageCount, Vaddr};

use crate::common::{Run, page_content, stored};

/// A frame's header.
pub(crate) fn header(op: Op, flags: PageFlags, pages: u64, vaddr: u64, target: Target) -> Header {
    Header {
        op,
        flags,
        pages: PageCount(pages),
        vaddr: Vaddr(vaddr),
        dst_id: target.dst_id(),
    }
}

/// The header of a frame that names a target and nothing else.
pub(crate) fn bare(op: Op, target: Target) -> Header {
    header(op, PageFlags::default(), 0, 0, target)
}

pub(crate) fn bytes_of(header: &Header, wire: Wire) -> Vec<u8> {
    let mut bytes = [0; HEADER_BYTES_MAX];
    let len = header.encode(wire, &mut bytes);
    bytes[..len].to_vec()
}

/// The frame of a run, its pages included.
pub(crate) fn frame(target: Target, run: &Run, wire: Wire) -> Vec<u8> {
    let op = match run.compressed {
        true => Op::AddFlagsCompressed,
        false => Op::AddFlags,
    };
    let vaddr = run.range().start().get();
    let mut out = bytes_of(&header(op, run.flags, run.pages, vaddr, target), wire);
    for seed in &run.seeds {
        if run.compressed {
            let block = stored(*seed);
            out.extend_from_slice(&(block.len() as u32).to_le_bytes());
            out.extend_from_slice(&block);
        } else {
            out.extend_from_slice(&page_content(*seed));
        }
    }
    out
}

/// A dump of `targets` up to and with CLOSE.
pub(crate) fn dump(targets: &[(Target, Vec<Run>)], wire: Wire) -> Vec<u8> {
    let mut out = Vec::new();
    for (target, runs) in targets {
        out.extend(bytes_of(&bare(Op::Open2, *target), wire));
        for run in runs {
            out.extend(frame(*target, run, wire));
        }
    }
    let last = targets
        .last()
        .map_or(Target::Process(1), |(target, _)| *target);
    out.extend(bytes_of(&bare(Op::Close, last), wire));
    out
}

/// Sends `bytes` in pieces of at most `piece` bytes, hangs up in order, and returns what the server
/// answered. A server that resets the connection gives what came before.
pub(crate) fn send(mut socket: UnixStream, bytes: Vec<u8>, piece: usize) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut answers = socket.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            // An error is the end as well.
            let _ = answers.read_to_end(&mut all);
            all
        });
        for piece in bytes.chunks(piece.max(1)) {
            if socket.write_all(piece).is_err() {
                break;
            }
        }
        let _ = socket.shutdown(std::net::Shutdown::Write);
        reader.join().unwrap()
    })
}
