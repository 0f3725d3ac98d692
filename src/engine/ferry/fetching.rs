//! A taker that connects, for a loop of its caller's: no thread of its own, nothing waits.
//!
//! ```text
//! stream ── OPEN, PAGES, CLOSE ──> next ──> Event: pages as plain bytes, checked
//!        <── ACK ──────────────── settle     when the caller has installed them
//!        ── WANT_HASHES ─────────> next
//!        <── HASHES ───────────── tell_hashes  of what an earlier round has left here
//! fault  <── FAULT ─────────────── ask
//!        ── FAULT_PAGES ─────────> next
//! ```
//!
//! The session outlives its connections: with new ones the far end goes on behind what was settled,
//! and the caller asks its open questions again.

mod delivery;
mod dialer;
mod earlier;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::WINDOW;
use super::conn::{ConnError, Frame};
use super::lane::{self, HEARTBEAT};
use crate::criu::header::Target;
use crate::error::{Error, Kind};
use crate::ferry::batch::{Batch, PageKind, Place};
use crate::ferry::frame;
use crate::ferry::hello::{Fail, FailCode};
use crate::ferry::message::{Fault, StateId, WantHashes};
use crate::ferry::receiver::{Arrival, Message, Receiver};
use crate::ferry::unpack::Unpacker;
use crate::image::chain::Chain;
use crate::limits::FERRY_FAULT_PAGES_MAX;
use crate::units::{PageRange, PageSize};
pub(in crate::engine) use delivery::{Delivery, Part};
pub(in crate::engine) use dialer::{FerryDialer, FerryPair};
use earlier::Earlier;

/// After so long without an answer a connection is dead, whatever its sockets say.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What has come.
#[derive(Debug)]
pub(in crate::engine) enum Event<T> {
    /// Pages that were pushed; they are settled by [`Fetching::settle`].
    Pushed(Delivery),
    /// The answer to the question `T`.
    Answer(T, Delivery),
    /// Nothing that concerns the caller.
    Other,
    /// The far end has heard that everything is here, and is through.
    Bye,
}

/// Why nothing more comes.
#[derive(Debug)]
pub(in crate::engine) enum Trouble {
    /// The connections are gone: others may be made.
    Lost(ConnError),
    /// The session is over.
    Over(Error),
}

impl From<ConnError> for Trouble {
    fn from(error: ConnError) -> Trouble {
        Trouble::Lost(error)
    }
}

/// An open question.
struct Question<T> {
    number: u64,
    tag: T,
    pages: u64,
    asked: Instant,
}

/// A session. `T` is what the caller knows a question by.
pub(in crate::engine) struct Fetching<T> {
    page: PageSize,
    receiver: Receiver,
    pair: Option<FerryPair>,
    questions: VecDeque<Question<T>>,
    asked: u64,
    unpacker: Unpacker,
    unpacked: Vec<u8>,
    spare: Vec<u8>,
    earlier: Earlier,
    /// An OPEN, its number and of what, that is answered when pages may be installed.
    open: Option<(u64, Target)>,
    may_install: bool,
    /// Number of the pushed pages that the caller is installing.
    unsettled: Option<u64>,
    closed: bool,
    said: Instant,
    received_before: u64,
}

impl<T> std::fmt::Debug for Fetching<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Fetching({:?}, {} questions)",
            self.receiver,
            self.questions.len()
        )
    }
}

impl<T> Fetching<T> {
    fn new(page: PageSize, earlier: Earlier) -> Fetching<T> {
        Fetching {
            page,
            receiver: Receiver::new(page, 1, WINDOW),
            pair: None,
            questions: VecDeque::new(),
            asked: 0,
            unpacker: Unpacker::default(),
            unpacked: Vec::new(),
            spare: Vec::new(),
            earlier,
            open: None,
            may_install: false,
            unsettled: None,
            closed: false,
            said: Instant::now(),
            received_before: 0,
        }
    }

