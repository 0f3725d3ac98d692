//! Asks the source for pages that local images should have and cannot give.
//!
//! ```text
//! unreadable -> questions -> thread: a connection of its own -> answers (eventfd) -> install
//! ```
//!
//! The source need not have them: a page-server that serves the whole dump has, `criu dump` has not. One that
//! lacks a page resets the connection, so these questions have one that nobody else needs.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use super::Links;
use super::reconnect::RECONNECT_PAUSE;
use super::source_dialer::SourceDialer;
use crate::criu::fetch::{Fetcher, Step};
use crate::error::{Error, Kind, Result};
use crate::stream::Stream;
use crate::units::PageRange;

/// Answers that wait to be installed at most.
const ANSWERS_MAX: usize = 16;

/// How long the end may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pages of the dump: whose, and their addresses there.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine::restore) struct Question {
    pub(in crate::engine::restore) pid: u32,
    pub(in crate::engine::restore) image: PageRange,
}

#[derive(Debug)]
enum SourceCommand {
    Ask(Question),
    /// Everything is here: the source is told.
    Finish,
}

/// What became of a question: its pages, or why they do not come.
pub(in crate::engine::restore) type Answer = (Question, io::Result<Vec<u8>>);

impl Links {
    /// Asks the source for the pages `image` of `pid`, which local images cannot give, in questions of `step` bytes;
    /// each is given up after `timeout`, and `asked` sees it. Returns whether there is a source to ask.
    pub(in crate::engine::restore) fn ask_fallback(
        &mut self,
        (pid, image): (u32, PageRange),
        step: u64,
        timeout: Duration,
        mut asked: impl FnMut(PageRange),
    ) -> bool {
        // Over ferry comes what the dump has kept alone, which no image has.
        if self.ferry.is_some() || self.pair.is_none() {
            return false;
        }
        if self.fallback.is_none()
            && let Some(dialer) = self.dialer.clone()
        {
            match Fallback::start(dialer, Arc::clone(&self.reconnected), timeout) {
                Ok(fallback) => self.fallback = Some(fallback),
                Err(error) => {
                    tracing::debug!("{error}");
                    return false;
                }
            }
        }
        let Some(fallback) = &self.fallback else {
            return false;
        };
        let mut start = image.start().get();
        while start < image.end().get() {
            let end = image.end().get().min(start + step);
            let image = PageRange::new(start, end);
            fallback.ask(Question { pid, image });
            asked(image);
            start = end;
        }
        true
    }

    /// What became of the next question of [`Links::ask_fallback`] that was answered.
    pub(in crate::engine::restore) fn fallback_answer(&mut self) -> Option<Answer> {
        let (question, answer) = self.fallback.as_ref()?.answer()?;
        if let Ok(bytes) = &answer {
            self.bytes_received_before += bytes.len() as u64;
        }
        Some((question, answer))
    }

    /// Nothing more is asked of the source on behalf of local images.
    pub(in crate::engine::restore) fn drop_fallback(&mut self) {
        self.fallback = None;
    }
}

