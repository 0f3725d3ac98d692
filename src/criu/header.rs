//! The frame header of CRIU's page-server protocol in its two layouts.
//!
//! ```text
//!            0       4       8               16              24              32
//! v1         | cmd   | pages | vaddr         | dst_id        |               CRIU up to 4.1.1
//! v2         | cmd   | (pad) | pages         | vaddr         | dst_id        |  CRIU from 4.2
//! ```
//!
//! Integers are in the host's byte order, which is little-endian wherever CRIU runs with lazy pages.
//! The padding of v2 is uninitialised memory of the sender: it is ignored when read and zero when
//! written. `cmd` is `flags << 16 | op`.

use std::fmt;

use thiserror::Error;

pub use super::page_flags::PageFlags;
use crate::limits::{FRAME_PAGES_MAX, SHMEM_ID_MAX};
use crate::units::{PageCount, PageSize, Vaddr};

/// Which of the two header layouts a connection speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wire {
    /// 24 bytes, CRIU up to 4.1.1.
    V1,
    /// 32 bytes, CRIU from 4.2.
    V2,
}

/// Length of the longer header, bytes.
pub const HEADER_BYTES_MAX: usize = 32;

/// How many bytes of a connection tell its layout: the length of the shorter header.
pub const DETECT_BYTES: usize = 24;

/// What a client says that gives up, before it resets its connection: a relay (`ssh -L`, a proxy) may turn the
/// reset into an orderly end, which CRIU's dump takes for success and then kills its processes. No CRIU knows
/// this operation (0xeeee), so that the dump fails and its processes go on. So many bytes hold a whole header in
/// either layout, even behind a part of another one.
pub const GIVE_UP: [u8; 2 * HEADER_BYTES_MAX] = [0xee; 2 * HEADER_BYTES_MAX];

/// The operation of [`GIVE_UP`].
const OP_GIVE_UP: u16 = 0xeeee;

/// Linux's highest possible pid plus one (`PID_MAX_LIMIT` of 64-bit kernels).
const PID_LIMIT: u64 = 1 << 22;

impl Wire {
    /// Its name, as `--wire` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Wire::V1 => "v1",
            Wire::V2 => "v2",
        }
    }

    /// Length of a header in bytes.
    pub const fn header_bytes(self) -> usize {
        match self {
            Wire::V1 => DETECT_BYTES,
            Wire::V2 => HEADER_BYTES_MAX,
        }
    }

    /// Tells the layout of a receiving session from the first bytes that the sender said; `None` for a
    /// frame that begins alike in both.
    ///
    /// A session begins with PARENT, OPEN or OPEN2 with page count and address zero. So the word at 16 is
    /// v1's dst_id, never zero, or v2's address, zero. Senders from before OPEN existed begin with pages:
    /// their dst_id ends in the number of a type, and is no address of a page. CLOSE has zeros in
    /// both layouts: a dump that fails before its first page says nothing else. A client that asks for
    /// pages is in the wrong place, but is to be told so with the right pid and address.
    pub fn detect_receive(first: &[u8; DETECT_BYTES]) -> Option<Wire> {
        let word = word64(first, 16);
        let v1 = match Op::of_command(word32(first, 0)) {
            Ok(Op::Close | Op::ForceClose) => return None,
            Ok(Op::Get) => return Wire::detect_serve(first),
            Ok(Op::Parent | Op::Open | Op::Open2) => word != 0,
            // Whoever sends an unknown operation is refused whatever follows.
            _ => !PageSize::KIB_4.divides(word),
        };
        Some(if v1 { Wire::V1 } else { Wire::V2 })
    }

    /// Tells the layout of a client that asks for pages from the first bytes of its first request; `None`
    /// for a frame that begins alike in both, or that could be of either or neither.
    ///
    /// The words at 8 and 16 are the address of a page and a pid in v1, a page count and the address of a
    /// page in v2. They could be either where 16 MiB below an address of 4 MiB are asked for.
    pub fn detect_serve(first: &[u8; DETECT_BYTES]) -> Option<Wire> {
        if let Ok(Op::Close | Op::ForceClose) = Op::of_command(word32(first, 0)) {
            return None;
        }
        let (eighth, sixteenth) = (word64(first, 8), word64(first, 16));
        let address = |word| PageSize::KIB_4.divides(word);
        let count = |word| (1..=FRAME_PAGES_MAX).contains(&word);
        let v1 = count(word32(first, 4).into())
            && address(eighth)
            && (1..PID_LIMIT).contains(&sixteenth);
        let v2 = count(eighth) && address(sixteenth);
        match (v1, v2) {
            (true, false) => Some(Wire::V1),
            (false, true) => Some(Wire::V2),
            _ => None,
        }
    }

    /// The layout to take for a first frame that tells none: what is `given`, or v1. It has the shorter
    /// header, so that nothing is waited for that may not come.
    pub(super) fn unconfirmed(given: Option<Wire>) -> Wire {
        given.unwrap_or(Wire::V1)
    }
}

