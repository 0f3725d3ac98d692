//! Speaks to a page-server as a dump does.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Target, Wire};
use pageferry::engine::forward::KEPT;
use pageferry::error::{Error, Kind, Result};
use pageferry::units::{PageCount, PageSize, Vaddr};

use super::PageSink;

/// Most pages without contents in one frame.
const LEFT_PAGES_MAX: u64 = 1 << 16;

/// A session with a page-server.
#[derive(Debug)]
pub(crate) struct Sender {
    stream: TcpStream,
    server: SocketAddr,
    page: PageSize,
    wire: Wire,
    target: Option<Target>,
    /// Of the pages that follow.
    flags: PageFlags,
    /// Pages so far: others look at them.
    pages: Arc<AtomicU64>,
    rate: Option<Rate>,
}

/// Holds the reading to a rate.
#[derive(Debug)]
struct Rate {
    bytes_per_s: u64,
    start: Instant,
    bytes: u64,
}

impl Rate {
    /// Waits until `bytes` more are allowed.
    fn wait_for(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_micros(self.bytes.saturating_mul(1_000_000) / self.bytes_per_s);
        let ahead = due.saturating_sub(self.start.elapsed());
        if !ahead.is_zero() {
            std::thread::sleep(ahead);
        }
    }
}

impl Sender {
    pub(crate) fn connect(
        server: SocketAddr,
        page: PageSize,
        wire: Wire,
        bytes_per_s: Option<u64>,
    ) -> Result<Sender> {
        let stream = TcpStream::connect(server).map_err(|error| lost(server, error))?;
        stream
            .set_nodelay(true)
            .map_err(|error| lost(server, error))?;
        Ok(Sender {
            stream,
            server,
            page,
            wire,
            target: None,
            flags: PageFlags::PRESENT,
            pages: Arc::default(),
            rate: bytes_per_s.map(|bytes_per_s| Rate {
                bytes_per_s,
                start: Instant::now(),
                bytes: 0,
            }),
        })
    }

    /// Pages that were sent.
    pub(super) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Counts pages there from now on.
    pub(super) fn count_in(&mut self, count: Arc<AtomicU64>) {
        self.pages = count;
    }

    /// Takes note of `pages` pages at `at`, which a lazy dump still has.
    pub(crate) fn left_at(&mut self, at: Vaddr, pages: u64) -> Result<()> {
        let shift = self.page.shift();
        let mut done = 0;
        while done < pages {
            let now = (pages - done).min(LEFT_PAGES_MAX);
            let start = Vaddr(at.get() + (done << shift));
            self.send(Op::AddFlags, PageFlags::LAZY, now, start)?;
            done += now;
        }
        Ok(())
    }

    /// Takes note of `pages` pages at `at`, which are as the destination has them: their hashes are.
    pub(crate) fn kept_at(&mut self, at: Vaddr, pages: u64) -> Result<()> {
        self.send(Op::AddFlags, KEPT, pages, at)
    }

    /// Waits until everything is stored.
    pub(crate) fn close(&mut self) -> Result<()> {
        self.send(Op::Close, PageFlags::default(), 0, Vaddr(0))?;
        let mut status = [0; 4];
        self.receive(&mut status)?;
        match i32::from_le_bytes(status) {
            0 => Ok(()),
            status => {
                let text = format!(
                    "the page-server at {} stored nothing: {status}",
                    self.server
                );
                Err(Error::new(Kind::PeerLost, text))
            }
        }
    }

    fn send(&mut self, op: Op, flags: PageFlags, pages: u64, vaddr: Vaddr) -> Result<()> {
        let header = Header {
            op,
            flags,
            pages: PageCount(pages),
            vaddr,
            dst_id: self.target.map_or(0, Target::dst_id),
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let length = header.encode(self.wire, &mut bytes);
        let server = self.server;
        self.stream
            .write_all(&bytes[..length])
            .map_err(|error| lost(server, error))
    }

    fn receive(&mut self, answer: &mut [u8]) -> Result<()> {
        let server = self.server;
        self.stream
            .read_exact(answer)
            .map_err(|error| lost(server, error))
    }
}

impl PageSink for Sender {
    fn open(&mut self, target: Target) -> Result<()> {
        self.target = Some(target);
        self.send(Op::Open2, PageFlags::default(), 0, Vaddr(0))?;
        let mut has_parent = [0; 1];
        self.receive(&mut has_parent)
    }

    fn lazily(&mut self, lazily: bool) {
        self.flags = match lazily {
            true => PageFlags::PRESENT.with(PageFlags::LAZY),
            false => PageFlags::PRESENT,
        };
    }

    fn holes_at(&mut self, at: Vaddr, pages: u64) -> Result<()> {
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.send(Op::AddFlags, PageFlags::PARENT, pages, at)
    }

    fn pages_at(&mut self, at: Vaddr, bytes: &[u8]) -> Result<()> {
        if let Some(rate) = &mut self.rate {
            rate.wait_for(bytes.len() as u64);
        }
        let pages = (bytes.len() >> self.page.shift()) as u64;
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.send(Op::AddFlags, self.flags, pages, at)?;
        let server = self.server;
        self.stream
            .write_all(bytes)
            .map_err(|error| lost(server, error))
    }
}

fn lost(server: SocketAddr, error: io::Error) -> Error {
    let text = format!("the page-server at {server} is lost (its log says why)");
    Error::wrap(Kind::PeerLost, text, error)
}
