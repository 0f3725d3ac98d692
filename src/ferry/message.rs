//! The bodies of the frames of a session, but for those that carry pages, as drawn in
//! docs/ferry.md.
//!
//! Reading checks every field that has a meaning of its own; whether it fits the session is for
//! [`super::sender`] and [`super::receiver`].

use crate::criu::header::{Target, Wire};
use crate::limits::{FERRY_FAULT_PAGES_MAX, FERRY_HASHES_MAX};
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

use super::fields::{Fields, PutFields};
use super::frame::{FrameError, Kind, OpenFrame};
use super::hash::{HASH_BYTES, PageHash};
use super::hello::SessionId;

/// Names a version of the memory that a receiver holds: the session that wrote it. Zero is none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct StateId(pub [u8; 16]);

impl StateId {
    /// No version at all.
    pub const NONE: StateId = StateId([0; 16]);
}

impl From<SessionId> for StateId {
    fn from(session: SessionId) -> StateId {
        StateId(session.0)
    }
}

/// The body of OPEN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Open {
    /// Whose pages follow.
    pub target: Target,
    /// Which layout, and so which image format, the CRIU at the source uses.
    pub wire: Wire,
}

impl Open {
    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.target.dst_id());
        out.put_u32(match self.wire {
            Wire::V1 => 1,
            Wire::V2 => 2,
        });
        out.put_u32(0);
    }

    /// Reads the body.
    pub fn decode(body: &[u8]) -> Result<Open, FrameError> {
        let kind = Kind::Open;
        let mut fields = Fields::new(kind, body);
        let target = target(kind, &mut fields)?;
        let wire = match fields.u32()? {
            1 => Wire::V1,
            2 => Wire::V2,
            other => {
                return Err(FrameError::Field {
                    kind,
                    field: "wire",
                    value: other.into(),
                });
            }
        };
        let _reserved = fields.u32()?;
        fields.end()?;
        Ok(Open { target, wire })
    }
}

/// Appends the body of CLOSE: how many pages all batches of the session had.
pub fn encode_close(pages: PageCount, out: &mut Vec<u8>) {
    out.put_u64(pages.get());
}

/// Reads the body of CLOSE.
pub fn decode_close(body: &[u8]) -> Result<PageCount, FrameError> {
    let mut fields = Fields::new(Kind::Close, body);
    let pages = PageCount(fields.u64()?);
    fields.end()?;
    Ok(pages)
}

/// The body of WANT_HASHES.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WantHashes {
    /// Whose hashes.
    pub target: Target,
    /// Where to begin.
    pub from: Vaddr,
}

impl WantHashes {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let frame = OpenFrame::begin(out);
        out.put_u64(self.target.dst_id());
        out.put_u64(self.from.get());
        frame.finish(out, Kind::WantHashes, 0);
    }

    /// Reads the body.
    pub fn decode(body: &[u8], page: PageSize) -> Result<WantHashes, FrameError> {
        let kind = Kind::WantHashes;
        let mut fields = Fields::new(kind, body);
        let target = target(kind, &mut fields)?;
        let from = Vaddr(fields.u64()?);
        fields.end()?;
        if !page.divides(from.get()) {
            return Err(FrameError::Field {
                kind,
                field: "address",
                value: from.get(),
            });
        }
        Ok(WantHashes { target, from })
    }
}

/// The body of ACK.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ack {
    /// Every frame up to this number is checked and done.
    pub safe: u64,
    /// The last answer.
    pub answer: Answer,
    /// The receiver has everything that it wants.
    pub complete: bool,
    /// The receiver has received BYE.
    pub bye_received: bool,
    /// How many bytes have arrived on this connection. What was sent and does not arrive shows a
    /// link that is dead in one direction.
    pub arrived: u64,
}

/// The answer to a question: OPEN, PARENT or CLOSE.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// Number of the question, 0 for none.
    pub to: u64,
    /// What is answered.
    pub value: i32,
    /// OPEN: the version of the memory that the receiver has as the base.
    pub state: StateId,
}