/// What a frame asks for: the low half of `cmd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Op {
    /// Pages follow.
    Add = 1,
    /// The pages are in the parent image.
    Hole = 2,
    /// Switch to another pagemap.
    Open = 3,
    /// Switch to another pagemap; answered by one byte, has_parent.
    Open2 = 4,
    /// Asks whether the parent directory has this pagemap; answered by an i32.
    Parent = 5,
    /// Pages with flags; with PRESENT their bytes follow. Also the answer to a GET.
    AddFlags = 6,
    /// Asks for pages.
    Get = 7,
    /// Pages with flags; with PRESENT each follows as a length and an LZ4 block.
    AddFlagsCompressed = 8,
    /// All was said; answered by an i32 status.
    Close = 0x1023,
    /// All was said, over a socket that is not closed afterwards; answered by an i32 status.
    ForceClose = 0x1024,
}

impl fmt::Display for Op {
    /// The name in CRIU, without its prefix.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Add => "ADD",
            Op::Hole => "HOLE",
            Op::Open => "OPEN",
            Op::Open2 => "OPEN2",
            Op::Parent => "PARENT",
            Op::AddFlags => "ADD_F",
            Op::Get => "GET",
            Op::AddFlagsCompressed => "ADD_F_COMPRESSED",
            Op::Close => "CLOSE",
            Op::ForceClose => "FORCE_CLOSE",
        })
    }
}

impl Op {
    /// Whether it is one that ends a session, whose frame has nothing but zeros.
    pub(super) fn is_close(self) -> bool {
        matches!(self, Op::Close | Op::ForceClose)
    }

    /// The operation in the first word of a header.
    pub fn of_command(cmd: u32) -> Result<Op, HeaderError> {
        let number = (cmd & 0xffff) as u16;
        Op::from_number(number).ok_or(match number {
            TLS_HANDSHAKE | TLS_ALERT => HeaderError::Tls,
            FERRY_MAGIC => HeaderError::Ferry,
            OP_GIVE_UP => HeaderError::GaveUp,
            _ => HeaderError::UnknownOp(number),
        })
    }

    fn from_number(number: u16) -> Option<Op> {
        Some(match number {
            1 => Op::Add,
            2 => Op::Hole,
            3 => Op::Open,
            4 => Op::Open2,
            5 => Op::Parent,
            6 => Op::AddFlags,
            7 => Op::Get,
            8 => Op::AddFlagsCompressed,
            0x1023 => Op::Close,
            0x1024 => Op::ForceClose,
            _ => return None,
        })
    }
}

/// A header as it stands on the wire, in either layout. Nothing in it is checked but the op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What is asked for.
    pub op: Op,
    /// The upper half of `cmd`.
    pub flags: PageFlags,
    /// How many pages the frame is about.
    pub pages: PageCount,
    /// Address of the first page.
    pub vaddr: Vaddr,
    /// Whose pages: see [`Target::from_dst_id`]; in a GET a plain pid.
    pub dst_id: u64,
}

/// A header that cannot be understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum HeaderError {
    /// The client says that it gives up.
    #[error("the client gave up before it had said CLOSE")]
    GaveUp,
    /// The low half of `cmd` names no operation.
    #[error("unknown operation {0:#x}: the peer speaks no page-server protocol that is known here")]
    UnknownOp(u16),
    /// The bytes are the beginning of a TLS handshake.
    #[error("the peer speaks TLS: both sides must be started with --tls, or neither")]
    Tls,
    /// The bytes are the beginning of ferry.
    #[error(
        "the peer speaks ferry, which this server does not: page-server --forward needs a page-server \
         that receives dumps (without --lazy-pages, --forward and --forward-lazy), lazy-client --ferry \
         needs a page-server --forward-lazy"
    )]
    Ferry,
    /// The header is of another layout than the user has said.
    #[error(
        "the peer speaks {}, but --wire {} was given: leave --wire out, or give --wire {}",
        found.name(), given.name(), found.name()
    )]
    OtherWire {
        /// What the user has said.
        given: Wire,
        /// What the bytes show.
        found: Wire,
    },
}

