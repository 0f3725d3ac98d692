//! The listening side of senders: memory that is held here is offered to receivers that connect.
//!
//! ```text
//! dump_memory ── in the order of its pages ──> packer ──> SenderSession ──> connections of the receiver's streams
//!   └──── what a thread waits for ───────────────────────────> its connection for faults (responder)
//! ```
//!
//! The thread whose connection opened a session owns it: when that connection ends it waits for
//! others, and gives the session up if nobody comes back. A session has succeeded when the receiver says
//! that it has everything and the caller takes note of it: only then is BYE said, and said again to whoever
//! comes back, until the receiver has confirmed it.

use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, Scope};
use std::time::Duration;

use crate::criu::header::{Target, Wire};
use crate::engine::ferry::conn::Conn;
use crate::engine::ferry::connection_loop::{DialingHandler, Lost};
use crate::engine::ferry::handshake::{greeting, queue_welcome, refuse, run_admitted};
use crate::engine::ferry::listener_sessions::{
    Admitted, Greetings, LOOK_AGAIN, ListenerSessions, Refused,
};
use crate::engine::ferry::packer::{Job, Packer};
use crate::engine::ferry::sender_session::SenderSession;
use crate::engine::ferry::{END_TIMEOUT, SenderHistory, WINDOW, lock};
use crate::engine::forward_lazy::dump_memory::DumpMemory;
use crate::engine::listening::stop::{Stop, Watched};
use crate::error::{Error, Kind, Result};
use crate::ferry::delta::PageMemory;
use crate::ferry::frame;
use crate::ferry::hello::{FailCode, Features, Hello, Role, SessionId};
use crate::ferry::known_hashes::KnownHashes;
use crate::ferry::message::{Fault, Open, StateId, encode_close};
use crate::ferry::push_planner::{PUSH_BYTES, PushPlanner, Step};
use crate::limits::FERRY_BATCH_BYTES_MAX;
use crate::observe::ferried::Sent;
use crate::observe::traffic::Traffic;
use crate::stream::Stream;
use crate::sync::Mutex;
use crate::units::{PageCount, PageRange};

/// Pages are taken for the push as long as no more than so many bytes wait for a connection.
const UNSENT_BYTES_MAX: u64 = 256 << 10;

/// See the module's text.
pub(in crate::engine) struct PostcopyListener {
    dump_memory: Arc<DumpMemory>,
    wire: Wire,
    reconnect_timeout: Duration,
    traffic: Arc<Traffic>,
    /// What an earlier round has left at the receivers.
    known: Option<KnownHashes>,
    sessions: ListenerSessions<PostcopySession>,
}

/// A receiver's session.
pub(in crate::engine) struct PostcopySession {
    pub(in crate::engine) dump_memory: Arc<DumpMemory>,
    pub(in crate::engine) sending: SenderSession,
    pub(in crate::engine) traffic: Arc<Traffic>,
    /// What is pushed next, and what need not be.
    push_planner: Mutex<PushPlanner>,
}

/// What came of a connection.
pub(in crate::engine) enum PushAccepted {
    /// It opened a session, which is over: what was sent, and how it ended.
    Session(Box<Sent>, Result<()>),
    /// It was one of the connections of a session.
    Joined,
}

impl std::fmt::Debug for PostcopyListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PostcopyListener({:?})", self.dump_memory)
    }
}

impl PostcopyListener {
    /// Offers `dump_memory`, which a CRIU that speaks `wire` has dumped. A session without a connection for
    /// `reconnect_timeout` is given up. Receivers may have the pages of an earlier round whose hashes are `known`.
    pub(in crate::engine) fn new(
        dump_memory: Arc<DumpMemory>,
        wire: Wire,
        reconnect_timeout: Duration,
        traffic: Arc<Traffic>,
        known: Option<KnownHashes>,
    ) -> PostcopyListener {
        let features = Features::FAULTS
            .with(Features::HASHES)
            .with(Features::ON_DEMAND)
            .with(Features::CONFIRMS_BYE)
            .with(Features::IN_PUSH);
        let mut own = Hello::of_listener(Role::Sender, dump_memory.page(), features, WINDOW);
        if let Some(known) = &known {
            own.features = features.with(Features::KNOWN);
            own.hash_key = known.key();
        }
        let roles = [Role::Sender, Role::Responder];
        PostcopyListener {
            dump_memory,
            wire,
            reconnect_timeout,
            traffic,
            known,
            sessions: ListenerSessions::new(own, &roles, FailCode::Sender, reconnect_timeout),
        }
    }

