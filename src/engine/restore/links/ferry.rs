//! A source that pushes: a `page-server --forward-lazy`, over ferry.
//!
//! ```text
//! pushed ──> what of it is missing counts as on the way ──> install ──> settle (ACK)
//! faults ──> questions of up to 64 pages on their own connection ──> install
//! working set ──> asked for as faults are, beside the push
//! pushed all of it ──> what is still missing is asked for as faults are
//! ```
//!
//! A batch is 64 KiB: as large a step as any other here, after which faults are looked for.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;

use crate::criu::header::Target;
use crate::engine::restore::postcopy_client::{
    Delivery, Event, Failure, FerryDialer, LAST_FRAMES_TIMEOUT, Part, PostcopyClient,
};
use crate::engine::restore::{Restore, Token, rewatch, watch};
use crate::error::{Error, Kind, Result};
use crate::image::chain::{Chain, Missing};
use crate::lazy::planner::{PageOutcome, Planner, Request};
use crate::lazy::space::Class;
use crate::limits::FERRY_BATCH_BYTES_MAX;
use crate::units::PageRange;

/// Questions that are open at most.
const QUESTIONS_MAX: usize = 64;

/// What the push has left out is asked for up to here, bytes: faults come first.
const LEFT_OUT_BYTES_MAX: u64 = 256 << 10;

/// How long the source may take to confirm the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two looks while the end is awaited, ms.
const LOOK_AGAIN_MS: u16 = 100;

/// The session with a source that pushes.
#[derive(Debug)]
pub(super) struct Ferry {
    pub(super) dialer: FerryDialer,
    pub(super) client: PostcopyClient<Request>,
    /// Which of the two sockets is polled for room.
    awaits_room: [bool; 2],
}

impl Ferry {
    /// A new session, not connected yet.
    pub(super) fn new(dialer: FerryDialer) -> Ferry {
        Ferry {
            client: dialer.session(),
            dialer,
            awaits_room: [false; 2],
        }
    }

    pub(super) fn connect(&mut self) -> Result<()> {
        self.client.attach(self.dialer.dial()?);
        Ok(())
    }
}

/// How the pages of `part` came, of which some were asked for as `class`.
fn outcome_of(part: &Part, class: Class) -> PageOutcome {
    match part.local {
        true => PageOutcome::Local,
        false => PageOutcome::Fetched(class),
    }
}

impl Restore {
    fn client(&mut self) -> Option<&mut PostcopyClient<Request>> {
        self.links.ferry.as_mut().map(|ferry| &mut ferry.client)
    }

    /// The pages `missing` of `pid` that are with the source may be in images of an earlier round too.
    pub(in crate::engine::restore) fn build_on_earlier(
        &mut self,
        pid: u32,
        missing: &[PageRange],
    ) -> Result<()> {
        let (Some(earlier), Some(ferry)) = (&self.links.earlier_images, &mut self.links.ferry)
        else {
            return Ok(());
        };
        let target = Target::Process(pid);
        if !earlier.has_pagemap(target) {
            let dir = earlier.path().display();
            tracing::warn!("the earlier round in {dir} has nothing of pid {pid}");
            return Ok(());
        }
        let chain = Chain::open(earlier, target, Missing::Leave)?;
        ferry.client.build_on(pid, chain, missing.to_vec());
        Ok(())
    }

    pub(super) fn watch_ferry(&mut self) -> Result<()> {
        if let Some(ferry) = &mut self.links.ferry {
            ferry.awaits_room = [false; 2];
        }
        let sockets = self
            .links
            .ferry
            .as_ref()
            .and_then(|ferry| ferry.client.sockets());
        let tokens = [Token::StreamLink, Token::FaultLink];
        for (socket, token) in sockets.into_iter().flatten().zip(tokens) {
            watch(&self.poll, &socket, EpollFlags::EPOLLIN, token as u64)?;
        }
        Ok(())
    }

    /// Asks for what faults need.
    pub(super) fn ask_ferry_for_faults(&mut self) -> Result<()> {
        self.ask_ferry(u64::MAX, Planner::next_urgent).map(drop)
    }

    /// Asks for what faults need, then for what the push has left out.
    pub(super) fn ask_ferry_for_all(&mut self) -> Result<()> {
        self.ask_ferry_for_faults()?;
        // A source that was asked to push nothing never says that it has pushed all.
        let pushes_nothing = self.config.on_demand || self.config.record_working_set.is_some();
        let closed = pushes_nothing || self.client().is_some_and(|client| client.is_closed());
        let now_us = self.clock.now_us();
        if self.background.is_off() || self.background.is_throttled(now_us) {
            return Ok(());
        }
        let most = FERRY_BATCH_BYTES_MAX as u64;
        // Pages that are there already are not fetched again: few are left out, far from each other.
        let pages = LEFT_OUT_BYTES_MAX >> self.images.page().shift();
        let asked = match closed {
            true => self.ask_ferry(pages, |planner| planner.next_stream(most, 0))?,
            // The push has an order of its own.
            false if self.handover.may_fill() => {
                self.ask_ferry(pages, |planner| planner.next_of_working_set(most))?
            }
            false => 0,
        };
        self.background.spend(asked);
        Ok(())
    }