const ACK_COMPLETE: u32 = 1;
const ACK_BYE_RECEIVED: u32 = 2;

impl Ack {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let frame = OpenFrame::begin(out);
        out.put_u64(self.safe);
        out.put_u64(self.answer.to);
        out.extend_from_slice(&self.answer.value.to_le_bytes());
        let complete = if self.complete { ACK_COMPLETE } else { 0 };
        let bye_received = if self.bye_received {
            ACK_BYE_RECEIVED
        } else {
            0
        };
        out.put_u32(complete | bye_received);
        out.extend_from_slice(&self.answer.state.0);
        out.put_u64(self.arrived);
        frame.finish(out, Kind::Ack, 0);
    }

    /// Reads the body.
    pub fn decode(body: &[u8]) -> Result<Ack, FrameError> {
        let mut fields = Fields::new(Kind::Ack, body);
        let (safe, to) = (fields.u64()?, fields.u64()?);
        let value = fields.i32()?;
        let flags = fields.u32()?;
        let state = StateId(fields.array()?);
        let arrived = fields.u64()?;
        fields.end()?;
        Ok(Ack {
            safe,
            answer: Answer { to, value, state },
            complete: flags & ACK_COMPLETE != 0,
            bye_received: flags & ACK_BYE_RECEIVED != 0,
            arrived,
        })
    }
}

/// The body of HASHES, as it lies in the receive buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hashes<'b> {
    /// Whose hashes.
    pub target: Target,
    /// Whether there are no more.
    pub last: bool,
    runs: Vec<PageRange>,
    hashes: &'b [u8],
}

const HASHES_LAST: u32 = 1;

impl<'b> Hashes<'b> {
    /// Appends a frame with the hashes of `runs`, in address order, page by page.
    pub fn encode(
        target: Target,
        page: PageSize,
        runs: &[PageRange],
        hashes: &[PageHash],
        last: bool,
        out: &mut Vec<u8>,
    ) {
        assert!(hashes.len() <= FERRY_HASHES_MAX, "the caller keeps the cap");
        let frame = OpenFrame::begin(out);
        out.put_u64(target.dst_id());
        out.put_u32(if last { HASHES_LAST } else { 0 });
        out.put_u32(u32::try_from(runs.len()).expect("no more runs than hashes"));
        for run in runs {
            out.put_u64(run.start().get());
            out.put_u32(u32::try_from(run.pages(page).get()).expect("no more than hashes"));
            out.put_u32(0);
        }
        for hash in hashes {
            out.extend_from_slice(&hash.0);
        }
        frame.finish(out, Kind::Hashes, 0);
    }

