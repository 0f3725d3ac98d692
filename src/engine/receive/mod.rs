//! Receives the memory of a dump: from the socket to the files, with the headers read in between.
//!
//! ```text
//!            +--------------- free buffers <---------------+
//!            v                                             |
//! socket --> buffer --> criu::receive: ranges --> plan --> driver: pwritev --> pages-*.img
//!    |                        |                                                    ^
//!    |                        +--> image::writer: entries                          |
//!    +--> pipe: pages of large frames, if nobody has to look at them --------------+
//! ```
//!
//! A buffer is filled from the socket until it is full, its headers are read in place, and it goes to
//! the driver with the plan of which ranges go where. While it is written the next one is filled. Once the
//! header of a large frame is read, its pages go past this process (`crate::engine::io::splice_path`).
//!
//! Invariants: CLOSE is answered only when every byte is in its file and every image has its name; on
//! any failure the images are gone and the connection is reset, so that the dump fails too.

mod batch_applier;
pub(in crate::engine) mod counters;
pub mod ingest_modes;
pub mod precopy_listener;
mod receiver_session;
mod session_pages;
pub mod stores;

use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::criu::header::{HEADER_BYTES_MAX, Target, Wire};
use crate::criu::receive::{CLOSE_STORED, ReceiveSession, Step, has_parent_answer, parent_answer};
use crate::engine::io::Io;
use crate::engine::io::batch::Plan;
use crate::engine::io::driver::{Link, Writes};
use crate::engine::io::session_io::SessionIo;
use crate::engine::pending::{CorkWatch, PendingTrees};
use crate::engine::receive::counters::SessionCounters;
use crate::engine::receive::ingest_modes::{IngestMode, IngestOptions, IngestScope};
use crate::engine::receive::stores::{SessionStore, Stores};
use crate::error::{Error, Kind, Result};
use crate::image::writer::{CommittedImages, SessionImages};
use crate::observe::received::Received;
use crate::observe::traffic::Traffic;
use crate::stream::{Stream, silent};
use crate::sys::buffers::Buffer;
use crate::units::PageSize;

/// A buffer is written when less room than this is left in it: a receive for less would cost more
/// than it brings.
const ROOM_BYTES_MIN: usize = 64 << 10;

/// Frames of which at least so many bytes are still to come go through a pipe: for fewer the calls cost
/// more than the copy that they save.
const PASS_BYTES_MIN: u64 = 512 << 10;

/// How long a peer that was told that all is well may take to hang up.
const HANG_UP: Duration = Duration::from_secs(30);

/// How long the end of a FORCE_CLOSE that may be there or not is waited for, once it is answered.
const REST_OF_CLOSE: Duration = Duration::from_millis(100);

/// What all receiving sessions of a page server share.
#[derive(Debug)]
pub struct ReceiveContext {
    /// Where images go to.
    pub stores: Stores,
    /// The header layout to expect, if it is not to be found out.
    pub wire: Option<Wire>,
    /// What moves the bytes.
    pub io: Io,
    /// When plain connections' bytes are written.
    pub writes: Writes,
    /// What becomes of received pages.
    pub ingest: IngestOptions,
    /// Whether received pages are taken out of the parents' files when all is stored.
    pub auto_dedup: bool,
    /// How long a peer may be silent.
    pub idle_timeout: Option<Duration>,
    /// Counts what the sessions move.
    pub traffic: Arc<Traffic>,
}

impl ReceiveContext {
    /// Sessions that find out what their peers speak, wait for them as long as it takes, and keep all
    /// pages as received.
    pub fn new(stores: Stores, io: Io) -> ReceiveContext {
        ReceiveContext {
            stores,
            wire: None,
            io,
            writes: Writes::of_machine(),
            ingest: IngestOptions::default(),
            auto_dedup: false,
            idle_timeout: None,
            traffic: Arc::default(),
        }
    }
}

