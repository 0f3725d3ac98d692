//! Forwards a dump: CRIU's protocol comes in, ferry goes out, nothing is stored here.
//!
//! ```text
//! CRIU ── frames ──> ReceiveSession ──> gathered batches of 256 KiB ──> packer ──> far end
//!  ^                      │
//!  └── CLOSE <────────────┴─ questions <───────────────────────────── answers of the far end
//! ```
//!
//! CLOSE is answered when the far end has everything. CRIU is not told of a parent there: a full dump
//! fails if it is told of one, and an incremental dump that is told of none is a full one, of which as
//! little travels. When the far end cannot take more, nothing is read from CRIU,
//! which waits; when it is lost for good, CRIU's connection is reset, so that the dump fails and
//! the process goes on.

pub mod destination;
mod kept;
mod push;
mod session_dialer;

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, Write};
use std::ops::Range;
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::criu::header::{PageFlags, Target, Wire};
use crate::criu::receive::{CLOSE_STORED, ReceiveSession, Step, has_parent_answer, parent_answer};
use crate::engine::ferry::packer::{Job, Packer};
use crate::engine::ferry::sender_session::SenderSession;
use crate::engine::ferry::{SenderHistory, lock};
use crate::engine::io::transport::Peer;
use crate::engine::listening::stop::Stop;
use crate::engine::pending::{CorkWatch, PendingTrees};
use crate::engine::receive::ingest_modes::decompress_page;
use crate::engine::receive::{answer, ended_early, leave_open, wait_for_end};
use crate::error::{Error, Kind, Result};
use crate::ferry::delta::PageMemory;
use crate::ferry::frame;
use crate::ferry::gather::{Gathered, Run};
use crate::ferry::hello::Features;
use crate::ferry::known_hashes::KnownHashes;
use crate::ferry::message::{Open, StateId, encode_close};
use crate::observe::ferried::{Forwarded, Sent};
use crate::observe::traffic::{Traffic, cpu_time};
use crate::stream::{Stream, silent};
use crate::sync::Mutex;
use crate::sys::buffers::Slab;
use crate::tls::Tls;
use crate::units::{PageCount, PageSize};
pub use kept::KEPT;
use push::push;

/// Received from CRIU at once, bytes.
const RECEIVE_BYTES: usize = 256 << 10;

/// From this many bytes on the rest of a frame is received where it belongs. Below, the calls cost
/// more than the copy.
const DIRECT_BYTES_MIN: u64 = 32 << 10;

/// More threads than this are of no use to one connection's memory.
const ENCODERS_MAX: usize = 4;

/// Where a sender goes, and how.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// The receiver.
    pub peer: Peer,
    /// How many connections to it.
    pub streams: u16,
    /// After so long without progress the session is given up.
    pub reconnect_timeout: Duration,
    /// Memory for hashes and contents of pages that the receiver has, bytes.
    pub delta_cache_bytes: u64,
    /// Secures the connections.
    pub tls: Option<Tls>,
    /// Ends all sessions when it is requested.
    pub stop: Stop,
    /// Counts what the sessions send.
    pub traffic: Arc<Traffic>,
}

/// What all forwarded sessions share.
#[derive(Debug)]
pub struct ForwardContext {
    /// Where the dumps go, and how.
    pub sender: SenderConfig,
    /// The header layout to expect, if it is not to be found out.
    pub wire: Option<Wire>,
    /// Size of a page.
    pub page: PageSize,
    /// How long the dump may say nothing.
    pub idle_timeout: Option<Duration>,
    /// Whether further sessions follow, so that it pays to remember this one's pages.
    pub remembers: bool,
    /// The history of the session before.
    history: Mutex<Option<SenderHistory>>,
    /// Where the hashes of what the receiver has are written after each session. Each session goes on from the one before
    /// then: the receiver need not hash what it has once more.
    hashes: Option<Mutex<File>>,
}

impl ForwardContext {
    /// Forwards as `sender` says.
    pub fn new(
        sender: SenderConfig,
        wire: Option<Wire>,
        page: PageSize,
        remembers: bool,
    ) -> ForwardContext {
        ForwardContext {
            sender,
            wire,
            page,
            idle_timeout: None,
            remembers,
            history: Mutex::new(None),
            hashes: None,
        }
    }