/// The thread that asks. Dropping this resets its connection.
#[derive(Debug)]
pub(super) struct Fallback {
    commands: Sender<SourceCommand>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl Fallback {
    /// Connects when the first question comes. `wake` is written when there is an answer; a question is given
    /// up after `timeout`.
    pub(super) fn start(
        dialer: SourceDialer,
        wake: Arc<EventFd>,
        timeout: Duration,
    ) -> Result<Fallback> {
        let (commands, inbox) = channel();
        let (outbox, answers) = sync_channel(ANSWERS_MAX);
        let source_thread = SourceThread {
            dialer,
            timeout,
            link: None,
        };
        let thread = std::thread::Builder::new()
            .name("fallback".to_owned())
            .spawn(move || source_thread.run(&inbox, &outbox, &wake))
            .map_err(|error| Error::wrap(Kind::Io, "cannot start a thread", error))?;
        Ok(Fallback {
            commands,
            answers,
            thread: Some(thread),
        })
    }

    pub(super) fn ask(&self, question: Question) {
        // A thread that is gone answers nothing, and then the images alone are tried.
        let _ = self.commands.send(SourceCommand::Ask(question));
    }

    /// The next answer, if there is one.
    pub(super) fn answer(&self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }

    /// Ends the connection in order. Nothing more is asked.
    pub(super) fn finish(mut self) {
        let _ = self.commands.send(SourceCommand::Finish);
        if let Some(thread) = self.thread.take() {
            // It has told all that it has to tell.
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct SourceThread {
    dialer: SourceDialer,
    timeout: Duration,
    link: Option<(Stream, Fetcher<()>)>,
}

impl SourceThread {
    fn run(mut self, inbox: &Receiver<SourceCommand>, outbox: &SyncSender<Answer>, wake: &EventFd) {
        for command in inbox {
            let SourceCommand::Ask(question) = command else {
                if let Some((stream, fetcher)) = self.link.take() {
                    // All has come: there is nothing left to do about a source that does not confirm it.
                    let _ = close(stream, fetcher);
                }
                return;
            };
            let answer = self.fetch_with_retries(question);
            if outbox.send((question, answer)).is_err() {
                return;
            }
            // A counter that is full has been told.
            let _ = wake.write(1);
        }
    }

    /// Tries again, on another connection, as long as the source cannot be reached at all.
    fn fetch_with_retries(&mut self, question: Question) -> io::Result<Vec<u8>> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let reached = match self.link.take() {
                Some(link) => Ok(link),
                None => self.connect(),
            };
            match reached {
                Ok(link) => return self.fetch(link, question),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => std::thread::sleep(RECONNECT_PAUSE.min(self.timeout)),
            }
        }
    }

    fn connect(&self) -> io::Result<(Stream, Fetcher<()>)> {
        let SourceDialer {
            peer,
            tls,
            wire,
            page,
            ..
        } = &self.dialer;
        let socket = peer.connect().map_err(io::Error::other)?;
        let stream = Stream::plain(socket)
            .secure_to(tls.as_ref(), peer.host())
            .map_err(io::Error::other)?;
        stream.socket().set_read_timeout(Some(self.timeout))?;
        stream.socket().set_write_timeout(Some(self.timeout))?;
        Ok((stream, Fetcher::new(*wire, *page)))
    }

    fn fetch(
        &mut self,
        (mut stream, mut fetcher): (Stream, Fetcher<()>),
        question: Question,
    ) -> io::Result<Vec<u8>> {
        let mut pages = Vec::new();
        let mut image = question.image;
        // A short answer is not the last one.
        while !image.is_empty() {
            let mut bytes = Vec::new();
            fetcher.get(question.pid, image, (), &mut bytes);
            stream.write_all(&bytes)?;
            stream.flush()?;
            let rest = receive(&mut stream, &mut fetcher, &mut pages)?;
            image = rest.unwrap_or(PageRange::new(image.end().get(), image.end().get()));
        }
        self.link = Some((stream, fetcher));
        Ok(pages)
    }
}

/// Appends the answer to `pages`. Returns what it lacks.
fn receive(
    stream: &mut Stream,
    fetcher: &mut Fetcher<()>,
    pages: &mut Vec<u8>,
) -> io::Result<Option<PageRange>> {
    let mut buffer = vec![0; 64 << 10];
    let mut filled = 0;
    loop {
        let mut read = 0;
        loop {
            let unread = &buffer[read..filled];
            let (used, step) = fetcher.next(unread).map_err(io::Error::other)?;
            match step {
                Step::Incomplete => break,
                Step::Pages { bytes, .. } => pages.extend_from_slice(&unread[bytes]),
                Step::Complete { rest, .. } => return Ok(rest),
                Step::Unavailable { .. } => {
                    return Err(io::Error::other("the source cannot read it either"));
                }
                Step::Answer { .. } | Step::Closed(_) => {}
            }
            read += used;
        }
        buffer.copy_within(read..filled, 0);
        filled -= read;
        match stream.read(&mut buffer[filled..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => filled += bytes,
        }
    }
}

fn close(mut stream: Stream, mut fetcher: Fetcher<()>) -> io::Result<()> {
    let mut bytes = Vec::new();
    fetcher.close(&mut bytes);
    stream.socket().set_read_timeout(Some(CLOSE_TIMEOUT))?;
    stream.write_all(&bytes)?;
    stream.flush()?;
    let mut status = [0; 4];
    stream.read_exact(&mut status)?;
    stream.socket().set_linger(None)?;
    stream.end()
}
