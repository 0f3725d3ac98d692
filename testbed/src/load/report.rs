//! What a load answers.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// A visit of a page that takes at least this long was served by a pager: a resident page takes
/// well under it, and the cheapest userfaultfd fault takes 3.5 µs.
pub const FAULT_NS: u64 = 2_000;

/// Wrong pages that are described one by one; the rest is counted.
pub const WRONG_PAGES_TOLD: usize = 32;

/// Where a load writes why it ends, in its directory: its standard error is /dev/null.
pub const FAILURE_FILE: &str = "failure.txt";

/// How long visits took, nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Visits.
    pub count: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The slowest.
    pub max_ns: u64,
}

impl Latency {
    /// The quantiles of `histogram`, whose values are nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Latency {
        Latency {
            count: histogram.len(),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            max_ns: histogram.max(),
        }
    }
}

/// A page that did not contain what it must.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WrongPage {
    /// Where it stands now.
    pub address: u64,
    /// Number of its area.
    pub area: u32,
    /// Number within the area.
    pub index: u32,
    /// The generation that it must have.
    pub generation: u32,
    /// Offset of the first wrong word, bytes.
    pub offset: u32,
    /// What this word must be.
    pub expected: u64,
    /// What it is.
    pub got: u64,
    /// All that was compared is zero.
    pub is_zero: bool,
}

/// What one step, or one pass of one process in it, found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step, as it was given.
    pub step: String,
    /// Visits whose page was compared.
    pub checked: u64,
    /// Pages that were wrong.
    pub wrong: u64,
    /// Wrong pages that were zero.
    pub wrong_zero: u64,
    /// Pages that raised SIGBUS.
    pub poisoned: u64,
    /// The first wrong pages.
    pub wrong_pages: Vec<WrongPage>,
    /// Sum of the digests of all pages read, if every byte was.
    pub digest: Option<u64>,
    /// Sum of the digests of all pages as they must be, if every byte was compared.
    pub expected_digest: Option<u64>,
    /// Duration of the step, µs.
    pub wall_us: u64,
    /// Its limit came before its end.
    pub cut_short: bool,
    /// First visits of each page.
    pub touches: Latency,
    /// Those of them that a pager served, see [`FAULT_NS`].
    pub faults: Latency,
    /// What forked children found.
    pub children: Vec<StepReport>,
    /// A system call of the step that failed, or a child that died.
    pub failure: Option<String>,
}

impl StepReport {
    /// This step and those of its children, and theirs.
    pub fn all(&self) -> Vec<&StepReport> {
        let mut all = vec![self];
        for child in &self.children {
            all.extend(child.all());
        }
        all
    }
}

/// The answer to one command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of the command; 0 is the report of a load that has just started.
    pub seq: u64,
    /// Number of the process in the tree.
    pub process: u32,
    /// Its pid as it sees it.
    pub pid: u32,
    /// Drawn when the load started: tells a restored process from a new one.
    pub nonce: u64,
    /// Grows with every turn of the process's main loop, and never starts again.
    pub counter: u64,
    /// The counters of the idle threads.
    pub thread_counters: Vec<u64>,
    /// The longest time between two turns of a thread that wakes each millisecond, since the last report, by
    /// CLOCK_REALTIME, µs. 0 without such a thread.
    #[serde(default)]
    pub longest_pause_us: u64,
    /// What each step found.
    pub steps: Vec<StepReport>,
}

impl Report {
    /// Pages compared in all steps and children.
    pub fn checked(&self) -> u64 {
        self.every_step().map(|step| step.checked).sum()
    }

    /// Wrong pages in all steps and children.
    pub fn wrong(&self) -> u64 {
        self.every_step().map(|step| step.wrong).sum()
    }

    /// Wrong pages that were zero.
    pub fn wrong_zero(&self) -> u64 {
        self.every_step().map(|step| step.wrong_zero).sum()
    }

    /// Pages that raised SIGBUS.
    pub fn poisoned(&self) -> u64 {
        self.every_step().map(|step| step.poisoned).sum()
    }

    /// All steps, those of forked children included.
    pub fn every_step(&self) -> impl Iterator<Item = &StepReport> {
        self.steps.iter().flat_map(StepReport::all)
    }

    /// An error that lists what is wrong, if a page, a digest or a system call was.
    pub fn expect_right(&self) -> anyhow::Result<()> {
        for step in self.every_step() {
            let digests_differ = step.digest != step.expected_digest;
            let bad = step.wrong + step.poisoned != 0 || digests_differ || step.failure.is_some();
            if bad {
                anyhow::bail!(
                    "process {} ({}), {}: {} of {} pages wrong, {} of them zero, {} lost; {}; first: {:#x?}",
                    self.process,
                    self.pid,
                    step.step,
                    step.wrong,
                    step.checked,
                    step.wrong_zero,
                    step.poisoned,
                    step.failure.as_deref().unwrap_or("no call failed"),
                    step.wrong_pages.first(),
                );
            }
        }
        Ok(())
    }
}

/// Fails if no process found a page missing: then nothing was tested.
///
/// # Errors
/// There was no fault.
pub fn expect_faults(reports: &[Report]) -> anyhow::Result<()> {
    let mut steps = reports.iter().flat_map(Report::every_step);
    anyhow::ensure!(
        steps.any(|step| step.faults.count > 0),
        "no page was found missing: nothing was tested"
    );
    Ok(())
}
