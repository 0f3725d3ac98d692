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
use crate::lazy::planner::{Counts, Planner};
use crate::lazy::space::Served;
use crate::observe::latency::{Latencies, LatencySummary};
use crate::observe::trace::{FaultRecord, TraceWriter};
use crate::units::PageSize;

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

/// What a restore did.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Summary {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// How many processes were restored, and children they forked while pages were missing.
    pub processes: u64,
    /// Pages that were missing at the start or came with a fork.
    pub total_pages: u64,
    /// Pages by their outcome.
    pub pages: Counts,
    /// Pages that did not come and were not poisoned either.
    pub missing_pages: u64,
    /// From a fault's message until its page was there, µs.
    pub fault_latency: LatencySummary,
    /// Bytes received from the source, headers included.
    pub bytes_received: u64,
    /// From the first fault or the finished restore, whichever came first, to the last page, ms.
    pub drain_ms: u64,
    /// From readiness to the end, ms.
    pub total_ms: u64,
    /// Bytes that `--auto-dedup` has taken out of the local images.
    pub freed_bytes: u64,
    /// How many faults the trace lacks because the disk could not keep up.
    pub trace_left_out: u64,
    /// What became of the huge pages that were there before.
    pub huge_pages: CollapseSummary,
    /// What a working set did.
    pub working_set: WorkingSetSummary,
}

/// Gathers what the loop sees.
#[derive(Debug)]
pub(super) struct Observer {
    latencies: Latencies,
    trace: Option<TraceWriter>,
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

    /// A thread of `pid` has got its page.
    pub(super) fn served(&mut self, pid: u32, thread: &Served, now_us: u64) {
        self.began_us.get_or_insert(thread.since_us);
        let latency_us = now_us.saturating_sub(thread.since_us);
        self.latencies.record(latency_us);
        self.progress.faults.fetch_add(1, Ordering::Relaxed);
        if let Some(trace) = &mut self.trace {
            trace.record(FaultRecord {
                time_us: thread.since_us,
                pid,
                latency_us: u32::try_from(latency_us).unwrap_or(u32::MAX),
                address: thread.page.get(),
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
