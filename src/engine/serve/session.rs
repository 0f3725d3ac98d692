//! The session of one client: reads its requests and answers them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host_activity::HostActivity;
use super::local_reads::{Tries, error_of_file};
use super::memory::Memory;
use super::{ServeContext, Summary};
use crate::criu::header::{HEADER_BYTES_MAX, Wire};
use crate::criu::serve::{CLOSE_STATUS, Get, Request, Requests};
use crate::engine::receive;
use crate::error::{Error, Kind, Result};
use crate::image::chain::{Place, Resolved};
use crate::limits::{ANSWER_BYTES, REQUEST_BYTES};
use crate::stream::{Stream, silent};
use crate::units::{PageCount, PageSize};

/// Runs of at least this many bytes are sent with `sendfile`; shorter ones are cheaper to copy.
/// Measured on loopback, in GiB/s: 16 KiB 2.1 copied, 2.0 sent; 32 KiB 2.5 and 3.6; 64 KiB 2.5 and
/// 4.0.
const SEND_FILE_BYTES_MIN: u64 = 32 << 10;

/// See the module's text.
pub(super) struct Session<'a> {
    context: &'a ServeContext,
    pub(super) stream: Stream,
    page: PageSize,
    requests: Requests,
    memories: HashMap<u32, Arc<dyn Memory>>,
    answers: Answers,
    /// The runs of the answer under way; kept for its room.
    runs: Vec<Resolved>,
    summary: Summary,
    start: Instant,
    activity: Option<HostActivity<'a>>,
}

/// Answers that wait to be sent together.
struct Answers {
    buffer: Box<[u8]>,
    filled: usize,
}

