//! The receiver of a post-copy: pushed pages in their order, questions and their answers, and what an
//! earlier round has left here.
//!
//! ```text
//! stream ── OPEN, PAGES, CLOSE ──> handle_pushed ──> UnverifiedDelivery ── complete ──> Delivery
//!        <── ACK ──────────────── poll               │        ^                          │ installed by the caller
//!        ── WANT_HASHES ────────> handle_pushed      │ local pages are                   v
//!        <── HASHES ───────────── send_hashes        └ read by the caller                settle ──> Backlog ──> safe
//! faults <── FAULT ────────────── ask
//!        ── FAULT_PAGES ────────> handle_answer ──> UnverifiedDelivery ── complete ──> Delivery
//! ```
//!
//! The session outlives its connections: with new ones the far end goes on behind what was settled, and
//! the caller asks its open questions again.
//!
//! Invariants: a page is in a [`Delivery`] only after every checksum and hash that covers it was
//! verified; an answer belongs to the oldest open question; no frame is safe before it is settled.

mod backlog;
mod delivery;
mod earlier;

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::batch::{Batch, PageKind};
use super::frame::{HEADER_BYTES, Kind};
use super::hash::{HashStep, PageHasher};
use super::hello::{Fail, Window};
use super::message::{Fault, StateId, WantHashes};
use super::receiver::{Arrival, Message, Receiver};
use super::session::{ReadError, SessionError};
use super::unpack::Unpacker;
use crate::criu::header::Target;
use crate::lazy::window::RateLimit;
use crate::limits::FERRY_FAULT_PAGES_MAX;
use crate::units::{PageRange, PageSize, Vaddr};
pub use backlog::window_at;
use backlog::{Applied, Backlog};
pub use delivery::{Delivery, Part, UnverifiedDelivery};
use earlier::Earlier;

/// The one stream of a receiver's session.
const STREAM: u16 = 0;

/// What has come. `D` is what pages come as.
#[derive(Debug)]
pub enum Event<T, D = UnverifiedDelivery> {
    /// Pages that were pushed; they are settled by [`PostcopyReceiver::settle`].
    Pushed(D),
    /// The answer to the question `T`.
    Answer(T, D),
    /// The page that the question `T` is about is pushed, and comes there.
    InPush(T),
    /// Nothing that concerns the caller.
    Other,
    /// The far end knows that everything is here, and is done.
    Bye,
}

/// Why the session is over.
#[derive(Debug, Error)]
pub enum PostcopyError {
    /// The far end has ended it.
    #[error("the far end has ended the session")]
    Ended(#[source] Fail),
    /// The far end breaks the rules.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A frame that is no answer came where answers belong.
    #[error("a {0} frame came where answers belong")]
    NoAnswer(Kind),
    /// An answer to no question, or to another one than the oldest.
    #[error("an answer came to no open question")]
    Unasked,
    /// There is one stream, so frames cannot overtake each other.
    #[error("pushed frames are out of order")]
    OutOfOrder,
    /// Something came behind an OPEN before that was answered.
    #[error("frames came behind an OPEN that has no answer yet")]
    BeforeAnswer,
    /// Pages come as differences.
    #[error("pages come as differences, which were not negotiated")]
    Differences,
    /// Pages of a shared memory segment.
    #[error("pages of shared memory are never lazy")]
    SharedMemory,
    /// Hashes are asked for again and again.
    #[error("too many questions for hashes at a time")]
    TooManyQuestions,
}

impl From<SessionError> for PostcopyError {
    fn from(error: SessionError) -> PostcopyError {
        PostcopyError::Read(error.into())
    }
}

/// An open question.
struct Question<T> {
    number: u64,
    tag: T,
    pid: u32,
    image: PageRange,
    pages: u64,
    asked: Duration,
}

/// A session. `T` is what the caller knows a question by. See the module's text.
pub struct PostcopyReceiver<T> {
    page: PageSize,
    receiver: Receiver,
    questions: VecDeque<Question<T>>,
    asked: u64,
    unpacker: Unpacker,
    unpacked: Vec<u8>,
    spare: Vec<u8>,
    earlier: Earlier,
    /// An OPEN, its number and of what, that is answered when pages may be installed.
    open: Option<(u64, Target)>,
    may_install: bool,
    /// Number of the pushed pages that the caller is installing, and the bytes of their frame.
    unsettled: Option<(u64, u64)>,
    /// What is applied and not acknowledged yet.
    backlog: Backlog,
    /// Acknowledgements have to be earned.
    throttled: bool,
    closed: bool,
    through: bool,
}

impl<T> fmt::Debug for PostcopyReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let questions = self.questions.len();
        write!(
            f,
            "PostcopyReceiver({:?}, {questions} questions)",
            self.receiver
        )
    }
}

