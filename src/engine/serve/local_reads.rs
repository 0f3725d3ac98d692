//! Reads of images that fail while a client waits: they are tried again, and never taken for the client's fault.
//!
//! ```text
//! a read fails -> again, for --local-timeout, as long as the client stays  -> it succeeds: the answer goes on
//!              -> the session ends; from then on, for a while, answers are read before they are begun, so
//!                 that they are short or say that a page cannot be had
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::memory::Memory;
use crate::error::{Error, Kind, Result};
use crate::stream::Stream;
use crate::sync::{Mutex, MutexGuard};

/// The first pause before a read is tried again; each one after it is twice as long.
const PAUSE: Duration = Duration::from_millis(10);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// How long answers are read before they are begun after a read has failed for good.
const READ_FIRST: Duration = Duration::from_secs(60);

/// How a server bears failed reads; shared by its sessions.
#[derive(Debug)]
pub(super) struct LocalReads {
    /// How long a read is tried again.
    pub(super) timeout: Duration,
    start: Instant,
    /// Until when answers are read before they are begun, ms since `start`.
    read_first_until_ms: AtomicU64,
    /// Memories that could not be read: opened anew they would lack what is cut off now.
    kept: Mutex<Vec<Arc<dyn Memory>>>,
}

impl LocalReads {
    pub(super) fn new(timeout: Duration) -> LocalReads {
        LocalReads {
            timeout,
            start: Instant::now(),
            read_first_until_ms: AtomicU64::new(0),
            kept: Mutex::default(),
        }
    }

    pub(super) fn reads_first(&self) -> bool {
        self.now_ms() < self.read_first_until_ms.load(Ordering::Relaxed)
    }

    /// Keeps `memory` open for whoever comes back.
    pub(super) fn keep(&self, memory: &Arc<dyn Memory>) {
        let mut kept = self.kept();
        if self.reads_first() && !kept.iter().any(|one| Arc::ptr_eq(one, memory)) {
            kept.push(Arc::clone(memory));
        }
    }

    /// A client has got what it needs.
    pub(super) fn drop_kept(&self) {
        self.kept().clear();
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Arc<dyn Memory>>> {
        // Poisoned or not, the list is whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn read_first(&self) {
        let read_first_ms = u64::try_from(READ_FIRST.as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.now_ms().saturating_add(read_first_ms);
        self.read_first_until_ms.store(until_ms, Ordering::Relaxed);
    }
}

/// How often one place was tried.
#[derive(Debug, Default)]
pub(super) struct Tries {
    since: Option<Instant>,
    pause: Duration,
}

impl Tries {
    /// Waits until it may be tried again.
    ///
    /// # Errors
    ///
    /// It was tried for long enough, the error will not pass, or the client has gone meanwhile.
    pub(super) fn wait_and_retry(
        &mut self,
        error: Error,
        reads: &LocalReads,
        stream: &Stream,
    ) -> Result<()> {
        if error.kind() != Kind::Io && error.kind() != Kind::Image {
            return Err(error);
        }
        let passes = error.kind() == Kind::Io;
        let tried = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        if !passes || tried >= reads.timeout {
            reads.read_first();
            let text = format!(
                "its pages cannot be read here, tried for {} s",
                tried.as_secs()
            );
            return Err(Error::wrap(Kind::Io, text, error));
        }
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.pause = PAUSE;
            tracing::warn!(
                "client {}: {error}; trying again for {} s",
                stream.peer(),
                reads.timeout.as_secs()
            );
        }
        let pause = self.pause.min(reads.timeout - tried);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        if has_gone_within(stream, pause) {
            let text = "it went away while a page was tried to be read";
            return Err(Error::wrap(Kind::PeerLost, text, error));
        }
        Ok(())
    }
}

/// Waits for `pause`, or until the client goes away.
fn has_gone_within(stream: &Stream, pause: Duration) -> bool {
    let socket = stream.socket();
    let mut ends = [PollFd::new(
        socket.as_fd(),
        PollFlags::from_bits_retain(libc::POLLRDHUP),
    )];
    let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX);
    poll(&mut ends, timeout).is_ok_and(|ended| ended > 0)
}

/// The error of the file if `error` of a transfer from `offset` of it is its own, and not the connection's.
pub(super) fn error_of_file(
    file: &File,
    path: &Path,
    offset: u64,
    error: &io::Error,
) -> Option<Error> {
    let failed = |error| Some(Error::file(&format!("read at {offset} from"), path, error));
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return failed(io::ErrorKind::UnexpectedEof.into());
    }
    if error.kind() == io::ErrorKind::WouldBlock {
        return None;
    }
    match file.read_exact_at(&mut [0], offset) {
        Ok(()) => None,
        Err(error) => failed(error),
    }
}
