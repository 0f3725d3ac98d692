//! A taker that connects, for a loop of its caller's: no thread of its own, nothing waits.
//!
//! ```text
//! stream ── OPEN, PAGES, CLOSE ──> next ──> Event: pages as plain bytes, checked
//!        <── ACK ──────────────── settle     when the caller has installed them
//! fault  <── FAULT ─────────────── ask
//!        ── FAULT_PAGES ─────────> next
//! ```
//!
//! The session outlives its connections: with new ones the far end goes on behind what was settled,
//! and the caller asks its open questions again.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::conn::{Conn, ConnError, Frame};
use super::dialing::first_frame;
use super::lane::{self, HEARTBEAT};
use super::{WINDOW, random_bits};
use crate::criu::header::Target;
use crate::engine::transport::{Peer, transport};
use crate::error::{Error, Kind, Result};
use crate::ferry::batch::{Batch, Place};
use crate::ferry::frame;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Fail, FailCode, Features, Greeting, Hello, Role, SessionId, VERSION};
use crate::ferry::message::{Fault, StateId};
use crate::ferry::receiver::{Arrival, Message, Receiver};
use crate::ferry::unpack::Unpacker;
use crate::limits::FERRY_FAULT_PAGES_MAX;
use crate::stream::Stream;
use crate::tls::Tls;
use crate::units::{PageRange, PageSize};

/// After so long without an answer a connection is dead, whatever its sockets say.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes the connections of a session, from any thread.
#[derive(Clone, Debug)]
pub(in crate::engine) struct FerryDialer {
    peer: Peer,
    tls: Option<Tls>,
    page: PageSize,
    session: SessionId,
    attempts: Arc<AtomicU32>,
    opened: Arc<AtomicBool>,
}

/// The two connections of a session, welcomed.
#[derive(Debug)]
pub(in crate::engine) struct FerryPair {
    stream: Conn,
    fault: Conn,
}

impl FerryDialer {
    /// For a new session with the forwarder at `peer`.
    pub(in crate::engine) fn new(
        peer: Peer,
        tls: Option<Tls>,
        page: PageSize,
    ) -> Result<FerryDialer> {
        Ok(FerryDialer {
            peer,
            tls,
            page,
            session: SessionId(random_bits()?),
            attempts: Arc::default(),
            opened: Arc::default(),
        })
    }

    /// Connects. An error of [`Kind::Protocol`] will not be another one the next time.
    pub(in crate::engine) fn dial(&self) -> Result<FerryPair> {
        let attempt = self.attempts.fetch_add(1, Ordering::SeqCst) + 1;
        let stream = self.connect(Role::Taker, attempt)?;
        self.opened.store(true, Ordering::SeqCst);
        let fault = self.connect(Role::Asker, attempt)?;
        Ok(FerryPair { stream, fault })
    }

    fn connect(&self, role: Role, attempt: u32) -> Result<Conn> {
        let silent = |error: ConnError| {
            let text = format!(
                "{} does not speak ferry: is it a page-server with --forward-lazy? (--ferry is for that \
                 alone)",
                self.peer
            );
            Error::wrap(Kind::PeerLost, text, error)
        };
        let socket = Stream::plain(self.peer.connect()?);
        let secured = socket.secure_to(self.tls.as_ref(), self.peer.host())?;
        let transport = transport(secured).map_err(|error| silent(ConnError::Socket(error)))?;
        let mut conn = Conn::new(transport, Arc::default());
        lane::prepare(&conn);
        let mut words = Vec::new();
        self.hello(role, attempt)
            .encode(frame::Kind::Hello, &mut words);
        conn.queue(Arc::new(words));
        let answer = first_frame(&mut conn).map_err(silent)?;
        let refused = |fail: Fail| {
            let kind = match fail.code {
                FailCode::Superseded | FailCode::Busy => Kind::PeerLost,
                _ => Kind::Protocol,
            };
            Error::wrap(kind, format!("{} refuses", self.peer), fail)
        };
        let broken = |error| silent(ConnError::Frame(error));
        match answer.kind {
            frame::Kind::Fail => Err(refused(Fail::decode(&answer.body).map_err(broken)?)),
            kind => match Hello::decode(kind, &answer.body).map_err(broken)? {
                Greeting::Hello(hello) if hello.role == role.opposite() => Ok(conn),
                Greeting::Hello(hello) => {
                    let text = format!("it is a {:?}", hello.role);
                    Err(refused(Fail::new(FailCode::Role, text)))
                }
                Greeting::OtherVersion(version) => {
                    let text = format!("it speaks version {version} of ferry, not {VERSION}");
                    Err(refused(Fail::new(FailCode::Version, text)))
                }
            },
        }
    }