    /// Writes to `file` after each session what the receiver has, for [`KnownHashes::read`].
    #[must_use]
    pub fn saving_hashes(self, file: Option<File>) -> ForwardContext {
        ForwardContext {
            hashes: file.map(Mutex::new),
            ..self
        }
    }

    fn save_hashes(&self, history: &SenderHistory) -> Result<()> {
        let Some(file) = &self.hashes else {
            return Ok(());
        };
        let file = lock(file);
        let mut out = BufWriter::new(&*file);
        let written = file
            .set_len(0)
            .and_then(|()| out.rewind())
            .and_then(|()| KnownHashes::write(history.memory(), |bytes| out.write_all(bytes)))
            .and_then(|()| out.flush());
        written.map_err(|error| Error::wrap(Kind::Io, "cannot write hashes (--save-hashes)", error))
    }

    /// Gives a dump up that says nothing for so long.
    #[must_use]
    pub fn ending_idle(self, idle_timeout: Option<Duration>) -> ForwardContext {
        ForwardContext {
            idle_timeout,
            ..self
        }
    }
}

/// Forwards one dump, from its first byte to the end of the connection, and tells what came of it. On
/// failure the connection is reset and the error names both ends and the place.
pub fn forward_client(mut stream: Stream, context: &ForwardContext) -> (Forwarded, Result<()>) {
    let (start, cpu_before) = (Instant::now(), cpu_time());
    let running = context.sender.traffic.begin_session();
    let history = lock(&context.history).take();
    let history = history.unwrap_or_else(|| {
        let budget_bytes = context.sender.delta_cache_bytes;
        let memory = PageMemory::new(context.page, budget_bytes);
        SenderHistory::new(memory.with_slabs(|bytes| Box::new(Slab::new(bytes))))
    });
    let mut wire = None;
    let goes_on = context.hashes.is_some();
    let place = (&context.sender, context.page, goes_on);
    let pushed = push(place, history, |scope, sending| {
        let mut forward = Forward::begin(context, scope, sending)?;
        let closed = forward.run(&mut stream);
        wire = forward.session.wire();
        let closed = closed.map_err(|error| error.within(forward.session.whereabouts()));
        let rest = forward.session.header_bytes_open();
        closed.map(|hangs_up| (hangs_up, rest, start.elapsed()))
    });
    let (outcome, sent) = match pushed {
        Ok((outcome, sent, history)) => {
            // The dump has arrived all the same.
            if outcome.is_ok()
                && let Err(error) = context.save_hashes(&history)
            {
                tracing::warn!("{error}: a post-copy will ask the far end for them");
            }
            *lock(&context.history) = Some(history);
            (outcome, sent)
        }
        Err(error) => (Err(error), Sent::default()),
    };
    let mut forwarded = Forwarded {
        peer: stream.peer().to_owned(),
        far_end: context.sender.peer.to_string(),
        wire,
        sent,
        page: context.page,
        elapsed: start.elapsed(),
        cpu: cpu_time().saturating_sub(cpu_before),
    };
    match outcome {
        Ok((hangs_up, rest, elapsed)) => {
            running.succeed();
            forwarded.elapsed = elapsed;
            if hangs_up {
                wait_for_end(&mut stream, rest);
            } else {
                leave_open(&mut stream, rest);
            }
            (forwarded, Ok(()))
        }
        Err(error) => {
            let error = error.within(format!("session with {}", stream.peer()));
            stream.reset();
            (forwarded, Err(error))
        }
    }
}

/// How many threads hash and compress.
pub(in crate::engine) fn encoders() -> usize {
    std::thread::available_parallelism().map_or(1, |found| found.get().min(ENCODERS_MAX))
}

