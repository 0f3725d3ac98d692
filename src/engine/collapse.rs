//! Makes regions of restored processes huge pages again, in a thread of its own.
//!
//! ```text
//! who restores ── regions that have all their pages ──> queue ──> look (pagemap) ──> MADV_COLLAPSE
//!                                                          ^          │                 │ Busy, Again
//!                                                          │          │ shared: left    v
//!                                                          └────────────────────── once more at the end
//! ```
//!
//! - No region is begun while a thread waits for a page ([`Collapser::hold`]). One that is under way holds its
//!   process's faults up for the time of one region.
//! - As long as pages are to come, the thread works for a quarter of the time (`REST`).
//! - Memory that is shared since a fork is left: to collapse it would copy it.
//! - A collapse changes no content. So a region that was unmapped, moved or mapped anew meanwhile is no danger.
//! - [`Collapser::finish`] ends in time, whatever is left: the kernel's own khugepaged may do it later.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::lazy::huge_pages::SystemSetting;
use crate::sys::collapse::{AdvisedProcess, Collapsed};
use crate::sys::owned_process::ProcessName;
use crate::sys::pagemap::Pagemap;
use crate::units::{PageRange, PageSize};

/// Where the kernel tells of its huge pages.
const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// How long the thread rests behind a region, in times of what that took, as long as pages are to come.
const REST: u32 = 3;

/// How often it looks whether it may go on, while a thread waits for a page.
const HELD: Duration = Duration::from_millis(1);

/// After so many regions in a row without memory for a huge page the others are left to the kernel.
const NO_MEMORY_MAX: u32 = 8;

/// How often a region is tried.
const TRIES_MAX: u8 = 3;

/// What the system says of huge pages: when it makes them, and how long they are, bytes.
pub fn system() -> Option<(SystemSetting, u64)> {
    let read = |name: &str| fs::read_to_string(Path::new(SETTINGS).join(name)).ok();
    let bytes = read("hpage_pmd_size")?.trim().parse().ok()?;
    Some((SystemSetting::parse(&read("enabled")?), bytes))
}

/// What became of the regions that were to be huge again.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, JsonSchema)]
pub struct CollapseSummary {
    /// How many regions were to be huge, whatever became of them.
    pub wanted: u64,
    /// How many are huge pages now.
    pub huge: u64,
    /// How many were left because other processes share their pages since a fork.
    pub shared: u64,
    /// How many found no memory for a huge page.
    pub no_memory: u64,
    /// How many the kernel refuses: remapped, advised against, poisoned or guarded.
    pub refused: u64,
    /// How many had a page that was missing, pinned or in use each time.
    pub busy: u64,
    /// How many were unmapped, or their process has ended.
    pub gone: u64,
    /// How many were not tried: it was time to end, or the kernel cannot.
    pub left: u64,
}

/// A process whose regions are to be huge.
#[derive(Debug)]
pub struct Owner {
    process: AdvisedProcess,
    pagemap: Pagemap,
    ended: AtomicBool,
}

impl Owner {
    /// The process `name`.
    ///
    /// # Errors
    ///
    /// It has ended, or may not be looked at.
    pub fn open(name: ProcessName) -> Result<Owner> {
        let failed = |error| {
            let text = format!("cannot open the memory of process {}", name.pid);
            Error::wrap(Kind::Io, text, error)
        };
        let pagemap = format!("/proc/{}/pagemap", name.pid);
        let pagemap = Pagemap::open(Path::new(&pagemap)).map_err(failed)?;
        // Opened behind it: if the process lives still, the file was its own.
        let process = AdvisedProcess::open(name).map_err(failed)?;
        Ok(Owner {
            process,
            pagemap,
            ended: AtomicBool::new(false),
        })
    }
}

#[derive(Debug)]
struct Job {
    owner: Arc<Owner>,
    region: PageRange,
    tries: u8,
}

#[derive(Debug, Default)]
struct Shared {
    held: AtomicBool,
    hurry: AtomicBool,
    stop: AtomicBool,
    queued: AtomicU64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Collapser {
    queue: Sender<Job>,
    shared: Arc<Shared>,
    thread: JoinHandle<CollapseSummary>,
}

impl Collapser {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn start(page: PageSize) -> Result<Collapser> {
        let (queue, jobs) = channel();
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            shared: Arc::clone(&shared),
            page,
            again: VecDeque::new(),
            without_memory: 0,
            summary: CollapseSummary::default(),
            unable: false,
        };
        let thread = std::thread::Builder::new()
            .name("huge-pages".to_owned())
            .spawn(move || worker.run(&jobs))
            .map_err(|error| Error::wrap(Kind::Io, "cannot start a thread", error))?;
        Ok(Collapser {
            queue,
            shared,
            thread,
        })
    }

    /// Makes `region` of `owner` huge when its turn comes.
    pub fn put(&self, owner: &Arc<Owner>, region: PageRange) {
        let job = Job {
            owner: Arc::clone(owner),
            region,
            tries: 0,
        };
        self.shared.queued.fetch_add(1, Ordering::Relaxed);
        // A thread that has ended for a panic has ended the process as well.
        let _ = self.queue.send(job);
    }

    /// Regions that were put and not tried yet.
    pub fn queued(&self) -> u64 {
        self.shared.queued.load(Ordering::Relaxed)
    }

