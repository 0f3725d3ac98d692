//! The receiver's state that all its threads share: order, window, acknowledgements.
//!
//! ```text
//! connections ── frames ──> order ── those whose turn it is ──> applier thread ── images
//!   ^                                                         │
//!   └──────────────── safe, answers, failure <────────────────┘
//! ```
//!
//! Connection loops only receive and put in order, so that they receive and answer at any time; the applier
//! checks, unpacks and writes. Hashes of the base version are computed by the connection that was asked.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::ferry::base::Base;
use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::ferry::conn::Frame;
use crate::engine::ferry::connection_loop::{ConnectionHandler, FrameOutcome};
use crate::engine::ferry::wakers::{Waker, Wakers};
use crate::engine::ferry::{END_TIMEOUT, lock};
use crate::engine::receive::batch_applier::{Bases, BatchApplier};
use crate::engine::receive::counters::SessionCounters;
use crate::error::{self, Error, Result};
use crate::ferry::frame::{HEADER_BYTES, Kind};
use crate::ferry::hello::{Fail, FailCode, Hello, Window};
use crate::ferry::message::{Hashes, StateId, WantHashes};
use crate::ferry::receiver::{Arrival, Message, Receiver, ReceiverEvent};
use crate::image::writer::CommittedImages;
use crate::limits::{FERRY_HASHES_MAX, FERRY_QUESTIONS_MAX};
use crate::sync::{Condvar, Mutex};
use crate::units::PageSize;

/// Most frames that are applied before they are acknowledged: far fewer than fit into the window.
const ACKNOWLEDGED_TOGETHER: u64 = 8;

/// Pages hashed at once: a piece of work of a few milliseconds.
const HASHED_AT_ONCE: u64 = 1024;

const _: () = assert!(HASHED_AT_ONCE <= FERRY_HASHES_MAX as u64);

/// How a session has ended, as seen from the connections.
#[derive(Debug)]
enum Ending {
    /// The sender has said goodbye.
    Bye,
    /// This side has failed and tells the other.
    Failed,
    /// The other side has failed, or did not come back.
    Lost(String),
}

/// The part behind the lock.
struct State {
    receiver: Receiver,
    /// Frames that came before their turn.
    held: BTreeMap<u64, Frame>,
    /// Frames whose turn has come, for the applier.
    ready: VecDeque<Frame>,
    /// Questions for hashes, each on the stream on which it came.
    questions: BTreeMap<u16, VecDeque<WantHashes>>,
    wakers: Wakers,
    ending: Option<Ending>,
    /// The sender has confirmed the failure.
    end_confirmed: bool,
}

/// See the module's text.
pub(in crate::engine) struct ReceiverSession {
    page: PageSize,
    state: Mutex<State>,
    changed: Condvar,
    bases: Arc<Bases>,
    /// Where bodies go when they are applied.
    pool: Arc<BufferPool>,
}

impl ReceiverSession {
    pub(in crate::engine) fn new(
        page: PageSize,
        streams: u16,
        window: Window,
        bases: Arc<Bases>,
        pool: Arc<BufferPool>,
        takes_shared: bool,
    ) -> ReceiverSession {
        ReceiverSession {
            page,
            state: Mutex::new(State {
                receiver: Receiver::new(page, streams, window).taking_shared(takes_shared),
                held: BTreeMap::new(),
                ready: VecDeque::new(),
                questions: BTreeMap::new(),
                wakers: Wakers::default(),
                ending: None,
                end_confirmed: false,
            }),
            changed: Condvar::new(),
            bases,
            pool,
        }
    }

    /// Applies frames to `applier` as their turn comes, until the images are complete. Fails if
    /// the session fails before; the sender has been told then, if it could be reached.
    pub(in crate::engine) fn apply_all(
        &self,
        mut applier: BatchApplier,
        counters: &mut SessionCounters<'_>,
    ) -> Result<CommittedImages> {
        let outcome = loop {
            let frame = self.next_frame()?;
            counters.came((HEADER_BYTES + frame.body.len()) as u64);
            if frame.kind == Kind::Close {
                let images = self.close(&frame, applier, counters);
                counters.answered();
                break images;
            }
            if let Err(error) = self.apply(&frame, &mut applier, counters) {
                break Err(error);
            }
            self.pool.give(frame.body);
        };
        outcome.inspect_err(|error| self.fail(error))
    }

