//! The state of a sender that all its threads share: numbers, frames until they are safe, and the memory of what the
//! receiver has.
//!
//! Connection loops poll frames out of it and hand acknowledgements in (`handler`). The packers submit batches in the
//! order of their sequence numbers. The thread that talks to CRIU asks questions and waits for the answers.

mod handler;
mod outbox;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::criu::header::Target;
use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::ferry::change_notifier::ChangeNotifier;
use crate::engine::ferry::connection_loop::{DialingHandler, Lost};
use crate::engine::ferry::wakers::Wakers;
use crate::engine::ferry::{SenderHistory, lock};
use crate::error::{self, Error, Result};
use crate::ferry::delta::PageMemory;
use crate::ferry::encode::EncodeCounters;
use crate::ferry::frame::{Kind, OpenFrame, SealedFrame};
use crate::ferry::hash::PageHasher;
use crate::ferry::hello::{Fail, FailCode, Features, SessionId};
use crate::ferry::level_control::LevelControl;
use crate::ferry::message::{Answer, StateId};
use crate::ferry::push_planner::PUSH_BYTES;
use crate::ferry::sender::Sender;
use crate::observe::ferried::{ByKind, Sent};
use crate::observe::traffic::Traffic;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::units::{PageSize, Vaddr};
use outbox::Outbox;

/// What both ends have agreed on.
#[derive(Clone, Debug)]
pub(crate) struct Agreed {
    /// Makes the receiver's hashes.
    pub(crate) hasher: Arc<PageHasher>,
    /// What both can do.
    pub(crate) features: Features,
}

#[derive(Debug)]
enum Ending {
    /// Everything is safe.
    Well,
    /// This side has failed and tells the other.
    Failed,
    /// The other side has failed, or cannot be reached.
    Lost(Error),
}

/// The part behind the lock.
struct State {
    talk: Option<(Sender, Agreed)>,
    outbox: Outbox,
    answer: Option<Answer>,
    /// The receiver has everything that it wants.
    complete: bool,
    /// It has confirmed that the session is over.
    bye_received: bool,
    /// Whose turn it is to submit a batch.
    sequence: u64,
    wakers: Wakers,
    ending: Option<Ending>,
    /// Nobody waits for the last messages any more.
    cut: bool,
    /// The receiver knows no such session any more.
    refused: bool,
}

/// See the module's text.
pub(crate) struct SenderSession {
    page: PageSize,
    session: SessionId,
    state: Mutex<State>,
    changed: Condvar,
    notifier: ChangeNotifier,
    memory: Mutex<PageMemory>,
    level_control: Mutex<LevelControl>,
    traffic: Arc<Traffic>,
    /// Buffers of frames that are safe.
    pool: BufferPool,
}

impl SenderSession {
    /// A session that goes on from `history` and counts in `traffic`.
    pub(in crate::engine) fn new(
        page: PageSize,
        session: SessionId,
        history: SenderHistory,
        traffic: Arc<Traffic>,
    ) -> SenderSession {
        SenderSession {
            page,
            session,
            state: Mutex::new(State {
                talk: None,
                outbox: Outbox::default(),
                answer: None,
                complete: false,
                bye_received: false,
                sequence: 0,
                wakers: Wakers::default(),
                ending: None,
                cut: false,
                refused: false,
            }),
            changed: Condvar::new(),
            notifier: ChangeNotifier::default(),
            memory: Mutex::new(history.memory),
            level_control: Mutex::new(history.level_control),
            traffic,
            pool: BufferPool::default(),
        }
    }

    /// Notifies when the session has changed.
    pub(in crate::engine) fn notifier(&self) -> &ChangeNotifier {
        &self.notifier
    }

