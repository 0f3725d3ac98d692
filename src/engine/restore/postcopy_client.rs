//! The receiver of post-copy, called by the loop of a restore: it has no thread of its own, and no call waits.
//! [`PostcopyReceiver`] decides what is sent and what a frame means; this module moves the bytes.
//!
//! ```text
//! stream ── OPEN, PAGES, CLOSE ──> next ──> Event: pages as plain bytes, checked
//!        <── ACK ──────────────── settle     when the caller has installed them, and, with a rate,
//!                                 acknowledge  when that has earned them
//!        ── WANT_HASHES ─────────> next
//!        <── HASHES ───────────── send_hashes  of what an earlier round has left here
//! fault  <── FAULT ─────────────── ask
//!        ── FAULT_PAGES ─────────> next
//! ```

mod earlier;
mod ferry_dialer;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::ferry::conn::{ConnError, Frame};
use crate::engine::ferry::connection_loop::{HEARTBEAT, send_last_frames};
use crate::error::{Error, Kind};
use crate::ferry::hash::PageHasher;
use crate::ferry::hello::{Fail, FailCode, SessionId, Window};
use crate::ferry::postcopy_receiver::{self, PostcopyError, PostcopyReceiver, UnverifiedDelivery};
pub(in crate::engine) use crate::ferry::postcopy_receiver::{Delivery, Part};
use crate::image::chain::Chain;
use crate::lazy::window::RateLimit;
use crate::units::{PageRange, PageSize, Vaddr};
use earlier::Earlier;
pub(in crate::engine) use ferry_dialer::{FerryDialer, FerryPair, Pushed};

/// After so long without an answer a connection is dead, whatever its sockets say.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the far end may take to receive the last message: processes may wait for what is local meanwhile.
pub(in crate::engine) const LAST_FRAMES_TIMEOUT: Duration = Duration::from_secs(1);

/// Hashes that go into a frame.
const HASHES_A_FRAME: usize = 1024;

/// What has come.
pub(in crate::engine) type Event<T> = postcopy_receiver::Event<T, Delivery>;

/// Why nothing more comes.
#[derive(Debug)]
pub(in crate::engine) enum Failure {
    /// The connections are gone: others may be made.
    Lost(ConnError),
    /// The session is over.
    Over(Error),
}

impl From<ConnError> for Failure {
    fn from(error: ConnError) -> Failure {
        Failure::Lost(error)
    }
}

impl From<PostcopyError> for Failure {
    fn from(error: PostcopyError) -> Failure {
        Failure::Over(match error {
            PostcopyError::Ended(fail) => {
                Error::wrap(Kind::PeerLost, "the far end has ended the session", fail)
            }
            wrong => Error::wrap(Kind::Protocol, "what the far end says is wrong", wrong),
        })
    }
}

/// A session. `T` is what the caller knows a question by.
#[derive(Debug)]
pub(in crate::engine) struct PostcopyClient<T> {
    receiver: PostcopyReceiver<T>,
    pair: Option<FerryPair>,
    earlier: Earlier,
    /// The far end has hung up on the connection for faults, behind the last of them.
    faults_over: bool,
    start: Instant,
    last_sent: Instant,
    received_before: u64,
}

impl<T> PostcopyClient<T> {
    fn new(
        page: PageSize,
        window: Window,
        hasher: PageHasher,
        session: SessionId,
    ) -> PostcopyClient<T> {
        PostcopyClient {
            receiver: PostcopyReceiver::new(page, window, hasher.clone(), session.into()),
            pair: None,
            earlier: Earlier::new(page, hasher),
            faults_over: false,
            start: Instant::now(),
            last_sent: Instant::now(),
            received_before: 0,
        }
    }

    /// What an earlier round has left of the pages `missing` of `pid`, sorted, is in `chain`: the far
    /// end shall send only the others.
    pub(in crate::engine) fn build_on(&mut self, pid: u32, chain: Chain, missing: Vec<PageRange>) {
        self.earlier.add(pid, chain, missing);
        self.receiver.build_on(pid);
    }

    /// From now on the far end goes no faster than the caller acknowledges.
    pub(in crate::engine) fn throttle(&mut self) {
        self.receiver.throttle();
    }

