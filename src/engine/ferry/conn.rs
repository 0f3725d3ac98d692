//! One connection that carries ferry: frames in, frames out, no waiting.
//!
//! ```text
//! socket ──> staging (headers, small frames) ──┐
//!    └─────> the rest of a large body ─────────┴──> Frame with a body of its own
//! ```
//!
//! A frame owns its body, because frames wait for their turn. The body is received into that memory. Only what comes
//! along with the header is copied, at most [`STAGING_BYTES`].

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::io::transport::Transport;
use crate::ferry::frame::{FrameError, HEADER_BYTES, Header, Kind};

/// Received at once in front of a large body, bytes.
const STAGING_BYTES: usize = 16 << 10;

/// A frame that has come, verified.
#[derive(Debug)]
pub(in crate::engine) struct Frame {
    /// What it says.
    pub(in crate::engine) kind: Kind,
    /// Its number.
    pub(in crate::engine) number: u64,
    /// What follows the header.
    pub(in crate::engine) body: Vec<u8>,
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub(in crate::engine) enum ConnError {
    /// The peer has ended the connection.
    #[error("the peer hung up")]
    End,
    /// The socket failed.
    #[error("the connection broke")]
    Socket(#[from] io::Error),
    /// The bytes are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A connection. See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct Conn {
    transport: Box<dyn Transport>,
    /// Where room for large bodies comes from.
    pool: Arc<BufferPool>,
    staging: Vec<u8>,
    start: usize,
    end: usize,
    /// A body that is being received, and how much of it is there.
    partial: Option<(Header, Vec<u8>, usize)>,
    /// Frames to be sent; the first one from `sent` on.
    queue: VecDeque<Arc<Vec<u8>>>,
    sent: usize,
    queued_bytes: usize,
    bytes_in: u64,
    bytes_out: u64,
}

impl Conn {
    pub(in crate::engine) fn new(transport: Box<dyn Transport>, pool: Arc<BufferPool>) -> Conn {
        Conn {
            transport,
            pool,
            staging: vec![0; STAGING_BYTES],
            start: 0,
            end: 0,
            partial: None,
            queue: VecDeque::new(),
            sent: 0,
            queued_bytes: 0,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// The socket, to poll.
    pub(in crate::engine) fn socket(&self) -> BorrowedFd<'_> {
        self.transport.socket()
    }

    /// Bytes received and sent so far.
    pub(in crate::engine) fn traffic(&self) -> (u64, u64) {
        (self.bytes_in, self.bytes_out)
    }

    /// Bytes that wait to be sent.
    pub(in crate::engine) fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Whether a frame may be there although the socket is not readable.
    pub(in crate::engine) fn has_buffered(&self) -> bool {
        self.transport.has_buffered() || self.end - self.start >= HEADER_BYTES
    }

    /// Queues whole frames for sending.
    pub(in crate::engine) fn queue(&mut self, frames: Arc<Vec<u8>>) {
        if !frames.is_empty() {
            self.queued_bytes += frames.len();
            self.queue.push_back(frames);
        }
    }

    /// Sends what the socket takes. Returns whether something is left.
    pub(in crate::engine) fn flush(&mut self) -> Result<bool, ConnError> {
        while let Some(front) = self.queue.front() {
            match self.transport.send(&front[self.sent..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(bytes) => {
                    self.sent += bytes;
                    self.queued_bytes -= bytes;
                    self.bytes_out += bytes as u64;
                    if self.sent == front.len() {
                        self.queue.pop_front();
                        self.sent = 0;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }

    /// The next frame, as far as it can be had without waiting.
    pub(in crate::engine) fn receive(&mut self) -> Result<Option<Frame>, ConnError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            match self.fill() {
                Ok(0) => return Err(ConnError::End),
                Ok(bytes) => self.bytes_in += bytes as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends the connection so that what was sent arrives: waits until `deadline` for the peer to end it as well.
    /// Says whether it has, behind all that was said to it.
    ///
    /// The kernel resets a connection that is closed while something is unread, or to which more comes then. A
    /// reset discards what has not arrived, here and in whatever relays the connection.
    pub(in crate::engine) fn close(mut self, deadline: Instant) -> bool {
        let ended = self.transport.close_in_order().and_then(|()| {
            // Others may hold the socket, to stop it: the peer shall see the end now.
            let socket = self.transport.socket();
            SockRef::from(&socket).shutdown(Shutdown::Write)
        });
        let closed = ended.and_then(|()| self.await_end(deadline));
        closed.unwrap_or_else(|error| {
            tracing::debug!("a connection could not be closed in order: {error}");
            false
        })
    }

    /// Discards what comes until the end of it, for as long as `deadline` says. Whether the end has come.
    fn await_end(&mut self, deadline: Instant) -> io::Result<bool> {
        loop {
            match self.transport.receive(&mut self.staging) {
                Ok(0) => return Ok(true),
                Ok(bytes) => self.bytes_in += bytes as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let mut polled = [PollFd::new(self.transport.socket(), PollFlags::POLLIN)];
                    match poll(&mut polled, left) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }

    /// Receives into the body that is under way, or else into the staging buffer.
    fn fill(&mut self) -> io::Result<usize> {
        if let Some((_, body, have)) = &mut self.partial {
            let bytes = self.transport.receive(&mut body[*have..])?;
            *have += bytes;
            return Ok(bytes);
        }
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let bytes = self.transport.receive(&mut self.staging[self.end..])?;
        self.end += bytes;
        Ok(bytes)
    }

    /// Takes a whole frame out of what has been received.
    fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.partial.is_none() && !self.begin_body()? {
            return Ok(None);
        }
        match self.partial.take() {
            Some((header, body, have)) if have == body.len() => {
                header.verify(&body)?;
                Ok(Some(Frame {
                    kind: header.kind,
                    number: header.number,
                    body,
                }))
            }
            partial => {
                self.partial = partial;
                Ok(None)
            }
        }
    }

    /// Reads a header from the staging buffer and moves what there is of its body.
    fn begin_body(&mut self) -> Result<bool, FrameError> {
        let staged = &self.staging[self.start..self.end];
        let Some((header, behind)) = staged.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let header = Header::decode(header)?;
        let have = behind.len().min(header.body_bytes);
        let mut body = match header.body_bytes {
            0..STAGING_BYTES => Vec::new(),
            _ => self.pool.take(),
        };
        body.resize(header.body_bytes, 0);
        body[..have].copy_from_slice(&behind[..have]);
        self.start += HEADER_BYTES + have;
        self.partial = Some((header, body, have));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, SocketAddr};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use proptest::prelude::*;
    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::engine::ferry::connection_loop::send_last_frames;
    use crate::engine::io::transport::PlainTransport;
    use crate::ferry::frame::OpenFrame;

    /// Longer than anybody here takes.
    const TIMEOUT: Duration = Duration::from_secs(60);

    fn pair() -> (UnixStream, Conn) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let transport = PlainTransport::new(Socket::from(theirs)).unwrap();
        (ours, Conn::new(Box::new(transport), Arc::default()))
    }

    fn receive(conn: &mut Conn) -> Result<Frame, ConnError> {
        loop {
            if let Some(frame) = conn.receive()? {
                return Ok(frame);
            }
            poll(
                &mut [PollFd::new(conn.socket(), PollFlags::POLLIN)],
                PollTimeout::NONE,
            )
            .unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn frames_come_out_as_they_went_in(
            sizes in prop::collection::vec(prop_oneof![0_usize..200, 10_000_usize..250_000], 1..8),
            piece in 1_usize..70_000,
        ) {
            let bodies: Vec<Vec<u8>> = sizes
                .iter()
                .map(|size| (0..=u8::MAX).cycle().step_by(7).take(*size).collect())
                .collect();
            let (mut socket, mut conn) = pair();
            let mut stream = Vec::new();
            for (number, body) in (1..).zip(&bodies) {
                let frame = OpenFrame::begin(&mut stream);
                stream.extend_from_slice(body);
                frame.finish(&mut stream, Kind::Pages, number);
            }
            let writer = std::thread::spawn(move || {
                stream.chunks(piece).for_each(|piece| socket.write_all(piece).unwrap());
            });
            for (number, body) in (1..).zip(&bodies) {
                let frame = receive(&mut conn).unwrap();
                prop_assert_eq!(frame.number, number);
                prop_assert!(frame.body == *body);
            }
            writer.join().unwrap();
            prop_assert!(matches!(receive(&mut conn), Err(ConnError::End)));
        }
    }

    #[test]
    fn what_the_socket_does_not_take_is_sent_later() {
        let (_, mut to) = pair();
        let (reader, writer) = UnixStream::pair().unwrap();
        let transport = PlainTransport::new(Socket::from(writer)).unwrap();
        let mut conn = Conn::new(Box::new(transport), Arc::default());
        std::mem::swap(&mut conn, &mut to);
        drop(conn);
        let frame = Arc::new(vec![7; 200_000]);
        for _ in 0..20 {
            to.queue(Arc::clone(&frame));
        }
        assert!(to.flush().unwrap(), "more than a socket holds");
        let expected = to.queued_bytes() as u64 + to.traffic().1;
        assert_eq!(expected, 20 * 200_000);
        let drain = std::thread::spawn(move || {
            std::io::copy(&mut { reader }, &mut std::io::sink()).unwrap()
        });
        while to.flush().unwrap() {
            poll(
                &mut [PollFd::new(to.socket(), PollFlags::POLLOUT)],
                PollTimeout::NONE,
            )
            .unwrap();
        }
        assert!(to.close(Instant::now() + TIMEOUT));
        assert_eq!(drain.join().unwrap(), expected);
    }

    #[test]
    fn the_last_word_arrives_although_the_peer_was_not_listened_to() {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Little of what is sent leaves before the peer reads.
        listener.set_recv_buffer_size(4 << 10).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        listener.bind(&any.into()).unwrap();
        listener.listen(1).unwrap();
        let ours = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // As sockets are made that dial.
        ours.set_linger(Some(Duration::ZERO)).unwrap();
        ours.connect(&listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&[0; 10_000]).unwrap();
        let transport = PlainTransport::new(ours).unwrap();
        let mut conn = Conn::new(Box::new(transport), Arc::default());
        conn.queue(Arc::new(vec![7; 50_000]));
        let closer = std::thread::spawn(move || send_last_frames(conn, TIMEOUT));
        let mut received = Vec::new();
        std::io::Read::read_to_end(&mut peer, &mut received).expect("no reset");
        assert_eq!(received.len(), 50_000);
        drop(peer);
        assert!(closer.join().unwrap(), "its end has come");
    }

    #[test]
    fn a_peer_that_does_not_end_its_side_is_not_waited_for() {
        let (_peer, conn) = pair();
        assert!(!conn.close(Instant::now()));
    }
}
