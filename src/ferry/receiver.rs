//! The receiver's side of a session: puts frames in order, knows what is safe, says so.
//!
//! ```text
//!                 handle_numbered                      applied
//! numbered frame ───────────────> next ── the engine ──────────> safe ── poll ──> ACK
//!        │                          ^     checks and stores
//!        ├── came before: dropped   │ next_held
//!        └── too early ──> held ────┘
//! ```
//!
//! It knows numbers and lengths; the engine keeps the bytes of frames that are held.
//!
//! Invariants: frames are handed out once each and in order; `safe` never runs ahead of what the
//! engine has applied; no more is held than the window; a target is opened once, and its pages come in
//! the order of their addresses and never twice, across batches too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::criu::header::Target;
use crate::limits::SESSION_TARGETS_MAX;
use crate::units::{PageCount, PageSize, Vaddr};

use super::batch::Batch;
use super::frame::{FRAME_BYTES_MAX, Kind};
use super::hello::{Fail, Window};
use super::message::{Ack, Answer, Open, StateId, WantHashes, decode_close};
use super::session::{ReadError, SessionError};

/// What to do with a numbered frame that has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// It came before: drop it.
    Again,
    /// It is the next one: apply it.
    Next,
    /// Others have to come first: keep its bytes until [`Receiver::next_held`] names it.
    Held,
}

/// A numbered frame, read.
#[derive(Debug)]
pub enum Message<'b> {
    /// The next pages belong to this target. A question.
    Open(Open),
    /// Pages of the open target.
    Pages(Batch<'b>),
    /// All was said, so many pages. A question.
    Close(PageCount),
}

/// What another frame from the sender meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReceiverEvent {
    /// The sender asks for hashes; they go to the same connection.
    WantHashes(WantHashes),
    /// The sender has failed.
    Failed(Fail),
    /// The sender is through.
    Bye,
}

/// Something to be written to a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// An acknowledgement.
    Ack(Ack),
    /// This side has failed.
    Fail(Fail),
}

impl Reply {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Reply::Ack(ack) => ack.encode(out),
            Reply::Fail(fail) => fail.encode(out),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum StreamState {
    Down,
    /// Welcomed, with what was last said on it.
    Up(Option<Ack>),
    /// The end was sent on it.
    Ended,
}

/// The receiver's side of a session. See the module's text.
#[derive(Clone, Debug)]
pub struct Receiver {
    page: PageSize,
    window: Window,
    /// Pages may be named as those of targets that were opened before.
    takes_shared: bool,
    streams: Vec<StreamState>,
    /// Frames that came too early, with their lengths in bytes.
    held: BTreeMap<u64, u64>,
    held_bytes: u64,
    handed_out: u64,
    /// Frames that were handed out and are not safe yet, with their lengths in bytes.
    unsafe_yet: VecDeque<u64>,
    unsafe_bytes: u64,
    ack: Ack,
    failure: Option<Fail>,
    opened: BTreeSet<Target>,
    open: Option<Target>,
    /// First address that the open target's next batch may name.
    next_vaddr: Vaddr,
    pages: u64,
    closed: bool,
}

impl Receiver {
    /// A session over up to `streams` connections, holding up to `window`.
    pub fn new(page: PageSize, streams: u16, window: Window) -> Receiver {
        Receiver {
            page,
            window,
            takes_shared: false,
            streams: vec![StreamState::Down; usize::from(streams)],
            held: BTreeMap::new(),
            held_bytes: 0,
            handed_out: 0,
            unsafe_yet: VecDeque::new(),
            unsafe_bytes: 0,
            ack: Ack::default(),
            failure: None,
            opened: BTreeSet::new(),
            open: None,
            next_vaddr: Vaddr(0),
            pages: 0,
            closed: false,
        }
    }

    /// The same, which understands pages that are named as those of targets that were opened before.
    #[must_use]
    pub fn taking_shared(self, takes_shared: bool) -> Receiver {
        Receiver {
            takes_shared,
            ..self
        }
    }

    /// A connection of `stream` was welcomed, in place of any older one.
    pub fn stream_up(&mut self, stream: u16) {
        self.streams[usize::from(stream)] = StreamState::Up(None);
    }

    /// The connection of `stream` is gone.
    pub fn stream_down(&mut self, stream: u16) {
        self.streams[usize::from(stream)] = StreamState::Down;
    }

    /// A numbered frame of `bytes` has come.
    pub fn handle_numbered(&mut self, number: u64, bytes: u64) -> Result<Arrival, SessionError> {
        if number <= self.handed_out || self.held.contains_key(&number) {
            return Ok(Arrival::Again);
        }
        let safe = self.ack.safe;
        let most = self.window.bytes.max(FRAME_BYTES_MAX as u64);
        let here = self.held_bytes + self.unsafe_bytes;
        if number - safe > u64::from(self.window.frames) || here + bytes > most {
            return Err(SessionError::BeyondWindow { number, safe });
        }
        if number == self.handed_out + 1 {
            self.hand_out(number, bytes);
            return Ok(Arrival::Next);
        }
        self.held.insert(number, bytes);
        self.held_bytes += bytes;
        Ok(Arrival::Held)
    }

    /// The frame to be applied next, if it is held.
    pub fn next_held(&mut self) -> Option<u64> {
        let entry = self.held.first_entry()?;
        if *entry.key() != self.handed_out + 1 {
            return None;
        }
        let (number, bytes) = entry.remove_entry();
        self.held_bytes -= bytes;
        self.hand_out(number, bytes);
        Some(number)
    }

