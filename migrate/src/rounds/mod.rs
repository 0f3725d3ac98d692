//! Rounds of pre-copy: the memory of a running tree, read from outside and without a freeze, is sent to the
//! forwarding page-server as if it were a dump.
//!
//! ```text
//! /proc/PID/maps, pagemap ──> memory (which pages) ──> process_vm_readv ──> sender ──> page-server --forward
//! ```
//!
//! The forwarder compares by hash with what the destination has, so a round sends what is new. A page that
//! changes while it is read may arrive torn; the final dump is compared by hash as well, and mends it.

mod memory;
mod sender;
mod tree;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pageferry::criu::header::{Target, Wire};
use pageferry::error::Result;
use pageferry::units::PageSize;

use memory::{Area, Contents, areas};
use sender::Sender;
pub(crate) use tree::{Member, Tree};

/// What one round read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RoundRead {
    /// Pages that were there.
    pub(crate) pages: u64,
    /// From the first byte to the forwarder's word that all is stored.
    pub(crate) took: Duration,
}

/// Reads all memory of `tree` once and sends it to the forwarder at `forwarder`, at most `bytes_per_s`. The
/// `wire` is that of the CRIU which will restore on top of the round's images.
pub(crate) fn run(
    tree: &Tree,
    forwarder: SocketAddr,
    page: PageSize,
    wire: Wire,
    bytes_per_s: Option<u64>,
) -> Result<RoundRead> {
    let start = Instant::now();
    let mut sender = Sender::connect(forwarder, page, wire, bytes_per_s)?;
    let mut segments = Vec::new();
    for member in tree.members() {
        let (private, shared): (Vec<Area>, Vec<Area>) = areas(member)
            .into_iter()
            .partition(|area| area.contents == Contents::Private);
        segments.extend(shared.into_iter().map(|area| (member.pid, area)));
        sender.open(Target::Process(member.inner_pid))?;
        for area in private {
            memory::send_private(member, area.range, page, &mut sender)?;
        }
    }
    // One area for each segment: the one that shows the most of it.
    segments.sort_by_key(|(_, area)| (area.segment(), std::cmp::Reverse(area.range.bytes())));
    segments.dedup_by_key(|(_, area)| area.segment());
    for (pid, area) in segments {
        if let Contents::Shared { id, .. } = area.contents {
            sender.open(Target::Shmem(id.into()))?;
            memory::send_shared(pid, &area, page, &mut sender)?;
        }
    }
    sender.close()?;
    Ok(RoundRead {
        pages: sender.pages(),
        took: start.elapsed(),
    })
}

/// Pages of `tree` that a dump would hold now.
pub(crate) fn count_pages(tree: &Tree, page: PageSize) -> u64 {
    let of_member = |member: &Member| -> u64 {
        let private = areas(member)
            .into_iter()
            .filter(|area| area.contents == Contents::Private);
        private
            .map(|area| memory::present_pages(member.pid, area.range, page))
            .sum()
    };
    tree.members().iter().map(of_member).sum()
}