    /// What an earlier round has left of the pages `missing` of `pid`, sorted, is in `chain`: the far
    /// end shall send only the others.
    pub(in crate::engine) fn build_on(&mut self, pid: u32, chain: Chain, missing: Vec<PageRange>) {
        self.earlier.add(pid, chain, missing);
    }

    /// Goes on over `pair`.
    pub(in crate::engine) fn attach(&mut self, pair: FerryPair) {
        self.receiver.stream_up(0);
        self.pair = Some(pair);
        self.say();
    }

    /// Drops the connections, which are reset. What was asked is forgotten.
    pub(in crate::engine) fn detach(&mut self) {
        self.received_before = self.bytes_received();
        self.pair = None;
        self.questions.clear();
        self.earlier.forget_questions();
        self.receiver.stream_down(0);
    }

    /// Whether there are connections.
    pub(in crate::engine) fn is_attached(&self) -> bool {
        self.pair.is_some()
    }

    /// What to poll: the stream's socket, and the one for faults.
    pub(in crate::engine) fn sockets(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let pair = self.pair.as_ref()?;
        Some([pair.stream.socket(), pair.fault.socket()])
    }

    /// Received over all connections, bytes.
    pub(in crate::engine) fn bytes_received(&self) -> u64 {
        let now = self
            .pair
            .as_ref()
            .map_or(0, |pair| pair.stream.traffic().0 + pair.fault.traffic().0);
        self.received_before + now
    }

    /// Whether there is something to do although no socket is readable.
    pub(in crate::engine) fn has_work(&self) -> bool {
        let to_tell = self.may_tell_hashes();
        self.pair
            .as_ref()
            .is_some_and(|pair| to_tell || pair.stream.has_buffered() || pair.fault.has_buffered())
    }

    /// Hashes are wanted, and the stream takes what they are sent in.
    fn may_tell_hashes(&self) -> bool {
        let pair = self.pair.as_ref();
        self.earlier.is_asked() && pair.is_some_and(|pair| pair.stream.queued_bytes() == 0)
    }

    /// Hashes the next few pages of what the far end asks for, which takes no longer than to install
    /// them would.
    pub(in crate::engine) fn tell_hashes(&mut self) {
        if self.may_tell_hashes()
            && let Some(words) = self.earlier.next_hashes()
            && let Some(pair) = &mut self.pair
        {
            pair.stream.queue(Arc::new(words));
        }
    }

    /// How many questions are open.
    pub(in crate::engine) fn questions(&self) -> usize {
        self.questions.len()
    }

    /// How many pages were asked for that have not come.
    pub(in crate::engine) fn asked_pages(&self) -> u64 {
        self.questions.iter().map(|question| question.pages).sum()
    }

    /// Whether the far end has pushed all that it would.
    pub(in crate::engine) fn is_closed(&self) -> bool {
        self.closed
    }

    /// From now on pages may be installed, so they may be pushed.
    pub(in crate::engine) fn may_install(&mut self) {
        self.may_install = true;
        if let Some((number, target)) = self.open.take() {
            self.answer_open(number, target);
        }
    }

    /// Asks for the pages `image` of `pid`, of which a thread waits for the first.
    pub(in crate::engine) fn ask(&mut self, pid: u32, image: PageRange, tag: T) {
        let Some(pair) = &mut self.pair else {
            return;
        };
        let pages = image.pages(self.page).get();
        let most = u64::from(FERRY_FAULT_PAGES_MAX).min(pages);
        let start = image.start().get();
        let fault = Fault {
            target: Target::Process(pid),
            vaddr: image.start(),
            around: PageRange::new(start, start + (most << self.page.shift())),
            in_full: self.earlier.is_distrusted(),
        };
        self.asked += 1;
        let mut words = Vec::new();
        fault.encode(self.asked, self.page, &mut words);
        pair.fault.queue(Arc::new(words));
        self.questions.push_back(Question {
            number: self.asked,
            tag,
            pages: most,
            asked: Instant::now(),
        });
    }

