//! The pages of a recording where a dump has those of its process when it begins to send: in pipes.
//!
//! ```text
//!   recording's file --splice--> pipes of 1 MiB --splice--> socket        no copy on the whole way
//!                      before the run            in the run
//! ```
//!
//! So the sender takes no more of the machine than CRIU's does, and the receiver is what is measured.
//! What is secured must be read, by CRIU too, and comes from the file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::pipe;

use super::case::Link;
use super::recording::Recording;

/// What CRIU fills its pipes up to, bytes.
const PIPE_BYTES: u64 = 1 << 20;

/// Descriptors that the program needs beside the pipes.
const OTHER_DESCRIPTORS: u64 = 256;

/// A pipe whose other end is closed: it ends where its pages do.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: OwnedFd,
    /// Bytes left in it.
    left: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) enum Pages {
    Piped(VecDeque<Pipe>),
    InFile(File),
}

impl Pages {
    /// Gets all pages of `recording` ready for a connection over `link`.
    ///
    /// # Errors
    /// So many pipes of this length cannot be had.
    pub(super) fn load(recording: &Recording, link: Link) -> Result<Pages> {
        let file = recording.pages_file()?;
        if link == Link::Tls {
            return Ok(Pages::InFile(file));
        }
        let bytes = recording.page_bytes();
        allow_descriptors(bytes.div_ceil(PIPE_BYTES) + OTHER_DESCRIPTORS)?;
        let mut pipes = VecDeque::new();
        let (mut loaded, mut offset) = (0, 0);
        while loaded < bytes {
            let wanted = PIPE_BYTES.min(bytes - loaded);
            pipes.push_back(Pipe::fill(&file, &mut offset, wanted)?);
            loaded += wanted;
        }
        Ok(Pages::Piped(pipes))
    }

    /// Sends the next pages, at most `most` bytes, to `socket`, and says how many bytes went.
    pub(super) fn splice(&mut self, socket: &TcpStream, most: u64) -> io::Result<u64> {
        let Pages::Piped(pipes) = self else {
            return Err(io::Error::other("pages in a file are not spliced"));
        };
        let pipe = pipes.front_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
        let length = usize::try_from(most.min(pipe.left)).unwrap_or(usize::MAX);
        let flags = SpliceFFlags::SPLICE_F_MOVE;
        let sent = splice(&pipe.reader, None, socket, None, length, flags)? as u64;
        if sent == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        pipe.left -= sent;
        if pipe.left == 0 {
            pipes.pop_front();
        }
        Ok(sent)
    }

    /// Reads the next `bytes` bytes of pages.
    pub(super) fn read(&mut self, bytes: u64, into: &mut Vec<u8>) -> Result<()> {
        let Pages::InFile(file) = self else {
            anyhow::bail!("pages in pipes are not read");
        };
        into.clear();
        let read = file.take(bytes).read_to_end(into)? as u64;
        ensure!(read == bytes, "the recording has become shorter");
        Ok(())
    }
}

impl Pipe {
    /// A pipe with the next `bytes` bytes of `file`, by reference.
    fn fill(file: &File, offset: &mut i64, bytes: u64) -> Result<Pipe> {
        let (reader, writer) = pipe().context("a pipe for pages")?;
        let room = i32::try_from(PIPE_BYTES)?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(room)).context("a pipe of 1 MiB")?;
        let mut left = bytes;
        while left > 0 {
            let length = usize::try_from(left)?;
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            match splice(file, Some(&mut *offset), &writer, None, length, flags) {
                Ok(0) => anyhow::bail!("the recording has become shorter"),
                Ok(moved) => left -= moved as u64,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("loading pages into a pipe"),
            }
        }
        Ok(Pipe {
            reader,
            left: bytes,
        })
    }
}

/// Lets the process have `count` descriptors.
fn allow_descriptors(count: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= count {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count))
        .with_context(|| format!("{count} pipes for pages"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use pageferry::units::PageSize;

    use super::super::recording::generate;
    use super::*;

    #[test]
    fn pages_leave_their_pipes_in_order() {
        let dir = testbed::test_dir::TestDir::new().unwrap();
        let recording = generate(&dir.path("recording"), 3, 100, PageSize::KIB_4).unwrap();
        let mut whole = Vec::new();
        let mut file = Pages::load(&recording, Link::Tls).unwrap();
        file.read(recording.page_bytes(), &mut whole).unwrap();
        assert!(file.read(1, &mut Vec::new()).is_err());

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let receiver = std::thread::spawn(move || {
            let mut received = Vec::new();
            receiver.read_to_end(&mut received).map(|_| received)
        });
        let mut pages = Pages::load(&recording, Link::Plain).unwrap();
        let mut left = recording.page_bytes();
        while left > 0 {
            left -= pages.splice(&sender, left.min(3 << 18)).unwrap();
        }
        assert!(pages.splice(&sender, 1).is_err());
        drop(sender);
        assert!(receiver.join().unwrap().unwrap() == whole);
    }
}
