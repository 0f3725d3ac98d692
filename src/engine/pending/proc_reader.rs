//! A second process that looks into /proc for a page server.
//!
//! ```text
//! page server ── pid, connection, whether it is a session's first question ──> proc-reader
//!             <────── the process that lacks pages, and its lazy-client ──────
//!             ── connection whose other end may hold bytes back ─────────────>
//!             <────── whether that was told to send them ────────────────────
//! ```
//!
//! Landlock, which confines the page server to its directories, hides other processes as well: their descriptors and
//! mappings cannot be seen any more. So a process is forked before. It opens no file of a peer's choice and has no
//! connection but this one.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock, PoisonError};

use bytemuck::{Pod, Zeroable};

use super::corked::CorkedSockets;
use super::dump_connection::{ConnectionBytes, DumpConnection};
use super::{IncompleteProcess, Seen};
use crate::error::{Error, Kind, Result};
use crate::sync::{Mutex, MutexGuard};
use crate::sys::process::close_all_but;

/// The one that looks for this process.
static OF_THIS_PROCESS: OnceLock<Arc<ReaderClient>> = OnceLock::new();

/// What is asked.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable, Debug)]
struct Question {
    /// [`CHECK`], [`CHECK_FIRST`] or [`PUSH`].
    what: u32,
    /// In the innermost namespace.
    pid: u32,
    dump: ConnectionBytes,
}

/// Whether a process lacks pages.
const CHECK: u32 = 0;
/// The same, as a session's first question.
const CHECK_FIRST: u32 = 1;
/// Have the dump send what its socket holds back.
const PUSH: u32 = 2;

/// An answer: the process that lacks pages and its lazy-client, pids of this host, or 0 twice. After [`PUSH`] 1 and 0 if
/// that could be done.
const ANSWER_BYTES: usize = 8;

/// Both ends of what connects the two processes, before there are two.
#[derive(Debug)]
pub struct ReaderEnds {
    server: UnixStream,
    reader: UnixStream,
}

/// The process that reads /proc, as seen from the page server. Dropping it lets that end.
#[derive(Debug)]
pub struct ProcReader(Arc<ReaderClient>);

/// One question at a time.
#[derive(Debug)]
pub(super) struct ReaderClient(Mutex<UnixStream>);

impl ReaderEnds {
    /// To be made before the fork that makes two processes of this one.
    pub fn new() -> Result<ReaderEnds> {
        let pair = UnixStream::pair().map_err(|error| {
            let text = "cannot reach a process that reads /proc";
            Error::wrap(Kind::Io, text, error)
        });
        let (server, reader) = pair?;
        Ok(ReaderEnds { server, reader })
    }

    /// What the page server keeps: from now on it asks.
    pub fn ask(self) -> ProcReader {
        let client = Arc::new(ReaderClient(Mutex::new(self.server)));
        // There is one in a process's life.
        let _ = OF_THIS_PROCESS.set(Arc::clone(&client));
        ProcReader(client)
    }

    /// What the other process is for: it gives up what it has inherited, does `confine`, and answers until the page
    /// server has ended.
    pub fn read(self, confine: impl FnOnce()) -> ! {
        let ReaderEnds { server, mut reader } = self;
        drop(server);
        // Nobody may wait for this process who waits for the page server's end, nor for a directory to be left.
        let _ = std::env::set_current_dir("/");
        confine();
        close_all_but(reader.as_fd());
        let ended = answer(&mut reader);
        std::process::exit(i32::from(ended.is_err()))
    }
}

impl Drop for ProcReader {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.stream().shutdown(Shutdown::Both);
    }
}

/// The process that looks for this one, if it has one.
pub(super) fn of_this_process() -> Option<&'static ReaderClient> {
    OF_THIS_PROCESS.get().map(AsRef::as_ref)
}

impl ReaderClient {
    fn stream(&self) -> MutexGuard<'_, UnixStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the process that is being dumped as `pid` over the connection `dump` lacks pages. The `first` time in a
    /// session all of /proc is looked through.
    pub(super) fn find(
        &self,
        pid: u32,
        dump: Option<DumpConnection>,
        first: bool,
    ) -> io::Result<Option<IncompleteProcess>> {
        let mut stream = self.stream();
        let question = Question {
            what: if first { CHECK_FIRST } else { CHECK },
            pid,
            dump: DumpConnection::encode(dump),
        };
        let [process, handler] = ask(&mut stream, &question)?;
        Ok((process != 0).then_some(IncompleteProcess { process, handler }))
    }

    /// Has the other end of the connection `dump` send what its socket holds back; tells whether it could be reached.
    pub(super) fn push(&self, dump: DumpConnection) -> io::Result<bool> {
        let question = Question {
            what: PUSH,
            pid: 0,
            dump: DumpConnection::encode(Some(dump)),
        };
        let [pushed, _] = ask(&mut self.stream(), &question)?;
        Ok(pushed != 0)
    }
}

fn ask(stream: &mut UnixStream, question: &Question) -> io::Result<[i32; 2]> {
    stream.write_all(bytemuck::bytes_of(question))?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer)?;
    Ok(bytemuck::pod_read_unaligned(&answer))
}

/// Answers until the other end is closed.
fn answer(stream: &mut UnixStream) -> io::Result<()> {
    let mut seen = Seen::default();
    let mut corked = CorkedSockets::default();
    loop {
        let mut question = Question::zeroed();
        match stream.read_exact(bytemuck::bytes_of_mut(&mut question)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let dump = DumpConnection::decode(question.dump);
        let answer = if question.what == PUSH {
            let pushed = dump.is_some_and(|dump| {
                corked.push(dump, || seen.tracers()) || {
                    // A dump that began since, or that has named no process yet.
                    seen = Seen::look();
                    corked.push(dump, || seen.tracers())
                }
            });
            [i32::from(pushed), 0]
        } else {
            if question.what == CHECK_FIRST {
                seen = Seen::look();
            }
            let found = seen.find(question.pid, dump);
            found.map_or([0; 2], |lacking| [lacking.process, lacking.handler])
        };
        stream.write_all(bytemuck::bytes_of(&answer))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_answered_until_nobody_asks() {
        let ReaderEnds { server, mut reader } = ReaderEnds::new().unwrap();
        let answers = std::thread::spawn(move || answer(&mut reader));
        let client = Arc::new(ReaderClient(Mutex::new(server)));
        for first in [true, false, true] {
            assert_eq!(client.find(std::process::id(), None, first).unwrap(), None);
            let nowhere = "127.0.0.1:1".parse().unwrap();
            assert!(
                !client
                    .push(DumpConnection::between(nowhere, nowhere))
                    .unwrap()
            );
        }
        let again = Arc::clone(&client);
        drop(ProcReader(client));
        answers.join().unwrap().unwrap();
        assert!(again.find(1, None, true).is_err());
    }
}
