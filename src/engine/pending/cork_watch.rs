//! Has a dump on this host send at once what its socket holds back: see [`super::corked`].
//!
//! ```text
//! no data for 5 ms ──> who has the other end of the connection ──> a copy of its socket ──> TCP_NODELAY ──> closed
//! ```

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::Socket;

use super::corked::CorkedSockets;
use super::dump_connection::DumpConnection;
use super::{Seen, is_local, proc_reader};
use crate::stream::Stream;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::tcp_info::since_data;

/// A dump that sends nothing for so long may hold something back: longer than it takes it to go from one frame to the
/// next, and short against the 200 ms of the kernel.
const QUIET: Duration = Duration::from_millis(5);

/// How often in a row it is told to send: what was held back has come by then, and it is busy otherwise.
const PUSHES_MAX: u32 = 200;

/// Watches the connection of a dump as long as it lives.
#[derive(Debug)]
pub(in crate::engine) struct CorkWatch {
    over: Arc<Over>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default, Debug)]
struct Over {
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl CorkWatch {
    /// Watches the connection `stream`, if its other end is on this host and can be reached.
    pub(in crate::engine) fn start(stream: &Stream) -> Option<CorkWatch> {
        if !is_local(stream) {
            return None;
        }
        let connection = DumpConnection::of(stream)?;
        let socket = stream.socket().try_clone().ok()?;
        let over = Arc::new(Over::default());
        let ends = Arc::clone(&over);
        let thread = thread::Builder::new()
            .name("cork-watch".to_owned())
            .spawn(move || watch(&socket, connection, &ends))
            .ok()?;
        Some(CorkWatch {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for CorkWatch {
    fn drop(&mut self) {
        *self.over.lock() = true;
        self.over.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

impl Over {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watch(socket: &Socket, connection: DumpConnection, over: &Over) {
    let mut here = None;
    let (mut pushes, mut told) = (0, false);
    let mut is_over = over.lock();
    while !*is_over {
        let waited = over.changed.wait_timeout(is_over, QUIET);
        (is_over, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *is_over {
            return;
        }
        let Ok(quiet) = since_data(socket.as_fd()) else {
            return;
        };
        if quiet < QUIET {
            pushes = 0;
            continue;
        }
        if pushes == PUSHES_MAX {
            continue;
        }
        pushes += 1;
        drop(is_over);
        let pushed = push(connection, &mut here);
        is_over = over.lock();
        // A dump that has just ended has no socket any more.
        if !pushed && !*is_over {
            tracing::debug!(
                "the dump's socket cannot be reached: its last message may come 200 ms late"
            );
            return;
        }
        if pushed && !std::mem::replace(&mut told, true) {
            tracing::debug!("the dump's socket is told to send what it holds back");
        }
    }
}

/// Has the other end send, by the process that looks into /proc for this one, or by this one, which remembers in `here`.
fn push(connection: DumpConnection, here: &mut Option<CorkedSockets>) -> bool {
    match proc_reader::of_this_process() {
        Some(reader) => reader.push(connection).unwrap_or(false),
        None => here
            .get_or_insert_default()
            .push(connection, || Seen::look().tracers()),
    }
}