impl Session<'_> {
    pub(super) fn new(stream: Stream, context: &ServeContext) -> Session<'_> {
        let page = context.page;
        let summary = Summary {
            peer: stream.peer().to_owned(),
            ..Summary::default()
        };
        Session {
            context,
            stream,
            page,
            requests: Requests::new(page, context.wire),
            memories: HashMap::new(),
            answers: Answers {
                buffer: vec![0; ANSWER_BYTES].into(),
                filled: 0,
            },
            runs: Vec::new(),
            summary,
            start: Instant::now(),
            activity: None,
        }
    }

    pub(super) fn summary(&self) -> Summary {
        Summary {
            elapsed: self.start.elapsed(),
            ..self.summary.clone()
        }
    }

    /// Answers requests until CLOSE.
    pub(super) fn run(&mut self, closing: &dyn Fn() -> Result<()>) -> Result<()> {
        if let Some(time_limit) = self.context.idle_timeout {
            self.end_when_silent_for(time_limit)?;
        }
        let mut input = [0; REQUEST_BYTES];
        let mut arrived = 0;
        loop {
            match self.receive(&mut input[arrived..], arrived > 0)? {
                0 if arrived == 0 && self.summary.requests == 0 => {
                    return Err(Error::nothing_came(self.stream.peer()));
                }
                0 => return Err(self.left_without_close()),
                bytes => arrived += bytes,
            }
            let mut read = 0;
            while let Some((request, len)) = self.next_request(&input[read..arrived])? {
                read += len;
                match request {
                    Request::Get(get) => self.answer(&get)?,
                    Request::Close { wait_for_end } => {
                        closing()?;
                        return self.close(wait_for_end);
                    }
                }
            }
            self.send_answers()?;
            input.copy_within(read..arrived, 0);
            arrived -= read;
        }
    }

    fn next_request(&mut self, bytes: &[u8]) -> Result<Option<(Request, usize)>> {
        let request = self.requests.read(bytes);
        request.map_err(|error| Error::wrap(Kind::Protocol, "bad request", error))
    }

    fn end_when_silent_for(&self, time_limit: Duration) -> Result<()> {
        let socket = self.stream.socket();
        // Local sockets have no host that could be gone.
        let _ = socket.set_tcp_user_timeout(Some(time_limit));
        let set = socket.set_read_timeout(Some(time_limit));
        set.and_then(|()| socket.set_write_timeout(Some(time_limit)))
            .map_err(|error| Error::wrap(Kind::Io, "cannot set --idle-timeout", error))
    }

    fn answer(&mut self, get: &Get) -> Result<()> {
        if self.activity.is_none() {
            self.activity = Some(self.context.active_hosts.begin(self.stream.host()));
        }
        let memory = self.memory(get.pid)?;
        self.runs.clear();
        let pages = memory.find_runs(get.range, &mut self.runs)?;
        let runs = std::mem::take(&mut self.runs);
        if self.context.local_reads.reads_first() {
            self.answer_after_reading(get, &*memory, &runs)?;
        } else {
            self.begin_answer(get, pages)?;
            let pushed = runs.iter().try_for_each(|run| self.push_run(&*memory, run));
            if pushed.is_err() {
                self.context.local_reads.keep(&memory);
            }
            pushed?;
        }
        self.runs = runs;
        Ok(())
    }

    /// Announces an answer of `pages` pages, and counts it.
    fn begin_answer(&mut self, get: &Get, pages: PageCount) -> Result<()> {
        // Known since the request was read.
        let wire = self.requests.wire().unwrap_or(Wire::V2);
        let mut header = [0; HEADER_BYTES_MAX];
        let len = get.answer(wire, pages, &mut header);
        self.push_header(&header[..len])?;
        self.summary.requests += 1;
        self.summary.short_answers += u64::from(pages < get.range.pages(self.page));
        self.summary.pages += pages.get();
        let bytes = pages.get() << self.page.shift();
        self.summary.bytes += bytes;
        self.context.traffic.served(1, pages.get(), bytes);
        Ok(())
    }

    fn memory(&mut self, pid: u32) -> Result<Arc<dyn Memory>> {
        if let Some(memory) = self.memories.get(&pid) {
            return Ok(Arc::clone(memory));
        }
        let memory = self.context.memories.memory(pid)?;
        self.memories.insert(pid, Arc::clone(&memory));
        Ok(memory)
    }

    /// Over TLS a header has a record of its own: see [`crate::tls`].
    fn push_header(&mut self, header: &[u8]) -> Result<()> {
        if self.stream.is_plain() {
            return self.push(header);
        }
        self.write_answers()?;
        self.push(header)?;
        self.write_answers()
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        if self.answers.room() < bytes.len() {
            self.write_answers()?;
        }
        self.answers.next(bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn push_run(&mut self, memory: &dyn Memory, run: &Resolved) -> Result<()> {
        let bytes = run.range.bytes();
        match run.place {
            Place::Raw { file, offset } if self.can_send_file(bytes) => {
                self.send_run(memory.file(file), offset, bytes)
            }
            place => self.copy_run(memory, place, bytes),
        }
    }

    /// Sends a raw run without a copy.
    fn send_run(&mut self, (file, path): (&File, &Path), offset: u64, bytes: u64) -> Result<()> {
        let waiting = self.answers.take();
        self.stream.write_more(waiting).map_err(not_taken)?;
        let (mut sent, mut tries) = (0, Tries::default());
        loop {
            let (before, at) = (sent, offset + sent);
            let left = bytes - sent;
            let Err(error) = self.stream.send_file(file, at, left, &mut sent) else {
                return Ok(());
            };
            if sent > before {
                tries = Tries::default();
            }
            match error_of_file(file, path, offset + sent, &error) {
                Some(error) => {
                    tries.wait_and_retry(error, &self.context.local_reads, &self.stream)?;
                }
                None => return Err(not_taken(error)),
            }
        }
    }

    /// Reads an answer before it is begun: it ends where reading does.
    fn answer_after_reading(
        &mut self,
        get: &Get,
        memory: &dyn Memory,
        runs: &[Resolved],
    ) -> Result<()> {
        let mut pages = Vec::new();
        let page = self.page.as_usize();
        'runs: for run in runs {
            for skipped in (0..run.range.bytes()).step_by(page) {
                let filled = pages.len();
                pages.resize(filled + page, 0);
                let read = memory.read(run.place.behind(skipped, self.page), &mut pages[filled..]);
                if let Err(error) = read {
                    pages.truncate(filled);
                    tracing::debug!("client {}: {error}", self.stream.peer());
                    break 'runs;
                }
                if pages.len() >= ANSWER_BYTES {
                    break 'runs;
                }
            }
        }
        self.begin_answer(get, PageCount((pages.len() / page) as u64))?;
        pages.chunks(page).try_for_each(|page| self.push(page))
    }

    fn can_send_file(&self, bytes: u64) -> bool {
        bytes >= SEND_FILE_BYTES_MIN && self.stream.is_plain()
    }

    /// Copies `bytes` from `place` on into the answer buffer, sending it whenever it is full.
    fn copy_run(&mut self, memory: &dyn Memory, mut place: Place, mut bytes: u64) -> Result<()> {
        let mut tries = Tries::default();
        while bytes > 0 {
            let room = self.page.floor(self.answers.room() as u64);
            if room == 0 {
                self.write_answers()?;
                continue;
            }
            let piece = bytes.min(room);
            let len = usize::try_from(piece).expect("less than the buffer's room");
            if let Err(error) = memory.read(place, self.answers.next(len)) {
                self.answers.take_back(len);
                // What lies before it is not held up.
                self.send_answers()?;
                tries.wait_and_retry(error, &self.context.local_reads, &self.stream)?;
                continue;
            }
            tries = Tries::default();
            place = place.behind(piece, self.page);
            bytes -= piece;
        }
        Ok(())
    }

    fn write_answers(&mut self) -> Result<()> {
        self.stream
            .write_all(self.answers.take())
            .map_err(not_taken)
    }

    fn send_answers(&mut self) -> Result<()> {
        self.write_answers()?;
        self.stream.flush().map_err(not_taken)
    }

    fn close(&mut self, wait_for_end: bool) -> Result<()> {
        // Who comes after the answer finds the images as they are then, however long this client takes
        // to hang up.
        self.memories.clear();
        self.context.local_reads.drop_kept();
        self.push(&CLOSE_STATUS)?;
        self.send_answers()?;
        let rest = self.requests.header_bytes_open();
        if wait_for_end {
            receive::wait_for_end(&mut self.stream, rest);
        } else {
            receive::leave_open(&mut self.stream, rest);
        }
        Ok(())
    }

    /// Reads what comes next; `begun` says that it is the rest of a request.
    fn receive(&mut self, out: &mut [u8], begun: bool) -> Result<usize> {
        loop {
            match self.stream.read(out) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if begun || !self.may_be_idle() {
                        return Err(silent(self.context.idle_timeout));
                    }
                }
                Err(error)
                    if error.kind() == ErrorKind::ConnectionReset
                        && !begun
                        && self.summary.requests == 0 =>
                {
                    return Ok(0);
                }
                result => return result.map_err(lost),
            }
        }
    }

    fn may_be_idle(&self) -> bool {
        self.activity.is_some() || self.context.active_hosts.contains(&self.stream.host())
    }

    fn left_without_close(&self) -> Error {
        let Summary {
            requests, pages, ..
        } = self.summary;
        Error::new(
            Kind::PeerLost,
            format!(
                "it went away without CLOSE after {requests} requests and {pages} pages: its \
                 restore may have failed"
            ),
        )
    }
}

impl Answers {
    fn room(&self) -> usize {
        self.buffer.len() - self.filled
    }

    /// The next `len` bytes, to be filled; there is room for them.
    fn next(&mut self, len: usize) -> &mut [u8] {
        let start = self.filled;
        self.filled += len;
        &mut self.buffer[start..self.filled]
    }

    /// The last `len` bytes were not filled after all.
    fn take_back(&mut self, len: usize) {
        self.filled -= len;
    }

    /// All that was filled; the buffer is empty afterwards.
    fn take(&mut self) -> &[u8] {
        &self.buffer[..std::mem::take(&mut self.filled)]
    }
}

/// Answers could not be sent.
fn not_taken(error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock => {
            let text = "the peer has taken no answers for as long as --idle-timeout says";
            Error::new(Kind::PeerLost, text)
        }
        _ => lost(error),
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::wrap(Kind::PeerLost, "the connection is lost", error)
}