    /// The images are complete: waits until the sender knows it, or will not come back to ask.
    pub(in crate::engine) fn wait_for_sender_to_end(&self) {
        let mut state = lock(&self.state);
        while state.ending.is_none() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// All is done: what is left is to say so to whoever asks once more.
    pub(in crate::engine) fn retire(&self) {
        lock(&self.bases).clear();
    }

    /// This process is to end: says so on the connections that there are.
    pub(in crate::engine) fn stop(&self) {
        let why = "stopped by a signal";
        let mut state = lock(&self.state);
        if state.ending.is_none() {
            state.receiver.fail(Fail::new(FailCode::Receiver, why));
        }
        drop(state);
        self.lost(why.to_owned());
    }

    /// The session cannot go on.
    pub(in crate::engine) fn lost(&self, why: String) {
        self.end(Ending::Lost(why));
    }

    fn end(&self, ending: Ending) {
        let mut state = lock(&self.state);
        state.ending.get_or_insert(ending);
        state.wakers.wake_all();
        drop(state);
        self.changed.notify_all();
    }

    /// This side has failed: tells the sender, and waits a while until that has confirmed it.
    fn fail(&self, error: &Error) {
        let code = match error.kind() {
            error::Kind::Protocol => FailCode::Protocol,
            error::Kind::Image => FailCode::Disagreement,
            _ => FailCode::Receiver,
        };
        let fail = Fail::new(code, error.to_string());
        lock(&self.state).receiver.fail(fail);
        self.end(Ending::Failed);
        let start = Instant::now();
        let mut state = lock(&self.state);
        while !state.end_confirmed
            && let Some(left) = END_TIMEOUT.checked_sub(start.elapsed())
        {
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn next_frame(&self) -> Result<Frame> {
        let mut state = lock(&self.state);
        loop {
            match &state.ending {
                None => {}
                Some(Ending::Lost(why)) => {
                    return Err(Error::new(error::Kind::PeerLost, why.clone()));
                }
                Some(Ending::Bye | Ending::Failed) => {
                    let text = "the far end has left before everything came";
                    return Err(Error::new(error::Kind::PeerLost, text));
                }
            }
            if let Some(frame) = state.ready.pop_front() {
                return Ok(frame);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn apply(
        &self,
        frame: &Frame,
        applier: &mut BatchApplier,
        counters: &mut SessionCounters<'_>,
    ) -> Result<()> {
        let answer = match self.read(frame)? {
            Message::Pages(batch) => {
                applier.store(&batch, &frame.body, counters)?;
                None
            }
            Message::Open(open) => {
                let (has_parent, state) = applier.open(open)?;
                counters.opened(open.wire);
                Some((i32::from(has_parent), state))
            }
            Message::Close(_) => None,
        };
        self.applied(frame.number, answer);
        Ok(())
    }

    fn close(
        &self,
        frame: &Frame,
        applier: BatchApplier,
        counters: &mut SessionCounters<'_>,
    ) -> Result<CommittedImages> {
        self.read(frame)?;
        let images = applier.commit(counters)?;
        self.applied(frame.number, Some((0, StateId::NONE)));
        Ok(images)
    }

    fn read<'b>(&self, frame: &'b Frame) -> Result<Message<'b>> {
        let mut state = lock(&self.state);
        let read = state.receiver.read(frame.kind, &frame.body);
        read.map_err(|error| {
            let text = "what the far end says is wrong";
            Error::wrap(error::Kind::Protocol, text, error)
        })
    }

    fn applied(&self, number: u64, answer: Option<(i32, StateId)>) {
        let mut state = lock(&self.state);
        state.receiver.applied(number);
        // While more is to be applied at once, the connections are left to their receiving.
        let due = answer.is_some()
            || state.ready.is_empty()
            || number.is_multiple_of(ACKNOWLEDGED_TOGETHER);
        if let Some((value, base)) = answer {
            state.receiver.answer(number, value, base);
        }
        if due {
            state.wakers.wake_all();
        }
    }

    /// The next hashes for whoever asked on `stream`.
    fn hashes(&self, stream: u16) -> Option<Arc<Vec<u8>>> {
        let wanted = lock(&self.state)
            .questions
            .get_mut(&stream)
            .and_then(VecDeque::pop_front)?;
        let base = lock(&self.bases).get(&wanted.target).cloned();
        let hash = |base: Arc<Mutex<Base>>| {
            let mut base = lock(&base);
            let step = base.hash_from(wanted.from, HASHED_AT_ONCE)?;
            base.remember(&step);
            Ok::<_, Error>(step)
        };
        let step = match base.map(hash) {
            Some(Ok(step)) => Some(step),
            Some(Err(error)) => {
                // Without hashes pages are sent in full.
                tracing::warn!("hashing the parent's pages of {}: {error}", wanted.target);
                None
            }
            None => None,
        };
        let mut frame = Vec::new();
        match step {
            Some(step) => {
                let last = step.next.is_none();
                let (runs, hashes) = (&step.runs, &step.hashes);
                Hashes::encode(wanted.target, self.page, runs, hashes, last, &mut frame);
                if let Some(from) = step.next {
                    let mut state = lock(&self.state);
                    let questions = state.questions.entry(stream).or_default();
                    questions.push_front(WantHashes { from, ..wanted });
                }
            }
            None => Hashes::encode(wanted.target, self.page, &[], &[], true, &mut frame),
        }
        Some(Arc::new(frame))
    }
}

impl State {
    fn take_question(
        &mut self,
        stream: u16,
        wanted: WantHashes,
    ) -> std::result::Result<bool, Fail> {
        let questions = self.questions.entry(stream).or_default();
        if questions.len() >= FERRY_QUESTIONS_MAX {
            let text = format!("{} questions for hashes at once", questions.len() + 1);
            return Err(Fail::new(FailCode::Protocol, text));
        }
        questions.push_back(wanted);
        Ok(true)
    }

    fn take_numbered(&mut self, frame: Frame) -> std::result::Result<bool, Fail> {
        let bytes = frame.body.len() as u64;
        let arrival = self.receiver.handle_numbered(frame.number, bytes);
        let arrival = arrival.map_err(|error| Fail::new(FailCode::Protocol, error.to_string()))?;
        match arrival {
            Arrival::Again => return Ok(false),
            Arrival::Held => drop(self.held.insert(frame.number, frame)),
            Arrival::Next => {
                self.ready.push_back(frame);
                while let Some(number) = self.receiver.next_held() {
                    let held = self.held.remove(&number);
                    self.ready.push_back(held.expect("held frames are kept"));
                }
            }
        }
        Ok(true)
    }
}

impl ConnectionHandler for ReceiverSession {
    fn stream_up(&self, stream: u16, _peer: &Hello, waker: &Arc<Waker>) {
        let mut state = lock(&self.state);
        state.receiver.stream_up(stream);
        state.questions.remove(&stream);
        if let Some(older) = state.wakers.replace(stream, waker) {
            older.wake();
        }
    }

    fn stream_down(&self, stream: u16, waker: &Arc<Waker>) {
        let mut state = lock(&self.state);
        if state.wakers.remove(stream, waker) {
            state.questions.remove(&stream);
            state.receiver.stream_down(stream);
        }
    }

    fn peer_closed(&self, stream: u16, waker: &Arc<Waker>) {
        let mut state = lock(&self.state);
        if !state.wakers.is_replaced(stream, waker) {
            state.end_confirmed |= state.receiver.was_sent_failure(stream);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn handle(&self, stream: u16, waker: &Arc<Waker>, frame: Frame) -> FrameOutcome {
        let mut state = lock(&self.state);
        let ends = [Kind::Fail, Kind::Bye].contains(&frame.kind);
        if state.wakers.is_replaced(stream, waker) && !ends {
            return FrameOutcome::default();
        }
        if state.ending.is_some() && frame.kind.is_numbered() {
            return FrameOutcome::default();
        }
        let came = if frame.kind.is_numbered() {
            state.take_numbered(frame)
        } else {
            match state.receiver.handle(frame.kind, &frame.body) {
                Ok(ReceiverEvent::WantHashes(wanted)) => state.take_question(stream, wanted),
                Ok(ReceiverEvent::Failed(fail)) => {
                    drop(state);
                    self.lost(format!("the far end has failed: {fail}"));
                    return FrameOutcome::progress(true);
                }
                Ok(ReceiverEvent::Bye) => {
                    drop(state);
                    self.end(Ending::Bye);
                    return FrameOutcome::progress(true);
                }
                Err(error) => Err(Fail::new(FailCode::Protocol, error.to_string())),
            }
        };
        match came {
            Ok(new) => {
                drop(state);
                self.changed.notify_all();
                FrameOutcome::progress(new)
            }
            Err(fail) => {
                state.receiver.fail(fail.clone());
                drop(state);
                self.lost(format!("what the far end says is wrong: {fail}"));
                FrameOutcome::default()
            }
        }
    }

    fn poll(&self, stream: u16, waker: &Arc<Waker>, arrived: u64) -> Option<Arc<Vec<u8>>> {
        let mut state = lock(&self.state);
        if state.wakers.is_replaced(stream, waker) {
            return None;
        }
        if let Some(reply) = state.receiver.poll(stream, arrived) {
            let mut frame = Vec::new();
            reply.encode(&mut frame);
            return Some(Arc::new(frame));
        }
        drop(state);
        self.hashes(stream)
    }

    fn awaits_message(&self) -> bool {
        // A sender may be silent for as long as its dump is. What is said to it now and then is
        // acknowledged by its kernel, so a host that is gone is noticed.
        false
    }

    fn heartbeat(&self, arrived: u64) -> Option<Arc<Vec<u8>>> {
        let mut frame = Vec::new();
        lock(&self.state).receiver.ack(arrived).encode(&mut frame);
        Some(Arc::new(frame))
    }

    fn observe_link(&self, _bytes: u64, _busy: Duration) {}

    fn is_over(&self) -> bool {
        let state = lock(&self.state);
        // A failure is what is left to say on each connection.
        state.ending.is_some()
    }

    fn is_replaced(&self, stream: u16, waker: &Arc<Waker>) -> bool {
        lock(&self.state).wakers.is_replaced(stream, waker)
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;
