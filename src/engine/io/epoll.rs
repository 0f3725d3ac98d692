//! The driver that needs nothing special of the kernel: plain calls, epoll to wait, and a thread of
//! its own that writes while this one receives.
//!
//! ```text
//! session thread   recv             --batch-->   writer thread   pwritev
//!                  epoll: socket,   <-eventfd--
//! ```

use std::ops::Range;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::io::batch::Batch;
use crate::engine::io::driver::{Completion, Driver, Link, Operation, is_retryable};
use crate::engine::io::writer::Writer;
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
pub(in crate::engine) struct EpollDriver {
    link: Link,
    epoll: Epoll,
    pending: Option<Pending>,
    writer: Writer<Batch>,
}

impl EpollDriver {
    pub(in crate::engine) fn new(link: Link) -> Result<EpollDriver> {
        let failed = |errno: Errno| Error::wrap(Kind::Io, "cannot set up epoll", errno);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let written = EventFd::from_flags(flags).map_err(failed)?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(link.socket.as_ref(), readable).map_err(failed)?;
        // Edges alone: nobody needs to read the counter then.
        let edge = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1);
        epoll.add(&written, edge).map_err(failed)?;
        Ok(EpollDriver {
            link,
            epoll,
            pending: None,
            writer: Writer::start(move || {
                // Only wakes a session that waits for its socket; it looks at the results in any case.
                let _ = written.write(1);
            })?,
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
                    Err(error) if is_retryable(&error) => {
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
        self.writer.drain()
    }
}
