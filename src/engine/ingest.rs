//! Receives the memory of a dump: from the socket to the files, with the headers read in between.
//!
//! ```text
//!            +--------------- free buffers <---------------+
//!            v                                             |
//! socket --> buffer --> criu::receive: ranges --> plan --> driver: pwritev --> pages-*.img
//!   |                         |                                                    ^
//!   |                         +--> image::writer: entries                          |
//!   +--- rest of a large frame: spliced, its bytes never come here ----------------+
//! ```
//!
//! A buffer is filled from the socket until it is full, its headers are read in place, and it goes to
//! the driver with the plan of which ranges go where. While it is written the next one is filled.
//!
//! Invariants: CLOSE is answered only when every byte is in its file and every image has its name; on
//! any failure the images are gone and the connection is reset, so that the dump fails too.

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::{Batch, Buffer, Plan};
use super::driver::{Completion, Driver, Io, Link, Operation};
use crate::criu::header::{PageFlags, Target, Wire};
use crate::criu::receive::{
    CLOSE_STORED, ReceiveError, ReceiveSession, Step, has_parent_answer, parent_answer,
};
use crate::error::{Error, Kind, Result};
use crate::image::store::ImageStore;
use crate::image::writer::{Destination, SessionImages};
use crate::limits::{RECEIVE_BUFFER_BYTES, RECEIVE_BUFFERS_MAX};
use crate::observe::received::{PageCounts, Received};
use crate::stream::Stream;
use crate::units::{PageRange, PageSize};

/// A buffer is written when less room than this is left in it: a receive for less would cost more
/// than it brings.
const ROOM_BYTES_MIN: usize = 64 << 10;

/// From this many bytes on the rest of a frame is spliced. Below, the calls cost more than the copy.
const SPLICE_BYTES_MIN: u64 = 128 << 10;

/// How long a dump that was told that all is stored may take to hang up.
const HANG_UP: Duration = Duration::from_secs(30);

/// What all receiving sessions of a page server share.
#[derive(Debug)]
pub struct ReceiveContext {
    /// The directory that images go to.
    pub store: Arc<ImageStore>,
    /// The header layout to expect, if it is not to be found out.
    pub wire: Option<Wire>,
    /// What moves the bytes.
    pub io: Io,
    /// How long a peer may be silent.
    pub idle_timeout: Option<Duration>,
}

/// Receives one dump, from its first byte to the end of the connection. On failure the connection is
/// reset, nothing is left of the images, and the error names the peer and the place.
pub fn receive_client(mut stream: Stream, context: &ReceiveContext) -> Result<Received> {
    match Ingest::begin(&stream, context).and_then(|ingest| ingest.run(&mut stream)) {
        Ok(received) => Ok(received),
        Err(error) => {
            let error = error.within(format!("session with {}", stream.peer()));
            stream.reset();
            Err(error)
        }
    }
}

#[derive(Debug)]
struct Ingest {
    session: ReceiveSession,
    images: SessionImages,
    driver: Box<dyn Driver>,
    page: PageSize,
    free: Vec<Buffer>,
    buffers: usize,
    /// Where the next bytes of the current run go.
    cursor: Option<Destination>,
    /// Pages that were decompressed, on their way to files.
    unpacked: Option<Unpacked>,
    /// The bytes of a compressed page that is cut by the end of a buffer.
    block: Vec<u8>,
    /// Whether the last frame was large enough to be spliced: then the next one is read header
    /// first, so that its payload can be spliced as a whole.
    expects_large: bool,
    peer: String,
    targets: u64,
    pages: PageCounts,
    wire_bytes: u64,
    start: Instant,
}

/// A buffer that is filled with decompressed pages.
#[derive(Debug)]
struct Unpacked {
    buffer: Buffer,
    filled: usize,
    plan: Plan,
}

/// How a session ended.
#[derive(Clone, Copy, Debug)]
struct Closed {
    hangs_up: bool,
}

impl Ingest {
    fn begin(stream: &Stream, context: &ReceiveContext) -> Result<Ingest> {
        let socket = stream.socket().try_clone();
        let link = Link {
            socket: socket
                .map_err(|error| Error::wrap(Kind::Io, "cannot use the socket", error))?,
            peer: stream.peer().to_owned(),
            idle_timeout: context.idle_timeout,
        };
        let page = context.store.dir().page();
        Ok(Ingest {
            session: ReceiveSession::new(context.wire, page),
            images: context.store.begin(),
            driver: context.io.driver(link)?,
            page,
            free: Vec::new(),
            buffers: 0,
            cursor: None,
            unpacked: None,
            block: Vec::new(),
            expects_large: false,
            peer: stream.peer().to_owned(),
            targets: 0,
            pages: PageCounts::default(),
            wire_bytes: 0,
            start: Instant::now(),
        })
    }

