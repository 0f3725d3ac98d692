//! The loop of one connection: hands frames to its handler, sends what the handler has.
//!
//! ```text
//!          ┌── frames ──> handler.handle ──┐
//! Conn ────┤                               ├── the session's state, shared by all its connections
//!          └── frames <── handler.poll  <───┘
//!                            ^ Waker: another connection or thread has changed that state
//! ```
//!
//! A connection can be dead although its socket reports no error. So the loop ends it in two cases:
//!
//! - The handler waits for something, and nothing comes for several times [`HEARTBEAT`]. A receiver sends something
//!   at least once in that time.
//! - The receiver says how many bytes have arrived, and that number does not grow although more were sent.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::engine::ferry::conn::{Conn, ConnError, Frame};
use crate::engine::ferry::wakers::Waker;
use crate::ferry::hello::{Fail, Hello};

/// How often a receiver says something even if there is nothing new.
pub(in crate::engine) const HEARTBEAT: Duration = Duration::from_secs(1);

/// After so long without a message, a connection on which one is due is given up.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// How long what was sent may stay unacknowledged by the peer's kernel.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// How long the last frames of a session may take to arrive.
pub(in crate::engine) const LAST_FRAMES_TIMEOUT: Duration = Duration::from_secs(5);

/// Frames are queued up to here, bytes; what is beyond stays free for other connections.
const QUEUE_BYTES: usize = 512 << 10;

/// Frames are queued so many at a time before the socket is looked at again: making them may take a
/// while.
const FRAMES_A_TURN: usize = 4;

/// One end of a session, as the loops of its connections see it: they share it.
pub(in crate::engine) trait ConnectionHandler: Send + Sync {
    /// The connection of `stream` was welcomed, in place of any older one.
    fn stream_up(&self, stream: u16, peer: &Hello, waker: &Arc<Waker>);
    /// The connection that `waker` belongs to is gone.
    fn stream_down(&self, stream: u16, waker: &Arc<Waker>);
    /// The peer has ended the connection that `waker` belongs to in order, behind what was last said on it.
    fn peer_closed(&self, stream: u16, waker: &Arc<Waker>);
    /// A frame has come on the connection of `stream` that `waker` belongs to. Once that is replaced only what ends the
    /// session counts.
    fn handle(&self, stream: u16, waker: &Arc<Waker>, frame: Frame) -> FrameOutcome;
    /// The next frame to be sent on the connection of `stream` that `waker` belongs to, on which `arrived` bytes have
    /// arrived. There is none once it is replaced: what it took would be lost with it, while the session takes it
    /// for carried by the newer one.
    fn poll(&self, stream: u16, waker: &Arc<Waker>, arrived: u64) -> Option<Arc<Vec<u8>>>;
    /// Whether a message of the peer is due.
    fn awaits_message(&self) -> bool;
    /// A message that is sent when nothing else was for a [`HEARTBEAT`].
    fn heartbeat(&self, arrived: u64) -> Option<Arc<Vec<u8>>>;
    /// `bytes` took `busy` to leave while more was waiting.
    fn observe_link(&self, bytes: u64, busy: Duration);
    /// Whether a newer connection has taken the place of the one that `waker` belongs to.
    fn is_replaced(&self, stream: u16, waker: &Arc<Waker>) -> bool;
    /// Whether the session is over: the connection's loop then says what is left to say and ends.
    fn is_over(&self) -> bool;
}

/// A handler that dials.
pub(in crate::engine) trait DialingHandler: ConnectionHandler {
    /// Whether the session has ended here, so that the peer may hang up at any time.
    fn is_ending(&self) -> bool;
    /// Whether nobody needs to be reached any more: the peer has confirmed the end, or need not.
    fn is_done(&self) -> bool;
    /// The session cannot go on: the peer said so, or nobody could be reached for too long.
    fn lost(&self, why: Lost);
}

/// Why a session cannot go on.
#[derive(Debug)]
pub(in crate::engine) enum Lost {
    /// The peer has refused or ended it.
    Refused(Fail),
    /// There was no progress for too long; what was wrong at last.
    GivenUp(String),
    /// A signal asked this process to stop.
    Stopped,
}

