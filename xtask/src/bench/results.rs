//! The cases of a benchmark as they are done: each is printed and judged, and all of them saved.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::criu::{self, Criu};
use testbed::workspace::root;

use super::bars::{self, Bar};
use super::document::{self, Document, FORM, Machine};

/// What all benchmarks are told.
#[derive(clap::Args)]
pub(crate) struct CommonArgs {
    /// The CRIU to use: a version (4.2.1) or a Debian suite (trixie, sid, experimental).
    #[arg(long, default_value = "sid")]
    criu: String,
    /// Write everything measured to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl CommonArgs {
    /// The CRIU that competes.
    pub(super) fn criu(&self) -> Result<Criu> {
        criu::of_version(&self.criu)
    }
}

/// See the module's text.
pub(super) struct Results<'a, R> {
    document: Document,
    /// What was measured, for who judges.
    taken: Vec<R>,
    judge: fn(&[R]) -> Vec<Bar>,
    file: Option<&'a Path>,
}

impl<'a, R> Results<'a, R> {
    /// Nothing is measured yet. Returns what the machine is, and `how` the numbers are to be read. Fails if what is
    /// measured could not be saved.
    pub(super) fn begin(
        bench: &str,
        args: &'a CommonArgs,
        criu: &Criu,
        judge: fn(&[R]) -> Vec<Bar>,
        how: &str,
    ) -> Result<Results<'a, R>> {
        let mut machine = machine()?;
        machine.criu = Some(criu.version.clone());
        Results::begin_on(machine, bench, args.json.as_deref(), judge, how)
    }

    /// As [`Results::begin`], for what no CRIU competes in. `machine` says what is special to the benchmark.
    pub(super) fn begin_on(
        machine: Machine,
        bench: &str,
        file: Option<&'a Path>,
        judge: fn(&[R]) -> Vec<Bar>,
        how: &str,
    ) -> Result<Results<'a, R>> {
        let criu = machine.criu.as_ref();
        println!(
            "pageferry {}, {}Linux {}, {} CPUs ({}), {} MiB\n{how}",
            machine.pageferry,
            criu.map_or(String::new(), |version| format!("CRIU {version}, ")),
            machine.kernel,
            machine.cpus,
            machine.cpu,
            machine.memory_mib
        );
        let results = Results {
            document: Document {
                form: FORM,
                bench: bench.to_owned(),
                commit: commit(),
                date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
                command: ["cargo".to_owned(), "xtask".to_owned()]
                    .into_iter()
                    .chain(env::args().skip(1))
                    .collect(),
                machine,
                limit_s: None,
                cases: Vec::new(),
                bars: Vec::new(),
            },
            taken: Vec::new(),
            judge,
            file,
        };
        results.save()?;
        Ok(results)
    }

    /// Runs are ended after so many seconds.
    pub(super) fn limited_to(mut self, limit_s: u64) -> Results<'a, R> {
        self.document.limit_s = Some(limit_s);
        self
    }

    /// Prints what came of a case, with its name above, and saves everything so far: a long run that
    /// is interrupted leaves what it has.
    pub(super) fn add(
        &mut self,
        tables: impl std::fmt::Display,
        case: document::Case,
        taken: R,
    ) -> Result<()> {
        self.taken.push(taken);
        let bars = (self.judge)(&self.taken);
        self.add_judged(tables, case, bars)
    }

    /// The same, for who judges all cases so far by itself: `bars`.
    pub(super) fn add_judged(
        &mut self,
        tables: impl std::fmt::Display,
        case: document::Case,
        bars: Vec<Bar>,
    ) -> Result<()> {
        println!("\n{}\n{tables}", case.name);
        self.document.cases.push(case);
        self.document.bars = bars;
        self.save()
    }

    fn save(&self) -> Result<()> {
        match self.file {
            Some(path) => write_json(path, &self.document),
            None => Ok(()),
        }
    }

    /// Prints the bars.
    pub(super) fn end(self) {
        if self.document.bars.is_empty() {
            return;
        }
        println!("\n{}", bars::table(&self.document.bars));
    }
}

/// What a result depends on besides the programs.
pub(super) fn machine() -> Result<Machine> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
    let cpus = fs::read_to_string("/proc/cpuinfo").context("CPU model")?;
    let model = cpus
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == "model name")
        .map_or("of unknown model", |(_, model)| model.trim());
    let memory = fs::read_to_string("/proc/meminfo").context("memory")?;
    let kib = memory
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<u64>().ok())
        .context("/proc/meminfo does not begin with the memory's size")?;
    Ok(Machine {
        kernel: kernel.trim().to_owned(),
        cpu: model.to_owned(),
        cpus: available_parallelism()?.get(),
        memory_mib: kib / 1024,
        criu: None,
        clock: None,
        pageferry: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// The commit that is built, with a mark if the work tree has changes.
fn commit() -> String {
    let git = |words: &[&str]| {
        let output = Command::new("git").current_dir(root()).args(words).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if !changes.is_empty() => commit + "+",
        _ => commit,
    }
}

/// Writes `results` so that the file is whole or absent.
fn write_json(path: &Path, results: &impl Serialize) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, serde_json::to_vec_pretty(results)?)
        .with_context(|| unfinished.display().to_string())?;
    fs::rename(&unfinished, path).with_context(|| path.display().to_string())
}