    /// Whether the next hashes may be counted and told now.
    pub(in crate::engine::restore) fn owes_hashes(&mut self) -> bool {
        let may_tell = self.handover.may_fill()
            && self.client().is_some_and(|client| client.may_send_hashes());
        may_tell && !self.background.is_throttled(self.clock.now_us())
    }

    /// Asks for what `next` names, as long as no more than `most_pages` are asked for. Returns for how many
    /// bytes it did.
    fn ask_ferry(
        &mut self,
        most_pages: u64,
        mut next: impl FnMut(&mut Planner) -> Option<Request>,
    ) -> Result<u64> {
        let Some(ferry) = &mut self.links.ferry else {
            return Ok(0);
        };
        let client = &mut ferry.client;
        let mut asked = 0;
        while client.is_attached()
            && client.questions() < QUESTIONS_MAX
            && client.asked_pages() < most_pages
            && let Some(request) = next(&mut self.planner)
        {
            let (pid, image) = (request.pid, request.image);
            // What is asked for already comes for all processes of one origin.
            let (unasked, others) = match client.asked_part(pid, image) {
                Err(end) => (PageRange::new(image.start().get(), end.get()), end),
                Ok(end) => {
                    let asked = PageRange::new(image.start().get(), end.get());
                    self.planner.await_push(request.space, asked);
                    if request.class == Class::Stream {
                        // It would be the next one again.
                        self.planner.await_push(request.space, image);
                        break;
                    }
                    (PageRange::new(end.get(), end.get()), end)
                }
            };
            if others < image.end() {
                let rest = PageRange::new(others.get(), image.end().get());
                self.planner.give_back_for(request.space, rest);
            }
            if !unasked.is_empty() {
                let request = Request {
                    image: unasked,
                    ..request
                };
                client.ask(pid, unasked, request);
                asked += unasked.bytes();
            }
        }
        if asked > 0 {
            self.flush_ferry()?;
        }
        Ok(asked)
    }

    fn flush_ferry(&mut self) -> Result<()> {
        let Some(client) = self.client() else {
            return Ok(());
        };
        match client.flush() {
            Ok(left) => self.watch_for_room(left),
            Err(error) => self.source_lost(Error::wrap(
                Kind::PeerLost,
                format!(
                    "the connection to the source at {} is lost",
                    self.links.peer()
                ),
                error,
            )),
        }
    }

    /// Wakes when the sockets that have something `left` take it, and only then.
    fn watch_for_room(&mut self, left: [bool; 2]) -> Result<()> {
        let Some(ferry) = &mut self.links.ferry else {
            return Ok(());
        };
        let before = std::mem::replace(&mut ferry.awaits_room, left);
        let tokens = [Token::StreamLink, Token::FaultLink];
        let sockets = ferry.client.sockets().into_iter().flatten().zip(tokens);
        for ((socket, token), (before, left)) in sockets.zip(before.into_iter().zip(left)) {
            if before != left {
                let mut flags = EpollFlags::EPOLLIN;
                flags.set(EpollFlags::EPOLLOUT, left);
                rewatch(&self.poll, &socket, flags, token as u64)?;
            }
        }
        Ok(())
    }

    /// Takes and installs the next thing that the source sent.
    pub(super) fn pump_ferry(&mut self) -> Result<()> {
        let may_fill = self.handover.may_fill();
        let Some(client) = self.client() else {
            return Ok(());
        };
        if may_fill {
            client.may_install();
        }
        let was_closed = client.is_closed();
        match client.next() {
            Ok(None) => {}
            Ok(Some(event)) => {
                let closes = client.is_closed() && !was_closed;
                self.links.down_since = None;
                self.take_event(event)?;
                if closes {
                    // What was to come with the push and did not.
                    self.planner.ask_for_all_again();
                }
            }
            Err(Failure::Lost(error)) => {
                let peer = self.links.peer();
                let text = format!("the source at {peer} hung up before all pages had arrived");
                return self.source_lost(Error::wrap(Kind::PeerLost, text, error));
            }
            Err(Failure::Over(error)) => return Err(error),
        }
        if self.owes_hashes() {
            let bytes = self.client().map_or(0, PostcopyClient::send_hashes);
            self.background.spend(bytes);
        }
        let now_us = self.clock.now_us();
        if let (Some(ferry), Some(limit)) = (&mut self.links.ferry, self.background.limit()) {
            ferry.client.acknowledge(limit, now_us);
        }
        self.flush_ferry()
    }

    fn take_event(&mut self, event: Event<Request>) -> Result<()> {
        match event {
            Event::Other | Event::Bye => Ok(()),
            Event::Pushed(delivery) => {
                self.install_pushed(&delivery)?;
                if let Some(client) = self.client() {
                    client.settle(delivery.plain);
                }
                Ok(())
            }
            Event::Answer(request, delivery) => self.install_answer(&request, &delivery),
            Event::InPush(request) => {
                self.planner.await_push(request.space, request.image);
                Ok(())
            }
        }
    }