    fn run(mut self, stream: &mut Stream) -> Result<Received> {
        let closed = self.receive_all(stream)?;
        self.flush_unpacked()?;
        self.driver.drain()?;
        let received = Received {
            peer: self.peer,
            wire: self.session.wire().unwrap_or(Wire::V2),
            targets: self.targets,
            pages: self.pages,
            page: self.page,
            wire_bytes: self.wire_bytes,
            elapsed: self.start.elapsed(),
        };
        self.images.commit()?;
        answer(stream, &CLOSE_STORED)?;
        if closed.hangs_up {
            wait_for_end(stream);
        }
        Ok(received)
    }

    /// Receives until CLOSE.
    fn receive_all(&mut self, stream: &mut Stream) -> Result<Closed> {
        loop {
            let mut buffer = self.free_buffer()?;
            let mut plan = Plan::default();
            let mut filled = 0;
            let mut closed = None;
            while closed.is_none() && buffer.len() - filled >= ROOM_BYTES_MIN {
                let window = filled..self.window_end(filled, buffer.len());
                let came;
                (buffer, came) = self.receive(buffer, window)?;
                let until = filled + came;
                closed = self.steps(stream, &buffer, filled..until, &mut plan)?;
                filled = until;
                self.splice_rest()?;
            }
            if plan.is_empty() {
                self.free.push(buffer);
            } else {
                self.driver
                    .submit(Operation::Write(Batch { buffer, plan }))?;
            }
            if let Some(closed) = closed {
                return Ok(closed);
            }
        }
    }

    /// Up to where the buffer is to be filled next.
    fn window_end(&self, filled: usize, len: usize) -> usize {
        match self.session.header_bytes_missing() {
            0 => len,
            missing if self.expects_large => filled + missing,
            _ => len,
        }
    }

    fn receive(&mut self, buffer: Buffer, window: Range<usize>) -> Result<(Buffer, usize)> {
        self.driver.submit(Operation::Receive { buffer, window })?;
        loop {
            match self.driver.wait()? {
                Completion::Received { bytes: 0, .. } => {
                    let ended = self.session.handle_end();
                    return Err(ended.err().map_or_else(
                        || Error::new(Kind::PeerLost, "the peer hung up"),
                        |error| Error::wrap(Kind::PeerLost, "not everything came", error),
                    ));
                }
                Completion::Received { buffer, bytes } => {
                    self.wire_bytes += bytes as u64;
                    return Ok((buffer, bytes));
                }
                Completion::Written(batch) => self.free.push(batch.buffer),
                Completion::Spliced => {}
            }
        }
    }

    /// Lets the driver move what is left of a large frame.
    fn splice_rest(&mut self) -> Result<()> {
        let bytes = self.session.raw_bytes_left();
        if bytes < SPLICE_BYTES_MIN {
            return Ok(());
        }
        let Some(Destination { part, offset }) = self.cursor.take() else {
            return Ok(());
        };
        self.expects_large = true;
        self.driver.submit(Operation::Splice {
            part,
            offset,
            bytes,
        })?;
        loop {
            match self.driver.wait()? {
                Completion::Written(batch) => self.free.push(batch.buffer),
                Completion::Spliced => break,
                Completion::Received { .. } => {}
            }
        }
        self.session.skip_raw(bytes);
        self.wire_bytes += bytes;
        Ok(())
    }

    /// Does what the bytes that came say.
    fn steps(
        &mut self,
        stream: &mut Stream,
        buffer: &Buffer,
        came: Range<usize>,
        plan: &mut Plan,
    ) -> Result<Option<Closed>> {
        let mut at = came.start;
        let input = &buffer[..came.end];
        while let Some(step) = self.session.next(input, &mut at).map_err(misspoken)? {
            match step {
                Step::Open { target, answer } => self.open(stream, target, answer)?,
                Step::AskParent(target) => {
                    let has_parent = self.images.has_parent(target)?;
                    answer(stream, &parent_answer(has_parent))?;
                }
                Step::Pages { range, flags } => self.run_of_pages(range, flags)?,
                Step::Raw(range) => {
                    let bytes = range.len() as u64;
                    if let Some(Destination { part, offset }) = &mut self.cursor {
                        plan.push(part, *offset, range);
                        *offset += bytes;
                    }
                }
                Step::ZeroPage => self.zero_page(),
                Step::Lz4 { range, ends } => self.lz4(&input[range], ends)?,
                Step::Close { hangs_up } => return Ok(Some(Closed { hangs_up })),
            }
        }
        Ok(None)
    }