    fn hello(&self, role: Role, attempt: u32) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: self.page,
            features: Features::FAULTS,
            session: self.session,
            stream: 0,
            streams: 1,
            attempt,
            opening: role == Role::Taker && !self.opened.load(Ordering::SeqCst),
            window: WINDOW,
            hash_key: HashKey::default(),
        }
    }
}

/// What has come.
#[derive(Debug)]
pub(in crate::engine) enum Event<T> {
    /// Pages that were pushed; they are settled by [`Fetching::settle`].
    Pushed(Delivery),
    /// The answer to the question `T`.
    Answer(T, Delivery),
    /// Nothing that concerns the caller.
    Other,
    /// The far end has heard that everything is here, and is through.
    Bye,
}

/// Pages of one process.
#[derive(Debug)]
pub(in crate::engine) struct Delivery {
    /// Whose they are in the dump.
    pub(in crate::engine) pid: u32,
    /// Their addresses in the dump, and where their bytes are in `plain`.
    pub(in crate::engine) runs: Vec<(PageRange, Range<usize>)>,
    /// The bytes.
    pub(in crate::engine) plain: Vec<u8>,
}

/// Why nothing more comes.
#[derive(Debug)]
pub(in crate::engine) enum Trouble {
    /// The connections are gone: others may be made.
    Lost(ConnError),
    /// The session is over.
    Over(Error),
}

impl From<ConnError> for Trouble {
    fn from(error: ConnError) -> Trouble {
        Trouble::Lost(error)
    }
}

/// A session. `T` is what the caller knows a question by.
pub(in crate::engine) struct Fetching<T> {
    page: PageSize,
    receiver: Receiver,
    pair: Option<FerryPair>,
    /// Open questions: number, tag, and when they were asked.
    questions: VecDeque<(u64, T, Instant)>,
    asked: u64,
    unpacker: Unpacker,
    unpacked: Vec<u8>,
    spare: Vec<u8>,
    /// An OPEN that is answered when pages may be installed.
    open: Option<u64>,
    may_install: bool,
    /// Number of the pushed pages that the caller is installing.
    unsettled: Option<u64>,
    closed: bool,
    said: Instant,
    received_before: u64,
}

impl<T> std::fmt::Debug for Fetching<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Fetching({:?}, {} questions)",
            self.receiver,
            self.questions.len()
        )
    }
}

impl<T> Fetching<T> {
    /// A session without connections.
    pub(in crate::engine) fn new(page: PageSize) -> Fetching<T> {
        Fetching {
            page,
            receiver: Receiver::new(page, 1, WINDOW),
            pair: None,
            questions: VecDeque::new(),
            asked: 0,
            unpacker: Unpacker::default(),
            unpacked: Vec::new(),
            spare: Vec::new(),
            open: None,
            may_install: false,
            unsettled: None,
            closed: false,
            said: Instant::now(),
            received_before: 0,
        }
    }

    /// Goes on over `pair`.
    pub(in crate::engine) fn attach(&mut self, pair: FerryPair) {
        self.receiver.stream_up(0);
        self.pair = Some(pair);
        self.say();
    }

    /// Drops the connections, which are reset. What was asked is forgotten.
    pub(in crate::engine) fn detach(&mut self) {
        self.received_before = self.bytes_received();
        self.pair = None;
        self.questions.clear();
        self.receiver.stream_down(0);
    }

    /// Whether there are connections.
    pub(in crate::engine) fn is_attached(&self) -> bool {
        self.pair.is_some()
    }

    /// What to poll: the stream's socket, and the one for faults.
    pub(in crate::engine) fn sockets(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let pair = self.pair.as_ref()?;
        Some([pair.stream.socket(), pair.fault.socket()])
    }

