//! Ends a server in order when a signal asks for it, whichever would have ended the process: no new sessions, and those that run
//! fail as if their peers had gone, which cleans up behind them.

use std::collections::HashMap;
use std::fmt;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use socket2::{SockRef, Socket};

use crate::error::{Error, Kind, Result};
use crate::sync::{AtomicBool, Mutex, MutexGuard};
use crate::sys::signals::{SignalReader, SignalSet};

/// A server's stop. Copies act on the same server.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    requested: AtomicBool,
    sockets: Mutex<Sockets>,
}

#[derive(Debug, Default)]
struct Sockets {
    open: HashMap<u64, End>,
    next: u64,
}

/// What a stop does.
#[derive(Clone)]
enum End {
    Shut(Arc<Socket>, Shutdown),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Shut(socket, how) => write!(f, "Shut({socket:?}, {how:?})"),
            End::Call(_) => f.write_str("Call"),
        }
    }
}

/// What is ended when the stop is requested, until this is dropped.
#[derive(Debug)]
pub struct Watched {
    stop: Stop,
    number: u64,
}

/// Keeps every signal that would end this process from doing so, in this thread and those that it starts. To
/// be called before any other thread is started.
pub fn block_stop_signals() -> Result<()> {
    let blocked = SignalSet::ending().and_then(SignalSet::block);
    blocked.map_err(|error| Error::wrap(Kind::Io, "cannot block signals", error))
}

impl Stop {
    /// A stop that the signals request, which [`block_stop_signals`] has blocked.
    pub fn on_signals() -> Result<Stop> {
        let stop = Stop::default();
        let requested = stop.clone();
        let signals = SignalSet::ending().and_then(SignalReader::new);
        let signals = signals
            .map_err(|error| Error::wrap(Kind::Io, "cannot make a signal descriptor", error))?;
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                // Waiting for a descriptor that is open cannot fail.
                if let Ok(signal) = signals.wait() {
                    tracing::warn!("{signal}: ending all sessions");
                    requested.request();
                }
            })
            .map_err(|error| Error::wrap(Kind::Io, "cannot start a thread", error))?;
        Ok(stop)
    }

    /// Ends everything that is watched, now and later.
    pub fn request(&self) {
        self.0.requested.store(true, Ordering::SeqCst);
        // What is called may take locks of its own.
        let ends: Vec<End> = self.sockets().open.values().cloned().collect();
        ends.iter().for_each(End::happen);
    }

    /// Whether the stop was requested.
    pub fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Shuts `socket` down when the stop is requested, at once if it was.
    pub fn watch(&self, socket: &SockRef<'_>) -> Result<Watched> {
        self.watch_for(socket, Shutdown::Both)
    }

    /// Ends reads from `socket` when the stop is requested, at once if it was. The peer is not told.
    pub fn watch_reads(&self, socket: &SockRef<'_>) -> Result<Watched> {
        self.watch_for(socket, Shutdown::Read)
    }

    fn watch_for(&self, socket: &SockRef<'_>, how: Shutdown) -> Result<Watched> {
        let copy = socket
            .try_clone()
            .map_err(|error| Error::wrap(Kind::Io, "cannot duplicate a socket", error))?;
        Ok(self.end(End::Shut(Arc::new(copy), how)))
    }

    /// Calls `callback` when the stop is requested, at once if it was: for sessions that say why they end.
    pub fn call(&self, callback: impl Fn() + Send + Sync + 'static) -> Watched {
        self.end(End::Call(Arc::new(callback)))
    }

    fn end(&self, end: End) -> Watched {
        let mut sockets = self.sockets();
        let number = sockets.next;
        sockets.next += 1;
        let late = end.clone();
        sockets.open.insert(number, end);
        drop(sockets);
        // Asked behind the insertion: a request from before it is seen here, a later one there.
        if self.is_requested() {
            late.happen();
        }
        let stop = self.clone();
        Watched { stop, number }
    }

    fn sockets(&self) -> MutexGuard<'_, Sockets> {
        // Poisoned or not, the map is whole: it is changed by single insertions and removals.
        self.0
            .sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.stop.sockets().open.remove(&self.number);
    }
}

impl End {
    fn happen(&self) {
        match self {
            End::Shut(socket, how) => {
                // A socket that its peer has closed needs no end.
                let _ = socket.shutdown(*how);
            }
            End::Call(callback) => callback(),
        }
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn watched_sockets_end_others_do_not() {
        let stop = Stop::default();
        let (watched, mut peer) = UnixStream::pair().unwrap();
        let (forgotten, mut other) = UnixStream::pair().unwrap();
        let _guard = stop.watch(&(&watched).into()).unwrap();
        drop(stop.watch(&(&forgotten).into()).unwrap());
        stop.request();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        let (late, mut late_peer) = UnixStream::pair().unwrap();
        let _late = stop.watch(&(&late).into()).unwrap();
        assert_eq!(late_peer.read(&mut [0]).unwrap(), 0);
        let called = Arc::new(AtomicBool::new(false));
        let calls = Arc::clone(&called);
        drop(stop.call(move || calls.store(true, Ordering::SeqCst)));
        assert!(called.load(Ordering::SeqCst));
        other.set_nonblocking(true).unwrap();
        let error = other.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
}