    /// Sends what is queued, and a heartbeat when it is time. Says for each socket whether something is
    /// left that it does not take now.
    pub(in crate::engine) fn flush(&mut self) -> std::result::Result<[bool; 2], ConnError> {
        if self.said.elapsed() >= HEARTBEAT
            && let Some(pair) = &mut self.pair
        {
            self.said = Instant::now();
            let mut words = Vec::new();
            self.receiver
                .ack(pair.stream.traffic().0)
                .encode(&mut words);
            pair.stream.queue(Arc::new(words));
        }
        match &mut self.pair {
            Some(pair) => Ok([pair.stream.flush()?, pair.fault.flush()?]),
            None => Ok([false; 2]),
        }
    }

    /// Says that everything is here.
    pub(in crate::engine) fn taken(&mut self) {
        self.receiver.taken();
        // Whoever still asks learns that there is nothing to build on.
        self.earlier.drop_images();
        self.say();
    }

    /// Says that this side has failed for good, and drops the connections.
    pub(in crate::engine) fn fail(&mut self, why: &str) {
        self.receiver.fail(Fail::new(FailCode::Taker, why));
        self.say();
        if let Some(mut pair) = self.pair.take() {
            self.received_before += pair.stream.traffic().0 + pair.fault.traffic().0;
            lane::say_last_words(&mut pair.stream);
            pair.stream.close();
        }
        self.detach();
    }

    /// The next thing that has come, faults first.
    pub(in crate::engine) fn next(&mut self) -> std::result::Result<Option<Event<T>>, Trouble> {
        let Some(pair) = &mut self.pair else {
            return Ok(None);
        };
        if let Some(frame) = pair.fault.receive()? {
            return self.take_answer(&frame).map(Some);
        }
        if let Some(frame) = pair.stream.receive()? {
            return self.take_pushed(&frame).map(Some);
        }
        let oldest = self.questions.front();
        if oldest.is_some_and(|question| question.asked.elapsed() > ANSWER_TIMEOUT) {
            return Err(ConnError::Socket(std::io::ErrorKind::TimedOut.into()).into());
        }
        Ok(None)
    }

    fn take_answer(&mut self, frame: &Frame) -> std::result::Result<Event<T>, Trouble> {
        match frame.kind {
            frame::Kind::FaultPages => {}
            frame::Kind::Fail => return Err(failed(frame)),
            other => {
                return Err(wrong(format!(
                    "a {other:?} frame came where answers belong"
                )));
            }
        }
        let front = self.questions.pop_front();
        let answered = front.filter(|question| question.number == frame.number);
        let Some(Question { tag, .. }) = answered else {
            return Err(wrong("an answer came that nobody asked for"));
        };
        let batch = Batch::parse(&frame.body, self.page).map_err(wrong)?;
        Ok(Event::Answer(tag, self.deliver(&batch, &frame.body)?))
    }

    fn take_pushed(&mut self, frame: &Frame) -> std::result::Result<Event<T>, Trouble> {
        if !frame.kind.is_numbered() {
            return match frame.kind {
                frame::Kind::Bye => Ok(Event::Bye),
                frame::Kind::Fail => Err(failed(frame)),
                frame::Kind::WantHashes => {
                    let wanted = WantHashes::decode(&frame.body, self.page).map_err(wrong)?;
                    self.earlier.ask(wanted).map_err(wrong)?;
                    Ok(Event::Other)
                }
                other => Err(wrong(format!("a {other:?} frame has no place here"))),
            };
        }
        let bytes = frame.body.len() as u64;
        match self.receiver.handle_numbered(frame.number, bytes) {
            Ok(Arrival::Next) => {}
            Ok(Arrival::Again) => return Ok(Event::Other),
            Ok(Arrival::Held) => return Err(wrong("pushed frames are out of order")),
            Err(error) => return Err(wrong(error)),
        }
        let mut pushed = None;
        match self.receiver.read(frame.kind, &frame.body).map_err(wrong)? {
            Message::Pages(batch) => pushed = Some(batch),
            Message::Open(open) if !self.may_install => {
                // Before the processes are restored there is nowhere to put their pages.
                self.open = Some((frame.number, open.target));
                return Ok(Event::Other);
            }
            Message::Open(open) => {
                self.answer_open(frame.number, open.target);
                return Ok(Event::Other);
            }
            Message::Close(_) => self.closed = true,
        }
        match pushed {
            Some(batch) => {
                let delivery = self.deliver(&batch, &frame.body)?;
                self.unsettled = Some(frame.number);
                Ok(Event::Pushed(delivery))
            }
            None => {
                self.answer(frame.number, 0, StateId::NONE);
                Ok(Event::Other)
            }
        }
    }

