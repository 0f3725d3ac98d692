//! The driver that needs nothing special of the kernel: plain calls, epoll to wait, and a thread of
//! its own that writes while this one receives.
//!
//! ```text
//! session thread   recv             --batch-->   writer thread   pwritev
//!                  epoll: socket,   <-eventfd--
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::batch::Batch;
use super::driver::{Completion, Driver, Link, Operation, is_patience};
use crate::error::{Error, Kind, Result};
use crate::sys::buffers::Buffer;

/// What the session thread does with the socket when it waits.
#[derive(Debug)]
struct Pending {
    buffer: Buffer,
    window: Range<usize>,
}

/// The driver. See the module's text.
#[derive(Debug)]
pub(super) struct EpollDriver {
    link: Link,
    epoll: Epoll,
    pending: Option<Pending>,
    writer: Writer,
}

/// The writer thread, seen from the session's.
#[derive(Debug)]
struct Writer {
    /// `None` when the thread is to end.
    batches: Option<Sender<Batch>>,
    /// Batches as they were written.
    results: Receiver<Result<Batch>>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl EpollDriver {
    pub(super) fn new(link: Link) -> Result<EpollDriver> {
        let failed = |errno: Errno| Error::wrap(Kind::Io, "cannot set up epoll", errno);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let written = Arc::new(EventFd::from_flags(flags).map_err(failed)?);
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(link.socket.as_ref(), readable).map_err(failed)?;
        // Edges alone: nobody needs to read the counter then.
        let edge = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1);
        epoll.add(written.as_ref(), edge).map_err(failed)?;
        Ok(EpollDriver {
            link,
            epoll,
            pending: None,
            writer: Writer::start(written)?,
        })
    }

    /// Sleeps until the socket has something or the writer is done with a batch.
    fn sleep(&self) -> Result<()> {
        let timeout = match self.link.idle_timeout {
            None => EpollTimeout::NONE,
            Some(most) => EpollTimeout::try_from(most).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); 2];
        match self.epoll.wait(&mut events, timeout) {
            Ok(0) => Err(self.link.silent()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Error::wrap(Kind::Io, "cannot wait for the socket", errno)),
        }
    }

    /// Goes on with what the socket is for. `None`: nothing there yet.
    fn progress(&mut self) -> Result<Option<Completion>> {
        match self.pending.take() {
            None => Ok(None),
            Some(Pending { mut buffer, window }) => {
                let into = &mut buffer[window.clone()];
                match self.link.receive_now(into) {
                    Ok(bytes) => Ok(Some(Completion::Received { buffer, bytes })),
                    Err(error) if is_patience(&error) => {
                        self.pending = Some(Pending { buffer, window });
                        self.sleep()?;
                        Ok(None)
                    }
                    Err(error) => Err(self.link.lost(error)),
                }
            }
        }
    }
}

impl Driver for EpollDriver {
    fn submit(&mut self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Receive { buffer, window } => {
                self.pending = Some(Pending { buffer, window });
                Ok(())
            }
            Operation::Write(batch) => self.writer.submit(batch),
        }
    }

    fn wait(&mut self) -> Result<Completion> {
        loop {
            let done = match self.pending {
                Some(_) => self.writer.result_now()?,
                None => Some(self.writer.next_result()?),
            };
            if let Some(batch) = done {
                return Ok(Completion::Written(batch));
            }
            if let Some(completion) = self.progress()? {
                return Ok(completion);
            }
        }
    }

    fn drain(&mut self) -> Result<()> {
        while self.writer.in_flight > 0 {
            self.writer.next_result()?;
        }
        Ok(())
    }
}

impl Writer {
    fn start(written: Arc<EventFd>) -> Result<Writer> {
        let (batches, inbox) = channel();
        let (outbox, results) = channel();
        let thread = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || write_all(&inbox, &outbox, &written))
            .map_err(|error| Error::wrap(Kind::Io, "cannot start the writer thread", error))?;
        Ok(Writer {
            batches: Some(batches),
            results,
            in_flight: 0,
            thread: Some(thread),
        })
    }

    fn submit(&mut self, batch: Batch) -> Result<()> {
        self.in_flight += 1;
        let sent = self.batches.as_ref().map(|batches| batches.send(batch));
        match sent {
            Some(Ok(())) => Ok(()),
            // The thread ends by itself only behind an error.
            _ => self.next_result().map(|_| ()),
        }
    }

    /// The next batch that is written, waiting for it.
    fn next_result(&mut self) -> Result<Batch> {
        let result = self.results.recv().map_err(|_| Writer::gone())?;
        self.in_flight -= 1;
        result
    }

    /// The next batch that is written already.
    fn result_now(&mut self) -> Result<Option<Batch>> {
        use std::sync::mpsc::TryRecvError;
        match self.results.try_recv() {
            Ok(result) => {
                self.in_flight -= 1;
                result.map(Some)
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Writer::gone()),
        }
    }

    fn gone() -> Error {
        Error::new(Kind::Io, "the writer thread has ended")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the writer has been told by the panic hook.
            let _ = thread.join();
        }
    }
}

/// The writer thread: writes batches in their order until there are no more, or one fails.
fn write_all(batches: &Receiver<Batch>, results: &Sender<Result<Batch>>, written: &EventFd) {
    for batch in batches {
        let done = batch.write();
        let failed = done.is_err();
        let told = results.send(done.map(|()| batch)).is_ok();
        // Only wakes a session that waits for its socket; it looks at the results in any case.
        let _ = written.write(1);
        if failed || !told {
            return;
        }
    }
}
