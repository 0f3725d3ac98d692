//! Frames of CRIU's protocol: honest ones, for seeds, and what a peer makes of them.

use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Target, Wire};
use pageferry::limits::FRAME_PAGES_MAX;
use pageferry::units::{PageCount, Vaddr};

use crate::{byte, take};

/// Bytes of pages in one stream of [`spoken`]: what a page holds decides nothing.
const PAYLOAD_BYTES_MAX: usize = 4 * 4096;

/// The operations that [`spoken`] knows by their places here.
const OPS: [Op; 10] = [
    Op::Add,
    Op::Hole,
    Op::Open,
    Op::Open2,
    Op::Parent,
    Op::AddFlags,
    Op::Get,
    Op::AddFlagsCompressed,
    Op::Close,
    Op::ForceClose,
];

/// A stream as structures, each of six bytes: operation, flags, pages, target, address (two bytes); behind those of a
/// compressed frame the length of each block. Pages come by themselves, so that a few bytes say what takes thousands on
/// the wire. With another operation some bytes follow, which go into the stream as they are.
pub(crate) fn spoken(mut data: &[u8], wire: Wire) -> Vec<u8> {
    let mut out = Vec::new();
    let mut payload = 0;
    while !data.is_empty() {
        let [op, flags, pages, target, page, fraction] = take(&mut data);
        let Some(op) = OPS.get(usize::from(op) % (OPS.len() + 1)).copied() else {
            let (bytes, rest) = data.split_at(data.len().min(usize::from(pages)));
            out.extend_from_slice(bytes);
            data = rest;
            continue;
        };
        let flags = PageFlags::from_bits(u32::from(flags));
        let count = match pages {
            255 => u64::from(u32::MAX),
            254 => FRAME_PAGES_MAX + 1,
            pages => u64::from(pages),
        };
        let dst_id = match target {
            0 => 0,
            target if target < 128 => Target::Process(u32::from(target)).dst_id(),
            target if target < 192 => Target::Shmem(u64::from(target)).dst_id(),
            // In answers: the pid alone.
            target => u64::from(target - 192),
        };
        let vaddr = match fraction {
            255 => u64::MAX - (u64::from(page) << 12) - 4095,
            fraction => (u64::from(page) << 12) + u64::from(fraction),
        };
        header(&mut out, wire, (op, flags), (count, vaddr), dst_id);
        let has_pages = op == Op::Add || flags.has(PageFlags::PRESENT);
        match op {
            Op::Add | Op::AddFlags if has_pages => {
                let bytes = usize::from(pages) * 4096;
                let bytes = bytes.min(PAYLOAD_BYTES_MAX - payload);
                payload += bytes;
                out.resize(out.len() + bytes, 7);
            }
            Op::AddFlagsCompressed if has_pages => {
                for _ in 0..pages.min(16) {
                    let length = match byte(&mut data) {
                        255 => u32::MAX,
                        length => u32::from(length),
                    };
                    out.extend_from_slice(&length.to_le_bytes());
                    out.resize(out.len() + (length % 256) as usize, 9);
                }
            }
            _ => {}
        }
    }
    out
}

/// What [`spoken`] makes a dump of one process of: all that [`dump`] has.
pub(crate) const DUMP: &[u8] = &[
    4, 0, 0, 7, 0, 0, // PARENT
    3, 0, 0, 7, 0, 0, // OPEN2
    5, 1, 3, 7, 1, 0, // in the parent
    5, 2, 2, 7, 16, 0, // named alone
    5, 4, 1, 7, 32, 0, // a page
    7, 4, 2, 7, 48, 0, 0, 3, // a zero page and a block
    8, 0, 0, 0, 0, 0, // CLOSE
];

/// A dump of a process and of shared memory, by the older operations.
pub(crate) const OLD_DUMP: &[u8] = &[
    2, 0, 0, 7, 0, 0, // OPEN
    0, 0, 1, 7, 1, 0, // ADD
    1, 0, 2, 7, 2, 0, // HOLE
    2, 0, 0, 130, 0, 0, // OPEN
    5, 6, 2, 130, 0, 0, // lazy pages
    9, 0, 0, 0, 0, 0, // FORCE_CLOSE
];

/// Answers to two requests, a page each, and to CLOSE.
pub(crate) const ANSWERS: &[u8] = &[
    5, 4, 1, 199, 1, 0, //
    5, 4, 1, 199, 16, 0, //
    10, 0, 4, 0, 0, 0, 0, 0, 0, 0, // as they are: the status
];

/// Appends a frame's header.
pub(crate) fn header(
    out: &mut Vec<u8>,
    wire: Wire,
    (op, flags): (Op, PageFlags),
    (pages, vaddr): (u64, u64),
    dst_id: u64,
) {
    let header = Header {
        op,
        flags,
        pages: PageCount(pages),
        vaddr: Vaddr(vaddr),
        dst_id,
    };
    let mut bytes = [0; HEADER_BYTES_MAX];
    let len = header.encode(wire, &mut bytes);
    out.extend_from_slice(&bytes[..len]);
}

/// A dump of one process with pages of every kind, up to and with CLOSE.
pub(crate) fn dump(wire: Wire) -> Vec<u8> {
    const PRESENT: PageFlags = PageFlags::PRESENT;
    let none = PageFlags::default();
    let mut out = Vec::new();
    let id = Target::Process(7).dst_id();
    header(&mut out, wire, (Op::Parent, none), (0, 0), id);
    header(&mut out, wire, (Op::Open2, none), (0, 0), id);
    header(
        &mut out,
        wire,
        (Op::AddFlags, PageFlags::PARENT),
        (3, 0x1000),
        id,
    );
    header(
        &mut out,
        wire,
        (Op::AddFlags, PageFlags::LAZY),
        (2, 0x10_000),
        id,
    );
    header(&mut out, wire, (Op::AddFlags, PRESENT), (1, 0x20_000), id);
    out.extend_from_slice(&[7; 4096]);
    let compressed = (Op::AddFlagsCompressed, PRESENT);
    header(&mut out, wire, compressed, (2, 0x30_000), id);
    for block in [&[] as &[u8], &[1, 2, 3]] {
        let len = u32::try_from(block.len()).expect("a short block");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(block);
    }
    header(&mut out, wire, (Op::Close, none), (0, 0), 0);
    out
}