    /// Runs a connection that has just begun to speak ferry, and that `watched` shuts down until then. If it opens
    /// a session, returns when that is over. `complete` is called when the receiver has everything, before it is told so; if that fails, the
    /// session has failed.
    pub(in crate::engine) fn handle(
        &self,
        stream: Stream,
        watched: Watched,
        stop: &Stop,
        complete: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<PushAccepted> {
        let peer = stream.peer().to_owned();
        self.greet(stream, watched, stop, complete)
            .map_err(|error| error.within(format!("ferry to {peer}")))
    }

    fn greet(
        &self,
        stream: Stream,
        watched: Watched,
        stop: &Stop,
        complete: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<PushAccepted> {
        let lost = |error| Error::wrap(Kind::PeerLost, "no greeting came", error);
        let (conn, greeting) = greeting(stream, Arc::default()).map_err(lost)?;
        // From here on a client is told why it is left.
        drop(watched);
        let make = |peer: &Hello| Ok((Arc::new(PostcopySession::new(self, peer)), ()));
        match self.sessions.admit(greeting, |_| true, make) {
            Admitted::Refused(Refused { fail, .. }) => {
                refuse(conn, &fail);
                Err(Error::wrap(Kind::Protocol, "refused", fail))
            }
            Admitted::Joined(session, greetings) => {
                if let Some(session) = session {
                    let greetings = self.by_known_key(greetings);
                    let stopped = Arc::clone(&session);
                    let _watched = stop.call(move || stopped.sending.stop());
                    self.join(conn, &session, &greetings)?;
                }
                Ok(PushAccepted::Joined)
            }
            Admitted::Opened(session, (), greetings) => {
                let greetings = self.by_known_key(greetings);
                let id = greetings.peer.session;
                tracing::info!("session {id} can fetch the dump's memory");
                let running = self.traffic.begin_session();
                let ended = self.own(conn, &session, &greetings, stop, complete);
                if ended.is_ok() {
                    running.succeed();
                }
                let sent = session.sending.sent();
                Ok(PushAccepted::Session(Box::new(sent), ended))
            }
            Admitted::Failed(fail, error) => {
                refuse(conn, &fail);
                Err(error)
            }
        }
    }

    /// What an earlier round has left at the receiver is known by hashes under one key: this side's, if it has some.
    fn by_known_key(&self, mut greetings: Greetings) -> Greetings {
        if let Some(known) = &self.known
            && greetings.peer.features.has(Features::KNOWN)
        {
            greetings.peer.hash_key = known.key();
        }
        greetings
    }

    /// Runs the first connection of a session, and then the session to its end.
    fn own(
        &self,
        conn: Conn,
        session: &Arc<PostcopySession>,
        greetings: &Greetings,
        stop: &Stop,
        complete: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<()> {
        let sending = &session.sending;
        let id = greetings.peer.session;
        let stopped = Arc::clone(session);
        let _watched = stop.call(move || stopped.sending.stop());
        let result = thread::scope(|scope| {
            let push = self.sessions.spawn(scope, || {
                let pushed = thread::scope(|scope| session.push(scope, self.wire));
                let pushed = pushed.and_then(|()| complete());
                match &pushed {
                    Ok(()) => sending.finish(),
                    Err(error) => sending.abort(&error.to_string()),
                }
                pushed
            });
            if let Err(error) = self.join(conn, session, greetings) {
                sending.lost(Lost::GivenUp(error.to_string()));
            }
            let look = || self.end_if_given_up(id, sending, stop);
            let push = self.sessions.follow(push, look);
            self.wait_for_bye_confirmation(id, sending, stop);
            sending.wait_until_done(END_TIMEOUT);
            sending.cut();
            let pushed = push.join();
            pushed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let kept = Arc::clone(session);
        self.sessions
            .end(id, kept, &result, PostcopySession::retire);
        result
    }

    /// Waits until a receiver that promised to confirm BYE has done so; BYE is sent again on each new
    /// connection: one that came back to nobody would not know whether the source goes on.
    fn wait_for_bye_confirmation(&self, session: SessionId, sending: &SenderSession, stop: &Stop) {
        loop {
            // What changes from here on ends the wait below.
            let seen = sending.notifier().notified();
            if !sending.awaits_bye_confirmation() {
                return;
            }
            if self.sessions.has_expired(session) || stop.is_requested() {
                tracing::warn!(
                    "the lazy client has everything, but may not have heard that the source knows: it did \
                     not come back"
                );
                return;
            }
            sending.notifier().wait(seen, LOOK_AGAIN);
        }
    }

    fn end_if_given_up(&self, session: SessionId, sending: &SenderSession, stop: &Stop) {
        if stop.is_requested() {
            sending.lost(Lost::Stopped);
        }
        if self.sessions.has_expired(session) {
            sending.lost(Lost::GivenUp(format!(
                "the lazy client did not reconnect within {} s (--reconnect-timeout)",
                self.reconnect_timeout.as_secs()
            )));
        }
    }

    /// Runs one connection of a session.
    fn join(
        &self,
        mut conn: Conn,
        session: &PostcopySession,
        Greetings { peer, welcome }: &Greetings,
    ) -> Result<()> {
        queue_welcome(&mut conn, welcome);
        let ended = if peer.role == Role::Requester {
            session.answer_all(conn, peer)
        } else {
            run_admitted(conn, &session.sending, peer)
        };
        self.sessions.connection_lost(peer);
        ended
    }
}

impl PostcopySession {
    fn new(listener: &PostcopyListener, peer: &Hello) -> PostcopySession {
        let (_, pages) = listener.dump_memory.progress();
        // A receiver may have an earlier round; what is pushed to it now it gets once.
        let page = listener.dump_memory.page();
        let runs = listener.dump_memory.runs();
        let known = listener.known.as_ref();
        let known = known.filter(|_| peer.features.has(Features::KNOWN));
        let memory = match known {
            None => PageMemory::for_hashes_of(page, runs),
            Some(known) => {
                let runs = runs.into_iter().chain(known.ranges());
                let mut memory = PageMemory::for_hashes_of(page, runs);
                // A receiver calls what it has by its session's name.
                memory.begin_with(peer.session.into(), known.key(), known.runs(page));
                memory
            }
        };
        let history = SenderHistory::new(memory);
        let traffic = Arc::clone(&listener.traffic);
        PostcopySession {
            dump_memory: Arc::clone(&listener.dump_memory),
            sending: SenderSession::new(page, peer.session, history, Arc::clone(&traffic)),
            traffic,
            push_planner: Mutex::new(PushPlanner::new(listener.dump_memory.page(), pages)),
        }
    }

    /// All is done: what is left is to say so to whoever asks once more.
    fn retire(&self) {
        *self.sending.memory() = PageMemory::new(self.dump_memory.page(), 0);
    }

    /// Which of the pages that were `found` for `fault`, by numbers and addresses, its answer brings: see
    /// [`PushPlanner::answer`].
    pub(in crate::engine) fn answer(
        &self,
        found: (Range<u64>, PageRange),
        fault: &Fault,
        may_wait: bool,
    ) -> Option<(Range<u64>, PageRange)> {
        let (numbers, range) = found;
        if range.is_empty() {
            return Some((numbers, range));
        }
        let shift = self.dump_memory.page().shift();
        let first = numbers.start;
        let awaited = first + ((fault.vaddr.get() - range.start().get()) >> shift);
        let numbers = lock(&self.push_planner).answer(numbers, awaited, fault, may_wait)?;
        let address = |number: u64| range.start().get() + ((number - first) << shift);
        let range = PageRange::new(address(numbers.start), address(numbers.end));
        Some((numbers, range))
    }

    /// Pushes everything, unless the receiver wants nothing but answers, and waits until it has all that it
    /// wants.
    fn push<'s>(&'s self, scope: &'s Scope<'s, '_>, wire: Wire) -> Result<()> {
        let agreed = self.sending.agree()?;
        let page = self.dump_memory.page();
        let encoders = crate::engine::forward::encoders();
        let packer = Packer::start(scope, &self.sending, &agreed, page, encoders)?;
        let mut push = Push {
            session: self,
            packer,
            wire,
            takes_questions: agreed.features.has(Features::HASHES),
            open: None,
            hashed: false,
            pages: 0,
        };
        if agreed.features.has(Features::ON_DEMAND) {
            push.open_all()?;
            return self.sending.wait_until_complete();
        }
        while !self.sending.is_complete() && push.step()? {}
        push.packer.flush()?;
        if !self.sending.is_complete() {
            let pages = PageCount(push.pages);
            let write = |out: &mut Vec<u8>| encode_close(pages, out);
            self.sending.ask(frame::Kind::Close, write)?;
        }
        self.sending.wait_until_complete()
    }
}

/// The push of a session.
struct Push<'s> {
    session: &'s PostcopySession,
    packer: Packer<'s>,
    wire: Wire,
    /// Whose pages are being pushed.
    open: Option<u32>,
    /// The receiver can be asked for hashes.
    takes_questions: bool,
    /// It has an earlier version of what is being pushed.
    hashed: bool,
    pages: u64,
}

impl Push<'_> {
    /// Pushes a batch as soon as its pages are there. Returns whether there may be more.
    fn step(&mut self) -> Result<bool> {
        let dump_memory = &self.session.dump_memory;
        let next = dump_memory.with_plan(|plan| lock(&self.session.push_planner).next_step(plan));
        match next {
            Step::Done => return Ok(false),
            Step::Wait if self.session.sending.is_ending() => {
                return Err(Error::new(Kind::PeerLost, "the lazy client has left"));
            }
            Step::Wait => dump_memory.wait_for_more(LOOK_AGAIN)?,
            Step::Push(pid) => {
                self.open(pid)?;
                self.push_batch(pid)?;
            }
        }
        Ok(true)
    }

    /// Opens all processes without a page: what an earlier round has of them need not travel with answers
    /// either.
    fn open_all(&mut self) -> Result<()> {
        let pids = self.session.dump_memory.pids();
        pids.into_iter().try_for_each(|pid| self.open(pid))
    }

    fn open(&mut self, pid: u32) -> Result<()> {
        if self.open == Some(pid) {
            return Ok(());
        }
        self.packer.flush()?;
        let open = Open {
            target: Target::Process(pid),
            wire: self.wire,
        };
        let write = |out: &mut Vec<u8>| open.encode(out);
        let sending = &self.session.sending;
        let answer = sending.ask(frame::Kind::Open, write)?;
        self.hashed = self.takes_questions && answer.state != StateId::NONE;
        if self.hashed {
            sending.adopt(open.target, answer.state);
        }
        self.open = Some(pid);
        Ok(())
    }

    /// Hands over a batch of the next pages of `pid` that are there.
    fn push_batch(&mut self, pid: u32) -> Result<()> {
        let dump_memory = &self.session.dump_memory;
        let mut buffer = self.packer.buffer()?;
        // What is taken is waited for by whoever asks for it, so it is not to lie about here.
        self.packer.wait_for_room(UNSENT_BYTES_MAX)?;
        // Of what the receiver has already little travels, and each batch costs both ends a few wake-ups.
        let most = match self.hashed {
            true => FERRY_BATCH_BYTES_MAX as u64,
            false => PUSH_BYTES,
        };
        let batch = dump_memory
            .with_plan(|plan| lock(&self.session.push_planner).take_batch(plan, pid, most));
        let mut filled = 0;
        for numbers in batch.numbers {
            let bytes = (numbers.end - numbers.start) << dump_memory.page().shift();
            let end = filled + usize::try_from(bytes).expect("a batch is small");
            dump_memory.read(numbers, &mut buffer[filled..end])?;
            filled = end;
        }
        self.pages += batch.pages.get();
        self.packer.push(Job {
            target: Target::Process(pid),
            runs: batch.runs,
            buffer,
            filled,
            hashed: self.hashed,
            kept: Vec::new(),
        })
    }
}