    /// Received over all connections, bytes.
    pub(in crate::engine) fn bytes_received(&self) -> u64 {
        let now = self
            .pair
            .as_ref()
            .map_or(0, |pair| pair.stream.traffic().0 + pair.fault.traffic().0);
        self.received_before + now
    }

    /// Whether something may have come although no socket is readable.
    pub(in crate::engine) fn has_buffered(&self) -> bool {
        self.pair
            .as_ref()
            .is_some_and(|pair| pair.stream.has_buffered() || pair.fault.has_buffered())
    }

    /// How many questions are open.
    pub(in crate::engine) fn questions(&self) -> usize {
        self.questions.len()
    }

    /// Whether the far end has pushed all that it would.
    pub(in crate::engine) fn is_closed(&self) -> bool {
        self.closed
    }

    /// From now on pages may be installed, so they may be pushed.
    pub(in crate::engine) fn may_install(&mut self) {
        self.may_install = true;
        if let Some(number) = self.open.take() {
            self.answer(number);
        }
    }

    /// Asks for the pages `image` of `pid`, of which a thread waits for the first.
    pub(in crate::engine) fn ask(&mut self, pid: u32, image: PageRange, tag: T) {
        let Some(pair) = &mut self.pair else {
            return;
        };
        let pages = image.pages(self.page).get();
        let most = u64::from(FERRY_FAULT_PAGES_MAX).min(pages);
        let start = image.start().get();
        let fault = Fault {
            target: Target::Process(pid),
            vaddr: image.start(),
            around: PageRange::new(start, start + (most << self.page.shift())),
        };
        self.asked += 1;
        let mut words = Vec::new();
        fault.encode(self.asked, self.page, &mut words);
        pair.fault.queue(Arc::new(words));
        self.questions.push_back((self.asked, tag, Instant::now()));
    }

    /// Sends what is queued, and a heartbeat when it is time. Says for each socket whether something is
    /// left that it does not take now.
    pub(in crate::engine) fn flush(&mut self) -> std::result::Result<[bool; 2], ConnError> {
        if self.said.elapsed() >= HEARTBEAT
            && let Some(pair) = &mut self.pair
        {
            self.said = Instant::now();
            let mut words = Vec::new();
            self.receiver
                .ack(pair.stream.traffic().0)
                .encode(&mut words);
            pair.stream.queue(Arc::new(words));
        }
        match &mut self.pair {
            Some(pair) => Ok([pair.stream.flush()?, pair.fault.flush()?]),
            None => Ok([false; 2]),
        }
    }

    /// Says that everything is here.
    pub(in crate::engine) fn taken(&mut self) {
        self.receiver.taken();
        self.say();
    }

    /// The next thing that has come, faults first.
    pub(in crate::engine) fn next(&mut self) -> std::result::Result<Option<Event<T>>, Trouble> {
        let Some(pair) = &mut self.pair else {
            return Ok(None);
        };
        if let Some(frame) = pair.fault.receive()? {
            return self.take_answer(&frame).map(Some);
        }
        if let Some(frame) = pair.stream.receive()? {
            return self.take_pushed(&frame).map(Some);
        }
        let oldest = self.questions.front();
        if oldest.is_some_and(|(.., asked)| asked.elapsed() > ANSWER_TIMEOUT) {
            return Err(ConnError::Socket(std::io::ErrorKind::TimedOut.into()).into());
        }
        Ok(None)
    }

    fn take_answer(&mut self, frame: &Frame) -> std::result::Result<Event<T>, Trouble> {
        match frame.kind {
            frame::Kind::FaultPages => {}
            frame::Kind::Fail => return Err(failed(frame)),
            other => {
                return Err(wrong(format!(
                    "a {other:?} frame came where answers belong"
                )));
            }
        }
        let front = self.questions.pop_front();
        let Some((_, tag, _)) = front.filter(|(number, ..)| *number == frame.number) else {
            return Err(wrong("an answer came that nobody asked for"));
        };
        let batch = Batch::parse(&frame.body, self.page).map_err(wrong)?;
        Ok(Event::Answer(tag, self.deliver(&batch, &frame.body)?))
    }

