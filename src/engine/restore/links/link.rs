//! One connection to a source: requests out, pages in, and how full it is.
//!
//! The receive buffer is what UFFDIO_COPY reads. What is unread between two receives, less than a page
//! and a header, moves to its front: so few bytes cost nothing, and the same memory is written again
//! and again, which a processor keeps in its cache.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::criu::fetch::{FetchError, Fetcher, Step};
use crate::criu::header::{GIVE_UP, Wire};
use crate::engine::io::transport::Transport;
use crate::lazy::planner::Request;
use crate::lazy::policy::Policy;
use crate::lazy::space::Class;
use crate::lazy::window::{RequestTiming, Window};
use crate::sys::disconnect;
use crate::units::{PageRange, PageSize};

/// The receive buffer, bytes: twice the largest step that is received with one call.
const BUFFER_BYTES: usize = 512 << 10;

/// What moves to the front of the buffer whenever there is room for more, bytes: the start of a page.
const REST_BYTES_MAX: usize = 8 << 10;

/// Requests for faults on the way at most, if the link does not hold more.
const URGENT_REQUESTS_MIN: u64 = 32;

/// How long a source may take to notice that it is given up: it finishes sending first.
pub(in crate::engine::restore) const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// A request and what was true when it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) request: Request,
    timing: RequestTiming,
}

/// What a step through the received bytes found.
pub(super) type LinkStep = Step<Sent>;

/// A connection.
#[derive(Debug)]
pub(super) struct Link {
    transport: Box<dyn Transport>,
    fetcher: Fetcher<Sent>,
    window: Window,
    page: PageSize,
    urgent: u64,
    out: Vec<u8>,
    /// The poll waits for room for the rest of `out`.
    pub(super) awaits_room: bool,
    received: Received,
    bytes_received: u64,
    /// The source was told how it ends, or is past hearing it.
    over: bool,
    /// It was closed in order: there is nothing to reset.
    in_order: bool,
}

/// The receive buffer. It is taken out of the link while its pages are installed, since faults that
/// come meanwhile use the link to ask.
#[derive(Debug, Default)]
pub(super) struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    pub(super) fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
    }
}

/// How an attempt to receive ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    Bytes,
    Nothing,
    End,
}

