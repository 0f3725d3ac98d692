//! One run: a post-copy from the dump to the last page, and what it took.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::Make;
use testbed::load::report::{Report, StepReport};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::use_daemons;

use super::super::TMPFS;
use super::super::rounds::{Contend, Measure};
use super::super::stats::Sample;
use super::arrival::Arrival;
use super::case::{Case, Contender, Side, SourceKind};

/// Warnings and errors, CRIU's default: the harness logs everything, which would be measured too.
const VERBOSITY: &str = "-v2";
/// How long a pass that its limit ends may take to say so: it waits for one page at most.
const LAST_ANSWER: Duration = Duration::from_secs(10);
const US_PER_S: f64 = 1e6;
const MIB: f64 = (1u32 << 20) as f64;

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    /// From the finished restore to the last page, s.
    Drain,
    /// From the finished restore to the end of the daemon, s.
    Over,
    /// The longest pass of a process over its memory, s.
    Pass,
    /// First visits of pages that a pager served.
    Faults,
    /// Their median, µs; of several processes the worst, as below.
    P50,
    /// Their 90th percentile, µs.
    P90,
    /// Their 99th percentile, µs.
    P99,
    /// The longest, µs.
    Max,
    /// User and system time of the daemon, s.
    Cpu,
    /// Most memory that the daemon had resident, MiB.
    Peak,
}

impl Metric {
    pub(super) const ALL: [Metric; 10] = [
        Metric::Drain,
        Metric::Over,
        Metric::Pass,
        Metric::Faults,
        Metric::P50,
        Metric::P90,
        Metric::P99,
        Metric::Max,
        Metric::Cpu,
        Metric::Peak,
    ];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Drain => "drained s",
            Metric::Over => "over s",
            Metric::Pass => "pass s",
            Metric::Faults => "faults",
            Metric::P50 => "p50 µs",
            Metric::P90 => "p90 µs",
            Metric::P99 => "p99 µs",
            Metric::Max => "max µs",
            Metric::Cpu => "CPU s",
            Metric::Peak => "peak MiB",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        // Of a pass that its limit ended the quantiles are bounds as well: the later a fault of a reader
        // whose pager falls behind, the longer it waits.
        let of_faults = |value: fn(&Faults) -> f64| run.faults.as_ref().map(value);
        let exact = match self {
            Metric::Drain => return Some(run.drain_s),
            Metric::Over => return Some(run.over_s),
            Metric::Pass => return Some(run.pass_s),
            Metric::Cpu => return Some(run.cpu_s),
            Metric::Peak => return Some(run.peak_mib),
            Metric::Faults => of_faults(|faults| faults.count),
            Metric::P50 => of_faults(|faults| faults.p50_us),
            Metric::P90 => of_faults(|faults| faults.p90_us),
            Metric::P99 => of_faults(|faults| faults.p99_us),
            Metric::Max => of_faults(|faults| faults.max_us),
        };
        let bound = run.pass_s.bound;
        exact.map(|value| Sample { value, bound })
    }
}

/// Faults as the processes saw them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Faults {
    count: f64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    max_us: f64,
}

impl Faults {
    /// Of all processes: their sum, and the worst of each quantile.
    fn of(steps: &[&StepReport]) -> Faults {
        let worst = |of: fn(&StepReport) -> u64| {
            let ns = steps.iter().map(|step| of(step)).max().unwrap_or(0);
            Duration::from_nanos(ns).as_secs_f64() * US_PER_S
        };
        let count: u64 = steps.iter().map(|step| step.faults.count).sum();
        Faults {
            count: count as f64,
            p50_us: worst(|step| step.faults.p50_ns),
            p90_us: worst(|step| step.faults.p90_ns),
            p99_us: worst(|step| step.faults.p99_ns),
            max_us: worst(|step| step.faults.max_ns),
        }
    }
}

/// What a run took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    drain_s: Sample,
    over_s: Sample,
    pass_s: Sample,
    /// Up to the limit, if that ended the run; none if its processes did not even tell then.
    faults: Option<Faults>,
    cpu_s: Sample,
    peak_mib: Sample,
    /// lazy-client's own account, if it wrote one.
    summary: Option<Value>,
}

/// What all runs have in common.
pub(super) struct Bench<'a> {
    pub(super) criu: &'a Criu,
    pub(super) limit: Duration,
    /// Where the programs of another build are.
    pub(super) baseline: Option<&'a Path>,
}

