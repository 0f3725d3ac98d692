//! A run of a server that serves a warm image, and the clients that ask it.
//!
//! ```text
//!   client --GETs, DEPTH_BYTES ahead--> server        many requests on the way, or one
//!          <--------answers------------
//! ```
//!
//! Clients ask in random order, each page of their share once, and check the first word of each.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pageferry::criu::fetch::{Fetcher, Step};
use pageferry::criu::header::{Target, Wire};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::units::{PageRange, PageSize, Vaddr};
use testbed::daemons::PageServer;
use testbed::load::Load;
use testbed::load::content::mix;
use testbed::migration::Dump;
use testbed::test_dir::TestDir;

use super::case::{Contender, Link, RequestPattern};
use super::connection::Connection;
use super::run::{Bench, Run, TIMEOUT};

/// Bytes of pages asked for ahead by all clients together. As many as a wide link would need.
const DEPTH_BYTES: u64 = 8 << 20;

/// Most requests ahead of one client: further ones do not fit into its socket.
const DEPTH_MAX: u64 = 512;

/// Round trips of one run.
const ROUND_TRIPS: u64 = 20_000;

/// Room for what a client has received and not looked at, bytes: a megabyte is as fast as more.
const BUFFER_BYTES: usize = 1 << 20;

/// An image to serve.
pub(super) struct Image {
    dir: PathBuf,
    pid: u32,
    /// What clients may ask for.
    memory: PageRange,
    /// The first word of each page.
    words: Vec<u64>,
}

impl Image {
    /// Gives its memory back.
    pub(super) fn forget(self) -> Result<()> {
        Ok(std::fs::remove_dir_all(self.dir)?)
    }
}

impl Bench<'_> {
    /// Dumps a process of `mib` MiB into files in memory.
    pub(super) fn image(&self, mib: u32) -> Result<Image> {
        let test_dir = TestDir::new_in(self.path("").as_path())?;
        let mut load = Load::start(self.load(&test_dir, mib), None)?;
        let dir = self.path("image");
        Dump::new(self.criu, load.pid(), &dir).run()?;
        load.wait_until_gone()?;
        let images = ImageDir::open(&dir, self.page)?;
        let pid = *images.processes()?.first().context("a dump of nobody")?;
        let chain = Chain::open(&images, Target::Process(pid), Missing::Refuse)?;
        let lazy = chain.extents().iter().filter(|extent| extent.lazy);
        let largest = lazy.max_by_key(|extent| extent.range.bytes());
        let memory = largest.context("no memory that is served")?.range;
        let mut page = vec![0; self.page.as_usize()];
        let mut words = Vec::new();
        for at in (memory.start().get()..memory.end().get()).step_by(self.page.as_usize()) {
            let found = chain.find(Vaddr(at)).context("a page of an extent")?;
            chain.read(found.place, &mut page)?;
            words.push(first_word(&page));
        }
        Ok(Image {
            dir,
            pid,
            memory,
            words,
        })
    }

    /// Lets a contender serve `image`.
    ///
    /// # Errors
    /// The server fails, or sends something wrong.
    pub(super) fn serve(
        &self,
        image: &Image,
        pattern: RequestPattern,
        link: Link,
        who: Contender,
    ) -> Result<Run> {
        let options = self.options(&image.dir, link);
        let mut server = PageServer::serving(self.make(who), &options)?;
        let cpu = server.process().cpu()?;
        // Connected before the clock starts: handshakes are not what is measured.
        let connections: Vec<Connection> = (0..pattern.clients())
            .map(|_| self.connect(server.address(), link))
            .collect::<Result<_>>()?;
        let started = Instant::now();
        let asked = self.ask(image, pattern, connections);
        let wall = started.elapsed();
        let mut clients = asked.with_context(|| server.process().log_tail())?;
        let peak = server.process().peak_rss_bytes()?;
        for client in &mut clients {
            client.close()?;
        }
        let bytes = clients.iter().map(|client| client.bytes).sum();
        let mut trips: Vec<Duration> = clients.remove(0).trips;
        drop(clients);
        let used = server.finish(TIMEOUT)?.cpu.saturating_sub(cpu);
        trips.sort_unstable();
        Ok(Run {
            p50_us: quantile_us(&trips, 50),
            p99_us: quantile_us(&trips, 99),
            ..Run::new(wall, bytes, used, peak)
        })
    }

    /// Lets a client ask over each connection, all at the same time.
    fn ask<'i>(
        &self,
        image: &'i Image,
        pattern: RequestPattern,
        connections: Vec<Connection>,
    ) -> Result<Vec<Client<'i>>> {
        let wire = self.wire()?;
        let plan = Plan::of(pattern, self.asked_mib, self.page);
        let clients = connections
            .into_iter()
            .zip(0..)
            .map(|(connection, number)| {
                let order = Order::new(image, self.page, &plan, number);
                Client::new(connection, wire, self.page, image, order)
            });
        let clients: Vec<Client<'_>> = clients.collect();
        thread::scope(|scope| {
            let running: Vec<_> = clients
                .into_iter()
                .map(|mut client| scope.spawn(move || client.ask(plan.depth).map(|()| client)))
                .collect();
            let joined = running
                .into_iter()
                .map(|client| client.join().expect("no panic but our own"));
            joined.collect()
        })
    }
}

/// What each client does.
#[derive(Clone, Copy)]
struct Plan {
    /// Pages of a request.
    pages: u64,
    requests: u64,
    /// Most requests that are not answered.
    depth: u64,
}