    /// Installs pages wherever they are missing: in the process, and in children that it forked.
    fn install_pushed(&mut self, delivery: &Delivery) -> Result<()> {
        for part in &delivery.parts {
            let outcome = outcome_of(part, Class::Stream);
            let bytes = &delivery.plain[part.bytes.clone()];
            self.install_in_family(delivery.pid, None, part.image, bytes, outcome)?;
        }
        for range in &delivery.absent {
            self.planner.ask_again(delivery.pid, *range);
        }
        Ok(())
    }

    fn install_answer(&mut self, request: &Request, delivery: &Delivery) -> Result<()> {
        let first = request.image.start();
        if delivery.pid != request.pid || !delivery.covers(first) {
            let text = format!(
                "the source has no page at {first} of pid {}: its images and ours are not of one dump",
                request.pid
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        for part in &delivery.parts {
            let outcome = outcome_of(part, request.class);
            let bytes = &delivery.plain[part.bytes.clone()];
            // Whoever asked comes first.
            self.install(request.space, part.image, bytes, outcome)?;
            let asker = Some(request.space);
            self.install_in_family(request.pid, asker, part.image, bytes, outcome)?;
        }
        // What the answer has left out is asked for once more, also for others who counted on it.
        self.planner.give_back(request.pid, request.image);
        self.planner.ask_again(request.pid, request.image);
        self.send_requests()
    }

    /// Tells a source that pushes that this restore has failed: it need not wait for us.
    pub(in crate::engine::restore) fn fail_ferry(&mut self, why: &str) {
        let Some(client) = self.client() else {
            return;
        };
        let may_hear = client.is_attached();
        if client.fail(why) {
            return;
        }
        // The connection was lost before the message arrived, or after. Where nobody could be reached lately there is
        // nobody to tell.
        if (may_hear || self.links.attempt.is_some())
            && self.links.reach_once(LAST_FRAMES_TIMEOUT)
            && let Some(client) = self.client()
        {
            client.fail(why);
        }
    }

    /// Tells the source that everything is here, and waits until it has confirmed that.
    pub(super) fn close_ferry(&mut self) -> Result<()> {
        let timeout = self.links.reconnect_timeout.unwrap_or(CLOSE_TIMEOUT);
        let deadline = Instant::now() + timeout.max(CLOSE_TIMEOUT);
        let result = loop {
            match self.await_bye(deadline) {
                Ok(()) => break Ok(()),
                Err(Failure::Over(error)) => break Err(error),
                Err(Failure::Lost(error)) => {
                    tracing::warn!("the source hung up at the end: {error}; sending the end again");
                }
            }
            if let Err(error) = self.redial(deadline) {
                break Err(error);
            }
        };
        self.reset_links();
        result
    }

    /// Makes the connections anew, again and again until the deadline.
    fn redial(&mut self, deadline: Instant) -> Result<()> {
        let Some(ferry) = &mut self.links.ferry else {
            return Ok(());
        };
        ferry.client.detach();
        loop {
            match ferry.dialer.dial() {
                Ok(pair) => {
                    ferry.client.attach(pair);
                    return Ok(());
                }
                Err(error) if error.kind() == Kind::Protocol || Instant::now() >= deadline => {
                    return Err(error);
                }
                Err(_) => {
                    self.signals.check()?;
                    std::thread::sleep(super::reconnect::RECONNECT_PAUSE);
                }
            }
        }
    }

    fn await_bye(&mut self, deadline: Instant) -> std::result::Result<(), Failure> {
        let signals = &self.signals;
        let Some(client) = self.links.ferry.as_mut().map(|ferry| &mut ferry.client) else {
            return Ok(());
        };
        client.may_install();
        client.note_complete();
        loop {
            client.send_hashes();
            let left = client.flush()?;
            match client.next()? {
                Some(Event::Bye) => {
                    client.leave();
                    return Ok(());
                }
                // What is still pushed is not wanted any more.
                Some(Event::Pushed(delivery)) => client.settle(delivery.plain),
                Some(Event::Answer(..) | Event::InPush(_) | Event::Other) => {}
                None if Instant::now() >= deadline => {
                    let text = "it does not answer";
                    return Err(Failure::Over(Error::new(Kind::PeerLost, text)));
                }
                None => {
                    signals.check().map_err(Failure::Over)?;
                    let events = |left| match left {
                        true => PollFlags::POLLIN | PollFlags::POLLOUT,
                        false => PollFlags::POLLIN,
                    };
                    let sockets = client.sockets().into_iter().flatten().zip(left);
                    let mut fds: Vec<PollFd<'_>> = sockets
                        .map(|(socket, left)| PollFd::new(socket, events(left)))
                        .collect();
                    match poll(&mut fds, PollTimeout::from(LOOK_AGAIN_MS)) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(errno) => {
                            let error = std::io::Error::from(errno);
                            let text = "cannot wait for the source";
                            return Err(Failure::Over(Error::wrap(Kind::Io, text, error)));
                        }
                    }
                }
            }
        }
    }
}