impl Bench<'_> {
    /// Dumps new processes, restores them, and watches their memory arrive.
    ///
    /// # Errors
    /// A step of the migration fails, or a page arrives wrong.
    pub(super) fn run(&self, case: Case, who: Contender) -> Result<Run> {
        let test_dir = TestDir::new_in(Path::new(TMPFS))?;
        use_daemons(self.baseline.filter(|_| who.side == Side::Baseline));
        let summary = test_dir.path("summary.json");
        let plan = self.plan(case, who, &summary);
        let lifetime = self.limit + 4 * GENEROUS;
        let load = case.load(
            who.shape,
            &test_dir.path("load"),
            u32::try_from(lifetime.as_secs())?,
        );
        let run = PostCopy::start(&test_dir, &plan, load, &[case.access.step(self.limit)])
            .and_then(|migration| self.watch(migration, &summary));
        run.with_context(|| format!("{}: {}", who.name(), case.describe()))
    }

    fn plan(&self, case: Case, who: Contender, summary: &Path) -> Plan<'_> {
        let client = match who.side {
            Side::Criu => Make::Criu(self.criu),
            Side::Ours | Side::Baseline => Make::Ours,
        };
        let source = match who.source {
            SourceKind::Dump => Source::Dump,
            SourceKind::PageServer => Source::PageServer(client),
            SourceKind::Local => Source::Local,
            SourceKind::Forwarder | SourceKind::Ferry => Source::Forwarder,
        };
        let mut plan = Plan::new(self.criu, source, client);
        if let Some(link) = case.link.link() {
            plan = plan.over(link);
        }
        plan.warmed_bytes = case.bytes();
        plan.source_options = vec![VERBOSITY.to_owned()];
        plan.client_options = vec![VERBOSITY.to_owned()];
        if who.source == SourceKind::Ferry {
            plan.client_options.push("--ferry".to_owned());
        }
        if matches!(client, Make::Ours) {
            let summary = ["--summary-json".to_owned(), summary.display().to_string()];
            plan.client_options.extend(summary);
        }
        plan
    }

    fn watch(&self, mut migration: PostCopy, summary: &Path) -> Result<Run> {
        let restored = Instant::now();
        let (mut over, mut reported) = (None, false);
        let mut arrival = Arrival::watch(restored);
        // The limit is judged inside: to reach it is an answer, not an error.
        wait::until("the last page", self.limit + GENEROUS, || {
            if over.is_none() {
                arrival.look(&migration.restored);
                if migration.daemon.process().ended()?.is_some() {
                    over = Some(restored.elapsed());
                }
            }
            reported = reported || migration.reported()?;
            let ended = over.is_some() || restored.elapsed() >= self.limit;
            let silent = restored.elapsed() >= self.limit + LAST_ANSWER;
            Ok((ended && reported || silent).then_some(()))
        })?;
        let limit = Sample::at_least(self.limit.as_secs_f64());
        let (pass_s, faults) = if reported {
            let (pass, faults) = passes(&migration.reports()?)?;
            (pass, Some(faults))
        } else {
            (limit, None)
        };
        let daemon = migration.daemon.process();
        let exact = |after: Duration| Sample::exact(after.as_secs_f64());
        let (ended, over_s, drain_s) = match over {
            Some(after) => {
                let ended = daemon.succeed(GENEROUS)?;
                let last_page = arrival.last_page().unwrap_or(after);
                (ended, exact(after), exact(last_page))
            }
            None => (daemon.kill()?, limit, limit),
        };
        let bound = over_s.bound;
        if over.is_some() && reported {
            migration.finish()?;
        }
        let used = |value| Sample { value, bound };
        Ok(Run {
            drain_s,
            over_s,
            pass_s,
            faults,
            cpu_s: used(ended.cpu.as_secs_f64()),
            peak_mib: used(ended.peak_rss_bytes as f64 / MIB),
            summary: match fs::read(summary) {
                // It is made at the start, and was ended before it was written.
                Ok(bytes) if bytes.is_empty() => None,
                Ok(bytes) => Some(serde_json::from_slice(&bytes)?),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error).context("lazy-client's summary"),
            },
        })
    }
}

/// The longest pass, and the faults of all.
fn passes(reports: &[Report]) -> Result<(Sample, Faults)> {
    let steps: Vec<&StepReport> = reports.iter().flat_map(Report::every_step).collect();
    ensure!(
        !steps.is_empty() && steps.iter().all(|step| step.checked > 0),
        "a process that read no page"
    );
    let longest = steps.iter().map(|step| step.wall_us).max();
    let longest = Duration::from_micros(longest.unwrap_or(0)).as_secs_f64();
    let pass = match steps.iter().any(|step| step.cut_short) {
        true => Sample::at_least(longest),
        false => Sample::exact(longest),
    };
    Ok((pass, Faults::of(&steps)))
}
