//! Ferry on real sockets: what drives the pure machines of [`crate::ferry`].
//!
//! ```text
//! sender (forward)                                    receiver (page-server)
//!
//! CRIU ─> gather ─> packer threads ─> sender_session ─┐    ┌─> receiver_session ─> applier thread ─> images
//!                    hash, judge,     numbers,        │    │   order,              check, unpack,
//!                    compress         frames          │    │   window              write
//!                                                     │    │
//!             session_dialer ─> connection loop ══════╪════╪══ connection loop <── precopy_listener
//!                    reconnects        N connections                                 admits
//! ```
//!
//! Each connection has a thread that runs `connection_loop`. What the connections of a session share is a
//! `ConnectionHandler` behind a lock that is held for moments only: bytes are hashed, compressed,
//! checked and written outside of it.

mod base;
mod batch_applier;
mod buffer_pool;
mod conn;
mod connection_loop;
mod fault_responder;
pub(super) mod packer;
pub(super) mod postcopy_client;
pub(super) mod postcopy_listener;
pub mod precopy_listener;
mod receiver_session;
pub(super) mod sender_session;
mod session_dialer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

use crate::engine::io::transport::Peer;
use crate::engine::listening::stop::Stop;
use crate::error::{Error, Kind, Result};
use crate::ferry::delta::PageMemory;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Features, Hello, Role, SessionId, VERSION, Window};
use crate::ferry::level_control::LevelControl;
use crate::ferry::link::RetryPolicy;
use crate::limits::FERRY_WINDOW_FRAMES_MAX;
use crate::observe::ferried::Sent;
use crate::observe::traffic::Traffic;
use crate::tls::Tls;
use crate::units::PageSize;
use sender_session::SenderSession;
use session_dialer::SessionDialer;

/// How much a receiver here holds that it cannot apply yet, and so how much is on its way: the product
/// of 1 Gbit/s and 200 ms.
const WINDOW: Window = Window {
    frames: FERRY_WINDOW_FRAMES_MAX,
    bytes: 24 << 20,
};

/// First and longest pause before a broken connection is made again.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// How long the far end may take to hear that the session is over.
const GOODBYE: Duration = Duration::from_secs(5);

/// Where a sender goes, and how.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// The receiver.
    pub peer: Peer,
    /// How many connections to it.
    pub streams: u16,
    /// After so long without progress the session is given up.
    pub reconnect_timeout: Duration,
    /// Memory for hashes and contents of pages that the receiver has, bytes.
    pub delta_cache_bytes: u64,
    /// Secures the connections.
    pub tls: Option<Tls>,
    /// Ends all sessions when it is pulled.
    pub stop: Stop,
    /// Counts what the sessions send.
    pub traffic: Arc<Traffic>,
}

/// What a sender learns in a session and takes along into the next one.
#[derive(Debug)]
pub(super) struct Learned {
    /// What the receiver has.
    memory: PageMemory,
    /// What compressing and carrying costs.
    level_control: LevelControl,
}

impl Learned {
    /// Nothing so far, but for what `memory` says.
    pub(super) fn new(memory: PageMemory) -> Learned {
        Learned {
            memory,
            level_control: LevelControl::new(1),
        }
    }
}

/// Runs `body` with a session to the receiver, which `body` ends with [`SenderSession::finish`] or by
/// failing. Returns its result, what was sent, and what was learned for the next session.
pub(super) fn push<T>(
    config: &SenderConfig,
    page: PageSize,
    learned: Learned,
    body: impl for<'s, 'env> FnOnce(&'s Scope<'s, 'env>, &'s SenderSession) -> Result<T>,
) -> Result<(Result<T>, Sent, Learned)> {
    let session = SessionId(random_bits()?);
    let sending = SenderSession::new(page, session, learned, Arc::clone(&config.traffic));
    let hello = Hello {
        version: VERSION,
        role: Role::Sender,
        page,
        features: Features::HASHES.with(Features::DELTA),
        session,
        stream: 0,
        streams: config.streams,
        attempt: 0,
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    };
    let retry = retry(config.reconnect_timeout);
    let dialer = SessionDialer::new(config, &sending, sending.notifier(), hello, retry);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| dialer.run(scope));
        let result = body(scope, &sending);
        match &result {
            Ok(_) => sending.finish(),
            Err(error) => sending.abort(&error.to_string()),
        }
        sending.wait_until_over(GOODBYE);
        sending.cut();
        result
    });
    let sent = sending.sent();
    drop(dialer);
    Ok((result, sent, sending.into_learned()))
}

/// The retry of an end that gives up after `give_up_after` without progress.
fn retry(give_up_after: Duration) -> RetryPolicy {
    RetryPolicy {
        pause_first: PAUSES[0],
        pause_max: PAUSES[1],
        give_up_after,
    }
}

/// The guarded value. A thread that panicked while it held the lock has not left it half-changed:
/// nothing that may panic is done to it in several steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// 128 random bits.
fn random_bits() -> Result<[u8; 16]> {
    let mut bits = [0; 16];
    let drawn = std::fs::File::open("/dev/urandom")
        .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut bits));
    drawn
        .map(|()| bits)
        .map_err(|error| Error::wrap(Kind::Io, "cannot read /dev/urandom", error))
}
