//! The connections to the source: one for the stream, and one for faults where the source takes a
//! second.
//!
//! CRIU's dump takes one connection in its life and answers in order, so there a fault goes over the
//! stream's connection. Our page-server takes many. Nothing on the wire tells the two apart before
//! the first message, so a second connection is made and the first fault is asked for over both: once
//! the second one answers, it is for faults alone.
//!
//! `link` is one connection that speaks CRIU's protocol, `ferry` the session with a source that pushes;
//! `source_dialer` connects, `reconnect` does so again, `closing` ends in order, `fallback` asks for what local
//! images cannot give.
//!
//! Invariants: there is a pair of connections or a session of ferry, never both; while neither is connected, an attempt
//! is under way or the source is lost.

mod closing;
mod fallback;
mod ferry;
pub(super) mod link;
mod reconnect;
mod source_dialer;

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::criu::fetch::Step;
use crate::criu::header::Wire;
use crate::engine::restore::install::offset;
use crate::engine::restore::postcopy_client::{FerryDialer, Pushed};
use crate::engine::restore::standby::StandbyMessage;
use crate::engine::restore::{Restore, RestoreConfig, Token, rewatch, unwatch, watch};
use crate::engine::start_wait::{StartWait, not_yet};
use crate::error::{Error, Kind, Result};
use crate::image::dir::ImageDir;
use crate::lazy::planner::{PageOutcome, Request};
use crate::lazy::policy::FaultPath;
use crate::lazy::space::{Class, FetchLimits};
use crate::lazy::window::CHUNK_BYTES_MIN;
use crate::units::PageSize;
use fallback::Fallback;
use ferry::Ferry;
use link::{Arrival, Link, LinkStep};
use source_dialer::{Dialed, Pair, SourceDialer, Which};

pub(super) use fallback::Question;
pub(super) use reconnect::RECONNECT_DEFAULT;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Links {
    dialer: Option<SourceDialer>,
    pair: Option<Pair>,
    /// In place of the pair: the session with a source that speaks ferry.
    ferry: Option<Ferry>,
    /// The source is one that can be reached again.
    ours: bool,
    reconnect_timeout: Option<Duration>,
    /// Since when the source has been out of reach or silent since it came back.
    down_since: Option<Instant>,
    attempt: Option<Receiver<Result<Dialed>>>,
    reconnected: Arc<EventFd>,
    /// Received over connections that are gone.
    bytes_received_before: u64,
    /// Asks for pages that local images should have and cannot give, on a connection of its own.
    fallback: Option<Fallback>,
    /// Images of an earlier round, where they can be of use.
    earlier_images: Option<ImageDir>,
    /// Answered by the source since more was last asked for behind an answer, bytes.
    unasked_bytes: u64,
}

