//! What is new since the last round: the whole memory compared by hash, or the pages that the kernel marks as
//! written.
//!
//! ```text
//! hash         every page is read, and the forwarder compares: works everywhere
//! soft-dirty   /proc/PID/clear_refs, bit 55 of /proc/PID/pagemap
//! wp           a userfaultfd made in the process (takeover), write protection without messages, PAGEMAP_SCAN
//! ```
//!
//! A tracker saves the reading of pages that nobody wrote; it decides nothing about memory at the destination. The
//! last dump is compared by hash page for page, so a write that a tracker misses is found then.
//!
//! Tracked is private anonymous memory. Other memory has no holes to an earlier round (see `memory`), or is written
//! by ways that no tracker of one process sees.

mod takeover;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use pageferry::error::{Error, Kind, Result};
use pageferry::sys::write_tracking::{self, WriteTracking, has_soft_dirty};
use pageferry::units::{PageRange, PageSize};

pub(crate) use takeover::undo;

use super::page_map::each_word;
use super::tree::{Member, Tree};

/// Values of `--track`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Track {
    /// The first of wp, soft-dirty and hash that works
    Auto,
    /// The kernel's soft-dirty bits: no cost but a fault at the first write to a page
    SoftDirty,
    /// Write protection by userfaultfd (Linux 6.7, x86_64)
    Wp,
    /// Read everything, and compare by hash
    Hash,
}

impl Track {
    /// Its name, as `--track` spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Track::Auto => "auto",
            Track::SoftDirty => "soft-dirty",
            Track::Wp => "wp",
            Track::Hash => "hash",
        }
    }
}

/// The trackers of all processes of a tree. Dropping it leaves nothing registered.
#[derive(Debug)]
pub(crate) struct Trackers {
    how: Track,
    /// Where a takeover under way is written down.
    dir: PathBuf,
    members: BTreeMap<i32, Tracker>,
}

/// The tracker of one process.
#[derive(Debug)]
pub(super) struct Tracker {
    method: Method,
    /// Pages of the last round, as addresses; their contents are at the destination.
    sent: Vec<(u64, u64)>,
    /// The same of the round that is under way.
    sending: Vec<(u64, u64)>,
}

#[derive(Debug)]
enum Method {
    Hash,
    /// Pages that had been written when the round began, addresses in order.
    SoftDirty(Vec<(u64, u64)>),
    Wp(WriteTracking),
}

impl Trackers {
    /// Prepares what `wanted` needs. `dir` is the migration's directory.
    ///
    /// # Errors
    /// A method that was asked for by name does not work here.
    pub(crate) fn new(wanted: Track, page: PageSize, dir: &Path) -> Result<Trackers> {
        let works = |track| match track {
            Track::Wp => cfg!(target_arch = "x86_64") && write_tracking::is_supported(),
            Track::SoftDirty => has_soft_dirty(page.shift()),
            Track::Hash | Track::Auto => true,
        };
        let how = match wanted {
            Track::Auto if works(Track::Wp) => Track::Wp,
            Track::Auto if works(Track::SoftDirty) => Track::SoftDirty,
            Track::Auto => Track::Hash,
            named if works(named) => named,
            named => {
                let text = format!(
                    "--track {}: this kernel or machine does not have it (--track auto takes what works)",
                    named.name()
                );
                return Err(Error::new(Kind::Unsupported, text));
            }
        };
        tracing::info!("pages that change are found by --track {}", how.name());
        Ok(Trackers {
            how,
            dir: dir.to_owned(),
            members: BTreeMap::new(),
        })
    }

    /// The method that is used; single processes may fall back to `hash`.
    pub(crate) fn how(&self) -> Track {
        self.how
    }

    /// Begins a round: processes that are new get trackers, those of processes that have ended go.
    pub(super) fn begin_round(&mut self, tree: &Tree) {
        let alive = |pid: &i32| tree.members().iter().any(|member| member.pid == *pid);
        self.members.retain(|pid, _| alive(pid));
        for member in tree.members() {
            if !self.members.contains_key(&member.pid) {
                let method = self.method(member);
                let tracker = Tracker {
                    method,
                    sent: Vec::new(),
                    sending: Vec::new(),
                };
                self.members.insert(member.pid, tracker);
            }
        }
    }

    fn method(&self, member: &Member) -> Method {
        match self.how {
            Track::Hash | Track::Auto => Method::Hash,
            // A zombie has no memory.
            Track::Wp if !member.name.is_alive() => Method::Hash,
            Track::SoftDirty => Method::SoftDirty(Vec::new()),
            Track::Wp => match takeover::userfaultfd_of(member, &self.dir)
                .and_then(|uffd| WriteTracking::begin(uffd, member.pid))
            {
                Ok(tracking) => Method::Wp(tracking),
                Err(error) => {
                    tracing::warn!("pid {} is tracked by hash, not wp: {error}", member.pid);
                    Method::Hash
                }
            },
        }
    }

