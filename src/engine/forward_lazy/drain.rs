//! The one connection to `criu dump --lazy-pages`: takes its memory over, and tells it in the end
//! whether it may go.
//!
//! The dump answers in order, so no more is asked for than keeps it busy: what a client waits for is
//! asked for next, and comes behind what is on its way. Whatever ends this process resets the
//! connection, unless CLOSE was answered: then the dump fails, and its processes go on. A relay may turn the reset
//! into an orderly end, which the dump would take for success: so it is told in words before.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::dump_memory::DumpMemory;
use super::guard::DumpGuard;
use crate::criu::fetch::{Fetcher, Step};
use crate::criu::header::{GIVE_UP, HEADER_BYTES_MAX, Target, Wire};
use crate::engine::io::transport::Peer;
use crate::engine::listening::stop::{Stop, Watched};
use crate::engine::pending::PendingTrees;
use crate::error::{Error, Kind, Result};
use crate::image::dir::ImageDir;
use crate::stream::Stream;
use crate::sys::disconnect::resets_are_skipped;

/// Requests that are on their way at most, however small: of fragmented memory each is for one run, and to
/// wait for its answer before the next one takes longer than the answer.
const REQUESTS_MAX: usize = 32;

/// No more are made until so few are left: several leave with one send, and the dump finds several with one
/// wake-up.
const REQUESTS_LEFT: usize = 16;

/// Bytes that are on their way at most, when the next request is made.
const REQUESTED_BYTES_MAX: u64 = 512 << 10;

/// The receive buffer, bytes: large pieces, and the beginning of an answer behind them.
const BUFFER_BYTES: usize = (256 << 10) + HEADER_BYTES_MAX;

/// How long the dump may take to answer CLOSE: it kills its processes first.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the dump may take to react when it is given up.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// What is said of a dump that was given up because of a signal.
pub(super) const STOPPED: &str =
    "stopped before a client had everything: the dump fails, its processes continue";

/// See the module's text.
#[derive(Debug)]
pub(super) struct Drain {
    dump: Peer,
    stream: Stream,
    /// Behind the connection, which lives on as long as the guard holds it.
    guard: Option<DumpGuard>,
    /// Requests are named by whose pages they are for.
    fetcher: Fetcher<u32>,
    /// Asked for and not answered, bytes.
    requested: u64,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// CLOSE was said.
    closed: bool,
}

impl Drain {
    /// Connects to the dump at `dump`.
    pub(super) fn connect(dump: &Peer) -> Result<Stream> {
        let socket = dump.connect().map_err(|error| {
            error.within("is criu dump --lazy-pages there, and does it listen already?")
        })?;
        Ok(Stream::plain(socket))
    }

    /// Speaks `wire` over `stream`, the connection to `dump`.
    pub(super) fn new(dump: &Peer, stream: Stream, wire: Wire, dump_memory: &DumpMemory) -> Drain {
        Drain {
            dump: dump.clone(),
            stream,
            guard: None,
            fetcher: Fetcher::new(wire, dump_memory.page()),
            requested: 0,
            buffer: vec![0; BUFFER_BYTES].into(),
            start: 0,
            end: 0,
            closed: false,
        }
    }

    /// `guard` gives the dump up if this process is killed.
    pub(super) fn guard_with(&mut self, guard: Option<DumpGuard>) {
        if let Some(guard) = &guard {
            guard.hold(self.stream.socket().as_fd());
        }
        self.guard = guard;
    }

    /// Fails if the dump lacks pages that a lazy-client still brings to its processes.
    pub(super) fn refuse_pending(&self, images: &ImageDir) -> Result<()> {
        let mut pending = PendingTrees::default();
        let mut pids = images.processes()?.into_iter();
        pids.try_for_each(|pid| pending.refuse(&self.stream, Target::Process(pid)))
    }

    /// Ends the connection when `stop` is requested.
    pub(super) fn watch(&self, stop: &Stop) -> Result<Watched> {
        // An orderly end is what the dump must not see.
        stop.watch_reads(&self.stream.socket())
    }

    /// Takes all pages over into `dump_memory`, or stops when `enough` says so. Fails when `stop` is requested.
    pub(super) fn run(
        &mut self,
        dump_memory: &DumpMemory,
        enough: impl Fn() -> bool,
        stop: &Stop,
    ) -> Result<()> {
        loop {
            if stop.is_requested() {
                return Err(Error::new(Kind::Interrupted, STOPPED));
            }
            self.ask(dump_memory, &enough)?;
            if self.fetcher.outstanding() == 0 {
                return Ok(());
            }
            self.receive()?;
            while self.step(dump_memory)? {}
        }
    }