impl Links {
    /// What there is to know of the source, if there is one, without a connection to it.
    pub(super) fn new(
        config: &RestoreConfig,
        wire: Wire,
        page: PageSize,
        earlier_images: Option<ImageDir>,
    ) -> Result<Links> {
        let dialer = config.source.clone().map(|peer| SourceDialer {
            peer,
            tls: config.tls.clone(),
            wire,
            page,
            policy: config.policy,
        });
        let reconnected = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::wrap(Kind::Io, "cannot make an eventfd", errno))?;
        Ok(Links {
            dialer,
            pair: None,
            ours: false,
            ferry: None,
            reconnect_timeout: config.reconnect_timeout,
            down_since: None,
            attempt: None,
            reconnected: Arc::new(reconnected),
            bytes_received_before: 0,
            fallback: None,
            earlier_images,
            unasked_bytes: 0,
        })
    }

    /// Whether the source is one that can be reached again.
    pub(super) fn is_ours(&self) -> bool {
        self.ours
    }

    /// The source is known to be one that can be reached again.
    pub(super) fn set_ours(&mut self) {
        self.ours = true;
    }

    /// Connects to the source, if there is one.
    pub(super) fn connect(&mut self, config: &RestoreConfig, wait: &mut StartWait) -> Result<()> {
        let hint = "is the source there, and does it serve pages (criu dump --lazy-pages, or page-server --lazy-pages)?";
        self.begin_session(config)?;
        let Some(dialer) = &self.dialer else {
            return Ok(());
        };
        dialer.peer.resolve()?;
        if let Some(ferry) = &mut self.ferry {
            wait.until(|| not_yet(ferry.connect()))?;
            tracing::info!("connected to the source at {} (ferry)", dialer.peer);
        } else {
            let pair = wait.until(|| not_yet(dialer.dial_pair()));
            let pair = pair.map_err(|error| error.within(hint))?;
            self.pair = Some(pair);
            tracing::info!(
                "connected to the source at {} (wire layout {})",
                dialer.peer,
                dialer.wire.name()
            );
        }
        Ok(())
    }

    /// Begins a session with a source that speaks ferry, without a connection yet.
    pub(super) fn begin_session(&mut self, config: &RestoreConfig) -> Result<()> {
        if let Some(SourceDialer {
            peer, tls, page, ..
        }) = self.dialer.as_ref().filter(|_| config.ferry)
        {
            let on_demand = config.on_demand || config.record_working_set.is_some();
            let pushed = match (on_demand, config.max_bandwidth) {
                (true, _) => Pushed::Nothing,
                (false, Some(rate)) => Pushed::AtRate(rate),
                (false, None) => Pushed::All,
            };
            let dialer = FerryDialer::new(peer.clone(), tls.clone(), *page, pushed)?;
            self.ferry = Some(Ferry::new(dialer));
            self.ours = true;
        }
        Ok(())
    }

    /// Readable when an attempt to reach the source again has ended.
    pub(super) fn reconnected(&self) -> BorrowedFd<'_> {
        self.reconnected.as_fd()
    }

    /// Received from the source so far, all connections together.
    pub(super) fn bytes_received(&self) -> u64 {
        let ferried = self
            .ferry
            .as_ref()
            .map_or(0, |ferry| ferry.client.bytes_received());
        let now = self.pair.as_ref().map_or(ferried, Pair::bytes_received);
        self.bytes_received_before + now
    }

    /// Whether pages are on the way that were asked for page by page.
    pub(super) fn has_in_flight(&self) -> bool {
        let is_full = |link: &Link| link.window().in_flight() > 0;
        self.pair.as_ref().is_some_and(|pair| {
            // A second connection that was never answered has its first question open for ever.
            let fault = pair.fault.as_ref().filter(|fault| fault.proven);
            is_full(&pair.stream) || fault.is_some_and(|fault| is_full(&fault.link))
        })
    }

    /// Whether the source was seen to be on this host or beside it. One that pushes is not asked.
    pub(super) fn is_near(&self) -> bool {
        let pair = self.pair.as_ref();
        pair.is_some_and(|pair| pair.stream.window().is_near())
    }

    pub(super) fn has_buffered(&self) -> bool {
        let ferry = self.ferry.as_ref();
        ferry.is_some_and(|ferry| ferry.client.has_work())
            || self
                .pair
                .as_ref()
                .is_some_and(|pair| pair.links().any(Link::has_buffered))
    }

    /// Until when the background stream holds back for a fault that is likely to come, µs.
    pub(super) fn holds_until_us(&self, now_us: u64) -> Option<u64> {
        self.pair.as_ref()?.stream.window().holds_until_us(now_us)
    }

    /// Whether the answer to a fault is due, or the next fault after one.
    pub(super) fn is_fault_due(&self, now_us: u64) -> bool {
        self.pair.as_ref().is_some_and(|pair| {
            let faults = pair
                .fault
                .as_ref()
                .map_or(&pair.stream, |fault| &fault.link);
            faults.window().is_fault_due(now_us)
        })
    }

    /// Whether lone faults are about.
    pub(super) fn is_faulting(&self, now_us: u64) -> bool {
        let pair = self.pair.as_ref();
        pair.is_some_and(|pair| pair.links().any(|link| link.window().is_faulting(now_us)))
    }

    /// Resets the connections, which nothing watches any more.
    pub(super) fn reset(&mut self) {
        let pair = self.pair.take();
        self.bytes_received_before += pair.as_ref().map_or(0, Pair::bytes_received);
        if let Some(ferry) = &mut self.ferry {
            ferry.client.detach();
        }
        self.attempt = None;
    }
}

