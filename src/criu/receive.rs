//! The session of a receiving page server: what a dump may say, and in which order.
//!
//! ```text
//! (PARENT)* (OPEN | OPEN2 | first frame of another dst_id) frames... (CLOSE | FORCE_CLOSE)
//! ```
//!
//! Pure. Bytes come in as ranges of the caller's buffer, and [`Step`]s come out: what to open, which
//! pages follow, where their bytes are, what to answer. Every number of the peer is checked here,
//! for every version, before anything is done with it:
//!
//! - pages of a target come in the order of their addresses and never twice;
//! - flags are LAZY, PRESENT, PARENT and sensible together;
//! - a range is aligned, not empty, at most [`FRAME_PAGES_MAX`] long and does not overflow;
//! - a target is opened once a session: a second time would overwrite what came first.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use thiserror::Error;

use super::deframer::{Deframer, Piece};
use super::header::{Header, HeaderError, Op, PageFlags, Target, TargetError, Wire};
use crate::limits::{FRAME_PAGES_MAX, SESSION_TARGETS_MAX};
use crate::units::{PageRange, PageSize, Vaddr};

/// The answer to CLOSE and FORCE_CLOSE when everything is stored.
pub const CLOSE_STORED: [u8; 4] = 0i32.to_le_bytes();

/// The answer to OPEN2: whether the parent directory has the target's pagemap.
pub const fn has_parent_answer(has_parent: bool) -> [u8; 1] {
    [has_parent as u8]
}

/// The answer to PARENT: whether the parent directory has the target's pagemap.
pub const fn parent_answer(has_parent: bool) -> [u8; 4] {
    (has_parent as i32).to_le_bytes()
}

/// What a caller has to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// The pages of `target` follow.
    Open {
        /// Whose pages.
        target: Target,
        /// Whether [`has_parent_answer`] is awaited.
        answer: bool,
    },
    /// [`parent_answer`] is awaited.
    AskParent(Target),
    /// A run of pages. With PRESENT their bytes follow in the next steps; with PARENT they are in
    /// the parent; with neither they are only named.
    Pages {
        /// The addresses.
        range: PageRange,
        /// LAZY, PRESENT, PARENT.
        flags: PageFlags,
    },
    /// Bytes of the run's pages at these places of the input, as they are.
    Raw(Range<usize>),
    /// The next page of the run is all zeroes.
    ZeroPage,
    /// Bytes of the LZ4 block of the run's next page at these places of the input.
    Lz4 {
        /// The bytes' places.
        range: Range<usize>,
        /// Whether they end the block.
        ends: bool,
    },
    /// Everything was said: store it and answer [`CLOSE_STORED`].
    Close {
        /// Whether the peer hangs up next (CLOSE) or keeps the socket (FORCE_CLOSE).
        hangs_up: bool,
    },
}

/// What a peer may not say.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ReceiveError {
    /// The header cannot be understood.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The dst_id names nothing.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Someone asks for pages.
    #[error(
        "the peer asks for the pages of pid {pid} at {vaddr}, but this page server receives: start \
         it with --lazy-pages to serve"
    )]
    Get {
        /// The pid asked for.
        pid: u64,
        /// The address asked for.
        vaddr: Vaddr,
    },
    /// Flags that no frame may have.
    #[error("{at}: flags {flags:#x} are none that pages can have")]
    Flags {
        /// Which frame.
        at: FrameName,
        /// The flags.
        flags: u32,
    },
    /// The range is empty, unaligned, too long or overflows.
    #[error("{at}: {pages} pages from there on are not a range of pages that a frame can have")]
    Range {
        /// Which frame.
        at: FrameName,
        /// The page count.
        pages: u64,
    },
    /// A frame begins before the end of the one before it.
    #[error(
        "{at}: begins before {previous_end}, where the pages before it end: pages must come in the \
         order of their addresses"
    )]
    Order {
        /// Which frame.
        at: FrameName,
        /// End of the frame before.
        previous_end: Vaddr,
    },
    /// A target is opened a second time.
    #[error("{0} is opened a second time in one session")]
    Reopened(Target),
    /// More targets than any process tree has.
    #[error("more than {SESSION_TARGETS_MAX} processes and shared memory segments in one session")]
    TooManyTargets,
    /// A compressed page is longer than a page.
    #[error("a compressed page of {bytes} bytes is longer than a page")]
    BlockTooLong {
        /// The claimed length.
        bytes: u32,
    },
    /// The stream ends inside a frame.
    #[error("the peer hung up inside a frame: what was received is discarded")]
    CutFrame,
    /// The stream ends between frames, but without CLOSE.
    #[error(
        "the peer hung up without CLOSE: the dump failed or was killed, and what was received is discarded"
    )]
    NoClose,
}

