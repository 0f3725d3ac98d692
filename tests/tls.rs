//! Both engines of a page server over TLS.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::{FIRST_PAGE, Images, PAGE, Run, TARGET, naive_memory, page_content, tls_args};
use dump_bytes::{bytes_of, dump};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::criu::serve::CLOSE_STATUS;
use pageferry::engine::io::Io;
use pageferry::engine::io::transport::{SecureTransport, Transport};
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::engine::receive::{ReceiveContext, receive_client};
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::error::Result;
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::stream::Stream;
use pageferry::tls::{Tls, TlsStream};
use pageferry::units::{PageCount, Vaddr};
use testbed::pki::{Authority, Credentials, Host};

fn tls(credentials: &Credentials) -> Tls {
    Tls::load(&tls_args(credentials)).unwrap().unwrap()
}

/// Runs `server` and `client` at the two ends of a TLS connection.
fn between<S: Send, C>(
    tls: &Tls,
    server: impl FnOnce(Stream) -> S + Send,
    client: impl FnOnce(TlsStream) -> C,
) -> (S, C) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        let served = scope.spawn(|| server(Stream::plain(accepted).secure(Some(tls)).unwrap()));
        let asked = client(tls.connect(socket.into(), "127.0.0.1").unwrap());
        (served.join().unwrap(), asked)
    })
}

fn get(page: u64, pages: u64) -> Vec<u8> {
    let header = Header {
        op: Op::Get,
        flags: PageFlags::default(),
        pages: PageCount(pages),
        vaddr: Vaddr(page << PAGE.shift()),
        dst_id: 7,
    };
    bytes_of(&header, Wire::V2)
}

fn contents(memory: &BTreeMap<u64, Option<u32>>, page: u64, pages: u64) -> Vec<u8> {
    let seeds = (page..page + pages).map_while(|page| memory.get(&page).copied().flatten());
    seeds.flat_map(page_content).collect()
}

#[test]
fn pages_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = tls(&authority.issue(&Host::LOOPBACK).unwrap());
    let runs = vec![Run::present(FIRST_PAGE, 600, PageFlags::LAZY, 1)];
    let memory = naive_memory(std::slice::from_ref(&runs));
    let images = Images::of(&[runs], Wire::V2);
    let context = ServeContext::new(ImageDir::open(&images.dirs[0], PAGE).unwrap(), None);
    let serve = |stream| serve_client(stream, &context);
    let (served, ()) = between(&tls, serve, |mut client| {
        let wanted = [(0, 1), (7, 512), (300, 16), (590, 100), (599, 1)];
        let wanted = wanted.map(|(page, pages)| (FIRST_PAGE + page, pages));
        let requests: Vec<u8> = wanted
            .iter()
            .flat_map(|(page, pages)| get(*page, *pages))
            .collect();
        client.write_all(&requests).unwrap();
        client.flush().unwrap();
        for (page, pages) in wanted {
            let mut header = [0; HEADER_BYTES_MAX];
            client.read_exact(&mut header).unwrap();
            let header = Header::decode(Wire::V2, &header).unwrap();
            let expected = contents(&memory, page, pages);
            assert_eq!(
                header.pages.get() as usize * PAGE.as_usize(),
                expected.len()
            );
            let mut content = vec![0; expected.len()];
            client.read_exact(&mut content).unwrap();
            assert!(content == expected, "page {page:#x}");
        }
        let close = Header {
            op: Op::Close,
            ..Header::decode(Wire::V2, &get(0, 0)).unwrap()
        };
        client.write_all(&bytes_of(&close, Wire::V2)).unwrap();
        client.flush().unwrap();
        let mut status = [1; 4];
        client.read_exact(&mut status).unwrap();
        assert_eq!(status, CLOSE_STATUS);
        client.close().unwrap();
        assert_eq!(client.read(&mut status).unwrap(), 0);
    });
    assert_eq!(served.unwrap().requests, 5);
}

fn receive(dir: &Path, stream: Stream, idle_timeout: Option<Duration>) -> Result<()> {
    let options = StoreOptions::new(dir, PAGE);
    let context = ReceiveContext {
        idle_timeout,
        ..ReceiveContext::new(Stores::open(options, None)?, Io::Epoll)
    };
    receive_client(stream, &context).1
}