/// Receives one dump, from its first byte to the end of the connection, and tells what came of it. On
/// failure the connection is reset, nothing is left of the images, and the error names the peer and
/// the place.
pub fn receive_client(mut stream: Stream, context: &ReceiveContext) -> (Received, Result<()>) {
    let running = context.traffic.begin_session();
    let mut counters = SessionCounters::start(&context.traffic);
    let opened = context.stores.for_session(&stream.host());
    let result = opened.and_then(|store| {
        let ingest = Ingest::begin(&stream, context, &store, &mut counters);
        let ended = ingest.and_then(|ingest| ingest.run(&mut stream));
        if ended.is_err() {
            store.discard();
        }
        ended
    });
    let received = counters.end(stream.peer(), context.stores.page());
    match result {
        Ok(()) => {
            running.succeed();
            (received, Ok(()))
        }
        Err(error) => {
            let error = error.within(format!("session with {}", stream.peer()));
            stream.reset();
            (received, Err(error))
        }
    }
}

#[derive(Debug)]
struct Ingest<'a, 't> {
    session: ReceiveSession,
    images: SessionImages,
    session_io: SessionIo,
    /// The connection, if its bytes can go past this process.
    bypass: Option<Link>,
    /// The frame is a large one, or the last one was and the next may be.
    large: bool,
    mode: Box<dyn IngestMode>,
    page: PageSize,
    idle_timeout: Option<Duration>,
    hides_parent: bool,
    auto_dedup: bool,
    pending: PendingTrees,
    /// Since the first process was named: a dump is known then.
    cork: Option<CorkWatch>,
    counters: &'a mut SessionCounters<'t>,
}

/// How a session ended.
#[derive(Clone, Copy, Debug)]
struct Closed {
    hangs_up: bool,
}

impl<'a, 't> Ingest<'a, 't> {
    fn begin(
        stream: &Stream,
        context: &ReceiveContext,
        store: &SessionStore,
        counters: &'a mut SessionCounters<'t>,
    ) -> Result<Ingest<'a, 't>> {
        let socket = stream.socket().try_clone();
        let socket =
            socket.map_err(|error| Error::wrap(Kind::Io, "cannot use the socket", error))?;
        let link = Link {
            socket: Arc::new(socket),
            idle_timeout: context.idle_timeout,
        };
        // Secured bytes are decrypted here while another thread writes.
        let (io, writes) = if stream.is_plain() {
            (context.io, context.writes)
        } else {
            let timeout = stream.socket().set_read_timeout(context.idle_timeout);
            timeout.map_err(|error| Error::wrap(Kind::Io, "cannot set --idle-timeout", error))?;
            (Io::Epoll, Writes::Beside)
        };
        let page = store.store.dir().page();
        Ok(Ingest {
            session: ReceiveSession::new(context.wire, page),
            images: store.store.begin(),
            bypass: stream.is_plain().then(|| link.clone()),
            large: false,
            session_io: SessionIo::new(io.driver(link)?, writes),
            mode: context.ingest.mode(page),
            page,
            idle_timeout: context.idle_timeout,
            hides_parent: context.ingest.dedup_content,
            auto_dedup: context.auto_dedup,
            pending: PendingTrees::default(),
            cork: None,
            counters,
        })
    }

    fn run(mut self, stream: &mut Stream) -> Result<()> {
        let stored = self.receive_all(stream).and_then(|closed| {
            self.mode
                .end_target(&mut self.images, &mut self.session_io)?;
            self.session_io.drain()?;
            Ok(closed)
        });
        self.counters.kept(self.mode.stored());
        let closed = stored.map_err(|error| error.within(self.session.whereabouts()))?;
        let images = self.images.commit()?;
        answer(stream, &CLOSE_STORED)?;
        self.counters.answered();
        if self.auto_dedup {
            punch_out_of_parents(&images);
        }
        let rest = self.session.header_bytes_open();
        if closed.hangs_up {
            wait_for_end(stream, rest);
        } else {
            leave_open(stream, rest);
        }
        Ok(())
    }

