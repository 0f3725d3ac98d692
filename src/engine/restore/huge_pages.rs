//! Which regions of the restored processes become huge pages again, and when: the rules are
//! [`lazy::huge_pages`](crate::lazy::huge_pages)'s, the work is [`engine::collapse`](crate::engine::collapse)'s.
//!
//! Invariants: nothing is collapsed before the restore has finished, for its mappings are still being put in place.
//! Children that were forked since are left alone: they share memory, or end soon. When everything has come the
//! source is let go first, then the userfaultfds are closed, so that no process waits for this one in fork(2).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Restore;
use crate::engine::collapse::{self, CollapseSummary, Collapser, Owner};
use crate::image::chain::Chain;
use crate::image::mm::Mappings;
use crate::lazy::huge_pages::{Before, HugePages, Regions, SystemSetting, regions};
use crate::lazy::planner::SpaceId;
use crate::sys::owned_process::ProcessName;
use crate::units::{PageRange, PageSize, Vaddr};

/// How long the end waits for huge pages: 10 GiB and more on the machine where it was tried.
const END_MAX: Duration = Duration::from_secs(10);

/// Regions that wait in the queue at most, before everything has come: those behind follow their memory.
const QUEUED_MAX: u64 = 64;

/// Regions looked at in one turn of a process.
const LOOKS: usize = 1024;

/// What is still to become huge of one process.
#[derive(Debug)]
struct Waiting {
    regions: Regions,
    name: ProcessName,
    owner: Option<Arc<Owner>>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct HugePageRestorer {
    wanted: HugePages,
    system: Option<(SystemSetting, u64)>,
    waiting: BTreeMap<SpaceId, Waiting>,
    collapser: Option<Collapser>,
    summary: CollapseSummary,
}

impl HugePageRestorer {
    pub(super) fn new(wanted: HugePages) -> HugePageRestorer {
        HugePageRestorer {
            system: collapse::system().filter(|_| wanted != HugePages::Never),
            wanted,
            waiting: BTreeMap::new(),
            collapser: None,
            summary: CollapseSummary::default(),
        }
    }

    pub(super) fn summary(&self) -> CollapseSummary {
        self.summary
    }

    /// What is to become huge of the process that the images call `pid` and this host `name`.
    pub(super) fn add(&mut self, id: SpaceId, name: ProcessName, found: Regions) {
        if found.is_empty() || name.pid <= 0 || name.started == 0 {
            return;
        }
        let waiting = Waiting {
            regions: found,
            name,
            owner: None,
        };
        self.waiting.insert(id, waiting);
    }

    /// The regions of a process with these images.
    pub(super) fn of(&self, mappings: &Mappings, chain: &Chain) -> Option<Regions> {
        let (system, bytes) = self.system?;
        let before = Before { seen: None, system };
        let dumped = chain.extents().iter().map(|extent| extent.range);
        let dumped: Vec<PageRange> = dumped.collect();
        Some(regions(self.wanted, before, &mappings.huge, &dumped, bytes))
    }

    pub(super) fn gone(&mut self, id: SpaceId, range: PageRange) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.regions.gone(range);
        }
    }

    pub(super) fn moved(&mut self, id: SpaceId, from: PageRange, to: Vaddr) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.regions.moved(from, to);
        }
    }

    pub(super) fn forget(&mut self, id: SpaceId) {
        self.waiting.remove(&id);
    }

    /// Begins nothing while a thread waits for a page.
    pub(super) fn hold(&self, held: bool) {
        if let Some(collapser) = &self.collapser {
            collapser.hold(held);
        }
    }

    /// Hands regions over that lack nothing, up to `most` in the queue.
    fn hand_over(&mut self, page: PageSize, most: u64, lacks: impl Fn(SpaceId, PageRange) -> bool) {
        if self.waiting.is_empty() {
            return;
        }
        if self.collapser.is_none() {
            self.collapser = match Collapser::start(page) {
                Ok(collapser) => Some(collapser),
                Err(error) => {
                    tracing::warn!("huge pages are left to the kernel: {error}");
                    self.waiting.clear();
                    return;
                }
            };
        }
        let Some(collapser) = &self.collapser else {
            return;
        };
        self.waiting.retain(|id, waiting| {
            let room =
                usize::try_from(most.saturating_sub(collapser.queued())).unwrap_or(usize::MAX);
            let looks = if most == u64::MAX { usize::MAX } else { LOOKS };
            let complete = waiting
                .regions
                .take_complete(room, looks, |range| lacks(*id, range));
            if complete.is_empty() {
                return !waiting.regions.is_empty();
            }
            let owner = match &waiting.owner {
                Some(owner) => Arc::clone(owner),
                None => match Owner::open(waiting.name).map(Arc::new) {
                    Ok(owner) => Arc::clone(waiting.owner.insert(owner)),
                    // It has ended.
                    Err(_) => return false,
                },
            };
            complete
                .into_iter()
                .for_each(|region| collapser.put(&owner, region));
            !waiting.regions.is_empty()
        });
    }
}

impl Restore {
    /// Hands regions over that have all their pages by now.
    pub(super) fn collapse_some(&mut self) {
        if self.handover.is_finished() {
            let page = self.images.page();
            let planner = &self.planner;
            let lacks = |id, range| planner.space(id).is_none_or(|space| space.lacks(range));
            self.huge_pages.hand_over(page, QUEUED_MAX, lacks);
        }
    }

    /// Everything has come and the source knows: the rest becomes huge now, as far as there is time.
    pub(super) fn collapse_rest(&mut self) {
        let page = self.images.page();
        self.huge_pages.hand_over(page, u64::MAX, |_, _| false);
        let Some(collapser) = self.huge_pages.collapser.take() else {
            return;
        };
        // Nobody waits for this process any more: neither in fork(2), nor to take over.
        self.standby = None;
        for id in self.processes.ids() {
            self.processes.remove(id);
        }
        let summary = collapser.finish(END_MAX, || self.signals.next().is_some());
        self.huge_pages.summary = summary;
        let CollapseSummary { wanted, huge, .. } = summary;
        tracing::info!("{huge} of {wanted} huge pages are back");
        if huge < wanted {
            tracing::info!("of the others: {summary:?}");
        }
    }
}
