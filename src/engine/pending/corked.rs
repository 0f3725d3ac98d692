//! The sockets of dumps on this host, which are made to send what they hold back.
//!
//! CRIU corks its connection to a page server (TCP_CORK of tcp(7)). Its last message, after which it waits for the answer,
//! does not fill a segment, so the kernel sends it 200 ms later, while the processes stand still. To set TCP_NODELAY on a
//! corked socket sends what waits in it, and leaves it corked. A copy of the socket would keep the connection up after
//! the dump's end, so none is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use socket2::Socket;

use super::dump_connection::DumpConnection;
use crate::sys::owned_process::ProcessName;

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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::stream::Stream;

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
