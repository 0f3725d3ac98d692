//! The sender's side of a session: what was sent, what is safe, what is sent again.
//!
//! ```text
//!        submit                      poll(stream)                 ACK
//! frame ────────> waiting ─────────────────────> carried ───────────────────> released
//!                    ^                              │
//!                    └───────── stream_down ────────┘
//! ```
//!
//! It knows numbers and lengths; the engine keeps the frames' bytes until they are released.
//!
//! Invariants: numbers are handed out without a gap; what is not safe is waiting or carried by
//! exactly one living connection; nothing numbered goes to a connection before its first ACK; no
//! more is outstanding than the receiver's window; one question is open at most.

use std::collections::{BTreeMap, VecDeque};

use crate::criu::header::Target;
use crate::limits::{FERRY_WINDOW_BYTES_MAX, FERRY_WINDOW_FRAMES_MAX};
use crate::units::{PageSize, Vaddr};

use super::frame::{FRAME_BYTES_MAX, Kind};
use super::hello::{Fail, Window};
use super::message::{Ack, Answer, Hashes, WantHashes, encode_bye};
use super::session::SessionError;

/// Something to be written to a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transmit {
    /// The frame that was submitted under this number.
    Numbered(u64),
    /// A question for hashes.
    WantHashes(WantHashes),
    /// This side has failed.
    Fail(Fail),
    /// This side is through.
    Bye,
}

impl Transmit {
    /// Appends the frame, unless it is a numbered one, which the engine keeps. Returns whether it
    /// did.
    pub fn encode(&self, out: &mut Vec<u8>) -> bool {
        match self {
            Transmit::Numbered(_) => return false,
            Transmit::WantHashes(question) => question.encode(out),
            Transmit::Fail(fail) => fail.encode(out),
            Transmit::Bye => encode_bye(out),
        }
        true
    }
}

/// What a frame from the receiver meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SenderEvent<'b> {
    /// An acknowledgement.
    Acked {
        /// Every frame up to this number may be dropped.
        safe: u64,
        /// The answer to the open question, if it came.
        answer: Option<Answer>,
        /// The receiver has everything that it wants.
        complete: bool,
        /// The receiver has confirmed that the session is over.
        bye_received: bool,
        /// How many bytes have arrived on the connection, says the receiver.
        arrived: u64,
        /// Whether the session has come forward, or has nothing to come forward with.
        progress: bool,
    },
    /// Hashes that were asked for.
    Hashes(Hashes<'b>),
    /// The receiver has failed.
    Failed(Fail),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum StreamState {
    Down,
    /// Welcomed; numbered frames wait for its first ACK.
    Welcomed,
    Ready,
    /// The end was sent on it.
    Ended,
}

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    bytes: u64,
    carrier: Option<u16>,
}

/// A question for the hashes of a target, until all of them have come.
#[derive(Clone, Copy, Debug)]
struct HashRequest {
    from: Vaddr,
    carrier: Option<u16>,
}

/// The sender's side of a session. See the module's text.
#[derive(Clone, Debug)]
pub struct Sender {
    page: PageSize,
    window: Window,
    streams: Vec<StreamState>,
    /// Frames `safe + 1 ..`, in order.
    outstanding: VecDeque<Outstanding>,
    outstanding_bytes: u64,
    safe: u64,
    /// No frame below this number waits for a connection.
    waiting_from: u64,
    question: Option<u64>,
    hash_requests: BTreeMap<Target, HashRequest>,
    ending: Option<Transmit>,
    /// The receiver has confirmed the end.
    end_confirmed: bool,
}

impl Sender {
    /// A session over up to `streams` connections with a receiver that has this `window`.
    pub fn new(page: PageSize, streams: u16, window: Window) -> Sender {
        Sender {
            page,
            window: Window {
                frames: window.frames.clamp(1, FERRY_WINDOW_FRAMES_MAX),
                bytes: window.bytes.min(FERRY_WINDOW_BYTES_MAX),
            },
            streams: vec![StreamState::Down; usize::from(streams)],
            outstanding: VecDeque::new(),
            outstanding_bytes: 0,
            safe: 0,
            waiting_from: 1,
            question: None,
            hash_requests: BTreeMap::new(),
            ending: None,
            end_confirmed: false,
        }
    }

