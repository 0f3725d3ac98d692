//! The connection for faults, at the end that has the pages: answers each question in its turn, as
//! soon as the pages are there.

use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::connection_loop::{self, DialingHandler, LAST_FRAMES_TIMEOUT};
use crate::engine::forward_lazy::postcopy_listener::PostcopySession;
use crate::error::{Error, Kind, Result};
use crate::ferry::encode::{Encoder, PlainBatch, Verdicts};
use crate::ferry::frame::{self, OpenFrame};
use crate::ferry::hash::PageHasher;
use crate::ferry::hello::{Features, Hello};
use crate::ferry::level_control::Level;
use crate::ferry::message::Fault;
use crate::ferry::push_planner;

/// Between two looks at whether the session is over, ms.
const LOOK_AGAIN_MS: u16 = 250;

/// Answers are compressed at zstd's first level: a thread waits for them.
const LEVEL: Level = Level::Zstd(1);

impl PostcopySession {
    /// Answers questions until the connection or the session ends.
    pub(in crate::engine) fn answer_all(&self, conn: Conn, peer: &Hello) -> Result<()> {
        let page = self.dump_memory.page();
        let encoder = Encoder::new(page)
            .map_err(|error| Error::wrap(Kind::Io, "cannot set up zstd", error))?;
        let mut responder = FaultResponder {
            session: self,
            conn,
            encoder,
            verdicts: Verdicts::default(),
            // Its hellos name the same key as those of the stream.
            hasher: PageHasher::new(peer.hash_key, page),
            may_wait: peer.features.has(Features::IN_PUSH),
            plain: Vec::new(),
        };
        let ended = responder.run();
        // Whoever sees this connection end looks no further.
        if let Some(failure) = self.sending.failure() {
            responder.conn.queue(Arc::new(failure));
        }
        connection_loop::send_last_frames(responder.conn, LAST_FRAMES_TIMEOUT);
        match ended {
            Err(Failure::Lost(error)) => {
                tracing::debug!("a connection for faults: {error}");
                Ok(())
            }
            Err(Failure::Failed(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    }
}

struct FaultResponder<'a> {
    session: &'a PostcopySession,
    conn: Conn,
    encoder: Encoder,
    verdicts: Verdicts,
    hasher: PageHasher,
    plain: Vec<u8>,
    /// The requester waits for what is in the push.
    may_wait: bool,
}

/// Why no more questions are answered.
enum Failure {
    /// The connection is gone; there may be another.
    Lost(ConnError),
    /// This side cannot go on.
    Failed(Error),
}

impl From<ConnError> for Failure {
    fn from(error: ConnError) -> Failure {
        Failure::Lost(error)
    }
}

impl FaultResponder<'_> {
    fn run(&mut self) -> std::result::Result<(), Failure> {
        while !self.session.sending.is_ending() {
            let left = self.conn.flush()?;
            match self.conn.receive()? {
                Some(found) if found.kind == frame::Kind::Fault => {
                    let fault = Fault::decode(&found.body, self.session.dump_memory.page());
                    let fault = fault.map_err(ConnError::Frame)?;
                    self.answer(found.number, &fault).map_err(Failure::Failed)?;
                }
                Some(found) => {
                    let text = format!(
                        "a {} frame came where only FAULT frames may come",
                        found.kind
                    );
                    return Err(Failure::Failed(Error::new(Kind::Protocol, text)));
                }
                None => self.sleep(left)?,
            }
        }
        Ok(())
    }

    fn sleep(&self, left: bool) -> std::result::Result<(), Failure> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, left);
        let mut fds = [PollFd::new(self.conn.socket(), events)];
        match poll(&mut fds, PollTimeout::from(LOOK_AGAIN_MS)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(ConnError::Socket(errno.into()).into()),
        }
    }

    /// Queues the answer to question `number`.
    fn answer(&mut self, number: u64, fault: &Fault) -> Result<()> {
        let session = self.session;
        let found = session.dump_memory.find(fault)?;
        let page = session.dump_memory.page();
        let Some((numbers, range)) = session.answer(found, fault, self.may_wait) else {
            let mut words = Vec::new();
            let open = OpenFrame::begin(&mut words);
            open.finish(&mut words, frame::Kind::FaultInPush, number);
            self.conn.queue(Arc::new(words));
            return Ok(());
        };
        let bytes = usize::try_from(range.bytes()).expect("an answer is small");
        self.plain.resize(bytes, 0);
        session.dump_memory.read(numbers, &mut self.plain)?;
        let (plain, verdicts) = (&self.plain, &mut self.verdicts);
        let memory = session.sending.memory();
        push_planner::judge_answer(&memory, &self.hasher, page, fault, range, plain, verdicts);
        drop(memory);
        let run = push_planner::answer_run(range);
        let batch = PlainBatch {
            target: fault.target,
            runs: run.as_slice(),
            plain,
        };
        let mut words = Vec::new();
        let open = OpenFrame::begin(&mut words);
        self.encoder
            .encode(batch, &self.verdicts, &self.hasher, LEVEL, &mut words)
            .map_err(|error| Error::wrap(Kind::Io, "zstd failed", error))?;
        open.finish(&mut words, frame::Kind::FaultPages, number);
        self.conn.queue(Arc::new(words));
        session
            .traffic
            .served(1, range.pages(page).get(), range.bytes());
        Ok(())
    }
}