    pub(super) fn of(&mut self, member: &Member) -> Option<&mut Tracker> {
        self.members.get_mut(&member.pid)
    }

    /// What a word of /proc/PID/pagemap says of a page that the process `pid` has written since the last round read it, if
    /// that is known.
    pub(super) fn written_mark(&self, pid: i32) -> Option<fn(u64) -> bool> {
        self.members.get(&pid)?.written_mark()
    }

    /// The round is at the destination.
    pub(super) fn end_round(&mut self) {
        for tracker in self.members.values_mut() {
            tracker.sent = std::mem::take(&mut tracker.sending);
        }
    }
}

impl Tracker {
    /// Begins a round's look at the process, whose anonymous mappings are `ranges`.
    pub(super) fn begin(&mut self, pid: i32, ranges: &[PageRange], page: PageSize) {
        self.sending.clear();
        if let Method::SoftDirty(marked) = &mut self.method {
            *marked = take_marks(pid, ranges, page);
        }
    }

    /// Which pages of an anonymous mapping have been written since the last round.
    pub(super) fn written(&self, range: PageRange) -> Written {
        match &self.method {
            Method::Hash => Written::Unknown,
            Method::SoftDirty(marked) => Written::Runs(marked.clone()),
            Method::Wp(tracking) => {
                let mut runs = Vec::new();
                let each = |run: PageRange| runs.push((run.start().get(), run.end().get()));
                match tracking.take_written(range, each) {
                    Ok(()) => Written::Runs(runs),
                    Err(error) => {
                        // A mapping that cannot be registered, or is gone.
                        tracing::debug!("{range} is not tracked: {error}");
                        Written::Unknown
                    }
                }
            }
        }
    }

    /// What a word of /proc/PID/pagemap says of a page that was written, if it says so.
    fn written_mark(&self) -> Option<fn(u64) -> bool> {
        match self.method {
            Method::Hash => None,
            Method::SoftDirty(_) => Some(|word| word & write_tracking::SOFT_DIRTY != 0),
            Method::Wp(_) => Some(|word| word & write_tracking::PROTECTED == 0),
        }
    }

    /// Whether the destination has contents of the page from the last round.
    pub(super) fn was_sent(&self, address: u64) -> bool {
        contains(&self.sent, address)
    }

    /// Notes pages that this round has sent, or left as they are.
    pub(super) fn note(&mut self, start: u64, end: u64) {
        match self.sending.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => self.sending.push((start, end)),
        }
    }
}

/// What is known of the writes to a mapping.
#[derive(Debug)]
pub(super) enum Written {
    /// Nothing: every page may have changed.
    Unknown,
    /// Those of these runs, addresses in order.
    Runs(Vec<(u64, u64)>),
}

impl Written {
    /// Whether the page at `address` may have changed.
    pub(super) fn has(&self, address: u64) -> bool {
        match self {
            Written::Unknown => true,
            Written::Runs(runs) => contains(runs, address),
        }
    }
}

/// The pages that a process has written since the last time, and forgets that. A write in between is lost to the
/// next round, and found by the last dump.
fn take_marks(pid: i32, ranges: &[PageRange], page: PageSize) -> Vec<(u64, u64)> {
    let mut marked: Vec<(u64, u64)> = Vec::new();
    for range in ranges {
        each_word(pid, *range, page, |address, word| {
            if word & write_tracking::SOFT_DIRTY == 0 {
                return;
            }
            match marked.last_mut() {
                Some((_, end)) if *end == address => *end += page.bytes(),
                _ => marked.push((address, address + page.bytes())),
            }
        });
    }
    if let Err(error) = fs::write(format!("/proc/{pid}/clear_refs"), "4") {
        tracing::debug!("the marks of pid {pid} stay: {error}");
    }
    marked
}

fn contains(runs: &[(u64, u64)], address: u64) -> bool {
    let behind = runs.partition_point(|(start, _)| *start <= address);
    behind > 0 && address < runs[behind - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_contain_what_lies_between_their_ends() {
        let runs = [(10, 20), (30, 31)];
        for (address, inside) in [
            (9, false),
            (10, true),
            (19, true),
            (20, false),
            (30, true),
            (31, false),
        ] {
            assert_eq!(contains(&runs, address), inside, "{address}");
        }
        assert!(!contains(&[], 0));
    }

    #[test]
    fn every_kernel_has_a_method_and_a_missing_one_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let page = pageferry::sys::process::page_size().unwrap();
        let auto = Trackers::new(Track::Auto, page, tmp.path()).unwrap();
        assert_ne!(auto.how(), Track::Auto);
        let hash = Trackers::new(Track::Hash, page, tmp.path()).unwrap();
        assert_eq!(hash.how(), Track::Hash);
        let soft_dirty = Trackers::new(Track::SoftDirty, page, tmp.path());
        assert_eq!(soft_dirty.is_ok(), has_soft_dirty(page.shift()));
        if let Err(error) = soft_dirty {
            assert!(error.to_string().contains("--track auto"), "{error}");
        }
    }
}