    /// The memory of what the receiver has.
    pub(in crate::engine) fn memory(&self) -> MutexGuard<'_, PageMemory> {
        lock(&self.memory)
    }

    /// So many threads compress.
    pub(in crate::engine) fn set_encoders(&self, encoders: usize) {
        self.level_control()
            .set_encoders(u32::try_from(encoders).unwrap_or(1));
    }

    /// An empty buffer for a frame.
    pub(in crate::engine) fn frame_buffer(&self) -> Vec<u8> {
        let mut buffer = self.pool.take();
        buffer.clear();
        buffer
    }

    /// Chooses compression levels.
    pub(in crate::engine) fn level_control(&self) -> MutexGuard<'_, LevelControl> {
        lock(&self.level_control)
    }

    /// Takes out what the next session goes on from.
    pub(in crate::engine) fn into_history(self) -> SenderHistory {
        let (memory, level_control) = (self.memory.into_inner(), self.level_control.into_inner());
        SenderHistory {
            memory: memory.unwrap_or_else(PoisonError::into_inner),
            level_control: level_control.unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// What was sent so far.
    pub(crate) fn sent(&self) -> Sent {
        lock(&self.state).outbox.sent
    }

    /// Waits until the receiver has been reached.
    pub(crate) fn agree(&self) -> Result<Agreed> {
        self.wait(|state| state.talk.as_ref().map(|(_, agreed)| agreed.clone()))
    }

    /// Asks the receiver a question with this body, and waits for the answer.
    pub(crate) fn ask(&self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) -> Result<Answer> {
        let mut frame = Vec::new();
        let open = OpenFrame::begin(&mut frame);
        write(&mut frame);
        let sealed = open.seal(&frame);
        self.submit(kind, sealed, frame, None)?;
        self.wait(|state| state.answer.take())
    }

    /// Submits the batch number `sequence` when all before it have been submitted.
    pub(in crate::engine) fn submit_batch(
        &self,
        sequence: u64,
        open: OpenFrame,
        frame: Vec<u8>,
        counters: &EncodeCounters,
    ) -> Result<()> {
        let sealed = open.seal(&frame);
        self.submit(Kind::Pages, sealed, frame, Some(sequence))?;
        self.traffic.forwarded(&ByKind::of(counters, self.page));
        lock(&self.state).outbox.sent.add(counters);
        Ok(())
    }

    /// Whether the receiver has said that it has everything that it wants.
    pub(in crate::engine) fn is_complete(&self) -> bool {
        lock(&self.state).complete
    }

    /// Waits until the receiver has everything that it wants.
    pub(in crate::engine) fn wait_until_complete(&self) -> Result<()> {
        self.wait(|state| state.complete.then_some(()))
    }

    /// Waits until a batch behind all with sequence numbers below `sequence` can be made: it has room in the
    /// receiver's window, and no more than `most_unsent` bytes wait for a connection. Frames that are being made
    /// count as one of a batch's length each.
    pub(super) fn wait_for_room(&self, sequence: u64, most_unsent: u64) -> Result<()> {
        self.wait(|state| {
            let (sender, _) = state.talk.as_ref()?;
            let being_made = (sequence - state.sequence) * PUSH_BYTES;
            let fits = sender.has_room_for(being_made + PUSH_BYTES);
            (fits && state.outbox.unsent + being_made <= most_unsent).then_some(())
        })
    }

    /// Waits until the batches with sequence numbers below `sequence` have been submitted.
    pub(in crate::engine) fn wait_for_batches_before(&self, sequence: u64) -> Result<()> {
        self.wait(|state| (state.sequence == sequence).then_some(()))
    }

    /// The receiver's base version of `target` is called `state`. Asks for its hashes if need be.
    pub(crate) fn adopt(&self, target: Target, state: StateId) {
        if !self.memory().adopt(target, state) {
            return;
        }
        let mut shared = lock(&self.state);
        if let Some((sender, _)) = &mut shared.talk {
            sender.ask_hashes(target);
        }
        shared.wakers.wake_all();
    }

    /// Waits until the receiver's hashes of `target` are known below `end`.
    pub(in crate::engine) fn await_hashes(&self, target: Target, end: Vaddr) -> Result<()> {
        self.wait(|state| {
            let (sender, _) = state.talk.as_ref()?;
            let known = sender.hashes_known_below(target);
            known.is_none_or(|below| end <= below).then_some(())
        })
    }

    /// Everything is safe: says goodbye and remembers the round.
    pub(crate) fn finish(&self) {
        self.memory().commit(self.session.into());
        let mut state = lock(&self.state);
        if let Some((sender, _)) = &mut state.talk {
            sender.leave();
        }
        self.end(state, Ending::Well);
    }

    /// This side has failed.
    pub(crate) fn abort(&self, why: &str) {
        self.memory().forget();
        let mut state = lock(&self.state);
        if let Some((sender, _)) = &mut state.talk {
            sender.fail(Fail::new(FailCode::Sender, why));
        }
        self.end(state, Ending::Failed);
    }

    /// What is to be said on a connection that carries no stream, if the session has failed.
    pub(in crate::engine) fn failure(&self) -> Option<Vec<u8>> {
        let state = lock(&self.state);
        let (sender, _) = state.talk.as_ref()?;
        let mut words = Vec::new();
        sender.failure()?.encode(&mut words);
        Some(words)
    }

    /// This process is to end: says so on the connections that there are.
    pub(in crate::engine) fn stop(&self) {
        self.lost(Lost::Stopped);
        self.cut();
    }

    /// Ends all connections, whether the far end has confirmed the end or not.
    pub(in crate::engine) fn cut(&self) {
        let mut state = lock(&self.state);
        state.cut = true;
        self.end(state, Ending::Failed);
    }

    fn end(&self, mut state: MutexGuard<'_, State>, ending: Ending) {
        state.ending.get_or_insert(ending);
        state.wakers.wake_all();
        drop(state);
        self.changed.notify_all();
        self.notifier.notify();
    }

    fn submit(
        &self,
        kind: Kind,
        sealed: SealedFrame,
        mut frame: Vec<u8>,
        sequence: Option<u64>,
    ) -> Result<()> {
        let bytes = frame.len() as u64;
        let mut state = self.wait_for(|state| {
            let turn = sequence.is_none_or(|sequence| state.sequence == sequence);
            let sender = state.talk.as_ref().map(|(sender, _)| sender);
            turn && sender.is_some_and(|sender| sender.has_room_for(bytes))
        })?;
        if let Some((sender, _)) = &mut state.talk {
            let number = sender.submit(kind, bytes);
            sealed.finish(&mut frame, kind, number);
        }
        state.outbox.put(frame);
        state.sequence += u64::from(sequence.is_some());
        self.traffic.forwarded_frame(bytes);
        state.wakers.wake_all();
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until `found` finds something; fails when the session has ended before.
    fn wait<T>(&self, mut found: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let mut result = None;
        drop(self.wait_for(|state| {
            result = found(state);
            result.is_some()
        })?);
        Ok(result.expect("it was waited for"))
    }

    fn wait_for(&self, mut ready: impl FnMut(&mut State) -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(ending) = &mut state.ending {
                return Err(ending.error());
            }
            if ready(&mut state) {
                return Ok(state);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A frame with a complaint about the receiver ends the session.
    fn refuse(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) {
        let error = Error::wrap(error::Kind::Protocol, "the far end breaks the rules", error);
        let mut state = lock(&self.state);
        if let Some((sender, _)) = &mut state.talk {
            sender.fail(Fail::new(FailCode::Protocol, error.to_string()));
        }
        self.end(state, Ending::Lost(error));
    }
}

impl Ending {
    /// What to tell a thread that waits for something that will not come.
    fn error(&mut self) -> Error {
        let over = "the session with the far end is over";
        match self {
            Ending::Well | Ending::Failed => Error::new(error::Kind::PeerLost, over),
            Ending::Lost(error) => {
                // The first one to ask gets the cause, the others the sentence.
                let text = error.to_string();
                std::mem::replace(error, Error::new(error.kind(), text))
            }
        }
    }
}

impl State {
    fn is_end_sent(&self) -> bool {
        let sender = self.talk.as_ref().map(|(sender, _)| sender);
        sender.is_none_or(Sender::has_sent_end)
    }

    fn is_end_confirmed(&self) -> bool {
        let sender = self.talk.as_ref().map(|(sender, _)| sender);
        sender.is_none_or(Sender::is_end_confirmed)
    }

    /// Whether BYE was sent, or will be, to a receiver that confirms it, and has not yet.
    fn awaits_bye_confirmation(&self) -> bool {
        let promised = |(_, agreed): &(_, Agreed)| agreed.features.has(Features::CONFIRMS_BYE);
        let well = matches!(self.ending, Some(Ending::Well));
        well && !self.bye_received && self.talk.as_ref().is_some_and(promised)
    }

    /// Takes out the frames that are safe.
    fn release(&mut self, safe: u64) -> Vec<Arc<Vec<u8>>> {
        let last = self.talk.as_ref().map_or(0, |(sender, _)| sender.last());
        let outstanding = usize::try_from(last - safe).expect("within the window");
        self.outbox.keep(outstanding)
    }
}

impl SenderSession {
    /// Whether the receiver promised to confirm BYE, and has not.
    pub(in crate::engine) fn awaits_bye_confirmation(&self) -> bool {
        lock(&self.state).awaits_bye_confirmation()
    }

    /// Waits until the receiver has confirmed the end, for `most` at the longest.
    pub(crate) fn wait_until_done(&self, most: Duration) {
        let start = Instant::now();
        loop {
            // What changes from here on ends the wait below.
            let seen = self.notifier.notified();
            let left = most.checked_sub(start.elapsed());
            let (false, Some(left)) = (self.is_done(), left) else {
                return;
            };
            self.notifier
                .wait(seen, left.min(Duration::from_millis(50)));
        }
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;

#[cfg(test)]
mod tests;