/// What a frame has told.
#[derive(Clone, Copy, Default, Debug)]
pub(in crate::engine) struct FrameOutcome {
    /// The session has come forward.
    pub(in crate::engine) progress: bool,
    /// So many bytes have arrived at the other end of the connection.
    pub(in crate::engine) arrived: Option<u64>,
}

impl FrameOutcome {
    /// Nothing but whether the session has come forward.
    pub(in crate::engine) fn progress(progress: bool) -> FrameOutcome {
        FrameOutcome {
            progress,
            arrived: None,
        }
    }
}

/// Why a connection has ended.
#[derive(Debug)]
pub(in crate::engine) enum ConnectionEnd {
    /// The session is over.
    Over,
    /// The connection is gone.
    Lost(ConnError),
    /// The peer has said nothing for too long.
    Silent,
    /// A newer connection has taken its place.
    Replaced,
}

impl fmt::Display for ConnectionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectionEnd::Over => f.write_str("the session is over"),
            ConnectionEnd::Lost(error) => write!(f, "the connection is lost: {error}"),
            ConnectionEnd::Silent => f.write_str("the peer was silent for too long"),
            ConnectionEnd::Replaced => f.write_str("a newer connection has replaced this one"),
        }
    }
}

/// Prepares the socket of a connection: a peer that is gone is noticed in seconds.
pub(in crate::engine) fn prepare(conn: &Conn) {
    let socket = conn.socket();
    let socket = SockRef::from(&socket);
    // AF_UNIX sockets have no such option, and need none.
    if let Err(error) = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX)) {
        tracing::debug!("no timeout for what the peer does not acknowledge: {error}");
    }
}

/// Runs the connection of `stream` until it or the session ends. `progress` is called whenever the
/// session has come forward.
pub(in crate::engine) fn run(
    mut conn: Conn,
    stream: u16,
    handler: &dyn ConnectionHandler,
    waker: &Arc<Waker>,
    mut progress: impl FnMut(),
) -> ConnectionEnd {
    let mut connection = ConnectionLoop {
        handler,
        stream,
        waker,
        last_received: Instant::now(),
        arrived: (Instant::now(), 0),
        last_sent: Instant::now(),
        blocked: None,
    };
    let end = loop {
        match connection.turn(&mut conn, &mut progress) {
            Ok(Turn::Again) => {}
            Ok(Turn::Over) => break ConnectionEnd::Over,
            Ok(Turn::Silent) => break ConnectionEnd::Silent,
            Ok(Turn::Replaced) => break ConnectionEnd::Replaced,
            Err(error) => {
                match error {
                    ConnError::Socket(_) => connection.receive_last_frames(&mut conn),
                    // The peer's answer to the last message came in the turn that had sent it.
                    ConnError::End if conn.queued_bytes() == 0 && handler.is_over() => {
                        handler.peer_closed(stream, waker);
                    }
                    ConnError::End | ConnError::Frame(_) => {}
                }
                break ConnectionEnd::Lost(error);
            }
        }
    };
    match end {
        ConnectionEnd::Over => {
            if send_last_frames(conn, LAST_FRAMES_TIMEOUT) {
                handler.peer_closed(stream, waker);
            }
        }
        // Nobody listens there any more.
        ConnectionEnd::Lost(_) | ConnectionEnd::Silent | ConnectionEnd::Replaced => {
            conn.close(Instant::now());
        }
    }
    end
}

enum Turn {
    Again,
    Over,
    Silent,
    Replaced,
}

struct ConnectionLoop<'a> {
    handler: &'a dyn ConnectionHandler,
    stream: u16,
    waker: &'a Arc<Waker>,
    last_received: Instant,
    /// How many bytes have arrived at the other end, and when that was news or nothing was missing.
    arrived: (Instant, u64),
    last_sent: Instant,
    /// Since when the socket takes nothing more, and what had left by then.
    blocked: Option<(Instant, u64)>,
}