/// What the first two bytes of a TLS handshake (record type 22, version 3.x) are as an operation.
const TLS_HANDSHAKE: u16 = 0x0316;

/// The same of a TLS alert (record type 21), with which a server answers what is no TLS.
const TLS_ALERT: u16 = 0x0315;

/// What the first two bytes of a ferry frame ("PFRY") are as an operation.
const FERRY_MAGIC: u16 = u16::from_le_bytes(*b"PF");

impl Header {
    /// Reads a header from `bytes`, which hold at least [`Wire::header_bytes`].
    pub fn decode(wire: Wire, bytes: &[u8]) -> Result<Header, HeaderError> {
        let cmd = word32(bytes, 0);
        let op = Op::of_command(cmd)?;
        let (pages, rest) = match wire {
            Wire::V1 => (u64::from(word32(bytes, 4)), 8),
            Wire::V2 => (word64(bytes, 8), 16),
        };
        Ok(Header {
            op,
            flags: PageFlags::from_bits(cmd >> 16),
            pages: PageCount(pages),
            vaddr: Vaddr(word64(bytes, rest)),
            dst_id: word64(bytes, rest + 8),
        })
    }

    /// Writes the header to the front of `out` and returns how many bytes it takes. In v1 the page
    /// count must fit in 32 bits, which [`crate::limits::FRAME_PAGES_MAX`] sees to.
    pub fn encode(&self, wire: Wire, out: &mut [u8; HEADER_BYTES_MAX]) -> usize {
        out.fill(0);
        let cmd = (self.flags.bits() << 16) | u32::from(self.op as u16);
        out[0..4].copy_from_slice(&cmd.to_le_bytes());
        let rest = match wire {
            Wire::V1 => {
                let pages = u32::try_from(self.pages.get()).expect("fewer than 2^32 pages a frame");
                out[4..8].copy_from_slice(&pages.to_le_bytes());
                8
            }
            Wire::V2 => {
                out[8..16].copy_from_slice(&self.pages.get().to_le_bytes());
                16
            }
        };
        out[rest..rest + 8].copy_from_slice(&self.vaddr.get().to_le_bytes());
        out[rest + 8..rest + 16].copy_from_slice(&self.dst_id.to_le_bytes());
        wire.header_bytes()
    }
}

/// Whose memory a pagemap describes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Target {
    /// Private memory of the process with this pid in the images.
    Process(u32),
    /// The shared memory segment with this id: a System V segment's, counted from 0 in each IPC
    /// namespace, or the inode number of anonymous shared memory or of a memfd, which may need more
    /// than 32 bits.
    Shmem(u64),
}

/// A dst_id that names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("dst_id {0:#x} names neither a process nor a shared memory segment")]
pub struct TargetError(pub u64);

impl Target {
    /// Reads `id << 8 | type`: type 1 or a legacy number for a process, 2 or a legacy number for
    /// shared memory.
    pub fn from_dst_id(dst_id: u64) -> Result<Target, TargetError> {
        let id = dst_id >> 8;
        match dst_id & 0xff {
            1 | 10 | 11 | 16 | 17 => match u32::try_from(id) {
                // No process has the pid 0.
                Ok(0) | Err(_) => Err(TargetError(dst_id)),
                Ok(pid) => Ok(Target::Process(pid)),
            },
            2 | 27 | 28 | 29 | 32 | 33 | 34 => Ok(Target::Shmem(id)),
            _ => Err(TargetError(dst_id)),
        }
    }

    /// The dst_id that current CRIUs use for the target.
    pub fn dst_id(self) -> u64 {
        match self {
            Target::Process(pid) => (u64::from(pid) << 8) | 1,
            Target::Shmem(id) => ((id & SHMEM_ID_MAX) << 8) | 2,
        }
    }

