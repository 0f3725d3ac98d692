//! A TCP proxy between the two sides: delay, rate, and impairments.
//!
//! ```text
//!   client <--> [reader] -> queue, each piece with its due time -> [writer] <--> server
//!                  ^ impairment: cut, reset, flipped bit at a byte offset
//! ```
//!
//! Invariants: bytes keep their order; the reader never waits for the link as long as the queue has
//! room, and the queue holds more than the bandwidth-delay product; a reset of one side reaches the
//! other as a reset, and a clean end as a clean end, because CRIU takes them differently, unless the link is to hide
//! the difference.

mod pump;
mod queue;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use pump::Connection;
use socket2::{Domain, SockRef, Socket, Type};

use crate::net::NetNs;
use crate::process::run;

/// What lies between the two sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Link {
    /// Time for there and back; each direction takes half.
    pub round_trip: Duration,
    /// Bytes a second in each direction; none: as fast as the machine.
    pub bytes_per_s: Option<u64>,
    /// A reset of one side reaches the other as a clean end, as through `ssh -L` or a TCP proxy.
    pub hides_resets: bool,
}

/// Where bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the side that connected.
    ToServer,
    /// To the side that connected.
    ToClient,
}

/// How a connection is impaired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImpairmentKind {
    /// Both sides see a reset.
    Reset,
    /// Both sides see a clean end.
    End,
    /// One bit of the byte at the offset arrives flipped.
    FlipBit,
    /// Nothing more arrives, and nobody is told.
    Silence,
}

/// An impairment at an offset of one direction of every connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Impairment {
    /// Which bytes are counted.
    pub direction: Direction,
    /// Bytes that pass unharmed.
    pub after_bytes: u64,
    /// What happens then.
    pub kind: ImpairmentKind,
}

/// A running proxy; its connections are reset on drop.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    listener: TcpListener,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    upstream: Upstream,
    link: Link,
    impairment: Option<Impairment>,
    /// How many more connections are impaired.
    impaired_left: AtomicU64,
    to_server: AtomicU64,
    to_client: AtomicU64,
    /// Decides which bit of the next bytes in each direction is flipped; 0: none.
    flips: [AtomicU64; 2],
    stopping: AtomicBool,
    connections: Mutex<Vec<Arc<Connection>>>,
}

/// Where a connection goes on.
#[derive(Clone, Copy, Debug)]
enum Upstream {
    /// Always there.
    At(SocketAddr),
    /// Where it was to go before the firewall turned it here.
    Intended,
}

/// Marks what the proxy itself sends, so that the firewall does not turn it to the proxy again.
const FIREWALL_MARK: u32 = 0x7066;

impl Upstream {
    fn connect(self, client: &TcpStream) -> io::Result<TcpStream> {
        match self {
            Upstream::At(address) => TcpStream::connect(address),
            Upstream::Intended => {
                let intended = SockRef::from(client).original_dst_v4()?;
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                socket.set_mark(FIREWALL_MARK)?;
                socket.connect(&intended)?;
                Ok(socket.into())
            }
        }
    }
}

impl Shared {
    /// Flips a bit of `bytes` if one is to be flipped.
    fn flip(&self, direction: Direction, bytes: &mut [u8]) {
        let chance = self.flips[direction as usize].swap(0, Ordering::Relaxed);
        if chance == 0 {
            return;
        }
        let place = usize::try_from(chance >> 8).unwrap_or(0) % bytes.len();
        bytes[place] ^= 1 << (chance & 7);
    }

    fn counter(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    /// The impairment of the next connection, if it is impaired.
    fn next_impairment(&self) -> Option<Impairment> {
        let one_less = |left: u64| left.checked_sub(1);
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        let impaired = self
            .impaired_left
            .fetch_update(set, fetch, one_less)
            .is_ok();
        self.impairment.filter(|_| impaired)
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Proxy {
    /// Listens on a free port of loopback, and connects to `upstream` for each connection.
    ///
    /// # Errors
    /// No socket can be bound.
    pub fn start(
        upstream: SocketAddr,
        link: Link,
        impairment: Option<Impairment>,
    ) -> Result<Proxy> {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), upstream, link, impairment)
    }

    /// The same for the first `connections` connections alone.
    ///
    /// # Errors
    /// No socket can be bound.
    pub fn start_with_impaired(
        upstream: SocketAddr,
        link: Link,
        impairment: Impairment,
        connections: u64,
    ) -> Result<Proxy> {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let upstream = Upstream::At(upstream);
        Self::run(address, upstream, link, Some(impairment), connections)
    }

    /// Stands between `net` and all ports of `far`: the firewall of `net` turns connections there to the proxy. The
    /// firewall's table goes with the network.
    ///
    /// # Errors
    /// `nft` fails, or no socket can be bound.
    pub fn between(net: &NetNs, far: IpAddr, link: Link) -> Result<Proxy> {
        net.enter(|| {
            let address = (Ipv4Addr::UNSPECIFIED, 0).into();
            let proxy = Self::run(address, Upstream::Intended, link, None, 0)?;
            let port = proxy.address.port();
            let rules = format!(
                "table ip testbed {{ chain out {{ type nat hook output priority -100; \
                 ip daddr {far} tcp dport 1-65535 meta mark != {FIREWALL_MARK} redirect to :{port}; }}; }}"
            );
            run(Command::new("nft").arg(rules))?;
            Ok(proxy)
        })
    }

    /// Listens on `address`.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn start_at(
        address: SocketAddr,
        upstream: SocketAddr,
        link: Link,
        impairment: Option<Impairment>,
    ) -> Result<Proxy> {
        Self::run(address, Upstream::At(upstream), link, impairment, u64::MAX)
    }

