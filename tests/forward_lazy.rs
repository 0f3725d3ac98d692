//! A forwarder between a dump, played by a page server on images, and clients, over loopback.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{FIRST_PAGE, PAGE, Run, TARGET, page_content, write_target};
use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::engine::forward_lazy::{ForwardLazy, ForwardLazyConfig};
use pageferry::engine::listen::{Place, Source};
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::engine::sessions::{Rules, Stay, run_sessions};
use pageferry::engine::stop::Stop;
use pageferry::engine::transport::Peer;
use pageferry::error::{Kind, Result};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::proto::PstreeEntry;
use pageferry::limits::CLIENTS_MAX;
use pageferry::units::{PageCount, Vaddr};
use socket2::{Domain, Socket, Type};

const PID: u32 = 7;
/// Longer than any of these tests lasts on a busy machine: an answer that never comes fails here.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: u64 = 3000;

fn loopback() -> Source {
    let address = Some("127.0.0.1".to_owned());
    Source::open(&Place::Tcp { address, port: 0 }).unwrap()
}

fn write_pstree(dir: &Path) {
    let file = File::create(dir.join("pstree.img")).unwrap();
    let mut writer = MessageWriter::new(file, Magic::Pstree).unwrap();
    writer.write(&PstreeEntry { pid: PID, ppid: 0 }).unwrap();
}

/// A dump that keeps its pages for one client: what its session ended with.
fn dump(dir: &Path) -> (u16, thread::JoinHandle<Result<()>>) {
    let seeded = Run::present(FIRST_PAGE, PAGES, PageFlags::LAZY, 1);
    write_target(dir, TARGET, Wire::V2, 1, &[seeded]);
    let context = ServeContext::new(ImageDir::open(dir, PAGE).unwrap(), Some(Wire::V2));
    let source = loopback();
    let port = source.port().unwrap();
    let thread = thread::spawn(move || {
        let rules = Rules {
            stay: Stay::One,
            most: 1,
            allowed: Vec::new(),
        };
        run_sessions(&source.socket, &rules, &Stop::default(), |stream| {
            serve_client(stream, &context).map(drop)
        })
    });
    (port, thread)
}

/// Starts a forwarder of the dump at `port`; gives where it listens and what it ends with.
fn forwarder(
    dir: &Path,
    port: u16,
    reconnect_timeout: Duration,
) -> (SocketAddr, thread::JoinHandle<Result<()>>) {
    forwarder_with(dir, port, reconnect_timeout, None)
}

/// The same with an `idle_timeout`.
fn forwarder_with(
    dir: &Path,
    port: u16,
    reconnect_timeout: Duration,
    idle_timeout: Option<Duration>,
) -> (SocketAddr, thread::JoinHandle<Result<()>>) {
    write_pstree(dir);
    let lazy = Run::absent(FIRST_PAGE, PAGES, PageFlags::LAZY);
    write_target(dir, TARGET, Wire::V2, 1, &[lazy]);
    let config = ForwardLazyConfig {
        dump: Peer::Tcp {
            host: "127.0.0.1".to_owned(),
            port,
        },
        spill: None,
        wire: Some(Wire::V2),
        keep: false,
        reconnect_timeout,
        idle_timeout,
        traffic: Arc::default(),
    };
    let images = ImageDir::open(dir, PAGE).unwrap();
    let forward = ForwardLazy::connect(config, &images).unwrap();
    let source = loopback();
    let address = source.socket.local_addr().unwrap().as_socket().unwrap();
    let thread = thread::spawn(move || {
        let rules = Rules {
            stay: Stay::UntilShutDown,
            most: CLIENTS_MAX,
            allowed: Vec::new(),
        };
        forward.run(&source, &rules, &Stop::default(), Ok, |_| {})
    });
    (address, thread)
}

struct Client(TcpStream);

