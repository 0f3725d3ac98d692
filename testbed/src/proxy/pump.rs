//! One connection of the proxy: a reader and a writer for each direction.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::prctl;
use socket2::SockRef;

use super::queue::{Piece, Queue};
use super::{Direction, Impairment, ImpairmentKind, Shared};

/// Bytes read at a time: small enough for a rate limit to be smooth.
const READ_BYTES: usize = 64 << 10;
/// How often a blocked writer looks whether the connection has ended.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);

/// A reader and a writer for each direction.
const THREADS: usize = 4;

#[derive(Debug)]
pub(super) struct Connection {
    client: TcpStream,
    server: TcpStream,
    to_server: Queue,
    to_client: Queue,
    /// Threads that have not ended.
    running: AtomicUsize,
}

/// Lets the close of the last handle of `stream` be a reset.
pub(super) fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

impl Connection {
    /// Starts the four threads of a connection.
    pub(super) fn start(
        client: TcpStream,
        server: TcpStream,
        shared: &Arc<Shared>,
    ) -> Vec<JoinHandle<()>> {
        for stream in [&client, &server] {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_write_timeout(Some(WRITE_TIMEOUT));
        }
        let connection = Arc::new(Connection {
            client,
            server,
            to_server: Queue::new(shared.link),
            to_client: Queue::new(shared.link),
            running: AtomicUsize::new(THREADS),
        });
        let mut connections = shared
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connections.push(Arc::clone(&connection));
        drop(connections);
        let impairment = shared.next_impairment();
        let mut threads = Vec::with_capacity(THREADS);
        for direction in [Direction::ToServer, Direction::ToClient] {
            let (reader, from) = (Arc::clone(&connection), Arc::clone(shared));
            let (writer, to) = (Arc::clone(&connection), Arc::clone(shared));
            threads.push(thread::spawn(move || {
                let impairment = impairment.filter(|impairment| impairment.direction == direction);
                reader.read(direction, impairment, &from);
                reader.forget_if_over(&from);
            }));
            threads.push(thread::spawn(move || {
                writer.write(direction, &to);
                writer.forget_if_over(&to);
            }));
        }
        threads
    }

    fn path(&self, direction: Direction) -> (&TcpStream, &Queue, &TcpStream) {
        match direction {
            Direction::ToServer => (&self.client, &self.to_server, &self.server),
            Direction::ToClient => (&self.server, &self.to_client, &self.client),
        }
    }

    /// Drops the list's hold on a connection whose last thread ends, so that its sockets are closed.
    fn forget_if_over(self: &Arc<Self>, shared: &Shared) {
        // Counted rather than told by who holds it: two threads that end at once hold it both.
        if self.running.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let mut connections = shared
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connections.retain(|connection| !Arc::ptr_eq(connection, self));
    }

    fn read(&self, direction: Direction, impairment: Option<Impairment>, shared: &Shared) {
        let (mut from, queue, _) = self.path(direction);
        let mut passed = 0u64;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let got = match from.read(&mut buffer) {
                Ok(0) => {
                    queue.push(Piece::End);
                    return;
                }
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) if queue.hides_resets() => {
                    queue.push(Piece::End);
                    return;
                }
                Err(_) => return self.end(ImpairmentKind::Reset),
            };
            let bytes = &mut buffer[..got];
            shared.flip(direction, bytes);
            let place = impairment.and_then(|impairment| {
                let offset = usize::try_from(impairment.after_bytes.checked_sub(passed)?).ok()?;
                (offset < got).then_some((offset, impairment.kind))
            });
            passed += got as u64;
            match place {
                None => {}
                Some((offset, ImpairmentKind::FlipBit)) => bytes[offset] ^= 1,
                Some((offset, kind)) => {
                    queue.push(Piece::Bytes(bytes[..offset].to_vec()));
                    return self.impair(direction, kind);
                }
            }
            if !queue.push(Piece::Bytes(bytes.to_vec())) {
                return;
            }
        }
    }

    fn impair(&self, direction: Direction, kind: ImpairmentKind) {
        match kind {
            ImpairmentKind::Reset | ImpairmentKind::FlipBit => self.end(ImpairmentKind::Reset),
            ImpairmentKind::Silence => {}
            ImpairmentKind::End => {
                // What was on its way still arrives; the other direction is heard no more.
                let (from, queue, _) = self.path(direction);
                queue.push(Piece::End);
                let _ = from.shutdown(Shutdown::Write);
            }
        }
    }

    fn write(&self, direction: Direction, shared: &Shared) {
        // Due times are kept to microseconds instead of the usual 50 µs of slack.
        let _ = prctl::set_timerslack(1);
        let (_, queue, mut to) = self.path(direction);
        while let Some(piece) = queue.pop() {
            let Piece::Bytes(bytes) = piece else {
                let _ = to.shutdown(Shutdown::Write);
                return;
            };
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                match to.write(rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(error) if is_passing(error.kind()) && !queue.is_closed() => {}
                    // It goes on reading: the other side hears of nothing but the end.
                    Err(_) if queue.hides_resets() => break,
                    Err(_) => return self.end(ImpairmentKind::Reset),
                }
            }
            shared
                .counter(direction)
                .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    }

    /// Ends both directions now: with a reset, or cleanly.
    pub(super) fn end(&self, kind: ImpairmentKind) {
        self.to_server.close();
        self.to_client.close();
        for stream in [&self.client, &self.server] {
            if kind == ImpairmentKind::End {
                let _ = stream.shutdown(Shutdown::Both);
            } else {
                reset(stream);
                // Wakes the reader without a word to the peer; the last close is the reset.
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
    }
}

fn is_passing(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut
    )
}