    fn run(
        address: SocketAddr,
        upstream: Upstream,
        link: Link,
        impairment: Option<Impairment>,
        impaired: u64,
    ) -> Result<Proxy> {
        let listener = TcpListener::bind(address).context("binding the proxy")?;
        let shared = Arc::new(Shared {
            upstream,
            link,
            impairment,
            impaired_left: AtomicU64::new(impaired),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            flips: Default::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::new(Vec::new()),
        });
        let address = listener.local_addr()?;
        let (for_acceptor, accepting) = (Arc::clone(&shared), listener.try_clone()?);
        let acceptor = thread::spawn(move || accept(&accepting, &for_acceptor));
        Ok(Proxy {
            address,
            listener,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Payload bytes that have arrived so far.
    pub fn carried(&self, direction: Direction) -> u64 {
        self.shared.counter(direction).load(Ordering::Relaxed)
    }

    /// Impairs all connections that stand now, by a reset or a clean end.
    pub fn cut(&self, kind: ImpairmentKind) {
        for connection in self.shared.connections() {
            connection.end(kind);
        }
    }

    /// Flips one bit of the next bytes in a `direction`, on whichever connection. `chance` decides which bit.
    pub fn flip(&self, direction: Direction, chance: u64) {
        // 0 stands for no flip.
        self.shared.flips[direction as usize].store(chance.max(1), Ordering::Relaxed);
    }

    /// Forgets flips that have not happened.
    pub fn flip_nothing(&self) {
        for flip in &self.shared.flips {
            flip.store(0, Ordering::Relaxed);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which waits for a connection.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut pumps = Vec::new();
    for client in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            break;
        }
        let Ok(client) = client else { continue };
        match shared.upstream.connect(&client) {
            Ok(server) => pumps.extend(Connection::start(client, server, shared)),
            Err(error) => {
                if let Upstream::At(upstream) = shared.upstream {
                    eprintln!("proxy: connecting to {upstream}: {error}");
                }
                pump::reset(&client);
            }
        }
    }
    for connection in shared.connections() {
        connection.end(ImpairmentKind::Reset);
    }
    for pump in pumps {
        let _ = pump.join();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::time::Instant;

    use super::*;

    /// A server that echoes one connection, and a proxy before it.
    fn echo(
        link: Link,
        impairment: Option<Impairment>,
    ) -> (Proxy, JoinHandle<std::io::Result<u64>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap(), link, impairment).unwrap();
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            std::io::copy(&mut &stream, &mut &stream)
        });
        (proxy, server)
    }

    #[test]
    fn carries_bytes_in_order_with_delay() {
        let link = Link {
            round_trip: Duration::from_millis(20),
            bytes_per_s: Some(100 << 20),
            hides_resets: false,
        };
        let (proxy, server) = echo(link, None);
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        let sent: Vec<u8> = (0..1_000_000u32)
            .map(|n| n.to_le_bytes()[n as usize % 3])
            .collect();
        let started = Instant::now();
        let mut writer = client.try_clone().unwrap();
        let bytes = sent.clone();
        let writing = thread::spawn(move || {
            writer.write_all(&bytes)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        // Not a bound on speed: nothing may arrive before the round trip is over.
        assert!(started.elapsed() >= link.round_trip);
        assert!(got == sent);
        writing.join().unwrap().unwrap();
        assert_eq!(server.join().unwrap().unwrap(), sent.len() as u64);
        assert_eq!(proxy.carried(Direction::ToServer), sent.len() as u64);
        assert_eq!(proxy.carried(Direction::ToClient), sent.len() as u64);
    }

    #[test]
    fn resets_both_sides_at_an_offset() {
        let impairment = Impairment {
            direction: Direction::ToClient,
            after_bytes: 1000,
            kind: ImpairmentKind::Reset,
        };
        let (proxy, server) = echo(Link::default(), Some(impairment));
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(&[1; 5000]).unwrap();
        let mut got = Vec::new();
        let error = client.read_to_end(&mut got).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(got.len() <= 1000);
        assert_eq!(
            server.join().unwrap().unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }

    #[test]
    fn ends_cleanly_at_an_offset() {
        let impairment = Impairment {
            direction: Direction::ToClient,
            after_bytes: 1000,
            kind: ImpairmentKind::End,
        };
        let (proxy, server) = echo(Link::default(), Some(impairment));
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(&[1; 5000]).unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got, [1; 1000]);
        server.join().unwrap().unwrap();
    }

    #[test]
    fn hides_a_reset_if_so_told() {
        let link = Link {
            hides_resets: true,
            ..Link::default()
        };
        let (proxy, server) = echo(link, None);
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(&[1; 100_000]).unwrap();
        client.read_exact(&mut [0; 10]).unwrap();
        pump::reset(&client);
        drop(client);
        // A copy that ends without an error has seen a clean end.
        assert_eq!(server.join().unwrap().unwrap(), 100_000);
    }

    #[test]
    fn closes_every_connection_that_is_over() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let proxy = Proxy::start(address, Link::default(), None).unwrap();
        for _ in 0..500 {
            let client = TcpStream::connect(proxy.address()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            // Readers and writers of both ways end at the same moment.
            pump::reset(&client);
            drop(client);
            let error = server.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }

    #[test]
    fn flips_one_bit() {
        let impairment = Impairment {
            direction: Direction::ToServer,
            after_bytes: 4,
            kind: ImpairmentKind::FlipBit,
        };
        let (proxy, server) = echo(Link::default(), Some(impairment));
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(&[0; 8]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got, [0, 0, 0, 0, 1, 0, 0, 0]);
        server.join().unwrap().unwrap();
    }
}