impl<T> PostcopyReceiver<T> {
    /// A session that takes up to `window` at a time. What is here of an earlier round is to be known as
    /// `state`, by the hashes of `hasher`.
    pub fn new(
        page: PageSize,
        window: Window,
        hasher: PageHasher,
        state: StateId,
    ) -> PostcopyReceiver<T> {
        PostcopyReceiver {
            page,
            receiver: Receiver::new(page, 1, window),
            questions: VecDeque::new(),
            asked: 0,
            unpacker: Unpacker::default(),
            unpacked: Vec::new(),
            spare: Vec::new(),
            earlier: Earlier::new(page, hasher, state),
            open: None,
            may_install: false,
            unsettled: None,
            backlog: Backlog::default(),
            throttled: false,
            closed: false,
            through: false,
        }
    }

    /// The caller has pages of `pid` of an earlier round: the far end shall send only the others.
    pub fn build_on(&mut self, pid: u32) {
        self.earlier.add(pid);
    }

    /// From now on nothing is acknowledged but by [`PostcopyReceiver::acknowledge`]: the far end goes no faster. The
    /// window should be one that [`window_at`] gives.
    pub fn throttle(&mut self) {
        self.throttled = true;
    }

    /// From now on both ends know what an earlier round has left here by the hashes of `hasher`. To be said before new
    /// connections stand.
    pub fn use_hasher(&mut self, hasher: PageHasher) {
        self.earlier.use_hasher(hasher);
    }

    /// New connections stand.
    pub fn attach(&mut self) {
        self.receiver.stream_up(STREAM);
    }

    /// The connections are gone. What was asked is forgotten, and so is what was to be told.
    pub fn detach(&mut self) {
        // What is applied need not come again.
        self.acknowledge_all();
        self.questions.clear();
        self.earlier.forget_questions();
        self.receiver.stream_down(STREAM);
    }

    /// How many questions are open.
    pub fn questions(&self) -> usize {
        self.questions.len()
    }

    /// How many pages were asked for that have not come.
    pub fn asked_pages(&self) -> u64 {
        self.questions.iter().map(|question| question.pages).sum()
    }

    /// Up to where the pages `image` of `pid`, or the first of them, need not be asked for since an open question
    /// does, `Ok`; or up to where no question does, `Err`.
    pub fn asked_part(&self, pid: u32, image: PageRange) -> Result<Vaddr, Vaddr> {
        let own = self.questions.iter().filter(|question| question.pid == pid);
        let common = own.filter_map(|question| question.image.intersect(image));
        match common.min_by_key(|common| common.start()) {
            Some(first) if first.start() == image.start() => Ok(first.end()),
            Some(first) => Err(first.start()),
            None => Err(image.end()),
        }
    }

    /// When the oldest open question was asked.
    pub fn waits_since(&self) -> Option<Duration> {
        self.questions.front().map(|question| question.asked)
    }

    /// Whether the far end has pushed all that it would.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// From now on pages may be installed, so they may be pushed.
    pub fn may_install(&mut self) {
        self.may_install = true;
        if let Some((number, target)) = self.open.take() {
            self.answer_open(number, target);
        }
    }