    /// Goes on over `pair`.
    pub(in crate::engine) fn attach(&mut self, pair: FerryPair) {
        self.receiver.use_hasher(pair.hasher.clone());
        self.receiver.attach();
        self.earlier.use_hasher(&pair.hasher);
        self.pair = Some(pair);
        self.faults_over = false;
        self.queue_replies();
    }

    /// Drops the connections, which are reset. What was asked is forgotten.
    pub(in crate::engine) fn detach(&mut self) {
        self.received_before = self.bytes_received();
        self.pair = None;
        self.receiver.detach();
    }

    /// Whether there are connections.
    pub(in crate::engine) fn is_attached(&self) -> bool {
        self.pair.is_some()
    }

    /// What to poll: the stream's socket, and the one for faults.
    pub(in crate::engine) fn sockets(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let pair = self.pair.as_ref()?;
        let faults = match self.faults_over {
            true => &pair.stream,
            false => &pair.fault,
        };
        Some([pair.stream.socket(), faults.socket()])
    }

    /// Received over all connections, bytes.
    pub(in crate::engine) fn bytes_received(&self) -> u64 {
        let now = self
            .pair
            .as_ref()
            .map_or(0, |pair| pair.stream.traffic().0 + pair.fault.traffic().0);
        self.received_before + now
    }

    /// Whether there is something to do although no socket is readable.
    pub(in crate::engine) fn has_work(&self) -> bool {
        self.pair
            .as_ref()
            .is_some_and(|pair| pair.stream.has_buffered() || pair.fault.has_buffered())
    }

    /// Hashes are wanted, and the stream takes what they are sent in.
    pub(in crate::engine) fn may_send_hashes(&self) -> bool {
        let wanted = self.receiver.wanted_hashes().is_some();
        let pair = self.pair.as_ref();
        wanted && pair.is_some_and(|pair| pair.stream.queued_bytes() == 0)
    }

    /// Hashes the next few pages of what the far end asks for, which takes no longer than to install
    /// them would. Returns how many bytes of them go out now.
    pub(in crate::engine) fn send_hashes(&mut self) -> u64 {
        if self.may_send_hashes()
            && let Some(wanted) = self.receiver.wanted_hashes()
            && let Some(pair) = &mut self.pair
        {
            let step = self.earlier.hash(wanted, self.receiver.begins_hashes());
            if let Some(frame) = self.receiver.send_hashes(step, HASHES_A_FRAME) {
                let bytes = frame.len() as u64;
                pair.stream.queue(Arc::new(frame));
                return bytes;
            }
        }
        0
    }

    /// How many questions are open.
    pub(in crate::engine) fn questions(&self) -> usize {
        self.receiver.questions()
    }

    /// What of the pages `image` of `pid` an open question asks for already: see
    /// [`PostcopyReceiver::asked_part`].
    pub(in crate::engine) fn asked_part(
        &self,
        pid: u32,
        image: PageRange,
    ) -> std::result::Result<Vaddr, Vaddr> {
        self.receiver.asked_part(pid, image)
    }

    /// How many pages were asked for that have not come.
    pub(in crate::engine) fn asked_pages(&self) -> u64 {
        self.receiver.asked_pages()
    }

    /// Whether the far end has pushed all that it would.
    pub(in crate::engine) fn is_closed(&self) -> bool {
        self.receiver.is_closed()
    }

    /// From now on pages may be installed, so they may be pushed.
    pub(in crate::engine) fn may_install(&mut self) {
        self.receiver.may_install();
        self.queue_replies();
    }

    /// Asks for the pages `image` of `pid`, of which a thread waits for the first.
    pub(in crate::engine) fn ask(&mut self, pid: u32, image: PageRange, tag: T) {
        if let Some(pair) = &mut self.pair {
            let now = self.start.elapsed();
            let frame = self.receiver.ask(pid, image, tag, now);
            pair.fault.queue(Arc::new(frame));
        }
    }

    /// Sends what is queued, and a heartbeat when it is time. Returns for each socket whether something is
    /// left that it does not take now.
    pub(in crate::engine) fn flush(&mut self) -> std::result::Result<[bool; 2], ConnError> {
        let Some(pair) = &mut self.pair else {
            return Ok([false; 2]);
        };
        if self.last_sent.elapsed() >= HEARTBEAT {
            self.last_sent = Instant::now();
            let frame = self.receiver.heartbeat(pair.stream.traffic().0);
            pair.stream.queue(Arc::new(frame));
        }
        let faults_left = !self.faults_over && pair.fault.flush()?;
        Ok([pair.stream.flush()?, faults_left])
    }