impl Restore {
    pub(super) fn watch_links(&mut self) -> Result<()> {
        self.watch_ferry()?;
        self.hand_source_on();
        let Some(pair) = &self.links.pair else {
            return Ok(());
        };
        watch(
            &self.poll,
            &pair.stream.socket(),
            EpollFlags::EPOLLIN,
            Token::StreamLink as u64,
        )?;
        if let Some(fault) = &pair.fault {
            watch(
                &self.poll,
                &fault.link.socket(),
                EpollFlags::EPOLLIN,
                Token::FaultLink as u64,
            )?;
        }
        Ok(())
    }

    /// Resets the connections: the source keeps its memory.
    pub(super) fn reset_links(&mut self) {
        if let Some(pair) = &self.links.pair {
            for link in pair.links() {
                unwatch(&self.poll, &link.socket());
            }
        }
        self.links.reset();
    }

    /// Who stands by gives the connections up if this process is killed.
    fn hand_source_on(&mut self) {
        let Some(pair) = self.links.pair.take() else {
            return;
        };
        let source = |faults| StandbyMessage::Source { faults };
        self.notify_standby(source(false), Some(pair.stream.socket()));
        if let Some(fault) = &pair.fault {
            self.notify_standby(source(true), Some(fault.link.socket()));
        }
        self.links.pair = Some(pair);
    }

    /// How many bytes are fetched for one fault now.
    pub(super) fn fetch_limits(&self, now_us: u64) -> FetchLimits {
        let page = self.images.page();
        let path = match &self.links.pair {
            _ if self.links.ferry.is_some() => FaultPath::BesidePush,
            Some(pair) if !pair.has_fault_link() => {
                let window = pair.stream.window();
                FaultPath::SharedConnection {
                    near: window.is_near(),
                    chunk_bytes: window.chunk_bytes(now_us),
                }
            }
            _ => FaultPath::OwnConnection,
        };
        let missing_bytes = self.planner.total_pages() << page.shift();
        let policy = self.planner.policy();
        policy.fetch_limits(path, page, missing_bytes, self.config.on_demand)
    }

    /// Sends for what faults need, as long as the link takes it.
    pub(super) fn send_urgent(&mut self) -> Result<()> {
        if self.links.ferry.is_some() {
            return self.ask_ferry_for_faults();
        }
        let now_us = self.clock.now_us();
        let Some(pair) = &mut self.links.pair else {
            return Ok(());
        };
        let mut which = Which::Stream;
        if pair.has_fault_link() {
            which = Which::Fault;
        }
        let mut asked = false;
        while let Some(link) = pair.link(which).filter(|link| link.has_room_for_urgent()) {
            let Some(request) = self.planner.next_urgent() else {
                break;
            };
            link.ask(request, now_us);
            self.planner.sent(&request);
            asked = true;
            if let Some(fault) = pair.fault.as_mut().filter(|fault| !fault.asked) {
                fault.asked = true;
                fault.link.ask(request, now_us);
            }
        }
        if asked { self.flush_links() } else { Ok(()) }
    }

    /// Sends for what faults need, then for the background's next pages.
    pub(super) fn send_requests(&mut self) -> Result<()> {
        if self.links.ferry.is_some() {
            return self.ask_ferry_for_all();
        }
        self.send_urgent()?;
        if !self.handover.may_fill() || self.background.is_off() {
            return Ok(());
        }
        let now_us = self.clock.now_us();
        let mut asked = false;
        let mut lives = None;
        while let Some(pair) = &self.links.pair
            && pair.stream.window().has_room(now_us)
        {
            if self.background.is_throttled(now_us) {
                break;
            }
            let window = pair.stream.window();
            let window = (window.chunk_bytes(now_us), window.gap_bytes());
            let (chunk, gap) = self.background.chunk_and_gap(window, self.images.page());
            let Some(request) = self.planner.next_stream(chunk, gap) else {
                break;
            };
            // Small requests leave by the dozen: one look is for all of them.
            if lives != Some(request.space) && self.forget_if_ended(request.space) {
                continue;
            }
            lives = Some(request.space);
            let Some(pair) = &mut self.links.pair else {
                break;
            };
            self.planner.sent(&request);
            self.background.spend(request.image.bytes());
            pair.stream.ask(request, now_us);
            asked = true;
        }
        if asked { self.flush_links() } else { Ok(()) }
    }