    /// Reads the body of a numbered frame whose turn has come.
    pub fn read<'b>(&mut self, kind: Kind, body: &'b [u8]) -> Result<Message<'b>, ReadError> {
        if self.closed {
            return Err(SessionError::Closed(kind).into());
        }
        match kind {
            Kind::Open => {
                let open = Open::decode(body).map_err(SessionError::from)?;
                self.open(open.target)?;
                Ok(Message::Open(open))
            }
            Kind::Pages => {
                let others = match self.takes_shared {
                    true => self.opened.len().saturating_sub(1),
                    false => 0,
                };
                let batch = Batch::parse_behind(body, self.page, others)?;
                if self.open != Some(batch.target) {
                    return Err(SessionError::NotOpen(batch.target).into());
                }
                self.keep_order(&batch)?;
                self.pages += batch.present().get();
                Ok(Message::Pages(batch))
            }
            Kind::Close => {
                let count = decode_close(body).map_err(SessionError::from)?;
                let came = self.pages;
                if count.get() != came {
                    let announced = count.get();
                    return Err(SessionError::PageCount { announced, came }.into());
                }
                self.closed = true;
                Ok(Message::Close(count))
            }
            other => Err(SessionError::Unexpected(other).into()),
        }
    }

    fn open(&mut self, target: Target) -> Result<(), SessionError> {
        if self.opened.len() == SESSION_TARGETS_MAX {
            return Err(SessionError::TooManyTargets);
        }
        if !self.opened.insert(target) {
            return Err(SessionError::Reopened(target));
        }
        self.open = Some(target);
        self.next_vaddr = Vaddr(0);
        Ok(())
    }

    /// Within a batch parsing has seen to the order.
    fn keep_order(&mut self, batch: &Batch<'_>) -> Result<(), SessionError> {
        let [Some(first), Some(last)] = [batch.runs().first(), batch.runs().last()] else {
            return Ok(());
        };
        let (vaddr, previous_end) = (first.range.start(), self.next_vaddr);
        if vaddr < previous_end {
            return Err(SessionError::Order {
                target: batch.target,
                vaddr,
                previous_end,
            });
        }
        self.next_vaddr = last.range.end();
        Ok(())
    }

    fn hand_out(&mut self, number: u64, bytes: u64) {
        self.handed_out = number;
        self.unsafe_yet.push_back(bytes);
        self.unsafe_bytes += bytes;
    }

    /// Frame `number` is checked and done.
    pub fn applied(&mut self, number: u64) {
        assert_eq!(number, self.ack.safe + 1, "frames are applied in order");
        let bytes = self.unsafe_yet.pop_front();
        self.unsafe_bytes -= bytes.expect("only what was handed out");
        self.ack.safe = number;
    }

    /// Answers the question `number`.
    pub fn answer(&mut self, number: u64, value: i32, state: StateId) {
        self.ack.answer = Answer {
            to: number,
            value,
            state,
        };
    }

    /// This side has everything that it wants.
    pub fn note_complete(&mut self) {
        self.ack.complete = true;
    }

    /// The sender's BYE has been received.
    pub fn bye_received(&mut self) {
        self.ack.bye_received = true;
    }

    /// What was said last, or will be next, on a connection on which `arrived` bytes have arrived:
    /// may be said again at any time.
    pub fn ack(&self, arrived: u64) -> Ack {
        Ack {
            arrived,
            ..self.ack
        }
    }

    /// The session has failed on this side: says so on every connection, and nothing else.
    pub fn fail(&mut self, fail: Fail) {
        self.failure.get_or_insert(fail);
    }

    /// Whether the failure of the session was sent on every open connection.
    pub fn has_sent_failure(&self) -> bool {
        let ended = |state: &StreamState| matches!(state, StreamState::Down | StreamState::Ended);
        self.failure.is_some() && self.streams.iter().all(ended)
    }

    /// Whether the failure of the session was sent on the connection of `stream`.
    pub fn was_sent_failure(&self, stream: u16) -> bool {
        self.streams[usize::from(stream)] == StreamState::Ended
    }

    /// What is to be written to `stream` next, on whose connection `arrived` bytes have arrived.
    pub fn poll(&mut self, stream: u16, arrived: u64) -> Option<Reply> {
        let state = &mut self.streams[usize::from(stream)];
        let StreamState::Up(sent) = state else {
            return None;
        };
        if let Some(fail) = &self.failure {
            *state = StreamState::Ended;
            return Some(Reply::Fail(fail.clone()));
        }
        if *sent == Some(self.ack) {
            return None;
        }
        *sent = Some(self.ack);
        Some(Reply::Ack(self.ack(arrived)))
    }

    /// A frame from the sender that is not numbered has come.
    pub fn handle(&mut self, kind: Kind, body: &[u8]) -> Result<ReceiverEvent, SessionError> {
        match kind {
            Kind::WantHashes => {
                let wanted = WantHashes::decode(body, self.page)?;
                Ok(ReceiverEvent::WantHashes(wanted))
            }
            Kind::Fail => Ok(ReceiverEvent::Failed(Fail::decode(body)?)),
            Kind::Bye => Ok(ReceiverEvent::Bye),
            other => Err(SessionError::Unexpected(other)),
        }
    }
}

#[cfg(test)]
mod tests;