struct Forward<'s> {
    sending: &'s SenderSession,
    packer: Packer<'s>,
    session: ReceiveSession,
    page: PageSize,
    idle_timeout: Option<Duration>,
    remembers: bool,
    /// The far end can be asked for hashes.
    takes_questions: bool,
    /// The far end knows its own version by the hashes that are remembered here.
    goes_on: bool,
    /// The far end understands that a page is another process's.
    names_shared: bool,
    target: Option<Target>,
    /// Whether the target's pages are worth hashing.
    hashed: bool,
    gathered: Gathered,
    /// The contents of the gathered pages, as far as they have come.
    buffer: Vec<u8>,
    filled: usize,
    /// Which of the gathered pages go by the hash that the far end knows them by: places in the batch.
    kept: Vec<Range<usize>>,
    /// Pages of the current frame that did not fit into the batch.
    rest: Option<Run>,
    /// The bytes of a compressed page that is cut by the end of the input.
    block: Vec<u8>,
    pages: u64,
    pending: PendingTrees,
    /// Since the first process was named: a dump is known then.
    cork: Option<CorkWatch>,
}

impl<'s> Forward<'s> {
    /// Waits for the far end, and gets ready for the dump.
    fn begin(
        context: &ForwardContext,
        scope: &'s Scope<'s, '_>,
        sending: &'s SenderSession,
    ) -> Result<Forward<'s>> {
        let agreed = sending.agree()?;
        let names_shared = agreed.features.has(Features::SHARED);
        sending
            .memory()
            .begin_session(names_shared, context.remembers);
        Ok(Forward {
            sending,
            packer: Packer::start(scope, sending, &agreed, context.page, encoders())?,
            session: ReceiveSession::new(context.wire, context.page),
            page: context.page,
            idle_timeout: context.idle_timeout,
            remembers: context.remembers,
            takes_questions: agreed.features.has(Features::HASHES),
            goes_on: agreed.features.has(Features::KNOWN),
            names_shared,
            target: None,
            hashed: false,
            gathered: Gathered::new(context.page),
            buffer: Vec::new(),
            filled: 0,
            kept: Vec::new(),
            rest: None,
            block: Vec::new(),
            pages: 0,
            pending: PendingTrees::default(),
            cork: None,
        })
    }

    /// Forwards until CLOSE is answered. Returns whether CRIU hangs up next.
    fn run(&mut self, stream: &mut Stream) -> Result<bool> {
        let idle_timeout = self.idle_timeout;
        let set = stream.socket().set_read_timeout(idle_timeout);
        set.map_err(|error| Error::wrap(Kind::Io, "cannot set --idle-timeout", error))?;
        let lost = |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock => silent(idle_timeout),
            _ => Error::wrap(Kind::PeerLost, "the connection is lost", error),
        };
        let mut input = vec![0; RECEIVE_BYTES];
        self.buffer = self.packer.buffer()?;
        loop {
            let bytes = if self.session.raw_bytes_left() >= DIRECT_BYTES_MIN {
                self.receive_direct(stream).map_err(lost)?
            } else {
                let bytes = stream.read(&mut input).map_err(lost)?;
                if let Some(hangs_up) = self.take_steps(stream, &input[..bytes])? {
                    return Ok(hangs_up);
                }
                bytes
            };
            if bytes == 0 {
                return Err(ended_early(&self.session));
            }
            self.make_room()?;
        }
    }

    /// Receives pages of a large frame into their batch.
    fn receive_direct(&mut self, stream: &mut Stream) -> std::io::Result<usize> {
        let left = usize::try_from(self.session.raw_bytes_left()).unwrap_or(usize::MAX);
        let end = self.filled + self.room().min(left);
        let bytes = stream.read(&mut self.buffer[self.filled..end])?;
        self.filled += bytes;
        self.session.skip_raw(bytes as u64);
        Ok(bytes)
    }

    /// Does what `input` says. Returns at CLOSE whether CRIU hangs up next.
    fn take_steps(&mut self, stream: &mut Stream, input: &[u8]) -> Result<Option<bool>> {
        let mut at = 0;
        loop {
            let step = self.session.next(input, &mut at).map_err(|error| {
                Error::wrap(Kind::Protocol, "what the dump says is wrong", error)
            })?;
            match step {
                None => return Ok(None),
                Some(Step::Open { target, answer }) => self.open(stream, target, answer)?,
                Some(Step::AskParent(_)) => answer(stream, &parent_answer(false))?,
                Some(Step::Pages { range, flags }) => self.begin_run(Run { range, flags })?,
                Some(Step::Raw(range)) => self.take_raw(&input[range])?,
                Some(Step::ZeroPage) => self.take_zero_page()?,
                Some(Step::Lz4 { range, ends }) => self.take_block(&input[range], ends)?,
                Some(Step::Close { hangs_up }) => {
                    self.close()?;
                    answer(stream, &CLOSE_STORED)?;
                    return Ok(Some(hangs_up));
                }
            }
        }
    }

    fn open(&mut self, stream: &mut Stream, target: Target, answered: bool) -> Result<()> {
        self.pending.refuse(stream, target)?;
        self.cork = self.cork.take().or_else(|| CorkWatch::start(stream));
        self.flush()?;
        let wire = self.session.wire().unwrap_or(Wire::V2);
        let open = Open { target, wire };
        let write = |out: &mut Vec<u8>| open.encode(out);
        let reply = self.sending.ask(frame::Kind::Open, write)?;
        let state = match self.takes_questions {
            // Whatever the far end calls it, it is what the last session has left there.
            true if self.goes_on && reply.state != StateId::NONE => self.sending.memory().state(),
            true => reply.state,
            false => StateId::NONE,
        };
        self.sending.adopt(target, state);
        self.target = Some(target);
        self.hashed = self.remembers || self.names_shared || state != StateId::NONE;
        tracing::debug!("forwarding {target}, has_parent={}", reply.value != 0);
        if answered {
            answer(stream, &has_parent_answer(false))?;
        }
        Ok(())
    }

    fn begin_run(&mut self, run: Run) -> Result<()> {
        if run.flags == KEPT && self.is_known(run.range) {
            return self.keep_run(run.range);
        }
        if run.flags.has(PageFlags::PRESENT) {
            self.pages += run.range.pages(self.page).get();
        }
        self.rest = self.gathered.push(run);
        self.make_room()
    }

    /// Where all gathered pages have come, hands them over and begins the next batch with the rest
    /// of the frame.
    fn make_room(&mut self) -> Result<()> {
        while self.room() == 0
            && let Some(rest) = self.rest.take()
        {
            self.hand_over()?;
            self.rest = self.gathered.push(rest);
        }
        Ok(())
    }

    /// How many bytes of gathered pages are still to come.
    fn room(&self) -> usize {
        let present = usize::try_from(self.gathered.present().get()).expect("a batch is small");
        (present << self.page.shift()) - self.filled
    }

    fn take_raw(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.room()));
            self.buffer[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            self.make_room()?;
        }
        Ok(())
    }

    fn take_zero_page(&mut self) -> Result<()> {
        self.next_page().fill(0);
        self.make_room()
    }

    fn take_block(&mut self, bytes: &[u8], ends: bool) -> Result<()> {
        self.block.extend_from_slice(bytes);
        if !ends {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        decompress_page(&block, self.next_page())?;
        self.block = block;
        self.block.clear();
        self.make_room()
    }

    /// The place of the next page of a compressed frame.
    fn next_page(&mut self) -> &mut [u8] {
        let start = self.filled;
        self.filled += self.page.as_usize();
        &mut self.buffer[start..self.filled]
    }

    fn hand_over(&mut self) -> Result<()> {
        let Some(target) = self.target.filter(|_| !self.gathered.runs().is_empty()) else {
            return Ok(());
        };
        let next = self.packer.buffer()?;
        let job = Job {
            target,
            runs: self.gathered.runs().to_vec(),
            buffer: std::mem::replace(&mut self.buffer, next),
            filled: self.filled,
            hashed: self.hashed,
            kept: std::mem::take(&mut self.kept),
        };
        self.gathered.clear();
        self.filled = 0;
        self.packer.push(job)
    }

    /// Hands over what was gathered and waits until it has its number.
    fn flush(&mut self) -> Result<()> {
        self.hand_over()?;
        self.packer.flush()
    }

    /// Waits until the far end has everything.
    fn close(&mut self) -> Result<()> {
        self.flush()?;
        let pages = PageCount(self.pages);
        let write = |out: &mut Vec<u8>| encode_close(pages, out);
        let reply = self.sending.ask(frame::Kind::Close, write)?;
        if reply.value != 0 {
            let text = format!("the far end answers the end with status {}", reply.value);
            return Err(Error::new(Kind::PeerLost, text));
        }
        Ok(())
    }
}
