//! Ferry on real sockets: drives the pure state machines of [`crate::ferry`].
//!
//! ```text
//! sender (forward)                                    receiver (page-server)
//!
//! CRIU ─> gather ─> packer threads ─> sender_session ─┐    ┌─> receiver_session ─> applier thread ─> images
//!                    hash, judge,     numbers,        │    │   order,              check, unpack,
//!                    compress         frames          │    │   window              write
//!                                                     │    │
//!             session_dialer ─> connection loop ══════╪════╪══ connection loop <── precopy_listener
//!                    reconnects        N connections                                 listener_sessions admit
//! ```
//!
//! Each connection has a thread that runs `connection_loop`. The connections of a session share a `ConnectionHandler`
//! behind a lock. Bytes are hashed, compressed, checked and written without that lock, so it is held for moments only.

pub(in crate::engine) mod base;
pub(in crate::engine) mod buffer_pool;
pub(in crate::engine) mod change_notifier;
pub(in crate::engine) mod conn;
pub(in crate::engine) mod connection_loop;
pub(in crate::engine) mod handshake;
pub(in crate::engine) mod listener_sessions;
pub(in crate::engine) mod packer;
pub(in crate::engine) mod sender_session;
pub(in crate::engine) mod wakers;

use std::sync::PoisonError;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::ferry::delta::PageMemory;
use crate::ferry::hello::Window;
use crate::ferry::level_control::LevelControl;
use crate::limits::FERRY_WINDOW_FRAMES_MAX;
use crate::sync::{Mutex, MutexGuard};

/// How much a receiver here holds that it cannot apply yet, and so how much is on its way: the product
/// of 1 Gbit/s and 200 ms.
pub(in crate::engine) const WINDOW: Window = Window {
    frames: FERRY_WINDOW_FRAMES_MAX,
    bytes: 24 << 20,
};

/// How long the far end may take to be told that the session is over.
pub(in crate::engine) const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What a sender knows from earlier sessions: the pages at the receiver, the cost of compression.
#[derive(Debug)]
pub(in crate::engine) struct SenderHistory {
    /// What the receiver has.
    memory: PageMemory,
    /// What compressing and carrying costs.
    level_control: LevelControl,
}

impl SenderHistory {
    /// What the receiver has.
    pub(in crate::engine) fn memory(&self) -> &PageMemory {
        &self.memory
    }

    /// Nothing so far, but for what `memory` says.
    pub(in crate::engine) fn new(memory: PageMemory) -> SenderHistory {
        SenderHistory {
            memory,
            level_control: LevelControl::new(1),
        }
    }
}

/// The guarded value. A thread that panicked while it held the lock has not left it half-changed:
/// nothing that may panic is done to it in several steps.
pub(in crate::engine) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// 128 random bits.
pub(in crate::engine) fn random_bits() -> Result<[u8; 16]> {
    let mut bits = [0; 16];
    let drawn = std::fs::File::open("/dev/urandom")
        .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut bits));
    drawn
        .map(|()| bits)
        .map_err(|error| Error::wrap(Kind::Io, "cannot read /dev/urandom", error))
}
