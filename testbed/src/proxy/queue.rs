//! Bytes on their way: a queue whose pieces come out at their due times.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Link;

/// What travels.
#[derive(Debug)]
pub(super) enum Piece {
    /// Payload.
    Bytes(Vec<u8>),
    /// The end of the stream.
    End,
}

/// Room of a link without a rate, bytes.
const ROOM_UNLIMITED: u64 = 64 << 20;
/// Least room of any link, bytes.
const ROOM_LEAST: u64 = 1 << 20;

/// One direction of a link.
#[derive(Debug)]
pub(super) struct Queue {
    link: Link,
    room: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<(Instant, Piece)>,
    held: u64,
    /// When the link has sent all that was given to it.
    idle_at: Option<Instant>,
    closed: bool,
}

impl Queue {
    pub(super) fn new(link: Link) -> Queue {
        let room = link.bytes_per_s.map_or(ROOM_UNLIMITED, |rate| {
            let round_trip_us = u64::try_from(link.round_trip.as_micros()).unwrap_or(u64::MAX);
            (4 * rate.saturating_mul(round_trip_us) / 1_000_000).max(ROOM_LEAST)
        });
        Queue {
            link,
            room,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Whether a reset is passed on as a clean end.
    pub(super) fn hides_resets(&self) -> bool {
        self.link.hides_resets
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a piece on its way; waits only while the queue is full. False once it is closed.
    pub(super) fn push(&self, piece: Piece) -> bool {
        let bytes = match &piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::End => 0,
        };
        let mut state = self.state();
        while state.held > self.room && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return false;
        }
        let now = Instant::now();
        let starts = state.idle_at.map_or(now, |idle| idle.max(now));
        let takes = self.link.bytes_per_s.map_or(Duration::ZERO, |rate| {
            Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.max(1))
        });
        state.idle_at = Some(starts + takes);
        state.held += bytes;
        state
            .pieces
            .push_back((starts + takes + self.link.round_trip / 2, piece));
        self.changed.notify_all();
        true
    }

    /// The next piece, at its due time; `None` once the queue is closed.
    pub(super) fn pop(&self) -> Option<Piece> {
        let due = {
            let mut state = self.state();
            loop {
                if state.closed {
                    return None;
                }
                if let Some((due, _)) = state.pieces.front() {
                    break *due;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        };
        // Only this reader takes pieces, so the first one is still the first one after the sleep.
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut state = self.state();
        let (_, piece) = state.pieces.pop_front()?;
        if let Piece::Bytes(bytes) = &piece {
            state.held -= bytes.len() as u64;
        }
        self.changed.notify_all();
        Some(piece)
    }

    /// Whether nothing passes any more.
    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Drops what is on its way and lets both ends go.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.pieces.clear();
        self.changed.notify_all();
    }
}
