//! Rounds of pre-copy: the memory of a running tree, read from outside and without a freeze, is sent to the
//! forwarding page-server as if it were a dump.
//!
//! ```text
//! /proc/PID/maps, pagemap ──> memory (which pages) ──> process_vm_readv ──> sender ──> page-server --forward
//! ```
//!
//! The forwarder compares by hash with what the destination has, so a round sends what is new. A page that
//! changes while it is read may arrive torn; the final dump is compared by hash as well, and mends it.

mod dirty;
mod memory;
mod page_map;
mod sample;
mod sender;
mod track;
mod tree;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use pageferry::criu::header::{Target, Wire};
use pageferry::error::Result;
use pageferry::units::{PageRange, PageSize, Vaddr};

pub(crate) use dirty::watch_changes;
pub(crate) use memory::read_memory;
use memory::{Area, Contents, areas};
use page_map::each_word;
pub(crate) use sample::packed_share;
pub(crate) use sender::Sender;
pub(crate) use track::{Track, Trackers, undo};
pub(crate) use tree::{Member, Tree};

/// What one round read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RoundRead {
    /// Pages that were there.
    pub(crate) pages: u64,
    /// From the first byte to the forwarder's answer that all is stored.
    pub(crate) took: Duration,
}

/// Where the pages of a tree go, in the order in which a dump sends them.
pub(crate) trait PageSink {
    /// Pages that follow are of `target`.
    fn open(&mut self, target: Target) -> Result<()>;

    /// Whether a lazy restore may leave the pages that follow.
    fn lazily(&mut self, lazily: bool);

    /// Takes note of `pages` pages at `at`, which are as they were in the last round.
    fn holes_at(&mut self, at: Vaddr, pages: u64) -> Result<()>;

    /// Takes whole pages that lie at `at`.
    fn pages_at(&mut self, at: Vaddr, bytes: &[u8]) -> Result<()>;
}

/// Where rounds go, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forwarder {
    pub(crate) at: SocketAddr,
    pub(crate) page: PageSize,
    /// That of the CRIU which will restore on top of the round's images.
    pub(crate) wire: Wire,
    /// The most that is read; `None`: as much as goes.
    pub(crate) bytes_per_s: Option<u64>,
}

/// Reads all memory of `tree` once and sends it. `count` tells the pages so far.
pub(crate) fn run(
    tree: &Tree,
    to: Forwarder,
    trackers: &mut Trackers,
    count: &Arc<AtomicU64>,
) -> Result<RoundRead> {
    let start = Instant::now();
    let mut sender = Sender::connect(to.at, to.page, to.wire, to.bytes_per_s)?;
    sender.count_in(Arc::clone(count));
    trackers.begin_round(tree);
    read(tree, to.page, &mut sender, Some(trackers))?;
    sender.close()?;
    trackers.end_round();
    Ok(RoundRead {
        pages: sender.pages(),
        took: start.elapsed(),
    })
}

/// Reads all memory of `tree` once.
fn read(
    tree: &Tree,
    page: PageSize,
    sink: &mut impl PageSink,
    mut trackers: Option<&mut Trackers>,
) -> Result<()> {
    for member in tree.members() {
        sink.open(Target::Process(member.inner_pid))?;
        let areas = areas(member);
        let mut tracker = trackers.as_mut().and_then(|trackers| trackers.of(member));
        if let Some(tracker) = &mut tracker {
            let ranges: Vec<PageRange> = anonymous(&areas).collect();
            tracker.begin(member.pid, &ranges, page);
        }
        for area in areas {
            if let Contents::Private { anonymous } = area.contents {
                sink.lazily(anonymous);
                // Of other memory no page may be a hole.
                let tracker = tracker.as_deref_mut().filter(|_| anonymous);
                memory::send_private(member, area.range, page, sink, tracker)?;
            }
        }
    }
    for (pid, area) in segments(tree) {
        if let Contents::Shared { id, .. } = area.contents {
            sink.open(Target::Shmem(id))?;
            sink.lazily(false);
            memory::send_shared(pid, &area, page, sink)?;
        }
    }
    Ok(())
}

