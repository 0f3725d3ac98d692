//! A forwarder between a dump and clients that speak CRIU's protocol.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/forwarding.rs"]
mod forwarding;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use common::{FIRST_PAGE, PAGE, page_content};
use forwarding::{PAGES, PID, TIMEOUT, dump, forwarder, forwarder_with};
use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::error::Kind;
use pageferry::units::{PageCount, Vaddr};
use socket2::{Domain, Socket, Type};

struct Client(TcpStream);

impl Client {
    /// From another address of this host.
    fn connect_from(host: &str, address: SocketAddr) -> Client {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let own = SocketAddr::new(host.parse().unwrap(), 0);
        socket.bind(&own.into()).unwrap();
        socket.connect(&address.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Client(stream)
    }

    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
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
    let (address, forwarder) = forwarder(here.path(), port, TIMEOUT);
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
    let (address, forwarder) = forwarder_with(here.path(), port, TIMEOUT, impatient);
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
        // Ended once the forwarder's time limit is over: those two have been silent for longer.
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
    // The dump saw no CLOSE, but the words of one who gives up, or the reset.
    let kind = dump.join().unwrap().unwrap_err().kind();
    assert!(matches!(kind, Kind::Protocol | Kind::PeerLost), "{kind:?}");
}

/// Passes all on to the dump at `port` but CLOSE: then it hangs up.
fn deaf_to_the_end(port: u16) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own_port = listener.local_addr().unwrap().port();
    let relay = thread::spawn(move || {
        let (mut forwarder, _) = listener.accept().unwrap();
        let mut dump = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut answers, mut back) = (dump.try_clone().unwrap(), forwarder.try_clone().unwrap());
        let answering = thread::spawn(move || std::io::copy(&mut answers, &mut back));
        let mut request = [0; HEADER_BYTES_MAX];
        let request = &mut request[..Wire::V2.header_bytes()];
        loop {
            forwarder.read_exact(request).unwrap();
            let op = Header::decode(Wire::V2, request).unwrap().op;
            if matches!(op, Op::Close | Op::ForceClose) {
                break;
            }
            dump.write_all(request).unwrap();
        }
        dump.shutdown(Shutdown::Both).unwrap();
        forwarder.shutdown(Shutdown::Both).unwrap();
        drop(answering.join().unwrap());
    });
    (own_port, relay)
}

#[test]
fn a_client_does_not_hear_of_an_end_that_the_dump_has_not_heard_of() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (port, relay) = deaf_to_the_end(port);
    let (address, forwarder) = forwarder(here.path(), port, TIMEOUT);
    let mut client = Client::connect(address);
    let mut page = 0;
    while page < PAGES {
        page += client.fetch(FIRST_PAGE + page, PAGES - page);
    }
    client.send(Op::Close, 0, 0);
    let mut answer = Vec::new();
    // The connection ends or is reset, whichever of two threads is first.
    let _ = client.0.read_to_end(&mut answer);
    assert!(answer.is_empty(), "{answer:?}");
    let error = forwarder.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("may run on as well"), "{error}");
    relay.join().unwrap();
    dump.join().unwrap().unwrap_err();
}