impl ConnectionLoop<'_> {
    fn turn(
        &mut self,
        conn: &mut Conn,
        progress: &mut impl FnMut(),
    ) -> std::result::Result<Turn, ConnError> {
        self.waker.clear();
        // Seen before the queue is filled: what is said last is still said.
        let over = self.handler.is_over();
        if self.handler.is_replaced(self.stream, self.waker) {
            return Ok(Turn::Replaced);
        }
        let more = self.fill_queue(conn);
        let left = self.flush(conn)?;
        if over && !more {
            return Ok(Turn::Over);
        }
        let readable = conn.has_buffered() || self.sleep(conn, left, more && !left)?;
        if readable {
            while let Some(frame) = conn.receive()? {
                self.last_received = Instant::now();
                let outcome = self.handler.handle(self.stream, self.waker, frame);
                if outcome.progress {
                    progress();
                }
                if let Some(arrived) = outcome.arrived
                    && (arrived > self.arrived.1 || arrived == conn.traffic().1)
                {
                    self.arrived = (self.last_received, arrived);
                }
                if conn.queued_bytes() == 0 {
                    self.fill_queue(conn);
                    self.flush(conn)?;
                }
            }
        }
        if !self.handler.awaits_message() {
            self.last_received = Instant::now();
            self.arrived.0 = self.last_received;
        }
        let stalled = self.arrived.0.elapsed() > SILENCE_MAX;
        if stalled || self.last_received.elapsed() > SILENCE_MAX {
            return Ok(Turn::Silent);
        }
        Ok(Turn::Again)
    }

    /// Receives what came before the connection broke: a peer that ends the session hangs up,
    /// and whatever is sent to it then fails.
    fn receive_last_frames(&self, conn: &mut Conn) {
        while let Ok(Some(frame)) = conn.receive() {
            let _outcome = self.handler.handle(self.stream, self.waker, frame);
        }
    }

    /// Queues what the handler has to say. Returns whether it may have more.
    fn fill_queue(&mut self, conn: &mut Conn) -> bool {
        for _ in 0..FRAMES_A_TURN {
            if conn.queued_bytes() >= QUEUE_BYTES {
                return true;
            }
            let Some(frame) = self.handler.poll(self.stream, self.waker, conn.traffic().0) else {
                if self.last_sent.elapsed() >= HEARTBEAT && conn.queued_bytes() == 0 {
                    self.last_sent = Instant::now();
                    self.handler
                        .heartbeat(conn.traffic().0)
                        .into_iter()
                        .for_each(|frame| conn.queue(frame));
                }
                return false;
            };
            conn.queue(frame);
            self.last_sent = Instant::now();
        }
        true
    }

    /// Sends, and measures the link while it holds something back.
    fn flush(&mut self, conn: &mut Conn) -> std::result::Result<bool, ConnError> {
        let left = conn.flush()?;
        let (_, out) = conn.traffic();
        if let Some((since, before)) = self.blocked.take() {
            self.handler.observe_link(out - before, since.elapsed());
        }
        if left {
            self.blocked = Some((Instant::now(), out));
        }
        Ok(left)
    }

    /// Waits until something may be done. Returns whether the socket is readable.
    fn sleep(&self, conn: &Conn, left: bool, hurry: bool) -> std::result::Result<bool, ConnError> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, left);
        let mut fds = [
            PollFd::new(conn.socket(), events),
            PollFd::new(self.waker.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = match hurry {
            true => PollTimeout::ZERO,
            false => PollTimeout::try_from(HEARTBEAT).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        }
        // An error or a hang-up is found out by receiving.
        let quiet = PollFlags::POLLOUT;
        Ok(fds[0]
            .revents()
            .is_some_and(|seen| !(seen - quiet).is_empty()))
    }
}

/// Sends what is queued and ends the connection, but waits for the peer no longer than `most`. Returns whether it
/// has received it: it has ended the connection as well.
pub(in crate::engine) fn send_last_frames(mut conn: Conn, most: Duration) -> bool {
    let deadline = Instant::now() + most;
    loop {
        match conn.flush() {
            Ok(false) => return conn.close(deadline),
            Ok(true) => {}
            Err(error) => {
                tracing::debug!("the last frames could not be sent: {error}");
                return false;
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(conn.socket(), PollFlags::POLLOUT)];
        // Whatever went wrong, the next try to send says.
        let _ = poll(&mut fds, timeout);
    }
}
