//! The first frames on a connection: HELLO, and WELCOME or FAIL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::ferry::conn::{Conn, ConnError, Frame};
use crate::engine::ferry::connection_loop::{self, ConnectionHandler, LAST_FRAMES_TIMEOUT};
use crate::engine::ferry::wakers::Waker;
use crate::engine::io::transport::transport;
use crate::error::Result;
use crate::ferry::frame;
use crate::ferry::hello::{Fail, Greeting, Hello};
use crate::stream::Stream;

/// How long a peer may take for its first frame.
pub(in crate::engine) const FIRST_WORD: Duration = Duration::from_secs(10);

/// Sends what is queued and waits for the peer's first frame.
pub(in crate::engine) fn first_frame(conn: &mut Conn) -> std::result::Result<Frame, ConnError> {
    let start = Instant::now();
    loop {
        let left_to_send = conn.flush()?;
        if let Some(frame) = conn.receive()? {
            return Ok(frame);
        }
        let Some(left) = FIRST_WORD.checked_sub(start.elapsed()) else {
            return Err(ConnError::Socket(std::io::ErrorKind::TimedOut.into()));
        };
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, left_to_send);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(conn.socket(), events)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        }
    }
}

/// Receives the greeting of a peer that has connected.
pub(in crate::engine) fn greeting(
    stream: Stream,
    pool: Arc<BufferPool>,
) -> std::result::Result<(Conn, Greeting), ConnError> {
    let mut conn = Conn::new(transport(stream)?, pool);
    connection_loop::prepare(&conn);
    let hello = first_frame(&mut conn)?;
    let greeting = Hello::decode(hello.kind, &hello.body)?;
    Ok((conn, greeting))
}

/// Queues the answer to a peer that is let in.
pub(in crate::engine) fn queue_welcome(conn: &mut Conn, welcome: &Hello) {
    let mut words = Vec::new();
    welcome.encode(frame::Kind::Welcome, &mut words);
    conn.queue(Arc::new(words));
}

/// Runs a connection that was let in and welcomed, until it or its session ends.
pub(in crate::engine) fn run_admitted(
    conn: Conn,
    session: &dyn ConnectionHandler,
    peer: &Hello,
) -> Result<()> {
    let waker = Waker::new()?;
    session.stream_up(peer.stream, peer, &waker);
    let end = connection_loop::run(conn, peer.stream, session, &waker, || {});
    session.stream_down(peer.stream, &waker);
    tracing::debug!("stream {} of session {}: {end}", peer.stream, peer.session);
    Ok(())
}

/// Says why, and hangs up.
pub(in crate::engine) fn refuse(mut conn: Conn, fail: &Fail) {
    let mut words = Vec::new();
    fail.encode(&mut words);
    conn.queue(Arc::new(words));
    connection_loop::send_last_frames(conn, LAST_FRAMES_TIMEOUT);
}