    /// Reads the body.
    pub fn decode(body: &'b [u8], page: PageSize) -> Result<Hashes<'b>, FrameError> {
        let kind = Kind::Hashes;
        let wrong = |field, value| FrameError::Field { kind, field, value };
        let mut fields = Fields::new(kind, body);
        let target = target(kind, &mut fields)?;
        let last = fields.u32()? & HASHES_LAST != 0;
        let count = fields.u32()?;
        if !usize::try_from(count).is_ok_and(|count| count <= FERRY_HASHES_MAX) {
            return Err(wrong("runs", count.into()));
        }
        let mut runs: Vec<PageRange> = Vec::with_capacity(FERRY_HASHES_MAX.min(body.len() / 16));
        let mut pages = 0;
        for _ in 0..count {
            let (start, length) = (fields.u64()?, fields.u32()?);
            let _reserved = fields.u32()?;
            let run = PageRange::checked(Vaddr(start), PageCount(length.into()), page)
                .filter(|run| runs.last().is_none_or(|before| before.end() <= run.start()))
                .ok_or(wrong("vaddr", start))?;
            runs.push(run);
            pages += u64::from(length);
        }
        let hashes = fields.rest();
        if pages.checked_mul(HASH_BYTES as u64) != Some(hashes.len() as u64) {
            return Err(wrong("pages", pages));
        }
        Ok(Hashes {
            target,
            last,
            runs,
            hashes,
        })
    }

    /// The runs of pages, each with its hashes.
    pub fn runs(
        &self,
        page: PageSize,
    ) -> impl Iterator<Item = (PageRange, &'b [[u8; HASH_BYTES]])> {
        let (mut rest, _) = self.hashes.as_chunks::<HASH_BYTES>();
        self.runs.iter().map(move |run| {
            let pages = usize::try_from(run.pages(page).get()).expect("decoding compared it");
            let (front, behind) = rest.split_at(pages);
            rest = behind;
            (*run, front)
        })
    }

    /// First address that this frame tells of, if it tells anything.
    pub fn start(&self) -> Option<Vaddr> {
        self.runs.first().map(|run| run.start())
    }

    /// First address behind all that this frame tells, if it tells anything.
    pub fn end(&self) -> Option<Vaddr> {
        self.runs.last().map(|run| run.end())
    }
}

/// The body of FAULT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Whose page.
    pub target: Target,
    /// The page that a thread waits for.
    pub vaddr: Vaddr,
    /// The page and the neighbours that are welcome.
    pub around: PageRange,
    /// Their contents are wanted even where the requester has told the hash of what it has: that has
    /// changed since.
    pub in_full: bool,
    /// They are wanted from here, wherever they were sent before.
    pub once_more: bool,
}

const FAULT_IN_FULL: u32 = 1;
const FAULT_ONCE_MORE: u32 = 2;

impl Fault {
    /// Appends the frame of question `number`.
    pub fn encode(&self, number: u64, page: PageSize, out: &mut Vec<u8>) {
        let frame = OpenFrame::begin(out);
        out.put_u64(self.target.dst_id());
        out.put_u64(self.vaddr.get());
        out.put_u64(self.around.start().get());
        out.put_u32(
            u32::try_from(self.around.pages(page).get()).expect("the requester keeps the cap"),
        );
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let in_full = flag(self.in_full, FAULT_IN_FULL);
        out.put_u32(in_full | flag(self.once_more, FAULT_ONCE_MORE));
        frame.finish(out, Kind::Fault, number);
    }

    /// Reads the body.
    pub fn decode(body: &[u8], page: PageSize) -> Result<Fault, FrameError> {
        let kind = Kind::Fault;
        let wrong = |field, value| FrameError::Field { kind, field, value };
        let mut fields = Fields::new(kind, body);
        let target = target(kind, &mut fields)?;
        let (vaddr, start) = (Vaddr(fields.u64()?), fields.u64()?);
        let pages = fields.u32()?;
        let flags = fields.u32()?;
        fields.end()?;
        if pages > FERRY_FAULT_PAGES_MAX {
            return Err(wrong("pages", pages.into()));
        }
        let around = PageRange::checked(Vaddr(start), PageCount(pages.into()), page)
            .ok_or(wrong("start", start))?;
        if !around.contains(vaddr) || !page.divides(vaddr.get()) {
            return Err(wrong("vaddr", vaddr.get()));
        }
        Ok(Fault {
            target,
            vaddr,
            around,
            in_full: flags & FAULT_IN_FULL != 0,
            once_more: flags & FAULT_ONCE_MORE != 0,
        })
    }
}

/// Appends the frame BYE.
pub fn encode_bye(out: &mut Vec<u8>) {
    OpenFrame::begin(out).finish(out, Kind::Bye, 0);
}

/// Reads a dst_id.
pub(super) fn target(kind: Kind, fields: &mut Fields<'_>) -> Result<Target, FrameError> {
    let dst_id = fields.u64()?;
    Target::from_dst_id(dst_id).map_err(|_| FrameError::Field {
        kind,
        field: "dst_id",
        value: dst_id,
    })
}

#[cfg(test)]
mod tests;
