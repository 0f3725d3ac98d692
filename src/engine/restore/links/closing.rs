//! The end of a session: the source is told that everything has come, and confirms it.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::link::{Arrival, Link};
use crate::criu::fetch::Step;
use crate::engine::restore::Restore;
use crate::engine::restore::install::{STEP_BYTES_MAX, offset};
use crate::engine::restore::signals::Signals;
use crate::error::{Error, Kind, Result};

/// How long the source may take to answer CLOSE: CRIU kills the source processes first.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

impl Restore {
    /// Tells the source that everything has come, and waits for its confirmation.
    pub(in crate::engine::restore) fn close_links(&mut self) -> Result<()> {
        let unconfirmed = format!(
            "all pages have come and the restored processes run, but the source at {} did not confirm the end: \
             if its processes run on as well, one of the two must be ended",
            self.links.peer()
        );
        let reached = self.links.await_attempt(&self.signals);
        reached.map_err(|error| error.within(unconfirmed.clone()))?;
        if self.links.ferry.is_some() {
            let result = self.close_ferry();
            return result.map_err(|error| error.within(unconfirmed));
        }
        if let Some(fallback) = self.links.fallback.take() {
            fallback.finish();
        }
        let Some(mut pair) = self.links.pair.take() else {
            return Ok(());
        };
        self.links.bytes_received_before += pair.bytes_received();
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        if let Some(mut fault) = pair.fault.take() {
            fault.link.close();
            // One that never answered belongs to nobody; what was asked over it came otherwise.
            let closed = if fault.proven {
                await_close(&mut fault.link, deadline, &self.signals)
            } else {
                fault.link.flush().map(|_| ())
            };
            if closed.and_then(|()| fault.link.finish()).is_err() {
                tracing::debug!("the connection for faults did not end in order");
            }
        }
        pair.stream.close();
        let result = await_close(&mut pair.stream, deadline, &self.signals)
            .and_then(|()| pair.stream.finish());
        result.map_err(|error| Error::wrap(Kind::PeerLost, unconfirmed, error))
    }
}

/// Sends what is queued and reads until the answer to CLOSE.
fn await_close(link: &mut Link, deadline: Instant, signals: &Signals) -> std::io::Result<()> {
    let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let interest = |flags| EpollEvent::new(flags, 0);
    poll.add(link.socket(), interest(EpollFlags::EPOLLIN))?;
    loop {
        let left_to_send = link.flush()?;
        let flags = if left_to_send {
            EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT
        } else {
            EpollFlags::EPOLLIN
        };
        poll.modify(link.socket(), &mut interest(flags))?;
        match link.receive(offset(STEP_BYTES_MAX))? {
            Arrival::End => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Arrival::Nothing => {
                signals.check().map_err(std::io::Error::other)?;
                if Instant::now() >= deadline {
                    return Err(std::io::ErrorKind::TimedOut.into());
                }
                let mut events = [EpollEvent::empty(); 1];
                match poll.wait(&mut events, EpollTimeout::from(100_u8)) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Arrival::Bytes => {
                let mut received = link.take_received();
                // Answers to requests of which nothing was missing any more may come first.
                let status = loop {
                    let (used, step) = link.step(&received, 0).map_err(std::io::Error::other)?;
                    received.consume(used);
                    match step {
                        Step::Closed(status) => break Some(status),
                        Step::Incomplete => break None,
                        _ => {}
                    }
                };
                link.put_received(received);
                match status {
                    Some(0) => return Ok(()),
                    Some(status) => {
                        let text = format!("the source answers the end with status {status}");
                        return Err(std::io::Error::other(text));
                    }
                    None => {}
                }
            }
        }
    }
}