impl Link {
    pub(super) fn new(
        transport: Box<dyn Transport>,
        wire: Wire,
        page: PageSize,
        policy: &'static dyn Policy,
    ) -> Link {
        Link {
            transport,
            fetcher: Fetcher::new(wire, page),
            window: Window::with_policy(policy),
            page,
            urgent: 0,
            out: Vec::new(),
            awaits_room: false,
            received: Received {
                buffer: vec![0; BUFFER_BYTES],
                start: 0,
                end: 0,
            },
            bytes_received: 0,
            over: false,
            in_order: false,
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.transport.socket()
    }

    pub(super) fn window(&self) -> &Window {
        &self.window
    }

    pub(super) fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// Whether one more request for a fault may go out: a storm of them is held back here, where
    /// the faults of other processes can still go first.
    pub(super) fn has_room_for_urgent(&self) -> bool {
        self.urgent < URGENT_REQUESTS_MIN.max(self.window.product() >> self.page.shift())
    }

    /// Queues a request; [`Link::flush`] sends it.
    pub(super) fn ask(&mut self, request: Request, now_us: u64) {
        let timing = self.window.sent(request.image.bytes(), now_us);
        self.urgent += u64::from(request.class != Class::Stream);
        match request.class {
            Class::Stream => self.window.streamed(now_us),
            Class::Fault => self.window.faulted(now_us),
            Class::Sequential => self.window.sequential_fault(now_us),
            Class::Around => {}
        }
        let sent = Sent { request, timing };
        self.fetcher
            .get(request.pid, request.image, sent, &mut self.out);
    }

    /// Queues the CLOSE that says that everything has come.
    pub(super) fn close(&mut self) {
        self.over = true;
        self.fetcher.close(&mut self.out);
    }

    /// Sends what is queued. Returns whether something is left that the socket does not take now.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            match self.transport.send(&self.out) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => drop(self.out.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Receives what is there into the buffer, at most `most` bytes: far less than the buffer has.
    pub(super) fn receive(&mut self, most: usize) -> io::Result<Arrival> {
        let received = &mut self.received;
        let rest = received.end - received.start;
        if rest <= REST_BYTES_MAX || received.buffer.len() - received.end < most {
            received.buffer.copy_within(received.start..received.end, 0);
            received.end -= received.start;
            received.start = 0;
        }
        let room = (received.buffer.len() - received.end).min(most);
        let free = &mut received.buffer[received.end..received.end + room];
        loop {
            match self.transport.receive(free) {
                Ok(0) => return Ok(Arrival::End),
                Ok(bytes) => {
                    received.end += bytes;
                    self.bytes_received += bytes as u64;
                    return Ok(Arrival::Bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Arrival::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether more can be received without the socket being readable.
    pub(super) fn has_buffered(&self) -> bool {
        self.transport.has_buffered()
    }

    pub(super) fn take_received(&mut self) -> Received {
        std::mem::take(&mut self.received)
    }

    pub(super) fn put_received(&mut self, received: Received) {
        self.received = received;
    }

    /// What the unread bytes begin with; keeps the measures of the link.
    pub(super) fn step(
        &mut self,
        received: &Received,
        now_us: u64,
    ) -> Result<(usize, LinkStep), FetchError> {
        let (used, step) = self.fetcher.next(received.unread())?;
        match &step {
            Step::Answer { tag } => self.window.answered(tag.timing, now_us),
            Step::Complete { tag, asked, rest } => {
                self.urgent -= u64::from(tag.request.class != Class::Stream);
                if tag.request.class == Class::Fault {
                    self.window.fault_answered(now_us);
                }
                let got = asked.bytes() - rest.map_or(0, PageRange::bytes);
                self.window
                    .completed(tag.timing, asked.bytes(), got, now_us);
            }
            Step::Unavailable { tag, asked } => {
                self.urgent -= u64::from(tag.request.class != Class::Stream);
                if tag.request.class == Class::Fault {
                    self.window.fault_answered(now_us);
                }
                self.window.completed(tag.timing, asked.bytes(), 0, now_us);
            }
            Step::Incomplete | Step::Pages { .. } | Step::Closed(_) => {}
        }
        Ok((used, step))
    }

    /// Closes the connection in order: the source may take it for success.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.in_order = true;
        self.transport.close_in_order()
    }

    /// Tells the source that this client gives up, and waits a moment until it hangs up.
    fn give_up(&mut self) -> io::Result<()> {
        let Some(begun) = self.transport.begun() else {
            return Ok(());
        };
        // Requests of which nothing has gone out are not made any more.
        let begun = rest_of_headers(self.out.len(), begun, self.fetcher.header_bytes());
        self.out.truncate(begun);
        self.out.extend_from_slice(&GIVE_UP);
        let deadline = Instant::now() + GIVE_UP_TIMEOUT;
        let mut discarded = [0; 16 << 10];
        loop {
            let left = self.flush()?;
            match self.transport.receive(&mut discarded) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut flags = PollFlags::POLLIN;
                    flags.set(PollFlags::POLLOUT, left);
                    let rest = deadline.saturating_duration_since(Instant::now());
                    let rest = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
                    poll(&mut [PollFd::new(self.transport.socket(), flags)], rest)?;
                }
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Ok(());
            }
        }
    }
}

/// How much of `queued` bytes, which end with a whole header, must still go out when `begun` of them are on
/// their way: all of the headers that were begun.
fn rest_of_headers(queued: usize, begun: usize, header: usize) -> usize {
    let cut = queued % header;
    let whole = begun.saturating_sub(cut).div_ceil(header);
    (cut + whole * header).min(queued)
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.over {
            // A source that is past hearing it has its own reasons to fail.
            let _ = self.give_up();
        }
        if !self.in_order {
            disconnect::reset(self.transport.socket());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_were_begun_are_sent_to_their_end() {
        for (queued, begun, rest) in [
            (0, 0, 0),
            (96, 0, 0),
            (96 - 5, 0, 27),
            (96 - 5, 27, 27),
            (96 - 5, 28, 59),
            (96, 1, 32),
            (96, 96, 96),
        ] {
            assert_eq!(rest_of_headers(queued, begun, 32), rest, "{queued} {begun}");
        }
    }
}