    /// Begins nothing as long as this was last called with `true`: a thread waits for a page.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
    }

    /// Waits until all is done, `within` is over or `interrupted` says so, and tells what was done.
    pub fn finish(self, within: Duration, interrupted: impl Fn() -> bool) -> CollapseSummary {
        let deadline = Instant::now() + within;
        self.shared.hurry.store(true, Ordering::Relaxed);
        drop(self.queue);
        while !self.thread.is_finished() {
            if Instant::now() >= deadline || interrupted() {
                self.shared.stop.store(true, Ordering::Relaxed);
                break;
            }
            std::thread::sleep(HELD);
        }
        self.thread.join().unwrap_or_default()
    }
}

struct Worker {
    shared: Arc<Shared>,
    page: PageSize,
    /// What was in the way may be gone at the end.
    again: VecDeque<Job>,
    /// Regions in a row without memory.
    without_memory: u32,
    summary: CollapseSummary,
    /// This process may not, or the kernel cannot.
    unable: bool,
}

impl Worker {
    fn run(mut self, jobs: &Receiver<Job>) -> CollapseSummary {
        while let Ok(job) = jobs.recv() {
            self.shared.queued.fetch_sub(1, Ordering::Relaxed);
            self.summary.wanted += 1;
            self.wait();
            let began = Instant::now();
            self.try_one(job);
            if !self.shared.hurry.load(Ordering::Relaxed) {
                std::thread::sleep(began.elapsed() * REST);
            }
        }
        while let Some(job) = self.again.pop_front() {
            self.try_one(job);
        }
        self.summary
    }

    /// Waits while a thread waits for a page.
    fn wait(&self) {
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        while is(&self.shared.held) && !is(&self.shared.hurry) && !is(&self.shared.stop) {
            std::thread::sleep(HELD);
        }
    }

    fn try_one(&mut self, job: Job) {
        if self.unable || self.shared.stop.load(Ordering::Relaxed) {
            self.summary.left += 1;
            return;
        }
        if job.owner.ended.load(Ordering::Relaxed) {
            self.summary.gone += 1;
            return;
        }
        if self.without_memory >= NO_MEMORY_MAX {
            self.summary.no_memory += 1;
            return;
        }
        let pages = job.region.bytes() / self.page.bytes();
        match job.owner.pagemap.count(job.region, self.page.bytes()) {
            // Unmapped, given back or swapped out meanwhile, mostly: to collapse it would take memory.
            Ok((there, _)) if there < pages => {
                return self.put_back(job, |summary| &mut summary.gone);
            }
            // As khugepaged does by default (max_ptes_shared).
            Ok((_, alone)) if alone < pages / 2 => {
                return self.put_back(job, |summary| &mut summary.shared);
            }
            Ok(_) => {}
            Err(_) => {
                self.summary.gone += 1;
                return;
            }
        }
        self.collapse(job);
    }

    fn collapse(&mut self, job: Job) {
        let collapsed = job.owner.process.collapse(job.region);
        if collapsed != Collapsed::NoMemory {
            self.without_memory = 0;
        }
        match collapsed {
            Collapsed::Huge => self.summary.huge += 1,
            Collapsed::Again | Collapsed::Busy => self.put_back(job, |summary| &mut summary.busy),
            Collapsed::NoMemory => {
                self.without_memory += 1;
                self.summary.no_memory += 1;
                if self.without_memory == NO_MEMORY_MAX {
                    tracing::info!("no memory for huge pages now: the kernel may make them later");
                }
            }
            Collapsed::Refused => self.summary.refused += 1,
            Collapsed::Ended => {
                job.owner.ended.store(true, Ordering::Relaxed);
                self.summary.gone += 1;
            }
            Collapsed::Impossible(errno) => {
                self.unable = true;
                self.summary.left += 1;
                tracing::warn!(
                    "huge pages are left to the kernel: process_madvise(MADV_COLLAPSE) says {errno} (it needs Linux 6.1 \
                     and CAP_SYS_NICE)"
                );
            }
        }
    }

    /// `job` is tried again at the end, or counted as `counted` says.
    fn put_back(&mut self, mut job: Job, counted: impl Fn(&mut CollapseSummary) -> &mut u64) {
        job.tries += 1;
        if job.tries < TRIES_MAX {
            self.again.push_back(job);
        } else {
            *counted(&mut self.summary) += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::page_size;

    #[test]
    fn what_is_left_at_the_end_is_counted() {
        let own = ProcessName::of(std::process::id().cast_signed()).unwrap();
        let owner = Arc::new(Owner::open(own).unwrap());
        let collapser = Collapser::start(page_size().unwrap()).unwrap();
        collapser.hold(true);
        for region in 0..5 {
            let start = region << 21;
            collapser.put(&owner, PageRange::new(start, start + (2 << 20)));
        }
        // Nothing is mapped there, or not all of it.
        let summary = collapser.finish(Duration::from_secs(60), || false);
        let expected = CollapseSummary {
            wanted: 5,
            gone: 5,
            ..CollapseSummary::default()
        };
        assert_eq!(summary, expected);
    }

    #[test]
    fn an_interruption_leaves_the_rest() {
        let own = ProcessName::of(std::process::id().cast_signed()).unwrap();
        let owner = Arc::new(Owner::open(own).unwrap());
        let collapser = Collapser::start(page_size().unwrap()).unwrap();
        collapser.shared.stop.store(true, Ordering::Relaxed);
        collapser.put(&owner, PageRange::new(0, 2 << 20));
        let summary = collapser.finish(Duration::ZERO, || true);
        assert_eq!((summary.wanted, summary.left), (1, 1));
    }
}