#[test]
fn a_dump_is_received() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = tls(&authority.issue(&Host::LOOPBACK).unwrap());
    let images = dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let runs = vec![
        Run::present(FIRST_PAGE, 700, PageFlags::LAZY, 1),
        Run::present(FIRST_PAGE + 900, 3, PageFlags::default(), 1),
    ];
    let memory = naive_memory(std::slice::from_ref(&runs));
    let bytes = dump(&[(TARGET, runs)], Wire::V2);
    let (received, answers) = between(
        &tls,
        |stream| receive(&images, stream, None),
        |mut client| {
            for piece in bytes.chunks(50_000) {
                client.write_all(piece).unwrap();
            }
            client.flush().unwrap();
            // OPEN2 is answered by a byte, CLOSE by its status.
            let mut answers = [1; 5];
            client.read_exact(&mut answers).unwrap();
            client.close().unwrap();
            answers
        },
    );
    received.unwrap();
    assert_eq!(answers, [0; 5]);
    let dir = ImageDir::open(&images, PAGE).unwrap();
    let chain = Chain::open(&dir, TARGET, Missing::Refuse).unwrap();
    for extent in chain.extents() {
        let mut content = vec![0; extent.range.bytes() as usize];
        chain.read(extent.place, &mut content).unwrap();
        let page = extent.range.start().get() >> PAGE.shift();
        let pages = extent.range.pages(PAGE).get();
        assert!(content == contents(&memory, page, pages));
    }
}

#[test]
fn a_dump_that_stops_leaves_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = tls(&authority.issue(&Host::LOOPBACK).unwrap());
    let runs = vec![Run::present(FIRST_PAGE, 700, PageFlags::LAZY, 1)];
    let bytes = dump(&[(TARGET, runs)], Wire::V2);
    for hangs_up in [true, false] {
        let images = tempfile::tempdir().unwrap();
        let timeout = (!hangs_up).then_some(Duration::from_millis(200));
        let (received, ()) = between(
            &tls,
            |stream| receive(images.path(), stream, timeout),
            |mut client| {
                client.write_all(&bytes[..bytes.len() / 2]).unwrap();
                client.flush().unwrap();
                if !hangs_up {
                    // Until the server has had enough.
                    let _ = client.read_to_end(&mut Vec::new());
                }
            },
        );
        let error = received.unwrap_err().to_string();
        assert_eq!(error.contains("--idle-timeout"), !hangs_up, "{error}");
        assert!(ImageDir::open(images.path(), PAGE).is_err());
    }
}

/// Waits until the transport can be read or written.
fn wait(transport: &SecureTransport, events: PollFlags) {
    let mut socket = [PollFd::new(transport.socket(), events)];
    assert_eq!(poll(&mut socket, PollTimeout::from(60_000_u16)).unwrap(), 1);
}

#[test]
fn an_event_loop_uses_a_secured_connection_from_before_its_handshake() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = tls(&authority.issue(&Host::LOOPBACK).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let stream = tls.begin(socket.into(), "127.0.0.1").unwrap();
    let mut client = SecureTransport::new(stream).unwrap();
    // More than sockets hold, so that each side must wait for the other.
    let sent: Vec<u8> = (0..=250).cycle().take(12 << 20).collect();
    let early = client.send(&sent[..100]).unwrap();
    assert_eq!(early, 100);
    let got = thread::scope(|scope| {
        scope.spawn(|| {
            let (accepted, _) = listener.accept().unwrap();
            let mut server = Stream::plain(accepted).secure(Some(&tls)).unwrap();
            for bytes in [early, sent.len() - early] {
                let mut all = vec![0; bytes];
                server.read_exact(&mut all).unwrap();
                server.write_all(&all).unwrap();
                server.flush().unwrap();
            }
            server.end().unwrap();
        });
        let (mut rest, mut got) = (&sent[early..], Vec::<u8>::new());
        let mut buffer = vec![0; 100_000];
        loop {
            while !rest.is_empty() && !got.is_empty() {
                match client.send(rest) {
                    Ok(bytes) => rest = &rest[bytes..],
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::WouldBlock);
                        break;
                    }
                }
            }
            match client.receive(&mut buffer) {
                Ok(0) => return got,
                Ok(bytes) => got.extend_from_slice(&buffer[..bytes]),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    assert!(!client.has_buffered());
                    let both = PollFlags::POLLIN | PollFlags::POLLOUT;
                    let writes = !rest.is_empty() && !got.is_empty();
                    wait(&client, if writes { both } else { PollFlags::POLLIN });
                }
            }
        }
    });
    assert!(got == sent);
}