    /// The pages of the last [`Event::Pushed`] are installed, or not wanted; `room` takes the next.
    pub(in crate::engine) fn settle(&mut self, room: Vec<u8>) {
        self.spare = room;
        if let Some(number) = self.unsettled.take() {
            self.receiver.applied(number);
            self.say();
        }
    }

    /// Answers the OPEN `number` of `target`: whether there is a version to build on, and its name.
    fn answer_open(&mut self, number: u64, target: Target) {
        let state = self.earlier.version_of(target);
        let has_one = i32::from(state != StateId::NONE);
        self.answer(number, has_one, state);
    }

    fn answer(&mut self, number: u64, value: i32, state: StateId) {
        self.receiver.applied(number);
        self.receiver.answer(number, value, state);
        self.say();
    }

    /// Queues what is to be said on the stream.
    fn say(&mut self) {
        let Some(pair) = &mut self.pair else {
            return;
        };
        while let Some(reply) = self.receiver.poll(0, pair.stream.traffic().0) {
            self.said = Instant::now();
            let mut words = Vec::new();
            reply.encode(&mut words);
            pair.stream.queue(Arc::new(words));
        }
    }

    /// Verifies `batch`, which lies in `body`, and lays its pages out one behind the other.
    fn deliver(
        &mut self,
        batch: &Batch<'_>,
        body: &[u8],
    ) -> std::result::Result<Delivery, Trouble> {
        if batch.bases().any(|(_, kind)| kind == PageKind::Delta) {
            return Err(wrong(
                "pages come as differences, which nobody offered to take",
            ));
        }
        let Target::Process(pid) = batch.target else {
            return Err(wrong("pages of shared memory are never lazy"));
        };
        self.unpacker
            .unpack(batch, &[], &mut self.unpacked)
            .map_err(wrong)?;
        let mut plain = std::mem::take(&mut self.spare);
        plain.clear();
        let mut parts: Vec<Part> = Vec::new();
        for (vaddr, place) in batch.places() {
            let start = plain.len();
            let local = place == Place::Same;
            match place {
                Place::Body(range) => plain.extend_from_slice(&body[range]),
                Place::Unpacked(range) => plain.extend_from_slice(&self.unpacked[range]),
                Place::Zero | Place::Same => plain.resize(start + self.page.as_usize(), 0),
            }
            let end = vaddr.get() + self.page.bytes();
            match parts.last_mut() {
                Some(part) if part.image.end() == vaddr && part.local == local => {
                    part.image = PageRange::new(part.image.start().get(), end);
                    part.bytes.end = plain.len();
                }
                _ => parts.push(Part {
                    image: PageRange::new(vaddr.get(), end),
                    bytes: start..plain.len(),
                    local,
                }),
            }
        }
        let mut lacking = Vec::new();
        if !self.earlier.fill(pid, batch, &parts, &mut plain) {
            parts.retain(|part| {
                if part.local {
                    lacking.push(part.image);
                }
                !part.local
            });
        }
        Ok(Delivery {
            pid,
            parts,
            lacking,
            plain,
        })
    }
}

/// The far end has ended the session.
fn failed(frame: &Frame) -> Trouble {
    match Fail::decode(&frame.body) {
        Ok(fail) => Trouble::Over(Error::wrap(
            Kind::PeerLost,
            "the far end has ended the session",
            fail,
        )),
        Err(error) => wrong(error),
    }
}

fn wrong(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Trouble {
    let text = "what the far end says is wrong";
    Trouble::Over(Error::wrap(Kind::Protocol, text, error))
}