    /// Name of the target's pagemap file in an image directory.
    pub fn pagemap_name(self) -> String {
        match self {
            Target::Process(pid) => format!("pagemap-{pid}.img"),
            Target::Shmem(id) => format!("pagemap-shmem-{id}.img"),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Process(pid) => write!(f, "pid {pid}"),
            Target::Shmem(id) => write!(f, "shared memory {id}"),
        }
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(op: Op, pages: u64, vaddr: u64, dst_id: u64) -> Header {
        let flags = PageFlags::default();
        Header {
            op,
            flags,
            pages: PageCount(pages),
            vaddr: Vaddr(vaddr),
            dst_id,
        }
    }

    fn first_bytes(header: &Header, wire: Wire) -> [u8; DETECT_BYTES] {
        let mut out = [0; HEADER_BYTES_MAX];
        header.encode(wire, &mut out);
        std::array::from_fn(|i| out[i])
    }

    #[test]
    fn first_frames_tell_the_layout() {
        for wire in [Wire::V1, Wire::V2] {
            for op in [Op::Parent, Op::Open, Op::Open2] {
                for target in [Target::Process(1), Target::Shmem(0)] {
                    let open = header(op, 0, 0, target.dst_id());
                    assert_eq!(Wire::detect_receive(&first_bytes(&open, wire)), Some(wire));
                }
            }
            for op in [Op::Add, Op::Hole, Op::AddFlags] {
                for vaddr in [0, 0x7f00_0000_0000] {
                    let pages = header(op, 3, vaddr, Target::Shmem(0).dst_id());
                    assert_eq!(Wire::detect_receive(&first_bytes(&pages, wire)), Some(wire));
                }
            }
            for (vaddr, pid) in [(0x40_0000, 4_194_303), (0x1_0000, 1), (0, 4096)] {
                let get = header(Op::Get, 16, vaddr, pid);
                assert_eq!(Wire::detect_serve(&first_bytes(&get, wire)), Some(wire));
                assert_eq!(Wire::detect_receive(&first_bytes(&get, wire)), Some(wire));
            }
            for op in [Op::Close, Op::ForceClose] {
                let close = first_bytes(&header(op, 0, 0, 0), wire);
                assert_eq!(Wire::detect_receive(&close), None);
                assert_eq!(Wire::detect_serve(&close), None);
            }
        }
    }

    #[test]
    fn a_tls_handshake_is_told_from_an_unknown_operation() {
        let mut bytes = [0; HEADER_BYTES_MAX];
        bytes[..6].copy_from_slice(&[0x16, 3, 1, 2, 0, 1]);
        assert_eq!(Header::decode(Wire::V1, &bytes), Err(HeaderError::Tls));
        bytes[0] = 0x17;
        let error = Err(HeaderError::UnknownOp(0x0317));
        assert_eq!(Header::decode(Wire::V1, &bytes), error);
    }

    #[test]
    fn ferry_is_told_from_an_unknown_operation() {
        let mut bytes = [0; HEADER_BYTES_MAX];
        bytes[..4].copy_from_slice(&crate::ferry::frame::MAGIC);
        for wire in [Wire::V1, Wire::V2] {
            assert_eq!(Header::decode(wire, &bytes), Err(HeaderError::Ferry));
        }
    }

    #[test]
    fn padding_of_v2_is_ignored() {
        let get = header(Op::Get, 3, 0x7000, 12);
        let mut out = [0; HEADER_BYTES_MAX];
        get.encode(Wire::V2, &mut out);
        out[4..8].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(Header::decode(Wire::V2, &out), Ok(get));
    }

    #[test]
    fn dst_ids_of_old_and_new_senders_name_targets() {
        for kind in [1, 10, 11, 16, 17] {
            assert_eq!(Target::from_dst_id(77 << 8 | kind), Ok(Target::Process(77)));
        }
        for kind in [2, 27, 28, 29, 32, 33, 34] {
            assert_eq!(Target::from_dst_id(77 << 8 | kind), Ok(Target::Shmem(77)));
        }
        // The first System V segment of an IPC namespace, and one with an inode number of 64 bits.
        for id in [0, 1 << 32, SHMEM_ID_MAX] {
            let target = Target::from_dst_id(id << 8 | 2);
            assert_eq!(target, Ok(Target::Shmem(id)));
            assert_eq!(target.unwrap().dst_id(), id << 8 | 2);
        }
        for dst_id in [0, 1, 77 << 8, 77 << 8 | 3, 77 << 8 | 255, 1 << 63 | 1] {
            assert_eq!(Target::from_dst_id(dst_id), Err(TargetError(dst_id)));
        }
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(
            op in prop::sample::select(vec![Op::Add, Op::Hole, Op::Open, Op::Open2, Op::Parent,
                Op::AddFlags, Op::Get, Op::AddFlagsCompressed, Op::Close, Op::ForceClose]),
            flags in 0..=u32::from(u16::MAX), pages in 0..=u64::from(u32::MAX),
            vaddr: u64, dst_id: u64, v1: bool,
        ) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let before = Header { flags: PageFlags::from_bits(flags), ..header(op, pages, vaddr, dst_id) };
            let mut out = [0; HEADER_BYTES_MAX];
            let len = before.encode(wire, &mut out);
            prop_assert_eq!(Header::decode(wire, &out[..len]), Ok(before));
        }
    }
}