/// Names a frame of pages in errors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameName {
    /// Whose pages.
    pub target: Target,
    /// Address of its first page.
    pub vaddr: Vaddr,
}

impl fmt::Display for FrameName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.target, self.vaddr)
    }
}

/// The state of one session. See the module's text.
#[derive(Clone, Debug)]
pub struct ReceiveSession {
    deframer: Deframer,
    page: PageSize,
    opened: BTreeSet<Target>,
    /// The target that frames are about.
    target: Option<Target>,
    /// A frame of pages whose target had to be opened first.
    postponed: Option<Header>,
    /// Where the last frame's pages begin, for errors.
    last_vaddr: Vaddr,
    /// First address that the next frame may name.
    next_vaddr: Vaddr,
    /// Length of the block that is being read.
    block_bytes: u32,
    closed: bool,
}

impl ReceiveSession {
    /// A session at its first byte. The first bytes tell the layout; with `wire` they must tell that one.
    pub fn new(wire: Option<Wire>, page: PageSize) -> ReceiveSession {
        ReceiveSession {
            deframer: Deframer::detecting(Wire::detect_receive, wire),
            page,
            opened: BTreeSet::new(),
            target: None,
            postponed: None,
            last_vaddr: Vaddr(0),
            next_vaddr: Vaddr(0),
            block_bytes: 0,
            closed: false,
        }
    }

    /// The header layout, known once the first header was read.
    pub fn wire(&self) -> Option<Wire> {
        self.deframer.wire()
    }

    /// How many bytes may still come that belong to the CLOSE that was read: see
    /// [`Deframer::header_bytes_open`].
    pub fn header_bytes_open(&self) -> usize {
        self.deframer.header_bytes_open()
    }

    /// Bytes of raw pages that are still to come for the run, behind what was handed in: an engine
    /// may move them by itself and say so with [`ReceiveSession::skip_raw`].
    pub fn raw_bytes_left(&self) -> u64 {
        self.deframer.raw_bytes_left()
    }

    /// Notes that `bytes` bytes of raw pages, at most [`ReceiveSession::raw_bytes_left`], were moved
    /// by the caller and will not be handed in.
    pub fn skip_raw(&mut self, bytes: u64) {
        self.deframer.skip_raw(bytes);
    }

    /// Where the session is, in words, for errors and logs.
    pub fn whereabouts(&self) -> String {
        match self.target {
            None => "before any image was opened".to_owned(),
            Some(target) if self.next_vaddr == Vaddr(0) => {
                format!("before the first page of {target}")
            }
            Some(target) => format!("in or after the pages of {target} at {}", self.last_vaddr),
        }
    }

    /// The next step that `input` from `at` on gives; `at` moves behind what was read. `None` when
    /// more input is needed; the input is then used up.
    ///
    /// # Errors
    ///
    /// The peer said what it may not say. The session is over then.
    pub fn next(&mut self, input: &[u8], at: &mut usize) -> Result<Option<Step>, ReceiveError> {
        if let Some(header) = self.postponed.take() {
            return self.pages(&header).map(Some);
        }
        loop {
            let Some(piece) = self.deframer.next(input, at)? else {
                return Ok(None);
            };
            match piece {
                Piece::Header(header) => return self.frame(&header).map(Some),
                Piece::Raw(range) => return Ok(Some(Step::Raw(range))),
                Piece::BlockLength(bytes) => self.block_length(bytes)?,
                Piece::Block { range, ends } => return Ok(Some(self.block(range, ends))),
            }
        }
    }

