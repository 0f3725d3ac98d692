//! What a receiving session brought.

use std::fmt;
use std::time::Duration;

use crate::criu::header::Wire;
use crate::units::PageSize;

/// Pages of a session, by what was said about them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageCounts {
    /// Pages whose bytes were received.
    pub received: u64,
    /// Of these, pages that came compressed (zero pages of compressed frames among them).
    pub compressed: u64,
    /// Pages that were said to be in the parent.
    pub in_parent: u64,
    /// Pages that were only named: they stayed with the source.
    pub with_source: u64,
}

/// How received pages were stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KeptPages {
    /// Pages that are in the parent with the same bytes.
    pub same_as_parent: u64,
    /// Zero pages that take no room.
    pub zero: u64,
    /// Bytes in the pages files.
    pub stored_bytes: u64,
}

/// A session that is over.
#[derive(Clone, Debug)]
pub struct Received {
    /// Who sent.
    pub peer: String,
    /// The sender's header layout.
    pub wire: Wire,
    /// Processes and shared memory segments.
    pub targets: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// How they were stored.
    pub kept: KeptPages,
    /// Size of a page.
    pub page: PageSize,
    /// Bytes that came over the wire.
    pub wire_bytes: u64,
    /// From the first byte to the answer to CLOSE.
    pub elapsed: Duration,
}

impl Received {
    /// Bytes of the pages received.
    pub fn received_bytes(&self) -> u64 {
        self.pages.received << self.page.shift()
    }
}

impl fmt::Display for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pages, kept) = (&self.pages, &self.kept);
        let mib = self.received_bytes() as f64 / f64::from(1 << 20);
        let seconds = self.elapsed.as_secs_f64();
        write!(
            f,
            "{} pages ({mib:.1} MiB) of {} processes and segments received from {} in {seconds:.3} s, \
             {:.1} MiB/s: {} stored in {} bytes, {} same as parent, {} zero; {} came compressed; {} \
             said to be in the parent, {} left with the source",
            pages.received,
            self.targets,
            self.peer,
            mib / seconds.max(1e-6),
            pages.received - kept.same_as_parent - kept.zero,
            kept.stored_bytes,
            kept.same_as_parent,
            kept.zero,
            pages.compressed,
            pages.in_parent,
            pages.with_source,
        )
    }
}
