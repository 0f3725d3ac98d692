//! A second process that looks into /proc for a page server.
//!
//! ```text
//! page server ── pid, connection, whether it is a session's first question ──> proc-reader
//!             <────── the process that lacks pages, and its lazy-client ──────
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
    /// Not 0: it is a session's first.
    first: u32,
    /// In the innermost namespace.
    pid: u32,
    dump: ConnectionBytes,
}

/// An answer: the process that lacks pages and its lazy-client, pids of this host, or 0 twice.
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
            first: u32::from(first),
            pid,
            dump: DumpConnection::encode(dump),
        };
        stream.write_all(bytemuck::bytes_of(&question))?;
        let mut answer = [0; ANSWER_BYTES];
        stream.read_exact(&mut answer)?;
        let [process, handler] = bytemuck::pod_read_unaligned::<[i32; 2]>(&answer);
        Ok((process != 0).then_some(IncompleteProcess { process, handler }))
    }
}

/// Answers until the other end is closed.
fn answer(stream: &mut UnixStream) -> io::Result<()> {
    let mut seen = Seen::default();
    loop {
        let mut question = Question::zeroed();
        match stream.read_exact(bytemuck::bytes_of_mut(&mut question)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        if question.first != 0 {
            seen = Seen::look();
        }
        let found = seen.find(question.pid, DumpConnection::decode(question.dump));
        let found = found.map_or([0; 2], |lacking| [lacking.process, lacking.handler]);
        stream.write_all(bytemuck::bytes_of(&found))?;
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
        }
        let again = Arc::clone(&client);
        drop(ProcReader(client));
        answers.join().unwrap().unwrap();
        assert!(again.find(1, None, true).is_err());
    }
}