impl Plan {
    fn of(pattern: RequestPattern, asked_mib: u32, page: PageSize) -> Plan {
        match pattern {
            RequestPattern::OneByOne => Plan {
                pages: 1,
                requests: ROUND_TRIPS,
                depth: 1,
            },
            RequestPattern::Ahead { pages, clients } => {
                let (pages, clients) = (u64::from(pages), u64::from(clients));
                let asked = u64::from(asked_mib) << (20 - page.shift());
                let depth = DEPTH_BYTES / clients / (pages << page.shift());
                Plan {
                    pages,
                    requests: (asked / pages / clients).max(1),
                    depth: depth.clamp(2, DEPTH_MAX),
                }
            }
        }
    }
}

fn quantile_us(sorted: &[Duration], percent: usize) -> Option<f64> {
    let at = sorted.get(sorted.len() * percent / 100)?;
    Some(at.as_secs_f64() * 1e6)
}

fn first_word(page: &[u8]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| page[i]))
}

/// Which pages are asked for, one request after the other: runs of the image at random places.
struct Order {
    memory: PageRange,
    /// Length of a run, bytes.
    run_bytes: u64,
    left: u64,
    next: u64,
}

impl Order {
    fn new(image: &Image, page: PageSize, plan: &Plan, client: u64) -> Order {
        Order {
            memory: image.memory,
            run_bytes: plan.pages << page.shift(),
            left: plan.requests,
            // Each client has numbers of its own.
            next: client << 32,
        }
    }
}

impl Iterator for Order {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        self.left = self.left.checked_sub(1)?;
        self.next += 1;
        let places = (self.memory.bytes() / self.run_bytes).max(1);
        let start = self.memory.start().get() + mix(self.next) % places * self.run_bytes;
        let end = (start + self.run_bytes).min(self.memory.end().get());
        Some(PageRange::new(start, end))
    }
}

struct Client<'a> {
    connection: Connection,
    fetcher: Fetcher<()>,
    page: PageSize,
    image: &'a Image,
    order: Order,
    /// What short answers left to be asked for again.
    again: VecDeque<PageRange>,
    /// Requests to be sent.
    outgoing: Vec<u8>,
    received: Vec<u8>,
    unread: std::ops::Range<usize>,
    /// Bytes of pages that came.
    bytes: u64,
    trips: Vec<Duration>,
}

impl<'a> Client<'a> {
    fn new(
        connection: Connection,
        wire: Wire,
        page: PageSize,
        image: &'a Image,
        order: Order,
    ) -> Client<'a> {
        Client {
            connection,
            fetcher: Fetcher::new(wire, page),
            page,
            image,
            order,
            again: VecDeque::new(),
            outgoing: Vec::new(),
            received: vec![0; BUFFER_BYTES],
            unread: 0..0,
            bytes: 0,
            trips: Vec::new(),
        }
    }

    /// Asks for everything, with up to `depth` requests on the way.
    fn ask(&mut self, depth: u64) -> Result<()> {
        loop {
            // Topped up in large steps: a call for each request would be measured too.
            if self.fetcher.outstanding() as u64 <= depth / 2 {
                self.request(depth)?;
            }
            if self.fetcher.outstanding() == 0 {
                return Ok(());
            }
            let asked = Instant::now();
            let outstanding = self.fetcher.outstanding();
            while self.fetcher.outstanding() == outstanding {
                self.receive()?;
                self.take_steps()?;
            }
            // Of requests that wait behind others it says nothing.
            if depth == 1 {
                self.trips.push(asked.elapsed());
            }
        }
    }

    fn request(&mut self, depth: u64) -> Result<()> {
        while (self.fetcher.outstanding() as u64) < depth {
            let next = self.again.pop_front().or_else(|| self.order.next());
            let Some(range) = next else {
                break;
            };
            let pid = self.image.pid;
            self.fetcher.get(pid, range, (), &mut self.outgoing);
        }
        self.send()
    }

    fn send(&mut self) -> Result<()> {
        self.connection.write_all(&self.outgoing)?;
        self.connection.flush()?;
        self.outgoing.clear();
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        // Less than a page is unread.
        self.received.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        match self
            .connection
            .read(&mut self.received[self.unread.end..])?
        {
            0 => bail!("the server hung up"),
            bytes => self.unread.end += bytes,
        }
        Ok(())
    }

    fn take_steps(&mut self) -> Result<()> {
        loop {
            let unread = &self.received[self.unread.clone()];
            let (used, step) = self.fetcher.next(unread)?;
            match step {
                Step::Incomplete => return Ok(()),
                Step::Answer { .. } => {}
                Step::Unavailable { asked, .. } => bail!("the server cannot read {asked}"),
                Step::Pages { image, bytes, .. } => {
                    let pages = unread[bytes].chunks_exact(self.page.as_usize());
                    let offset = image.start().get() - self.image.memory.start().get();
                    let first = usize::try_from(offset >> self.page.shift())?;
                    for (page, expected) in pages.zip(&self.image.words[first..]) {
                        ensure!(first_word(page) == *expected, "a wrong page in {image:?}");
                    }
                    self.bytes += image.bytes();
                }
                Step::Complete { rest, .. } => self.again.extend(rest),
                Step::Closed(status) => bail!("the server closes with status {status}"),
            }
            self.unread.start += used;
        }
    }

    /// Says CLOSE and hears that all is well.
    fn close(&mut self) -> Result<()> {
        self.fetcher.close(&mut self.outgoing);
        self.send()?;
        let mut status = [0xff; size_of::<u32>()];
        self.connection.read_exact(&mut status)?;
        ensure!(status == [0; 4], "the server closes with {status:?}");
        Ok(())
    }
}
