//! Counts what one session moves, for its summary and for the server's counters at once.

use std::time::{Duration, Instant};

use crate::criu::header::{PageFlags, Wire};
use crate::observe::received::{PageCounts, Received, StoredPages};
use crate::observe::traffic::{ReceivedKind, Traffic, cpu_time};
use crate::units::{PageCount, PageSize};

/// See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct SessionCounters<'a> {
    traffic: &'a Traffic,
    started: Instant,
    cpu_before: Duration,
    /// When CLOSE was answered: what comes after it holds up nobody.
    answered: Option<Instant>,
    wire: Option<Wire>,
    targets: u64,
    pages: PageCounts,
    kept: StoredPages,
    wire_bytes: u64,
}

impl<'a> SessionCounters<'a> {
    /// A session begins now.
    pub(in crate::engine) fn start(traffic: &'a Traffic) -> SessionCounters<'a> {
        SessionCounters {
            traffic,
            started: Instant::now(),
            cpu_before: cpu_time(),
            answered: None,
            wire: None,
            targets: 0,
            pages: PageCounts::default(),
            kept: StoredPages::default(),
            wire_bytes: 0,
        }
    }

    /// A process or segment was opened by a sender that speaks `wire`.
    pub(in crate::engine) fn opened(&mut self, wire: Wire) {
        self.wire = Some(wire);
        self.targets += 1;
    }

    /// `bytes` bytes came from the socket.
    pub(in crate::engine) fn came(&mut self, bytes: u64) {
        self.wire_bytes += bytes;
        self.traffic.came(bytes);
    }

    /// A run of pages was announced.
    pub(in crate::engine) fn run(&mut self, pages: PageCount, flags: PageFlags) {
        let (counter, kind) = if flags.has(PageFlags::PRESENT) {
            (&mut self.pages.received, ReceivedKind::Received)
        } else if flags.has(PageFlags::PARENT) {
            (&mut self.pages.in_parent, ReceivedKind::InParent)
        } else {
            (&mut self.pages.with_source, ReceivedKind::WithSource)
        };
        *counter += pages.get();
        self.traffic.received(kind, pages.get());
    }

    /// A page came compressed.
    pub(in crate::engine) fn compressed(&mut self) {
        self.pages.compressed += 1;
        self.traffic.received(ReceivedKind::Compressed, 1);
    }

    /// This is how pages were kept so far.
    pub(in crate::engine) fn kept(&mut self, kept: StoredPages) {
        let before = std::mem::replace(&mut self.kept, kept);
        let same = kept.same_as_parent - before.same_as_parent;
        self.traffic.received(ReceivedKind::SameAsParent, same);
        let same = kept.same_in_tree - before.same_in_tree;
        self.traffic.received(ReceivedKind::SameInTree, same);
        self.traffic
            .received(ReceivedKind::Zero, kept.zero - before.zero);
        self.traffic.stored(kept.stored_bytes - before.stored_bytes);
    }

    /// CLOSE is answered.
    pub(in crate::engine) fn answered(&mut self) {
        self.answered = Some(Instant::now());
    }

    /// The session with `peer`, which has ended.
    pub(in crate::engine) fn end(self, peer: &str, page: PageSize) -> Received {
        let ended = self.answered.unwrap_or_else(Instant::now);
        Received {
            peer: peer.to_owned(),
            wire: self.wire,
            targets: self.targets,
            pages: self.pages,
            kept: self.kept,
            page,
            wire_bytes: self.wire_bytes,
            elapsed: ended - self.started,
            cpu: cpu_time().saturating_sub(self.cpu_before),
        }
    }
}