    /// Sends what was asked for; what does not fit goes when the socket has room.
    fn flush_links(&mut self) -> Result<()> {
        for which in [Which::Fault, Which::Stream] {
            let Some(link) = self.links.pair.as_mut().and_then(|pair| pair.link(which)) else {
                continue;
            };
            match link.flush() {
                Ok(left) if left != link.awaits_room => {
                    link.awaits_room = left;
                    let mut flags = EpollFlags::EPOLLIN;
                    flags.set(EpollFlags::EPOLLOUT, left);
                    rewatch(&self.poll, &link.socket(), flags, which.token() as u64)?;
                }
                Ok(_) => {}
                Err(error) => self.link_failed(which, Some(error))?,
            }
        }
        Ok(())
    }

    /// Receives and installs what the source sent, a step from each connection.
    pub(super) fn pump_links(&mut self) -> Result<()> {
        if self.links.ferry.is_some() {
            return self.pump_ferry();
        }
        if self.links.pair.as_ref().is_some_and(Pair::awaits_room) {
            self.flush_links()?;
        }
        self.pump(Which::Fault)?;
        self.pump(Which::Stream)
    }

    fn pump(&mut self, which: Which) -> Result<()> {
        let most = offset(self.step_bytes());
        let Some(link) = self.links.pair.as_mut().and_then(|pair| pair.link(which)) else {
            return Ok(());
        };
        match link.receive(most) {
            Ok(Arrival::Bytes) => {}
            Ok(Arrival::Nothing) => return Ok(()),
            Ok(Arrival::End) => return self.link_failed(which, None),
            Err(error) => return self.link_failed(which, Some(error)),
        }
        self.links.down_since = None;
        self.install_received(which)
    }

    /// Installs what is in the receive buffer of a link. Faults that come meanwhile use the link.
    fn install_received(&mut self, which: Which) -> Result<()> {
        let Some(link) = self.links.pair.as_mut().and_then(|pair| pair.link(which)) else {
            return Ok(());
        };
        let mut received = link.take_received();
        let result = loop {
            // The connection may fail while its last pages are installed: then they are the last.
            let Some(link) = self.links.pair.as_mut().and_then(|pair| pair.link(which)) else {
                return Ok(());
            };
            let (used, step) = match link.step(&received, self.clock.now_us()) {
                Ok(found) => found,
                Err(error) => break Err(self.bad_source(error)),
            };
            let handled = self.handle_step(which, &step, received.unread());
            received.consume(used);
            if handled.is_err() || step_is_last(&step) {
                break handled;
            }
        };
        if let Some(link) = self.links.pair.as_mut().and_then(|pair| pair.link(which)) {
            link.put_received(received);
        }
        result
    }

    fn handle_step(&mut self, which: Which, step: &LinkStep, unread: &[u8]) -> Result<()> {
        match step {
            Step::Incomplete | Step::Closed(_) => Ok(()),
            Step::Answer { .. } => {
                if which == Which::Fault {
                    self.prove_fault_link();
                }
                Ok(())
            }
            Step::Pages { tag, image, bytes } => {
                let bytes = &unread[bytes.clone()];
                let Request { pid, space, .. } = tag.request;
                let outcome = PageOutcome::Fetched(tag.request.class);
                // Whoever asked comes first.
                self.planner.pushed(space, *image);
                self.install(space, *image, bytes, outcome)?;
                self.install_in_family(pid, Some(space), *image, bytes, outcome)
            }
            Step::Unavailable { tag, asked } => self.source_lacks(&tag.request, *asked),
            Step::Complete { tag, asked, rest } => {
                if let Some(rest) = rest {
                    self.planner.give_back(tag.request.pid, *rest);
                }
                // The source has more to do for as long as that: one send for many small answers.
                self.links.unasked_bytes += asked.bytes();
                let few = self.links.unasked_bytes < CHUNK_BYTES_MIN;
                if tag.request.class == Class::Stream && few {
                    return Ok(());
                }
                self.links.unasked_bytes = 0;
                self.send_requests()
            }
        }
    }

    fn prove_fault_link(&mut self) {
        let Some(fault) = self
            .links
            .pair
            .as_mut()
            .and_then(|pair| pair.fault.as_mut())
        else {
            return;
        };
        if !fault.proven {
            fault.proven = true;
            self.links.ours = true;
            self.note_ours();
            tracing::info!("the source takes several connections: faults have one of their own");
        }
    }
}

fn step_is_last(step: &LinkStep) -> bool {
    matches!(step, Step::Incomplete | Step::Closed(_))
}