/// How many pages of private anonymous memory have been written since the last round read them; `None` if that is not
/// known of a process.
pub(crate) fn written_pages(tree: &Tree, trackers: &Trackers, page: PageSize) -> Option<u64> {
    let mut written = 0;
    for member in tree.members() {
        let areas = areas(member);
        let mut ranges = anonymous(&areas).peekable();
        // A zombie has no memory, and is not tracked.
        if ranges.peek().is_none() {
            continue;
        }
        let is_written = trackers.written_mark(member.pid)?;
        for range in ranges {
            each_word(member.pid, range, page, |_, word| {
                written += u64::from(memory::is_private(word) && is_written(word));
            });
        }
    }
    Some(written)
}

/// The private mappings of no file.
fn anonymous(areas: &[Area]) -> impl Iterator<Item = PageRange> {
    let is_anonymous = |area: &&Area| area.contents == Contents::Private { anonymous: true };
    areas.iter().filter(is_anonymous).map(|area| area.range)
}

/// One mapping of each shared segment: the one that shows the most of it.
fn segments(tree: &Tree) -> Vec<(i32, Area)> {
    let mut segments: Vec<(i32, Area)> = Vec::new();
    for member in tree.members() {
        let shared = areas(member)
            .into_iter()
            .filter(|area| matches!(area.contents, Contents::Shared { .. }));
        segments.extend(shared.map(|area| (member.pid, area)));
    }
    segments.sort_by_key(|(_, area)| (area.segment(), std::cmp::Reverse(area.range.bytes())));
    segments.dedup_by_key(|(_, area)| area.segment());
    segments
}

/// How much memory a dump of `tree` would hold now.
pub(crate) fn measure(tree: &Tree, page: PageSize) -> Size {
    let (mut private, mut of_files, mut locked, mut copied) = (0, 0, 0, 0);
    for member in tree.members() {
        for area in areas(member) {
            if let Contents::Private { anonymous } = area.contents {
                let pages = memory::present_pages(member.pid, area.range, page);
                private += pages;
                of_files += if anonymous { 0 } else { pages };
            }
        }
        locked += memory::locked_bytes(member.pid);
        copied += memory::shared_since_fork_bytes(member.pid);
    }
    let shared = segments(tree);
    let shared = shared
        .iter()
        .map(|(pid, area)| memory::shared_bytes(*pid, area));
    Size {
        private_bytes: private << page.shift(),
        eager_private_bytes: (of_files << page.shift()) + locked,
        shared_bytes: shared.sum(),
        copied_bytes: copied.min(private << page.shift()),
    }
}

/// Memory of a tree, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Size {
    /// Of the processes' own: a lazy restore can begin without it.
    pub(crate) private_bytes: u64,
    /// Of those, about how many a lazy restore needs first all the same: mlocked ones, and written pages of files.
    pub(crate) eager_private_bytes: u64,
    /// Shared segments: every restore needs them first.
    pub(crate) shared_bytes: u64,
    /// Of the processes' own: what they share since a fork, beyond the first copy. A lazy restore makes copies of it, a
    /// plain one shares it again.
    pub(crate) copied_bytes: u64,
}

impl Size {
    pub(crate) fn bytes(self) -> u64 {
        self.private_bytes + self.shared_bytes
    }

    /// What the restored processes take at the destination.
    pub(crate) fn restored_bytes(self, lazily: bool) -> u64 {
        match lazily {
            true => self.bytes(),
            false => self.bytes() - self.copied_bytes.min(self.private_bytes),
        }
    }

    /// What must be at the destination before the first instruction, whatever the mode.
    pub(crate) fn eager_bytes(self) -> u64 {
        self.shared_bytes + self.eager_private_bytes.min(self.private_bytes)
    }
}