    /// Asks for the pages `image` of `pid`, of which a thread waits for the first, and gives the frame
    /// for the connection for faults. Of a long range only the front is asked for.
    pub fn ask(&mut self, pid: u32, image: PageRange, tag: T, now: Duration) -> Vec<u8> {
        let pages = image.pages(self.page).get();
        let most = u64::from(FERRY_FAULT_PAGES_MAX).min(pages);
        let start = image.start().get();
        let fault = Fault {
            target: Target::Process(pid),
            vaddr: image.start(),
            around: PageRange::new(start, start + (most << self.page.shift())),
            in_full: self.earlier.is_distrusted(),
            // What has not come with the push does not come any more.
            once_more: self.closed,
        };
        self.asked += 1;
        let mut frame = Vec::new();
        fault.encode(self.asked, self.page, &mut frame);
        self.questions.push_back(Question {
            number: self.asked,
            tag,
            pid,
            image: fault.around,
            pages: most,
            asked: now,
        });
        frame
    }

    /// Everything that the caller wants is here.
    pub fn note_complete(&mut self) {
        self.through = true;
        // Nothing more is pushed than what is on its way.
        self.throttled = false;
        self.acknowledge_all();
        self.receiver.note_complete();
        // Whoever still asks learns that there is nothing to build on.
        self.earlier.drop_images();
    }

    /// Whether everything that the caller wants is here: there will be no more questions, and of what comes
    /// only the far end's last message is awaited.
    pub fn is_through(&self) -> bool {
        self.through
    }

    /// This side has failed for good.
    pub fn fail(&mut self, fail: Fail) {
        self.receiver.fail(fail);
    }

    /// What is to be written to the stream next, on whose connection `arrived` bytes have arrived.
    pub fn poll(&mut self, arrived: u64) -> Option<Vec<u8>> {
        let reply = self.receiver.poll(STREAM, arrived)?;
        let mut frame = Vec::new();
        reply.encode(&mut frame);
        Some(frame)
    }

    /// What was said last on the stream, once more.
    pub fn heartbeat(&self, arrived: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        self.receiver.ack(arrived).encode(&mut frame);
        frame
    }

    /// A frame came on the connection for faults.
    pub fn handle_answer(
        &mut self,
        kind: Kind,
        number: u64,
        body: &[u8],
    ) -> Result<Event<T>, PostcopyError> {
        match kind {
            Kind::FaultPages | Kind::FaultInPush => {}
            Kind::Fail => return Err(failed(body)),
            other => return Err(PostcopyError::NoAnswer(other)),
        }
        let front = self.questions.pop_front();
        let answered = front.filter(|question| question.number == number);
        let Some(Question { tag, .. }) = answered else {
            return Err(PostcopyError::Unasked);
        };
        if kind == Kind::FaultInPush {
            return Ok(Event::InPush(tag));
        }
        let batch = Batch::parse(body, self.page).map_err(ReadError::from)?;
        Ok(Event::Answer(tag, self.unverified(&batch, body)?))
    }

    /// A frame came on the stream.
    pub fn handle_pushed(
        &mut self,
        kind: Kind,
        number: u64,
        body: &[u8],
    ) -> Result<Event<T>, PostcopyError> {
        if !kind.is_numbered() {
            return self.handle_message(kind, body);
        }
        match self.receiver.handle_numbered(number, body.len() as u64)? {
            Arrival::Next => {}
            Arrival::Again => return Ok(Event::Other),
            Arrival::Held => return Err(PostcopyError::OutOfOrder),
        }
        // Frames are applied in order, and that one is not.
        if self.open.is_some() {
            return Err(PostcopyError::BeforeAnswer);
        }
        match self.receiver.read(kind, body)? {
            Message::Pages(batch) => {
                let unverified = self.unverified(&batch, body)?;
                self.unsettled = Some((number, (HEADER_BYTES + body.len()) as u64));
                return Ok(Event::Pushed(unverified));
            }
            // Before the processes are restored there is nowhere to put their pages.
            Message::Open(open) if !self.may_install => self.open = Some((number, open.target)),
            Message::Open(open) => self.answer_open(number, open.target),
            Message::Close(_) => {
                self.closed = true;
                self.answer(number, 0, StateId::NONE);
            }
        }
        Ok(Event::Other)
    }

