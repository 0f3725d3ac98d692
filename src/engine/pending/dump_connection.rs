//! Which process of this host has the other end of a connection: of two trees that are stopped at one moment, and in
//! which a pid occurs, the dump's is the one that the dump's process traces.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytemuck::{Pod, Zeroable};
use procfs::ProcResult;
use procfs::net::TcpNetEntry;

use crate::stream::Stream;

/// Both addresses of a TCP connection, IPv4 in its own form.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct DumpConnection {
    own: SocketAddr,
    peer: SocketAddr,
}

/// [`DumpConnection`] as one process sends it to another of this program. Ports are 0 where there is no connection over
/// TCP.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable, Debug)]
pub(super) struct ConnectionBytes {
    own: [u8; 16],
    peer: [u8; 16],
    own_port: u16,
    peer_port: u16,
}

impl DumpConnection {
    /// That of `stream`, if it is one over TCP.
    pub(super) fn of(stream: &Stream) -> Option<DumpConnection> {
        let socket = stream.socket();
        let own = socket.local_addr().ok()?.as_socket()?;
        let peer = socket.peer_addr().ok()?.as_socket()?;
        Some(DumpConnection {
            own: canonical(own),
            peer: canonical(peer),
        })
    }

    #[cfg(test)]
    pub(super) fn between(own: SocketAddr, peer: SocketAddr) -> DumpConnection {
        DumpConnection { own, peer }
    }

    /// Which of the processes `pids` has the other end open. None if no one has: there is a relay in between, or the
    /// other end is in another network namespace.
    pub(super) fn holder(&self, pids: &BTreeSet<i32>) -> Option<i32> {
        self.descriptor(pids).map(|(pid, _, _)| pid)
    }

    /// Which of the processes `pids` has the other end open, as which descriptor, and what the link of that in
    /// /proc/PID/fd leads to.
    pub(super) fn descriptor(&self, pids: &BTreeSet<i32>) -> Option<(i32, i32, String)> {
        let inode = self.other_end()?;
        let link = format!("socket:[{inode}]");
        pids.iter().find_map(|pid| {
            let fds = fs::read_dir(format!("/proc/{pid}/fd"));
            let mut fds = fds.into_iter().flatten().flatten();
            let fd = fds.find(|fd| {
                fs::read_link(fd.path()).is_ok_and(|found| found.as_os_str() == link.as_str())
            })?;
            let number = fd.file_name().to_str()?.parse().ok()?;
            Some((*pid, number, link.clone()))
        })
    }

    /// The number of the socket at the other end, as /proc/PID/fd shows it.
    fn other_end(&self) -> Option<u64> {
        // A host may have either protocol alone.
        let tables: [fn() -> ProcResult<Vec<TcpNetEntry>>; 2] =
            [procfs::net::tcp, procfs::net::tcp6];
        let entries = tables.iter().filter_map(|table| table().ok()).flatten();
        let mut ends = entries.filter(|entry| {
            let (local, remote) = (entry.local_address, entry.remote_address);
            (canonical(local), canonical(remote)) == (self.peer, self.own)
        });
        ends.next().map(|entry| entry.inode)
    }

    pub(super) fn encode(connection: Option<DumpConnection>) -> ConnectionBytes {
        let Some(DumpConnection { own, peer }) = connection else {
            return ConnectionBytes::zeroed();
        };
        let octets = |address: SocketAddr| match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        ConnectionBytes {
            own: octets(own),
            peer: octets(peer),
            own_port: own.port(),
            peer_port: peer.port(),
        }
    }

    pub(super) fn decode(bytes: ConnectionBytes) -> Option<DumpConnection> {
        let address =
            |octets: [u8; 16], port| canonical(SocketAddr::from((Ipv6Addr::from(octets), port)));
        let known = bytes.own_port != 0 && bytes.peer_port != 0;
        known.then(|| DumpConnection {
            own: address(bytes.own, bytes.own_port),
            peer: address(bytes.peer, bytes.peer_port),
        })
    }
}

/// `address` without what a table of the kernel does not show: the form of IPv4 within IPv6, a scope.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::from((address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn who_has_the_other_end_is_found() {
        for ip in ["127.0.0.1", "::1"] {
            // A host may have no IPv6.
            let Ok(listener) = TcpListener::bind((ip, 0)) else {
                continue;
            };
            let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let connection = DumpConnection::of(&Stream::plain(accepted)).unwrap();
            let again = DumpConnection::decode(DumpConnection::encode(Some(connection)));
            assert_eq!(again, Some(connection));
            let mut unrelated = Command::new("cat")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let (own, other) = (
                std::process::id().cast_signed(),
                unrelated.id().cast_signed(),
            );
            assert_eq!(connection.holder(&BTreeSet::from([own, other])), Some(own));
            assert_eq!(connection.holder(&BTreeSet::from([other])), None);
            drop(peer);
            drop(unrelated.stdin.take());
            unrelated.wait().unwrap();
        }
    }

    #[test]
    fn a_connection_without_internet_addresses_is_none() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(DumpConnection::of(&Stream::plain(one)), None);
        assert_eq!(DumpConnection::decode(DumpConnection::encode(None)), None);
    }
}