    fn open(&mut self, stream: &mut Stream, target: Target, answered: bool) -> Result<()> {
        // Known since the frame's header was read.
        let wire = self.session.wire().unwrap_or(Wire::V2);
        self.images.open(target, wire)?;
        self.targets += 1;
        let has_parent = self.images.has_parent(target)?;
        tracing::debug!("receiving {target}, has_parent={has_parent}");
        if answered {
            answer(stream, &has_parent_answer(has_parent))?;
        }
        Ok(())
    }

    fn run_of_pages(&mut self, range: PageRange, flags: PageFlags) -> Result<()> {
        self.cursor = self.images.append(range, flags)?;
        let pages = range.pages(self.page).get();
        let counted = if flags.has(PageFlags::PRESENT) {
            &mut self.pages.received
        } else if flags.has(PageFlags::PARENT) {
            &mut self.pages.in_parent
        } else {
            &mut self.pages.with_source
        };
        *counted += pages;
        if range.bytes() < SPLICE_BYTES_MIN {
            self.expects_large = false;
        }
        Ok(())
    }

    /// A page that is all zeroes takes its room in the file, where nothing is written.
    fn zero_page(&mut self) {
        self.pages.compressed += 1;
        if let Some(destination) = &mut self.cursor {
            destination.offset += self.page.bytes();
        }
    }

    fn lz4(&mut self, bytes: &[u8], ends: bool) -> Result<()> {
        if !ends || !self.block.is_empty() {
            self.block.extend_from_slice(bytes);
            if !ends {
                return Ok(());
            }
            let block = std::mem::take(&mut self.block);
            self.unpack(&block)?;
            self.block = block;
            self.block.clear();
            return Ok(());
        }
        self.unpack(bytes)
    }

    /// Decompresses one page.
    fn unpack(&mut self, block: &[u8]) -> Result<()> {
        let Some(Destination { part, offset }) = self.cursor.clone() else {
            return Ok(());
        };
        let page = self.page.as_usize();
        if self
            .unpacked
            .as_ref()
            .is_some_and(|unpacked| unpacked.filled + page > unpacked.buffer.len())
        {
            self.flush_unpacked()?;
        }
        if self.unpacked.is_none() {
            self.unpacked = Some(Unpacked {
                buffer: self.free_buffer()?,
                filled: 0,
                plan: Plan::default(),
            });
        }
        let Some(unpacked) = &mut self.unpacked else {
            return Ok(());
        };
        let range = unpacked.filled..unpacked.filled + page;
        let unpacked_bytes =
            lz4_flex::block::decompress_into(block, &mut unpacked.buffer[range.clone()]);
        let bytes = unpacked_bytes.map_err(|error| {
            let text = format!(
                "a compressed page is damaged, {}",
                self.session.whereabouts()
            );
            Error::wrap(Kind::Protocol, text, error)
        })?;
        if bytes != page {
            let text = format!(
                "a compressed page has {bytes} bytes and not {page}, {}",
                self.session.whereabouts()
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        unpacked.plan.push(&part, offset, range);
        unpacked.filled += page;
        self.pages.compressed += 1;
        self.cursor = Some(Destination {
            part,
            offset: offset + self.page.bytes(),
        });
        Ok(())
    }

    fn flush_unpacked(&mut self) -> Result<()> {
        match self.unpacked.take() {
            Some(Unpacked { buffer, plan, .. }) => {
                self.driver.submit(Operation::Write(Batch { buffer, plan }))
            }
            None => Ok(()),
        }
    }

    /// A buffer to fill, waiting for a write if all are on the way.
    fn free_buffer(&mut self) -> Result<Buffer> {
        loop {
            if let Some(buffer) = self.free.pop() {
                return Ok(buffer);
            }
            if self.buffers < RECEIVE_BUFFERS_MAX {
                self.buffers += 1;
                return Buffer::new(RECEIVE_BUFFER_BYTES);
            }
            if let Completion::Written(batch) = self.driver.wait()? {
                self.free.push(batch.buffer);
            }
        }
    }
}

fn misspoken(error: ReceiveError) -> Error {
    Error::wrap(Kind::Protocol, "the dump cannot be understood", error)
}

fn answer(stream: &mut Stream, bytes: &[u8]) -> Result<()> {
    let sent = stream.write_all(bytes);
    sent.map_err(|error| Error::wrap(Kind::PeerLost, "cannot answer", error))
}

/// Waits for the peer to hang up, as CRIU does: whoever closes first keeps the port busy.
fn wait_for_end(stream: &mut Stream) {
    // All is stored and said: however the peer hangs up now, the session was a success.
    let _ = stream.socket().set_read_timeout(Some(HANG_UP));
    let mut rest = [0; 64];
    while matches!(stream.read(&mut rest), Ok(1..)) {
        tracing::warn!("{} goes on after CLOSE", stream.peer());
    }
}
