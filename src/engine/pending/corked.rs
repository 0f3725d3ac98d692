//! Has a dump on this host send at once what its socket holds back.
//!
//! ```text
//! no data for 5 ms ──> who has the other end of the connection ──> a copy of its socket ──> TCP_NODELAY ──> closed
//! ```
//!
//! CRIU corks its connection to a page server (TCP_CORK of tcp(7)). Its last message, after which it waits for the answer,
//! does not fill a segment, so the kernel sends it 200 ms later, while the processes stand still. To set TCP_NODELAY on a
//! corked socket sends what waits in it, and leaves it corked. A copy of the socket would keep the connection up after
//! the dump's end, so none is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::Socket;

use super::dump_connection::DumpConnection;
use super::{Seen, is_local, proc_reader};
use crate::engine::ferry::lock;
use crate::stream::Stream;
use crate::sync::{Condvar, Mutex};
use crate::sys::owned_process::ProcessName;
use crate::sys::tcp_info::since_data;

/// A dump that sends nothing for so long may hold something back: longer than it takes it to go from one frame to the
/// next, and short against the 200 ms of the kernel.
const QUIET: Duration = Duration::from_millis(5);

/// How often in a row it is told to send: what was held back has come by then, and it is busy otherwise.
const PUSHES_MAX: u32 = 200;

/// Connections whose other ends are remembered.
const SOCKETS_MAX: usize = 64;

/// The sockets of dumps of this host.
#[derive(Default, Debug)]
pub(super) struct CorkedSockets(BTreeMap<DumpConnection, SocketPlace>);

/// Where the other end of a connection is: finding it means to look through all connections of this host.
#[derive(Clone, Debug)]
struct SocketPlace {
    process: ProcessName,
    number: i32,
    link: String,
}

impl CorkedSockets {
    /// Has the other end of `connection`, which one of the processes `holders` has, send what it holds back. Tells
    /// whether it was found.
    pub(super) fn push(
        &mut self,
        connection: DumpConnection,
        holders: impl FnOnce() -> BTreeSet<i32>,
    ) -> bool {
        let known = self.0.get(&connection).cloned();
        let Some(place) = known.or_else(|| SocketPlace::find(connection, &holders())) else {
            return false;
        };
        let pushed = place.push().is_some();
        if !pushed {
            self.0.remove(&connection);
        } else if self.0.len() < SOCKETS_MAX || self.0.contains_key(&connection) {
            self.0.insert(connection, place);
        } else {
            self.0 = BTreeMap::from([(connection, place)]);
        }
        pushed
    }
}

impl SocketPlace {
    fn find(connection: DumpConnection, holders: &BTreeSet<i32>) -> Option<SocketPlace> {
        let (pid, number, link) = connection.descriptor(holders)?;
        let process = ProcessName::of(pid).ok()?;
        Some(SocketPlace {
            process,
            number,
            link,
        })
    }

    fn push(&self) -> Option<()> {
        let Self {
            process,
            number,
            link,
        } = self;
        // The number may be another file's by now.
        let found = fs::read_link(format!("/proc/{}/fd/{number}", process.pid)).ok()?;
        if found.as_os_str() != link.as_str() {
            return None;
        }
        let socket = Socket::from(process.descriptor(*number).ok()?);
        socket.set_tcp_nodelay(true).ok()
    }
}

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
        *lock(&self.over.is_over) = true;
        self.over.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

fn watch(socket: &Socket, connection: DumpConnection, over: &Over) {
    let mut here = None;
    let (mut pushes, mut told) = (0, false);
    let mut is_over = lock(&over.is_over);
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
        is_over = lock(&over.is_over);
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_other_ends_socket_is_told_to_send() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dump = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let connection = DumpConnection::of(&Stream::plain(server)).unwrap();
        let own = || BTreeSet::from([std::process::id().cast_signed()]);
        let mut sockets = CorkedSockets::default();
        assert!(!sockets.push(connection, BTreeSet::new));
        for known in [false, true] {
            dump.set_nodelay(false).unwrap();
            assert_eq!(sockets.0.contains_key(&connection), known);
            assert!(sockets.push(connection, own));
            assert!(dump.nodelay().unwrap());
        }
        drop(dump);
        assert!(!sockets.push(connection, own));
        assert!(sockets.0.is_empty());
    }
}