    /// Receives until CLOSE.
    fn receive_all(&mut self, stream: &mut Stream) -> Result<Closed> {
        loop {
            self.pass_large()?;
            let mut buffer = self.session_io.buffer()?;
            let mut plan = Plan::default();
            let mut filled = 0;
            let mut closed = None;
            while closed.is_none() && !self.passes() && buffer.len() - filled >= ROOM_BYTES_MIN {
                let window = filled..self.window_end(filled, buffer.len());
                let bytes;
                (buffer, bytes) = self.receive(stream, buffer, window)?;
                if bytes == 0 {
                    return Err(ended_early(&self.session));
                }
                self.counters.came(bytes as u64);
                let arrived = filled..filled + bytes;
                closed = self.take_steps(stream, &buffer, &arrived, &mut plan)?;
                filled = arrived.end;
            }
            self.session_io.write(buffer, plan)?;
            self.counters.kept(self.mode.stored());
            if let Some(closed) = closed {
                return Ok(closed);
            }
        }
    }

    /// Whether the next bytes go past this process.
    fn passes(&self) -> bool {
        let least = if self.large { 1 } else { PASS_BYTES_MIN };
        self.bypass.is_some()
            && self.session.raw_bytes_left() >= least
            && self.mode.place().is_some()
    }

    /// Where to end a receive into the first `len` bytes of a buffer: behind a header, if large pages may
    /// follow that are not to be copied.
    fn window_end(&mut self, filled: usize, len: usize) -> usize {
        if !std::mem::take(&mut self.large) {
            return len;
        }
        let header = self
            .session
            .wire()
            .map_or(HEADER_BYTES_MAX, Wire::header_bytes);
        len.min(filled + header)
    }

