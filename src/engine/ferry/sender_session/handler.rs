//! What connections and those who dial them see of a sender.

use std::sync::Arc;
use std::time::Duration;

use super::{Agreed, Ending, SenderSession};
use crate::engine::ferry::conn::Frame;
use crate::engine::ferry::connection_loop::{ConnectionHandler, FrameOutcome};
use crate::engine::ferry::connection_loop::{DialingHandler, Lost};
use crate::engine::ferry::lock;
use crate::engine::ferry::wakers::Waker;
use crate::error::{self, Error};
use crate::ferry::frame::Kind;
use crate::ferry::hash::PageHasher;
use crate::ferry::hello::{Fail, FailCode, Features, Hello};
use crate::ferry::sender::{Sender, SenderEvent, Transmit};

impl ConnectionHandler for SenderSession {
    fn stream_up(&self, stream: u16, peer: &Hello, waker: &Arc<Waker>) {
        let mut memory = self.memory();
        // What is known here is the receiver's as well then, by the hashes of this side.
        if !peer.features.has(Features::KNOWN) {
            memory.use_key(peer.hash_key);
        }
        let key = memory.key();
        drop(memory);
        let mut state = lock(&self.state);
        let (sender, _) = state.talk.get_or_insert_with(|| {
            let hasher = Arc::new(PageHasher::new(key, self.page));
            let features = peer.features;
            let agreed = Agreed { hasher, features };
            (Sender::new(self.page, peer.streams, peer.window), agreed)
        });
        sender.stream_up(stream);
        state.wakers.replace(stream, waker);
        state.wakers.wake_all();
        drop(state);
        self.changed.notify_all();
    }

    fn stream_down(&self, stream: u16, waker: &Arc<Waker>) {
        let mut state = lock(&self.state);
        if !state.wakers.remove(stream, waker) {
            return;
        }
        if let Some((sender, _)) = &mut state.talk {
            sender.stream_down(stream);
        }
        // Other connections carry what this one did.
        state.wakers.wake_all();
        drop(state);
        self.notifier.notify();
    }

    fn peer_closed(&self, stream: u16, waker: &Arc<Waker>) {
        let mut state = lock(&self.state);
        if state.wakers.is_replaced(stream, waker) {
            return;
        }
        if let Some((sender, _)) = &mut state.talk {
            sender.handle_end(stream);
        }
        drop(state);
        self.notifier.notify();
    }

    fn handle(&self, stream: u16, waker: &Arc<Waker>, frame: Frame) -> FrameOutcome {
        let mut state = lock(&self.state);
        if state.wakers.is_replaced(stream, waker) && frame.kind != Kind::Fail {
            return FrameOutcome::default();
        }
        let Some((sender, _)) = &mut state.talk else {
            return FrameOutcome::default();
        };
        match sender.handle(stream, frame.kind, &frame.body) {
            Ok(SenderEvent::Acked {
                safe,
                answer,
                complete,
                bye_received,
                arrived,
                progress,
            }) => {
                state.complete |= complete;
                if bye_received && !state.bye_received {
                    state.bye_received = true;
                    state.wakers.wake_all();
                    self.notifier.notify();
                }
                if let Some(answer) = answer {
                    state.answer = Some(answer);
                }
                let released = state.release(safe);
                drop(state);
                for frame in released {
                    // Some connection may still hold it.
                    if let Ok(frame) = Arc::try_unwrap(frame) {
                        self.pool.give(frame);
                    }
                }
                self.changed.notify_all();
                FrameOutcome {
                    progress,
                    arrived: Some(arrived),
                }
            }
            Ok(SenderEvent::Hashes(hashes)) => {
                drop(state);
                let mut memory = self.memory();
                let mut learned = 0;
                for (run, hashes_of_run) in hashes.runs(self.page) {
                    memory.learn(hashes.target, run, hashes_of_run);
                    learned += hashes_of_run.len() as u64;
                }
                drop(memory);
                lock(&self.state).outbox.sent.hashes_learned += learned;
                self.changed.notify_all();
                FrameOutcome::progress(true)
            }
            Ok(SenderEvent::Failed(fail)) => {
                drop(state);
                self.lost(Lost::Refused(fail));
                FrameOutcome::default()
            }
            Err(error) => {
                drop(state);
                self.refuse(error);
                FrameOutcome::default()
            }
        }
    }

    fn poll(&self, stream: u16, waker: &Arc<Waker>, _arrived: u64) -> Option<Arc<Vec<u8>>> {
        let mut state = lock(&self.state);
        if state.wakers.is_replaced(stream, waker) {
            return None;
        }
        let (sender, _) = state.talk.as_mut()?;
        let transmit = sender.poll(stream)?;
        let last = sender.last();
        if let Transmit::Numbered(number) = transmit {
            let (frame, is_first) = state.outbox.take(number, last);
            if is_first {
                // Somebody may wait for room.
                self.changed.notify_all();
            }
            return Some(frame);
        }
        let mut frame = Vec::new();
        transmit.encode(&mut frame);
        Some(Arc::new(frame))
    }

    fn awaits_message(&self) -> bool {
        let state = lock(&self.state);
        let sender = state.talk.as_ref().map(|(sender, _)| sender);
        sender.is_some_and(Sender::awaits_message) || state.awaits_bye_confirmation()
    }

    fn heartbeat(&self, _arrived: u64) -> Option<Arc<Vec<u8>>> {
        None
    }

    fn observe_link(&self, bytes: u64, busy: Duration) {
        let connections = lock(&self.state).wakers.len();
        let connections = u32::try_from(connections).unwrap_or(1).max(1);
        self.level_control().observe_link(bytes, busy / connections);
    }

    fn is_replaced(&self, stream: u16, waker: &Arc<Waker>) -> bool {
        lock(&self.state).wakers.is_replaced(stream, waker)
    }

    fn is_over(&self) -> bool {
        let state = lock(&self.state);
        match &state.ending {
            None => false,
            Some(Ending::Lost(_)) => true,
            Some(Ending::Well | Ending::Failed) => {
                state.cut || (state.is_end_sent() && !state.awaits_bye_confirmation())
            }
        }
    }
}

impl DialingHandler for SenderSession {
    fn is_ending(&self) -> bool {
        lock(&self.state).ending.is_some()
    }

    fn is_done(&self) -> bool {
        let state = lock(&self.state);
        match &state.ending {
            None => false,
            Some(Ending::Lost(_)) => true,
            Some(Ending::Well) if state.bye_received => true,
            Some(Ending::Well | Ending::Failed) => {
                state.cut || state.refused || state.is_end_confirmed()
            }
        }
    }

    fn lost(&self, why: Lost) {
        let refused = matches!(why, Lost::Refused(_));
        let error = match why {
            Lost::Refused(fail) => {
                let kind = match fail.code {
                    FailCode::Disagreement => error::Kind::Image,
                    FailCode::Version | FailCode::Role | FailCode::PageSize => error::Kind::Usage,
                    _ => error::Kind::PeerLost,
                };
                Error::wrap(kind, "the far end has ended the session", fail)
            }
            Lost::GivenUp(text) => Error::new(error::Kind::PeerLost, text),
            Lost::Stopped => Error::new(error::Kind::Interrupted, "stopped by a signal"),
        };
        // A connection may be turned away while the others have long come to the end.
        if !self.is_ending() {
            self.memory().forget();
        }
        let mut state = lock(&self.state);
        state.refused |= refused;
        if !refused && let Some((sender, _)) = &mut state.talk {
            sender.fail(Fail::new(FailCode::Sender, error.to_string()));
        }
        self.end(state, Ending::Lost(error));
    }
}
