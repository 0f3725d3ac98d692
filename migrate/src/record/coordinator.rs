//! Coordinates the connections of a recorder. They share the log, the order, and how many bytes of answers were seen.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::REPLAY_HEAD_BYTES_MAX;
use pageferry::replay::{Entry, Order, Sequencer};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::service_log::LogWriter;

/// The recorder's state, used by one thread.
#[derive(Debug)]
pub(super) struct Coordinator {
    state: RefCell<State>,
    /// Somebody waits for the answer to another connection's piece.
    blocked: Notify,
    failed: Notify,
    /// The last piece may be answered now.
    settling: Notify,
    /// Somebody has asked for the end of the recording.
    ending: Notify,
    stopping: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    log: LogWriter,
    sequencer: Sequencer,
    connections: BTreeMap<u32, Connection>,
    /// Connections with answers that the log does not have yet.
    fresh: Vec<u32>,
    passed: Instant,
    holders: usize,
    /// Clients stay held until somebody says otherwise: they may be another service's by now.
    sealed: bool,
    failure: Option<Error>,
}

#[derive(Default, Debug)]
struct Connection {
    turn: Rc<Notify>,
    answers: u64,
    checksum: crc32fast::Hasher,
    head: Vec<u8>,
    is_fresh: bool,
    has_ended: bool,
}

impl Coordinator {
    pub(super) fn new(log: LogWriter, order: Order) -> Rc<Coordinator> {
        Rc::new(Coordinator {
            state: RefCell::new(State {
                log,
                sequencer: Sequencer::new(order),
                connections: BTreeMap::new(),
                fresh: Vec::new(),
                passed: Instant::now(),
                holders: 0,
                sealed: false,
                failure: None,
            }),
            blocked: Notify::new(),
            failed: Notify::new(),
            settling: Notify::new(),
            ending: Notify::new(),
            stopping: watch::Sender::new(false),
        })
    }

    /// A client has connected.
    pub(super) fn open(&self) -> Result<u32> {
        let mut state = self.state.borrow_mut();
        let connection = state.log.new_connection()?;
        state.note_answers();
        state.log.push(&Entry::Open { connection });
        state.log.commit()?;
        state.connections.insert(connection, Connection::default());
        Ok(connection)
    }

    /// Waits for the connection's turn, and writes the entry to the log. The caller then does what it says. Returns
    /// whether it may: the log can be written, and the service has not ended the connection.
    pub(super) async fn pass(&self, connection: u32, entry: &Entry) -> bool {
        let Some(turn) = self.arrive(connection) else {
            return false;
        };
        loop {
            if self.state.borrow().sequencer.next() == Some(connection) {
                return self.write(connection, entry);
            }
            turn.notified().await;
        }
    }

    fn arrive(&self, connection: u32) -> Option<Rc<Notify>> {
        let mut state = self.state.borrow_mut();
        let turn = Rc::clone(&state.connections.get(&connection)?.turn);
        state.sequencer.arrive(connection);
        if state.sequencer.is_blocked() {
            self.blocked.notify_one();
        }
        Some(turn)
    }

    fn write(&self, connection: u32, entry: &Entry) -> bool {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let has_ended = state.connections.get(&connection);
        if has_ended.is_none_or(|known| known.has_ended) {
            state.sequencer.forget(connection);
            state.wake(&self.blocked);
            return false;
        }
        state.note_answers();
        if state.sequencer.pass() {
            state.log.push(&Entry::Settled);
        }
        state.log.push(entry);
        state.passed = Instant::now();
        let written = state.log.commit();
        state.wake(&self.blocked);
        drop(guard);
        self.judge(written)
    }

