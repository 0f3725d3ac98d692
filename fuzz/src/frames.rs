//! Honest frames of CRIU's protocol, for seeds.

use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::units::{PageCount, Vaddr};

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
    let id = pageferry::criu::header::Target::Process(7).dst_id();
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