impl Client {
    /// From another address of this host.
    fn connect_from(host: &str, address: SocketAddr) -> Client {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let own = SocketAddr::new(host.parse().unwrap(), 0);
        socket.bind(&own.into()).unwrap();
        socket.connect(&address.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(stream)
    }

    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(stream)
    }

    fn send(&mut self, op: Op, page: u64, pages: u64) {
        let header = Header {
            op,
            flags: PageFlags::default(),
            pages: PageCount(pages),
            vaddr: Vaddr(page << PAGE.shift()),
            dst_id: u64::from(PID),
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let len = header.encode(Wire::V2, &mut bytes);
        self.0.write_all(&bytes[..len]).unwrap();
    }

    /// Fetches the pages from `page` on and compares them; returns how many came.
    fn fetch(&mut self, page: u64, pages: u64) -> u64 {
        self.send(Op::Get, page, pages);
        let mut bytes = [0; HEADER_BYTES_MAX];
        self.0
            .read_exact(&mut bytes[..Wire::V2.header_bytes()])
            .unwrap();
        let header = Header::decode(Wire::V2, &bytes).unwrap();
        let came = header.pages.get();
        assert!((1..=pages).contains(&came), "{came} of {pages} pages");
        let mut content = vec![0; PAGE.as_usize()];
        for n in 0..came {
            self.0.read_exact(&mut content).unwrap();
            let seed = (1 + page - FIRST_PAGE + n) as u32;
            assert!(content == page_content(seed), "page {} is wrong", page + n);
        }
        came
    }

    fn expect_reset(mut self) {
        let error = self.0.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    fn close(mut self) {
        self.send(Op::Close, 0, 0);
        let mut status = [1; 4];
        self.0.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
    }
}

#[test]
fn many_clients_read_a_dump_while_it_is_drained() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, PATIENCE);
    let mut clients: Vec<Client> = (0..3).map(|_| Client::connect(address)).collect();
    thread::scope(|scope| {
        for (n, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || match n {
                // From the back, a page at a time, as faults come.
                0 => (0..PAGES).rev().for_each(|page| {
                    client.fetch(FIRST_PAGE + page, 1);
                }),
                // In large requests, which get short answers while pages are missing.
                _ => {
                    let mut page = 0;
                    while page < PAGES {
                        page += client.fetch(FIRST_PAGE + page, PAGES - page);
                    }
                }
            });
        }
    });
    clients.into_iter().for_each(Client::close);
    forwarder.join().unwrap().unwrap();
    dump.join().unwrap().unwrap();
}

#[test]
fn clients_that_never_ask_are_ended_but_a_restore_may_be_idle() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let impatient = Some(Duration::from_millis(200));
    let (address, forwarder) = forwarder_with(here.path(), port, PATIENCE, impatient);
    // Nobody has asked for a page yet. The second stops within its first request.
    Client::connect(address).expect_reset();
    let mut client = Client::connect(address);
    client.0.write_all(&[7, 0, 0, 0, 0, 0]).unwrap();
    client.expect_reset();

    let mut client = Client::connect(address);
    client.fetch(FIRST_PAGE, 1);
    // The connection for faults of the same host need not be used as long as the other is.
    let mut for_faults = Client::connect(address);
    for _ in 0..3 {
        // Ended once the forwarder's patience is over: those two have been silent for longer.
        Client::connect_from("127.0.0.2", address).expect_reset();
    }
    for client in [&mut for_faults, &mut client] {
        client.fetch(FIRST_PAGE + 1, 1);
    }
    client.close();
    drop(for_faults);
    forwarder.join().unwrap().unwrap();
    dump.join().unwrap().unwrap();
}

#[test]
fn a_client_that_does_not_come_back_leaves_the_dump_to_its_processes() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, Duration::ZERO);
    let mut client = Client::connect(address);
    client.fetch(FIRST_PAGE, 1);
    drop(client);
    let error = forwarder.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("--reconnect-timeout"), "{error}");
    // The dump saw no CLOSE.
    assert_eq!(dump.join().unwrap().unwrap_err().kind(), Kind::PeerLost);
}
