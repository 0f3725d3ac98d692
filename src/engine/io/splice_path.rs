//! Large frames on their way to a file: pages in a pipe, which this process never looks at.
//!
//! ```text
//! socket --splice--> pipe --splice--> pages-*.img
//! ```
//!
//! The first half moves references to pages and the second half copies them, once. A pipe goes from
//! hand to hand like a buffer, so that both halves never wait for each other inside the kernel.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

use crate::engine::io::driver::Link;
use crate::engine::io::writer::WriteJob;
use crate::error::Result;
use crate::image::writer::Destination;
use crate::limits::{RECEIVE_PIPE_BYTES, RECEIVE_PIPE_BYTES_MIN};

/// A pipe that pages pass through. It is empty whenever it is filled.
#[derive(Debug)]
pub(in crate::engine) struct Pipe {
    entrance: OwnedFd,
    exit: OwnedFd,
}

impl Pipe {
    /// A pipe, or `None` where the kernel gives none that is large enough to be of use: a user
    /// without privileges may have but so many pages in pipes (`fs.pipe-user-pages-soft`).
    pub(in crate::engine) fn new() -> io::Result<Option<Pipe>> {
        let (exit, entrance) = pipe2(OFlag::O_CLOEXEC)?;
        let wanted = i32::try_from(RECEIVE_PIPE_BYTES).unwrap_or(i32::MAX);
        // If it is refused, what there is may still do.
        let bytes = fcntl(&exit, FcntlArg::F_SETPIPE_SZ(wanted))
            .or_else(|_| fcntl(&exit, FcntlArg::F_GETPIPE_SZ))?;
        let is_large = usize::try_from(bytes).is_ok_and(|bytes| bytes >= RECEIVE_PIPE_BYTES_MIN);
        Ok(is_large.then_some(Pipe { entrance, exit }))
    }

    /// Takes bytes from the socket until `most` are here or the pipe is full, and says how many that
    /// are; fewer only at the end of the stream. Never takes more than the pipe's size, although what
    /// comes in large pieces of memory would leave room.
    pub(in crate::engine) fn fill(&self, link: &Link, most: usize) -> Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        let most = most.min(RECEIVE_PIPE_BYTES);
        let mut filled = 0;
        while filled < most {
            link.await_readable()?;
            match splice(
                &link.socket,
                None,
                &self.entrance,
                None,
                most - filled,
                flags,
            ) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                // The socket has something: then it is the pipe that has no room.
                Err(Errno::EAGAIN) if filled > 0 => break,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(link.lost(errno.into())),
            }
        }
        Ok(filled)
    }
}

/// A pipe with its bytes, ready to be written.
#[derive(Debug)]
pub(in crate::engine) struct SpliceWrite {
    pipe: Pipe,
    /// How many bytes are left in the pipe.
    bytes: usize,
    /// Where they go.
    to: Destination,
}

impl SpliceWrite {
    /// The `bytes` bytes in `pipe` go to `to`.
    pub(in crate::engine) fn new(pipe: Pipe, bytes: usize, to: Destination) -> SpliceWrite {
        SpliceWrite { pipe, bytes, to }
    }

    /// The pipe, for the next splice.
    pub(in crate::engine) fn into_pipe(self) -> Pipe {
        debug_assert_eq!(self.bytes, 0, "only an empty pipe is filled");
        self.pipe
    }
}

impl WriteJob for SpliceWrite {
    fn write(&mut self) -> Result<()> {
        while self.bytes > 0 {
            let part = &self.to.part;
            let at = i64::try_from(self.to.offset).map_err(|_| part.write_error(Errno::EFBIG))?;
            let flags = SpliceFFlags::SPLICE_F_MOVE;
            match splice(
                &self.pipe.exit,
                None,
                part.file(),
                Some(&mut { at }),
                self.bytes,
                flags,
            ) {
                Ok(0) => return Err(part.write_error(io::ErrorKind::WriteZero)),
                Ok(bytes) => {
                    self.bytes -= bytes;
                    self.to.offset += bytes as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(part.write_error(errno)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;

    fn connection() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (link(listener.accept().unwrap().0), peer)
    }

    fn link(socket: impl Into<OwnedFd>) -> Link {
        Link {
            socket: Arc::new(socket.into().into()),
            idle_timeout: None,
        }
    }

    /// `None`, with a log line, where the kernel gives none.
    fn pipe() -> Option<Pipe> {
        let pipe = Pipe::new().unwrap();
        if pipe.is_none() {
            eprintln!("skipped: pipes have little room here");
        }
        pipe
    }

    #[test]
    fn a_pipe_takes_no_more_than_it_is_told_and_says_when_the_stream_ends() {
        let (link, mut peer) = connection();
        let Some(pipe) = pipe() else { return };
        peer.write_all(b"0123456789").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(pipe.fill(&link, 4).unwrap(), 4);
        assert_eq!(pipe.fill(&link, 100).unwrap(), 6);
        assert_eq!(pipe.fill(&link, 100).unwrap(), 0);
    }

    #[test]
    fn a_pipe_without_room_waits_for_nobody() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let link = link(ours);
        let Some(pipe) = pipe() else { return };
        // Each of them takes as much room in the pipe as a page.
        let places = RECEIVE_PIPE_BYTES / 4096;
        for _ in 0..places + 10 {
            peer.write_all(&[7]).unwrap();
        }
        let filled = pipe.fill(&link, 1 << 20).unwrap();
        assert!((1..places + 10).contains(&filled), "{filled}");
    }

    #[test]
    fn a_pipe_holds_back_no_more_than_its_share() {
        let (link, mut peer) = connection();
        let Some(pipe) = pipe() else { return };
        let sender = std::thread::spawn(move || peer.write_all(&vec![7; 4 << 20]));
        let filled = pipe.fill(&link, 4 << 20).unwrap();
        assert!((1..=RECEIVE_PIPE_BYTES).contains(&filled), "{filled}");
        drop(link);
        // Its last bytes may have fitted into the socket before that was closed.
        let _ = sender.join().unwrap();
    }
}