    fn ask(&mut self, dump_memory: &DumpMemory, enough: &impl Fn() -> bool) -> Result<()> {
        if self.fetcher.outstanding() > REQUESTS_LEFT {
            return Ok(());
        }
        let mut words = Vec::new();
        while self.fetcher.outstanding() < REQUESTS_MAX
            && self.requested <= REQUESTED_BYTES_MAX
            && !enough()
        {
            let Some((pid, range)) = dump_memory.next_request() else {
                break;
            };
            self.fetcher.get(pid, range, pid, &mut words);
            self.requested += range.bytes();
        }
        match words.is_empty() {
            true => Ok(()),
            false => self.send(&words),
        }
    }

    fn send(&mut self, words: &[u8]) -> Result<()> {
        let sent = self.stream.write_all(words);
        sent.map_err(|error| self.lost(error))
    }

    fn receive(&mut self) -> Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match self.stream.read(&mut self.buffer[self.end..]) {
            Ok(0) => Err(self.lost(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => {
                self.end += bytes;
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Takes what has come. Returns whether there may be more.
    fn step(&mut self, dump_memory: &DumpMemory) -> Result<bool> {
        let unread = &self.buffer[self.start..self.end];
        let (used, step) = self.fetcher.next(unread).map_err(|error| {
            let text = format!("what the dump at {} says is wrong", self.dump);
            Error::wrap(Kind::Protocol, text, error)
        })?;
        let mut again = true;
        match step {
            Step::Incomplete | Step::Closed(_) => again = false,
            Step::Answer { .. } => {}
            Step::Unavailable { tag, asked } => {
                let text = format!(
                    "the dump at {} does not have {asked} of pid {tag}",
                    self.dump
                );
                return Err(Error::new(Kind::Protocol, text));
            }
            Step::Pages { tag, image, bytes } => dump_memory.store(tag, image, &unread[bytes])?,
            Step::Complete { tag, asked, rest } => {
                self.requested -= asked.bytes();
                if let Some(rest) = rest {
                    dump_memory.give_back(tag, rest);
                }
                again = self.start + used < self.end;
            }
        }
        self.start += used;
        Ok(again)
    }

    /// Tells the dump that its processes may go, and waits until they have.
    pub(super) fn close(mut self) -> Result<()> {
        let mut words = Vec::new();
        self.closed = true;
        if let Some(guard) = &self.guard {
            guard.note_closing();
        }
        self.fetcher.close(&mut words);
        self.send(&words)?;
        // Only what the kernel refuses makes a wait endless; the dump's end is noticed all the same.
        let _ = self.stream.socket().set_read_timeout(Some(CLOSE_TIMEOUT));
        loop {
            let unread = &self.buffer[self.start..self.end];
            let step = self.fetcher.next(unread).map_err(|error| {
                let text = format!("the dump at {} did not confirm the end", self.dump);
                Error::wrap(Kind::Protocol, text, error)
            })?;
            match step {
                (_, Step::Closed(0)) => break,
                (_, Step::Closed(status)) => {
                    let text = format!("the dump answers the end with status {status}");
                    return Err(Error::new(Kind::PeerLost, text));
                }
                _ => self.receive()?,
            }
        }
        let closed = self.stream.socket().set_linger(None);
        closed.map_err(|error| self.lost(error))
    }

    fn lost(&self, error: std::io::Error) -> Error {
        let text = format!("the dump at {} is lost", self.dump);
        Error::wrap(Kind::PeerLost, text, error)
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        let socket = self.stream.socket();
        if resets_are_skipped() {
            let _ = socket.set_linger(None);
            return;
        }
        let patient = socket.set_write_timeout(Some(GIVE_UP_TIMEOUT));
        let sent = patient.and_then(|()| self.stream.write_all(&GIVE_UP));
        // Until the dump hangs up: it sends what it is busy with first. Whatever fails, the reset is left.
        let deadline = Instant::now() + GIVE_UP_TIMEOUT;
        let mut has_hung_up = sent.is_err();
        while !has_hung_up && Instant::now() < deadline {
            let patient = self.stream.socket().set_read_timeout(Some(GIVE_UP_TIMEOUT));
            has_hung_up =
                patient.is_err() || matches!(self.stream.read(&mut self.buffer), Ok(0) | Err(_));
        }
    }
}