    fn take_pushed(&mut self, frame: &Frame) -> std::result::Result<Event<T>, Trouble> {
        if !frame.kind.is_numbered() {
            return match frame.kind {
                frame::Kind::Bye => Ok(Event::Bye),
                frame::Kind::Fail => Err(failed(frame)),
                other => Err(wrong(format!("a {other:?} frame has no place here"))),
            };
        }
        let bytes = frame.body.len() as u64;
        match self.receiver.handle_numbered(frame.number, bytes) {
            Ok(Arrival::Next) => {}
            Ok(Arrival::Again) => return Ok(Event::Other),
            Ok(Arrival::Held) => return Err(wrong("pushed frames are out of order")),
            Err(error) => return Err(wrong(error)),
        }
        let mut pushed = None;
        match self.receiver.read(frame.kind, &frame.body).map_err(wrong)? {
            Message::Pages(batch) => pushed = Some(batch),
            Message::Open(_) if !self.may_install => {
                // Before the processes are restored there is nowhere to put their pages.
                self.open = Some(frame.number);
                return Ok(Event::Other);
            }
            Message::Close(_) => self.closed = true,
            Message::Open(_) => {}
        }
        match pushed {
            Some(batch) => {
                let delivery = self.deliver(&batch, &frame.body)?;
                self.unsettled = Some(frame.number);
                Ok(Event::Pushed(delivery))
            }
            None => {
                self.answer(frame.number);
                Ok(Event::Other)
            }
        }
    }

    /// The pages of the last [`Event::Pushed`] are installed, or not wanted; `room` takes the next.
    pub(in crate::engine) fn settle(&mut self, room: Vec<u8>) {
        self.spare = room;
        if let Some(number) = self.unsettled.take() {
            self.receiver.applied(number);
            self.say();
        }
    }

    /// Answers the question `number`: there is no parent, no version to build on, nothing wrong.
    fn answer(&mut self, number: u64) {
        self.receiver.applied(number);
        self.receiver.answer(number, 0, StateId::NONE);
        self.say();
    }

    /// Queues what is to be said on the stream.
    fn say(&mut self) {
        let Some(pair) = &mut self.pair else {
            return;
        };
        while let Some(reply) = self.receiver.poll(0, pair.stream.traffic().0) {
            self.said = Instant::now();
            let mut words = Vec::new();
            reply.encode(&mut words);
            pair.stream.queue(Arc::new(words));
        }
    }

    /// Verifies `batch`, which lies in `body`, and lays its pages out one behind the other.
    fn deliver(
        &mut self,
        batch: &Batch<'_>,
        body: &[u8],
    ) -> std::result::Result<Delivery, Trouble> {
        if batch.bases().next().is_some() {
            return Err(wrong("pages are told by an earlier round that is not here"));
        }
        let Target::Process(pid) = batch.target else {
            return Err(wrong("pages of shared memory are never lazy"));
        };
        self.unpacker
            .unpack(batch, &[], &mut self.unpacked)
            .map_err(wrong)?;
        let mut plain = std::mem::take(&mut self.spare);
        plain.clear();
        let mut runs: Vec<(PageRange, Range<usize>)> = Vec::new();
        for (vaddr, place) in batch.places() {
            let start = plain.len();
            match place {
                Place::Body(range) => plain.extend_from_slice(&body[range]),
                Place::Unpacked(range) => plain.extend_from_slice(&self.unpacked[range]),
                Place::Zero | Place::Same => plain.resize(start + self.page.as_usize(), 0),
            }
            let end = vaddr.get() + self.page.bytes();
            match runs.last_mut() {
                Some((range, bytes)) if range.end() == vaddr => {
                    *range = PageRange::new(range.start().get(), end);
                    bytes.end = plain.len();
                }
                _ => runs.push((PageRange::new(vaddr.get(), end), start..plain.len())),
            }
        }
        Ok(Delivery { pid, runs, plain })
    }
}

/// The far end has ended the session.
fn failed(frame: &Frame) -> Trouble {
    match Fail::decode(&frame.body) {
        Ok(fail) => Trouble::Over(Error::wrap(
            Kind::PeerLost,
            "the far end has ended the session",
            fail,
        )),
        Err(error) => wrong(error),
    }
}

fn wrong(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Trouble {
    let text = "what the far end says is wrong";
    Trouble::Over(Error::wrap(Kind::Protocol, text, error))
}