    /// Says that everything is here.
    pub(in crate::engine) fn note_complete(&mut self) {
        self.receiver.note_complete();
        self.earlier.drop_images();
        self.queue_replies();
    }

    /// Sends that this side has failed for good, and ends the connections. Returns whether the far end has confirmed it.
    pub(in crate::engine) fn fail(&mut self, why: &str) -> bool {
        self.receiver.fail(Fail::new(FailCode::Receiver, why));
        self.queue_replies();
        self.hang_up()
    }

    /// The far end has sent BYE: confirms it, and closes the connections in order.
    pub(in crate::engine) fn leave(&mut self) {
        self.queue_replies();
        self.hang_up();
    }

    /// Sends what is queued, and ends the connections. Returns whether the far end has confirmed it.
    fn hang_up(&mut self) -> bool {
        self.received_before = self.bytes_received();
        let pair = self.pair.take();
        let confirmed = pair.is_some_and(|pair| send_last_frames(pair.stream, LAST_FRAMES_TIMEOUT));
        self.receiver.detach();
        confirmed
    }

    /// The next thing that has come, faults first.
    pub(in crate::engine) fn next(&mut self) -> std::result::Result<Option<Event<T>>, Failure> {
        let Some(pair) = &mut self.pair else {
            return Ok(None);
        };
        let answer = match pair.fault.receive() {
            Err(_) if self.receiver.is_through() => {
                // A peer that is done hangs up everywhere, and its last message comes on the stream.
                self.faults_over = true;
                None
            }
            received => received?,
        };
        if let Some(Frame { kind, number, body }) = answer {
            let event = self.receiver.handle_answer(kind, number, &body)?;
            return Ok(Some(self.complete(event)));
        }
        if let Some(Frame { kind, number, body }) = pair.stream.receive()? {
            let event = self.receiver.handle_pushed(kind, number, &body)?;
            self.queue_replies();
            return Ok(Some(self.complete(event)));
        }
        let now = self.start.elapsed();
        let oldest = self.receiver.waits_since();
        if oldest.is_some_and(|since| now.saturating_sub(since) > ANSWER_TIMEOUT) {
            return Err(ConnError::Socket(std::io::ErrorKind::TimedOut.into()).into());
        }
        Ok(None)
    }

    /// Reads what is local of what has come.
    fn complete(&mut self, event: postcopy_receiver::Event<T>) -> Event<T> {
        match event {
            postcopy_receiver::Event::Pushed(unverified) => Event::Pushed(self.verify(unverified)),
            postcopy_receiver::Event::Answer(tag, unverified) => {
                Event::Answer(tag, self.verify(unverified))
            }
            postcopy_receiver::Event::InPush(tag) => Event::InPush(tag),
            postcopy_receiver::Event::Other => Event::Other,
            postcopy_receiver::Event::Bye => Event::Bye,
        }
    }

    fn verify(&mut self, mut unverified: UnverifiedDelivery) -> Delivery {
        let read = self.earlier.read(&mut unverified);
        let (delivery, usable) = self.receiver.complete(unverified, matches!(read, Ok(true)));
        if !usable {
            let why = match read {
                Ok(true) => "they are not what they were".to_owned(),
                Ok(false) => "they are not there any more".to_owned(),
                Err(error) => error.to_string(),
            };
            self.earlier.log_unusable(delivery.pid, &why);
        }
        delivery
    }

    /// The pages of the last [`Event::Pushed`] are installed, or not wanted; `room` takes the next.
    pub(in crate::engine) fn settle(&mut self, room: Vec<u8>) {
        self.receiver.settle(room);
        self.queue_replies();
    }

    /// With a throttle: acknowledges what `limit` has earned.
    pub(in crate::engine) fn acknowledge(&mut self, limit: &mut RateLimit, now_us: u64) {
        self.receiver.acknowledge(limit, now_us);
        self.queue_replies();
    }

    /// Queues what is to be sent on the stream.
    fn queue_replies(&mut self) {
        let Some(pair) = &mut self.pair else {
            return;
        };
        while let Some(frame) = self.receiver.poll(pair.stream.traffic().0) {
            self.last_sent = Instant::now();
            pair.stream.queue(Arc::new(frame));
        }
    }
}