    /// The peer has hung up: whether it may, here.
    pub fn handle_end(&self) -> Result<(), ReceiveError> {
        if self.closed {
            Ok(())
        } else if self.deframer.is_between_frames() {
            Err(ReceiveError::NoClose)
        } else {
            Err(ReceiveError::CutFrame)
        }
    }

    fn frame(&mut self, header: &Header) -> Result<Step, ReceiveError> {
        match header.op {
            Op::Add | Op::Hole | Op::AddFlags | Op::AddFlagsCompressed => {
                let target = Target::from_dst_id(header.dst_id)?;
                if self.target == Some(target) {
                    return self.pages(header);
                }
                // Senders from before OPEN existed switch targets by just naming another one.
                self.postponed = Some(*header);
                self.open(target, false)
            }
            Op::Open => self.open(Target::from_dst_id(header.dst_id)?, false),
            Op::Open2 => self.open(Target::from_dst_id(header.dst_id)?, true),
            Op::Parent => Ok(Step::AskParent(Target::from_dst_id(header.dst_id)?)),
            Op::Get => Err(ReceiveError::Get {
                pid: header.dst_id,
                vaddr: header.vaddr,
            }),
            Op::Close | Op::ForceClose => {
                self.closed = true;
                Ok(Step::Close {
                    hangs_up: header.op == Op::Close,
                })
            }
        }
    }

    fn open(&mut self, target: Target, answer: bool) -> Result<Step, ReceiveError> {
        if self.opened.len() == SESSION_TARGETS_MAX {
            return Err(ReceiveError::TooManyTargets);
        }
        if !self.opened.insert(target) {
            return Err(ReceiveError::Reopened(target));
        }
        self.target = Some(target);
        self.last_vaddr = Vaddr(0);
        self.next_vaddr = Vaddr(0);
        Ok(Step::Open { target, answer })
    }

    fn pages(&mut self, header: &Header) -> Result<Step, ReceiveError> {
        let at = FrameName {
            target: Target::from_dst_id(header.dst_id)?,
            vaddr: header.vaddr,
        };
        let flags = flags_of(header).ok_or(ReceiveError::Flags {
            at,
            flags: header.flags.bits(),
        })?;
        let range = PageRange::checked(header.vaddr, header.pages, self.page)
            .filter(|_| header.pages.get() <= FRAME_PAGES_MAX)
            .ok_or(ReceiveError::Range {
                at,
                pages: header.pages.get(),
            })?;
        if range.start() < self.next_vaddr {
            return Err(ReceiveError::Order {
                at,
                previous_end: self.next_vaddr,
            });
        }
        self.last_vaddr = range.start();
        self.next_vaddr = range.end();
        if flags.has(PageFlags::PRESENT) {
            match header.op {
                Op::AddFlagsCompressed => self.deframer.expect_blocks(header.pages.get()),
                _ => self.deframer.expect_raw(range.bytes()),
            }
        }
        Ok(Step::Pages { range, flags })
    }

    fn block_length(&mut self, bytes: u32) -> Result<(), ReceiveError> {
        if u64::from(bytes) > self.page.bytes() {
            return Err(ReceiveError::BlockTooLong { bytes });
        }
        self.deframer.expect_block_bytes(bytes);
        self.block_bytes = bytes;
        Ok(())
    }

    fn block(&self, range: Range<usize>, ends: bool) -> Step {
        match self.block_bytes {
            0 => Step::ZeroPage,
            bytes if u64::from(bytes) == self.page.bytes() => Step::Raw(range),
            _ => Step::Lz4 { range, ends },
        }
    }
}

/// The flags that a frame of pages means, or `None` if no frame may have them.
fn flags_of(header: &Header) -> Option<PageFlags> {
    const KNOWN: PageFlags = PageFlags::PARENT
        .with(PageFlags::LAZY)
        .with(PageFlags::PRESENT);
    const BOTH: PageFlags = PageFlags::PARENT.with(PageFlags::PRESENT);
    match header.op {
        Op::Add => Some(PageFlags::PRESENT),
        Op::Hole => Some(PageFlags::PARENT),
        _ => {
            let flags = header.flags;
            let sensible = KNOWN.has(flags) && flags != PageFlags::default() && !flags.has(BOTH);
            sensible.then_some(flags)
        }
    }
}

#[cfg(test)]
mod tests;