    /// Whether a frame of `bytes` fits into the window now.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let frames = u64::from(self.window.frames);
        let empty = self.outstanding.is_empty();
        let fits = self.outstanding_bytes + bytes <= self.window.bytes;
        (self.outstanding.len() as u64) < frames && (fits || empty)
    }

    /// Takes a frame of `bytes` and returns its number. There must be room for it; a question must
    /// be the only one.
    pub fn submit(&mut self, kind: Kind, bytes: u64) -> u64 {
        assert!(self.has_room_for(bytes), "the caller waits for room");
        assert!(self.ending.is_none(), "nothing follows the end");
        let number = self.last() + 1;
        if matches!(kind, Kind::Open | Kind::Close) {
            assert!(self.question.is_none(), "one question at a time");
            self.question = Some(number);
        }
        self.outstanding_bytes += bytes;
        self.outstanding.push_back(Outstanding {
            bytes,
            carrier: None,
        });
        number
    }

    /// Number of the last frame that was submitted.
    pub fn last(&self) -> u64 {
        self.safe + self.outstanding.len() as u64
    }

    /// Whether everything is safe and answered.
    pub fn is_settled(&self) -> bool {
        self.outstanding.is_empty() && self.question.is_none()
    }

    /// Whether the receiver has something to say: an acknowledgement, an answer, hashes.
    pub fn awaits_message(&self) -> bool {
        !self.is_settled()
            || !self.hash_requests.is_empty()
            || self.streams.contains(&StreamState::Welcomed)
    }

    /// Whether a question waits for its answer.
    pub fn has_question(&self) -> bool {
        self.question.is_some()
    }

    /// Asks for the receiver's hashes of `target`, all from the start.
    pub fn ask_hashes(&mut self, target: Target) {
        let (from, carrier) = (Vaddr(0), None);
        self.hash_requests
            .insert(target, HashRequest { from, carrier });
    }

    /// Below which address all hashes of `target` are known, if more were asked for.
    pub fn hashes_known_below(&self, target: Target) -> Option<Vaddr> {
        self.hash_requests.get(&target).map(|request| request.from)
    }

    /// The session is over and well: says BYE on every connection, and nothing else.
    pub fn leave(&mut self) {
        self.ending.get_or_insert(Transmit::Bye);
    }

    /// The session has failed on this side: says so on every connection, and nothing else.
    pub fn fail(&mut self, fail: Fail) {
        self.ending.get_or_insert(Transmit::Fail(fail));
    }

    /// Whether the end of the session was sent on every open connection.
    pub fn has_sent_end(&self) -> bool {
        let ended = |state: &StreamState| matches!(state, StreamState::Down | StreamState::Ended);
        self.ending.is_some() && self.streams.iter().all(ended)
    }

    /// The receiver has ended the connection of `stream` in order, behind what was said on it.
    pub fn handle_end(&mut self, stream: u16) {
        self.end_confirmed |= self.streams[usize::from(stream)] == StreamState::Ended;
    }

    /// Why the session has failed on this side, if it has.
    pub fn failure(&self) -> Option<&Fail> {
        match &self.ending {
            Some(Transmit::Fail(fail)) => Some(fail),
            _ => None,
        }
    }

    /// Whether the receiver has confirmed that the session is over. That the end was sent does not show it: the connection may
    /// have been lost with the message.
    pub fn is_end_confirmed(&self) -> bool {
        self.end_confirmed
    }

    /// The connection of `stream` was welcomed. It is a new one: what an older one carried has to
    /// be carried again.
    pub fn stream_up(&mut self, stream: u16) {
        self.stream_down(stream);
        self.streams[usize::from(stream)] = StreamState::Welcomed;
    }

    /// The connection of `stream` is gone.
    pub fn stream_down(&mut self, stream: u16) {
        self.streams[usize::from(stream)] = StreamState::Down;
        for (frame, number) in self.outstanding.iter_mut().zip(self.safe + 1..) {
            if frame.carrier == Some(stream) {
                frame.carrier = None;
                self.waiting_from = self.waiting_from.min(number);
            }
        }
        for request in self.hash_requests.values_mut() {
            if request.carrier == Some(stream) {
                request.carrier = None;
            }
        }
    }

    /// What is to be written to `stream` next.
    pub fn poll(&mut self, stream: u16) -> Option<Transmit> {
        let state = &mut self.streams[usize::from(stream)];
        if let Some(ending) = &self.ending {
            let due = matches!(state, StreamState::Welcomed | StreamState::Ready);
            return due.then(|| {
                *state = StreamState::Ended;
                ending.clone()
            });
        }
        if *state != StreamState::Ready {
            return None;
        }
        let mut hash_requests = self.hash_requests.iter_mut();
        if let Some((target, request)) =
            hash_requests.find(|(_, request)| request.carrier.is_none())
        {
            request.carrier = Some(stream);
            return Some(Transmit::WantHashes(WantHashes {
                target: *target,
                from: request.from,
            }));
        }
        let last = self.last();
        while self.waiting_from <= last {
            let number = self.waiting_from;
            self.waiting_from += 1;
            let at = usize::try_from(number - self.safe - 1).expect("within the window");
            let frame = &mut self.outstanding[at];
            if frame.carrier.is_none() {
                frame.carrier = Some(stream);
                return Some(Transmit::Numbered(number));
            }
        }
        None
    }

    /// A frame from the receiver came on `stream`.
    pub fn handle<'b>(
        &mut self,
        stream: u16,
        kind: Kind,
        body: &'b [u8],
    ) -> Result<SenderEvent<'b>, SessionError> {
        match kind {
            Kind::Ack => self.handle_ack(stream, Ack::decode(body)?),
            Kind::Hashes => self.handle_hashes(Hashes::decode(body, self.page)?),
            Kind::Fail => Ok(SenderEvent::Failed(Fail::decode(body)?)),
            other => Err(SessionError::Unexpected(other)),
        }
    }

    fn handle_ack(&mut self, stream: u16, ack: Ack) -> Result<SenderEvent<'static>, SessionError> {
        let last = self.last();
        let never_sent = ack.safe.max(ack.answer.to);
        if never_sent > last {
            return Err(SessionError::NeverSent {
                safe: never_sent,
                last,
            });
        }
        let state = &mut self.streams[usize::from(stream)];
        if *state == StreamState::Welcomed {
            *state = StreamState::Ready;
        }
        let mut progress = false;
        while self.safe < ack.safe {
            let released = self
                .outstanding
                .pop_front()
                .expect("compared with the last");
            self.outstanding_bytes -= released.bytes;
            self.safe += 1;
            progress = true;
        }
        self.waiting_from = self.waiting_from.max(self.safe + 1);
        let answer = self.question.is_some() && self.question == Some(ack.answer.to);
        if answer {
            self.question = None;
            progress = true;
        }
        Ok(SenderEvent::Acked {
            safe: self.safe,
            answer: answer.then_some(ack.answer),
            complete: ack.complete,
            bye_received: ack.bye_received,
            arrived: ack.arrived,
            progress: progress || self.is_settled(),
        })
    }

    fn handle_hashes<'b>(&mut self, hashes: Hashes<'b>) -> Result<SenderEvent<'b>, SessionError> {
        let unasked = SessionError::UnaskedHashes(hashes.target);
        let request = self.hash_requests.get_mut(&hashes.target).ok_or(unasked)?;
        if hashes.start().is_some_and(|start| start < request.from) {
            return Err(unasked);
        }
        request.from = hashes.end().unwrap_or(request.from);
        if hashes.last {
            self.hash_requests.remove(&hashes.target);
        }
        Ok(SenderEvent::Hashes(hashes))
    }
}

const _: () = assert!(FRAME_BYTES_MAX as u64 <= FERRY_WINDOW_BYTES_MAX);

#[cfg(test)]
mod tests;