    /// Moves large frames' pages from the socket to their file as long as there are any.
    fn pass_large(&mut self) -> Result<()> {
        while let (true, Some(link), Some(to)) = (self.passes(), &self.bypass, self.mode.place()) {
            let left = usize::try_from(self.session.raw_bytes_left()).unwrap_or(usize::MAX);
            let Some(bytes) = self.session_io.pass(link, left, to)? else {
                self.bypass = None;
                return Ok(());
            };
            if bytes == 0 {
                return Err(ended_early(&self.session));
            }
            self.session.skip_raw(bytes as u64);
            self.mode.placed(bytes as u64);
            self.counters.came(bytes as u64);
            self.large = true;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        stream: &mut Stream,
        mut buffer: Buffer,
        window: Range<usize>,
    ) -> Result<(Buffer, usize)> {
        if stream.is_plain() {
            return self.session_io.receive(buffer, window);
        }
        loop {
            match stream.read(&mut buffer[window.clone()]) {
                Ok(bytes) => return Ok((buffer, bytes)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err(silent(self.idle_timeout));
                }
                Err(error) => {
                    return Err(Error::wrap(Kind::PeerLost, "the connection is lost", error));
                }
            }
        }
    }

    /// Does what the bytes that arrived in `buffer` say.
    fn take_steps(
        &mut self,
        stream: &mut Stream,
        buffer: &[u8],
        arrived: &Range<usize>,
        plan: &mut Plan,
    ) -> Result<Option<Closed>> {
        let mut at = arrived.start;
        let buffer = &buffer[..arrived.end];
        loop {
            let step = self.session.next(buffer, &mut at).map_err(|error| {
                Error::wrap(Kind::Protocol, "what the dump says is wrong", error)
            })?;
            let scope = &mut IngestScope {
                images: &mut self.images,
                session_io: &mut self.session_io,
                plan,
                buffer,
            };
            match step {
                None => return Ok(None),
                Some(Step::Close { hangs_up }) => return Ok(Some(Closed { hangs_up })),
                Some(Step::Open { target, answer }) => self.open(stream, target, answer)?,
                Some(Step::AskParent(target)) => {
                    let has_parent = self.has_parent(target)?;
                    answer(stream, &parent_answer(has_parent))?;
                }
                Some(Step::Pages { range, flags }) => {
                    self.mode.begin_run(scope, range, flags)?;
                    self.counters.run(range.pages(self.page), flags);
                }
                Some(Step::Raw(range)) => self.mode.raw(scope, range)?,
                Some(Step::ZeroPage) => {
                    self.mode.zero_page(scope)?;
                    self.counters.compressed();
                }
                Some(Step::Lz4 { range, ends }) => {
                    self.mode.lz4(scope, range, ends)?;
                    if ends {
                        self.counters.compressed();
                    }
                }
            }
        }
    }

    fn open(&mut self, stream: &mut Stream, target: Target, answered: bool) -> Result<()> {
        self.pending.refuse(stream, target)?;
        self.cork = self.cork.take().or_else(|| CorkWatch::start(stream));
        // Known since the frame's header was read.
        let wire = self.session.wire().unwrap_or(Wire::V2);
        self.mode
            .end_target(&mut self.images, &mut self.session_io)?;
        self.images.open(target, wire)?;
        self.counters.opened(wire);
        let has_parent = self.has_parent(target)?;
        tracing::debug!("receiving {target}, has_parent={has_parent}");
        if answered {
            answer(stream, &has_parent_answer(has_parent))?;
        }
        Ok(())
    }

    /// What the dump is told. A dump that is not an incremental one fails if it is told of a parent;
    /// where contents are compared none needs to be, and so none is told.
    fn has_parent(&self, target: Target) -> Result<bool> {
        Ok(!self.hides_parent && self.images.has_parent(target)?)
    }
}

/// Frees the room of the parents' copies. The images are whole and answered for: a failure costs room
/// and nothing else.
pub(in crate::engine) fn punch_out_of_parents(images: &CommittedImages) {
    match images.punch_out_of_parents() {
        Ok(bytes) => tracing::info!("{bytes} bytes taken out of the parents' files"),
        Err(error) => tracing::warn!("--auto-dedup: the parents keep their copies: {error}"),
    }
}

/// The error for a dump that hangs up before CLOSE.
pub(in crate::engine) fn ended_early(session: &ReceiveSession) -> Error {
    let context = "the dump is incomplete";
    match session.handle_end() {
        Err(error) => Error::wrap(Kind::PeerLost, context, error),
        // CLOSE ends the loop before anybody hangs up.
        Ok(()) => Error::new(Kind::PeerLost, context),
    }
}

/// Answers the dump.
pub(in crate::engine) fn answer(stream: &mut Stream, bytes: &[u8]) -> Result<()> {
    let sent = stream.write_all(bytes).and_then(|()| stream.flush());
    sent.map_err(|error| Error::wrap(Kind::PeerLost, "cannot answer", error))
}

/// Waits for the peer to hang up after CLOSE, as CRIU does: whoever closes first keeps the port busy.
/// `rest` bytes of its CLOSE may still come.
pub(in crate::engine) fn wait_for_end(stream: &mut Stream, mut rest: usize) {
    // All was done and said: however the peer hangs up now, the session was a success.
    let _ = stream.socket().set_read_timeout(Some(HANG_UP));
    while let Ok(bytes @ 1..) = stream.read(&mut [0; 64]) {
        if bytes > rest {
            // What it may still say is not waited for, however much it is.
            tracing::warn!(
                "{} sends data after CLOSE: closing the connection",
                stream.peer()
            );
            break;
        }
        rest -= bytes;
    }
    // It may be gone by now.
    let _ = stream.end();
}

/// Leaves after FORCE_CLOSE the socket to whoever owns it, at the end of what was said: `rest` bytes of
/// the FORCE_CLOSE, which are zero, may be there or on their way. What else comes is somebody else's.
pub(in crate::engine) fn leave_open(stream: &mut Stream, rest: usize) {
    let _ = stream.socket().set_read_timeout(Some(REST_OF_CLOSE));
    // An error is the end of what comes.
    let _ = stream.skip_zeros(rest);
    let _ = stream.socket().set_read_timeout(None);
    // It may be gone by now.
    let _ = stream.end();
}
