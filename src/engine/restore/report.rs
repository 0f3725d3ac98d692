//! What a post-copy restore shows: latencies, progress, the summary.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::Serialize;

use super::Restore;
use super::auto_dedup::AutoDedup;
use super::working_set::WorkingSetSummary;
use crate::engine::collapse::CollapseSummary;
use crate::error::Result;
use crate::lazy::answer::Class;
use crate::lazy::planner::{Counts, PageOutcome, Planner, SpaceId};
use crate::lazy::space::Served;
use crate::observe::latency::{Latencies, LatencySummary};
use crate::observe::trace::{Access, Answer, FaultRecord, OpenFaults, TraceWriter};
use crate::units::{PageRange, PageSize, Vaddr};

/// How far a restore is, for another thread to read.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pages that were missing at the start or came with a fork.
    pub total_pages: AtomicU64,
    /// Pages that are installed or gone.
    pub settled_pages: AtomicU64,
    /// Faults answered.
    pub faults: AtomicU64,
    /// Bytes received from the source.
    pub bytes: AtomicU64,
}

/// The result of a lazy restore.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Summary {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// How many processes were restored, with the children that they forked while pages were missing.
    pub processes: u64,
    /// Pages that were missing at the start or came with a fork.
    pub total_pages: u64,
    /// Pages by their outcome.
    pub pages: Counts,
    /// Pages that did not arrive and were not poisoned.
    pub missing_pages: u64,
    /// Times from the message of a fault until its page was installed.
    pub fault_latency: LatencySummary,
    /// Bytes received from the source, headers included.
    pub bytes_received: u64,
    /// From the first fault or the finished restore, whichever came first, to the last page, ms.
    pub drain_ms: u64,
    /// From readiness to the end, ms.
    pub total_ms: u64,
    /// Bytes that `--auto-dedup` has punched out of the local images.
    pub freed_bytes: u64,
    /// How many faults the trace lacks because the disk could not keep up.
    pub trace_left_out: u64,
    /// What happened to regions that were huge pages before.
    pub huge_pages: CollapseSummary,
    /// The effect of a working set.
    pub working_set: WorkingSetSummary,
}

/// Gathers what the loop sees.
#[derive(Debug)]
pub(super) struct Observer {
    latencies: Latencies,
    trace: Option<TraceWriter>,
    /// Faults that are not answered yet, while there is a trace.
    open_faults: OpenFaults<SpaceId>,
    trace_left_out: u64,
    progress: Arc<Progress>,
    began_us: Option<u64>,
    last_page_us: u64,
}

impl Observer {
    pub(super) fn new(trace: Option<&Path>, page: PageSize) -> Result<Observer> {
        Ok(Observer {
            latencies: Latencies::default(),
            trace: trace
                .map(|path| TraceWriter::create(path, page))
                .transpose()?,
            open_faults: OpenFaults::default(),
            trace_left_out: 0,
            progress: Arc::default(),
            began_us: None,
            last_page_us: 0,
        })
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// The restore is finished: from now on pages come in the background too.
    pub(super) fn restored(&mut self, now_us: u64) {
        self.began_us.get_or_insert(now_us);
    }

    /// A thread of `id` waits for `page`.
    pub(super) fn faulted(&mut self, id: SpaceId, page: Vaddr, is_write: bool, thread: u32) {
        if self.trace.is_some() {
            let access = if is_write {
                Access::Write
            } else {
                Access::Read
            };
            self.open_faults.begin((id, page), access, thread);
        }
    }

    /// `page` of `id`, for which a thread waits, has become what `outcome` says, together with the rest of `range`.
    pub(super) fn answered(
        &mut self,
        id: SpaceId,
        page: Vaddr,
        range: PageRange,
        outcome: PageOutcome,
    ) {
        let answer = match outcome {
            PageOutcome::Fetched(Class::Stream) => Answer::Stream,
            PageOutcome::Fetched(Class::Fault | Class::Sequential) => Answer::Fault,
            PageOutcome::Fetched(Class::Around) => Answer::Around,
            PageOutcome::Local => Answer::Local,
            PageOutcome::Zero => Answer::Zero,
            PageOutcome::Gone => Answer::Gone,
            PageOutcome::Poisoned => Answer::Poisoned,
        };
        self.open_faults.answer((id, page), answer, range);
    }

    /// The thread that waited for `page` of `id` faults again elsewhere.
    pub(super) fn moved(&mut self, id: SpaceId, page: Vaddr) {
        self.open_faults.remove((id, page));
    }

    /// Nobody of `id` waits any more.
    pub(super) fn forget(&mut self, id: SpaceId) {
        self.open_faults.forget(id);
    }

    /// A thread of the process `id`, which the images call `pid`, has got its page.
    pub(super) fn served(&mut self, (id, pid): (SpaceId, u32), thread: &Served, now_us: u64) {
        self.began_us.get_or_insert(thread.since_us);
        let latency_us = now_us.saturating_sub(thread.since_us);
        self.latencies.record(latency_us);
        self.progress.faults.fetch_add(1, Ordering::Relaxed);
        if let Some(trace) = &mut self.trace {
            let fault = self.open_faults.remove((id, thread.page));
            trace.record(FaultRecord {
                time_us: thread.since_us,
                pid,
                latency_us: u32::try_from(latency_us).unwrap_or(u32::MAX),
                address: thread.page.get(),
                start: fault.range.start().get(),
                bytes: fault.range.bytes(),
                thread: fault.thread,
                access: fault.access as u16,
                answer: fault.answer as u16,
            });
        }
    }

    /// Pages were filled at `now_us`.
    pub(super) fn filled(&mut self, now_us: u64) {
        self.last_page_us = now_us;
    }

    pub(super) fn tick(&self, planner: &Planner, bytes_received: u64) {
        self.progress
            .total_pages
            .store(planner.total_pages(), Ordering::Relaxed);
        self.progress
            .settled_pages
            .store(planner.counts().settled(), Ordering::Relaxed);
        self.progress.bytes.store(bytes_received, Ordering::Relaxed);
    }

    pub(super) fn finish_trace(&mut self) -> Result<()> {
        if let Some(trace) = self.trace.take() {
            self.trace_left_out = trace.finish()?;
        }
        Ok(())
    }
}

impl Restore {
    pub(super) fn summary(&self) -> Summary {
        let began_us = self.observer.began_us.unwrap_or(0);
        Summary {
            page_bytes: self.images.page().bytes(),
            processes: self.planner.added(),
            total_pages: self.planner.total_pages(),
            pages: self.planner.counts(),
            missing_pages: self.planner.missing_pages(),
            fault_latency: self.observer.latencies.summary(),
            bytes_received: self.links.bytes_received(),
            drain_ms: self.observer.last_page_us.saturating_sub(began_us) / 1000,
            total_ms: self.clock.now_us() / 1000,
            freed_bytes: self.auto_dedup.as_ref().map_or(0, AutoDedup::bytes),
            trace_left_out: self.observer.trace_left_out,
            huge_pages: self.huge_pages.summary(),
            working_set: self.working_set.summary(),
        }
    }
}