    /// Answers have come, which the client has not seen yet.
    pub(super) fn answered(&self, connection: u32, bytes: &[u8]) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if let Some(known) = state.connections.get_mut(&connection) {
            known.answers += bytes.len() as u64;
            known.checksum.update(bytes);
            let room = REPLAY_HEAD_BYTES_MAX.saturating_sub(known.head.len());
            known.head.extend(bytes.iter().take(room));
            if !std::mem::replace(&mut known.is_fresh, true) {
                state.fresh.push(connection);
            }
        }
        state.sequencer.answered(connection);
        state.wake(&self.blocked);
        self.settling.notify_one();
    }

    /// The service has ended the connection.
    pub(super) fn ended(&self, connection: u32) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.note_answers();
        state.log.push(&Entry::Ended { connection });
        let written = state.log.commit();
        if let Some(known) = state.connections.get_mut(&connection) {
            known.has_ended = true;
        }
        state.sequencer.answered(connection);
        state.wake(&self.blocked);
        drop(guard);
        self.judge(written);
    }

    /// Both directions are over.
    pub(super) fn forget(&self, connection: u32) {
        let mut state = self.state.borrow_mut();
        state.note_answers();
        state.connections.remove(&connection);
        state.sequencer.forget(connection);
        state.wake(&self.blocked);
    }

    fn judge(&self, written: Result<()>) -> bool {
        match written {
            Ok(()) => true,
            Err(error) => {
                self.state.borrow_mut().failure.get_or_insert(error);
                self.failed.notify_one();
                false
            }
        }
    }

    /// Returns when the log cannot be written.
    pub(super) async fn failure(&self) -> Error {
        loop {
            if let Some(error) = self.state.borrow_mut().failure.take() {
                return error;
            }
            self.failed.notified().await;
        }
    }

    /// Gives turns to connections that wait for an answer which does not come.
    pub(super) async fn measure_waits(&self, wait: Duration) -> Infallible {
        loop {
            self.blocked.notified().await;
            while let Some(due) = self.due(wait) {
                if Instant::now() < due {
                    sleep_until(due).await;
                    continue;
                }
                let mut state = self.state.borrow_mut();
                state.sequencer.waited();
                state.wake(&self.blocked);
            }
        }
    }

    fn due(&self, wait: Duration) -> Option<Instant> {
        let state = self.state.borrow();
        state.sequencer.is_blocked().then(|| state.passed + wait)
    }

    /// One more, or one less, wants that nothing is passed.
    pub(super) fn hold(&self, held: bool) {
        let mut state = self.state.borrow_mut();
        state.holders = match held {
            true => state.holders + 1,
            false => state.holders.saturating_sub(1),
        };
        state.hold_or_pass(&self.blocked);
    }

    /// Clients stay held whoever holds them ends; or not any more.
    pub(super) fn seal(&self, sealed: bool) {
        let mut state = self.state.borrow_mut();
        state.sealed = sealed;
        state.hold_or_pass(&self.blocked);
    }

    /// Whether clients may be another service's by now.
    pub(super) fn is_sealed(&self) -> bool {
        self.state.borrow().sealed
    }

    /// Waits, while nothing is passed, until the service has read what was passed before. Writes what it has answered, and
    /// returns how many entries the log has then.
    pub(super) async fn settle(&self, wait: Duration) -> Result<u64> {
        loop {
            let due = {
                let state = self.state.borrow();
                state.sequencer.is_unread().then(|| state.passed + wait)
            };
            let Some(due) = due.filter(|due| Instant::now() < *due) else {
                break;
            };
            tokio::select! {
                () = sleep_until(due) => {}
                () = self.settling.notified() => {}
            }
        }
        let mut state = self.state.borrow_mut();
        state.sequencer.waited();
        state.note_answers();
        state.log.commit()?;
        Ok(state.log.entries())
    }

    /// Asks for the end of the recording.
    pub(super) fn ask_for_end(&self) {
        self.ending.notify_one();
    }

    /// Waits until somebody asks for the end.
    pub(super) async fn end_asked(&self) {
        self.ending.notified().await;
    }

    /// No client may send more.
    pub(super) fn stop(&self) {
        let mut state = self.state.borrow_mut();
        state.holders = 0;
        state.hold_or_pass(&self.blocked);
        self.stopping.send_replace(true);
    }

    /// Waits for [`Coordinator::stop`].
    pub(super) async fn stopped(&self) {
        // The sender lives as long as this one.
        let _ = self
            .stopping
            .subscribe()
            .wait_for(|&stopping| stopping)
            .await;
    }

    /// Ends the log. Returns how many entries it has.
    pub(super) fn end(&self, digest: Option<Vec<u8>>) -> Result<u64> {
        let mut state = self.state.borrow_mut();
        if let Some(error) = state.failure.take() {
            return Err(error);
        }
        state.note_answers();
        state.log.push(&Entry::End { digest });
        state.log.commit()?;
        state.log.sync()?;
        match state.log.entries() {
            0 => Err(Error::new(Kind::Io, "the log has no entry")),
            entries => Ok(entries),
        }
    }
}

impl State {
    /// Writes how many bytes of answers were seen on the connections where there are more than the log knows.
    fn note_answers(&mut self) {
        for connection in std::mem::take(&mut self.fresh) {
            let Some(known) = self.connections.get_mut(&connection) else {
                continue;
            };
            known.is_fresh = false;
            self.log.push(&Entry::Answers {
                connection,
                total: known.answers,
                checksum: known.checksum.clone().finalize(),
                head: std::mem::take(&mut known.head),
            });
        }
    }

    /// Lets nothing pass as long as somebody wants that.
    fn hold_or_pass(&mut self, blocked: &Notify) {
        let is_held = self.sealed || self.holders > 0;
        self.sequencer.hold(is_held);
        self.wake(blocked);
    }

    /// Tells whose turn it is.
    fn wake(&self, blocked: &Notify) {
        match self.sequencer.next() {
            Some(connection) => {
                if let Some(known) = self.connections.get(&connection) {
                    known.turn.notify_one();
                }
            }
            None if self.sequencer.is_blocked() => blocked.notify_one(),
            None => {}
        }
    }
}