    fn handle_message(&mut self, kind: Kind, body: &[u8]) -> Result<Event<T>, PostcopyError> {
        match kind {
            Kind::Bye => {
                self.receiver.bye_received();
                Ok(Event::Bye)
            }
            Kind::Fail => Err(failed(body)),
            Kind::WantHashes => {
                let wanted = WantHashes::decode(body, self.page).map_err(SessionError::from)?;
                self.earlier.ask(wanted)?;
                Ok(Event::Other)
            }
            other => Err(SessionError::Unexpected(other).into()),
        }
    }

    /// The pages of the last [`Event::Pushed`] are installed, or not wanted; `room` takes the next.
    pub fn settle(&mut self, room: Vec<u8>) {
        self.spare = room;
        if let Some((number, bytes)) = self.unsettled.take() {
            self.apply(Applied::pages(number, bytes));
        }
    }

    /// Acknowledges what is settled and answered as far as `limit` has earned it by `now_us` on its clock.
    pub fn acknowledge(&mut self, limit: &mut RateLimit, now_us: u64) {
        while let Some(applied) = self.backlog.next(limit, now_us) {
            self.confirm(&applied);
        }
    }

    fn acknowledge_all(&mut self) {
        while let Some(applied) = self.backlog.next_at_once() {
            self.confirm(&applied);
        }
    }

    fn apply(&mut self, applied: Applied) {
        match self.throttled {
            true => self.backlog.push(applied),
            false => self.confirm(&applied),
        }
    }

    fn confirm(&mut self, applied: &Applied) {
        self.receiver.applied(applied.number);
        if let Some((value, state)) = applied.answer {
            self.receiver.answer(applied.number, value, state);
        }
    }

    /// Of whose pages the far end waits for hashes, and from where on.
    pub fn wanted_hashes(&self) -> Option<WantHashes> {
        self.earlier.wanted()
    }

    /// Whether a question for hashes has just begun to be answered, or will be.
    pub fn begins_hashes(&self) -> bool {
        self.earlier.begins()
    }

    /// The next hashes of what is wanted; `step` is empty where there is nothing (any more). Gives a
    /// frame for the stream when there are so many hashes for it that it is `full`, or the answer is
    /// complete.
    pub fn send_hashes(&mut self, step: HashStep, full: usize) -> Option<Vec<u8>> {
        self.earlier.send(step, full)
    }

    /// Turns `unverified` into what may be installed. `read` says whether the caller has read all of
    /// [`UnverifiedDelivery::local`]; if not, or if they are not what the far end means, none of them is used, and from
    /// now on everything is asked for in full. Says with it whether the local pages can be used.
    pub fn complete(&mut self, unverified: UnverifiedDelivery, read: bool) -> (Delivery, bool) {
        self.earlier.complete(unverified, read)
    }

    /// Answers the OPEN `number` of `target`: whether there is a version to build on, and its name.
    fn answer_open(&mut self, number: u64, target: Target) {
        let state = self.earlier.version_of(target);
        let has_one = i32::from(state != StateId::NONE);
        self.answer(number, has_one, state);
    }

    fn answer(&mut self, number: u64, value: i32, state: StateId) {
        self.apply(Applied::question(number, value, state));
    }

    /// Verifies what `batch`, which lies in `body`, brings, and lays its pages out one behind the other.
    fn unverified(
        &mut self,
        batch: &Batch<'_>,
        body: &[u8],
    ) -> Result<UnverifiedDelivery, PostcopyError> {
        if batch.bases().any(|(_, kind)| kind == PageKind::Delta) {
            return Err(PostcopyError::Differences);
        }
        let Target::Process(pid) = batch.target else {
            return Err(PostcopyError::SharedMemory);
        };
        self.unpacker
            .unpack(batch, &[], &mut self.unpacked)
            .map_err(ReadError::from)?;
        let room = std::mem::take(&mut self.spare);
        Ok(UnverifiedDelivery::of(
            pid,
            batch,
            body,
            &self.unpacked,
            self.page,
            room,
        ))
    }
}

/// The far end has ended the session.
fn failed(body: &[u8]) -> PostcopyError {
    match Fail::decode(body) {
        Ok(fail) => PostcopyError::Ended(fail),
        Err(error) => SessionError::from(error).into(),
    }
}
