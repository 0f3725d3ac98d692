//! A server over images in threads of this process, and clients that speak to it byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::engine::listening::sessions::{EndPolicy, Rules, run_sessions};
use pageferry::engine::listening::stop::Stop;
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::error::Result;
use pageferry::image::dir::ImageDir;
use pageferry::limits::CLIENTS_MAX;
use pageferry::units::{PageCount, Vaddr};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::common::PAGE;

pub(crate) const PID: u64 = 7;
/// Longer than any of these tests lasts on a busy machine: an answer that never comes fails here.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// Short, so that the tests that wait for it do not take long.
pub(crate) const PATIENCE_OF_SERVER: Duration = Duration::from_millis(50);

pub(crate) fn loopback() -> Socket {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    listener.bind(&any.into()).unwrap();
    listener
}

/// A server over some images, in threads of this process.
pub(crate) struct Server {
    pub(crate) listener: Socket,
    pub(crate) thread: Option<thread::JoinHandle<Result<()>>>,
}

impl Server {
    pub(crate) fn start(dir: &Path, keep: bool) -> Server {
        Server::run(loopback(), dir, keep, None)
    }

    /// A server that waits for silent clients no longer than [`PATIENCE_OF_SERVER`].
    pub(crate) fn start_impatient(dir: &Path, keep: bool) -> Server {
        Server::run(loopback(), dir, keep, Some(PATIENCE_OF_SERVER))
    }

    pub(crate) fn start_unix(dir: &Path, path: &Path) -> Server {
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(path).unwrap()).unwrap();
        Server::run(listener, dir, false, None)
    }

    pub(crate) fn run(
        listener: Socket,
        dir: &Path,
        keep: bool,
        idle_timeout: Option<Duration>,
    ) -> Server {
        let context = ServeContext::new(ImageDir::open(dir, PAGE).unwrap(), None);
        Server::run_with(listener, keep, context.ending_idle(idle_timeout))
    }

    /// A server for one client that tries failing reads again for `local_timeout`.
    pub(crate) fn start_reading_again(dir: &Path, local_timeout: Duration) -> Server {
        let context = ServeContext::new(ImageDir::open(dir, PAGE).unwrap(), None);
        Server::run_with(loopback(), false, context.reading_again(local_timeout))
    }

    pub(crate) fn run_with(listener: Socket, keep: bool, context: ServeContext) -> Server {
        listener.listen(16).unwrap();
        let accepting = listener.try_clone().unwrap();
        let thread = thread::spawn(move || {
            let rules = Rules {
                ends: if keep {
                    EndPolicy::Keep
                } else {
                    EndPolicy::Together
                },
                most: CLIENTS_MAX,
                allowed: Vec::new(),
            };
            run_sessions(&accepting, &rules, &Stop::default(), |stream, _watched| {
                serve_client(stream, &context).map(|_| ())
            })
        });
        Server {
            listener,
            thread: Some(thread),
        }
    }

    pub(crate) fn connect(&self) -> Client<TcpStream> {
        self.connect_from("127.0.0.1")
    }

    /// Connects from a host, which on loopback is any address of 127.0.0.0/8.
    pub(crate) fn connect_from(&self, host: &str) -> Client<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let own = SocketAddr::new(host.parse().unwrap(), 0);
        socket.bind(&own.into()).unwrap();
        socket
            .connect(&self.listener.local_addr().unwrap())
            .unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client {
            stream,
            wire: Wire::V2,
        }
    }

    /// What the server ended with.
    pub(crate) fn outcome(mut self) -> Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.listener.shutdown(Shutdown::Both);
    }
}

pub(crate) struct Client<S> {
    pub(crate) stream: S,
    pub(crate) wire: Wire,
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn request(&self, op: Op, pages: u64, page: u64, dst_id: u64) -> Vec<u8> {
        let header = Header {
            op,
            flags: PageFlags::default(),
            pages: PageCount(pages),
            vaddr: Vaddr(page << PAGE.shift()),
            dst_id,
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let len = header.encode(self.wire, &mut bytes);
        bytes[..len].to_vec()
    }

    pub(crate) fn send(&mut self, op: Op, pages: u64, page: u64, dst_id: u64) {
        let request = self.request(op, pages, page, dst_id);
        self.stream.write_all(&request).unwrap();
    }

    pub(crate) fn get(&mut self, page: u64, pages: u64) {
        self.send(Op::Get, pages, page, PID);
    }

    /// The next answer: first page number and content.
    pub(crate) fn answer(&mut self) -> (u64, Vec<u8>) {
        let mut bytes = [0; HEADER_BYTES_MAX];
        self.stream
            .read_exact(&mut bytes[..self.wire.header_bytes()])
            .unwrap();
        let header = Header::decode(self.wire, &bytes).unwrap();
        assert_eq!(
            (header.op, header.flags),
            (Op::AddFlags, PageFlags::PRESENT)
        );
        assert_eq!(header.dst_id, PID);
        let mut content = vec![0; (header.pages.get() << PAGE.shift()) as usize];
        self.stream.read_exact(&mut content).unwrap();
        (header.vaddr.get() >> PAGE.shift(), content)
    }

    /// Says CLOSE, hears that all is well, and leaves.
    pub(crate) fn close(mut self) {
        self.say(Op::Close);
    }

    /// Says that all is over, and hears that all is well.
    pub(crate) fn say(&mut self, close: Op) {
        self.send(close, 0, 0, 0);
        let mut status = [1; 4];
        self.stream.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
    }

    /// The next answer, which may be of no page.
    pub(crate) fn answer_of_any_length(&mut self) -> (Header, Vec<u8>) {
        let mut bytes = [0; HEADER_BYTES_MAX];
        self.stream
            .read_exact(&mut bytes[..self.wire.header_bytes()])
            .unwrap();
        let header = Header::decode(self.wire, &bytes).unwrap();
        let mut content = vec![0; (header.pages.get() << PAGE.shift()) as usize];
        self.stream.read_exact(&mut content).unwrap();
        (header, content)
    }

    /// Waits for the connection to be reset, whatever comes before.
    pub(crate) fn expect_cut_off(mut self) {
        let mut came = vec![0; 1 << 20];
        let error = loop {
            match self.stream.read(&mut came) {
                Ok(bytes) => assert!(bytes > 0, "an orderly end"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    /// Waits for the connection to be reset and not just ended.
    pub(crate) fn expect_reset(mut self) {
        let error = self.stream.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}
