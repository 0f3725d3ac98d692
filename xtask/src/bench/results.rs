//! The cases of a benchmark as they are done: each is printed and judged, and all of them saved.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::criu::{self, Criu};

use super::bars::{self, Bar};

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

/// What a result depends on besides the programs.
#[derive(Clone, Debug, Serialize)]
struct Machine {
    kernel: String,
    cpus: usize,
    criu: String,
    pageferry: &'static str,
}

impl Machine {
    fn here(criu: &Criu) -> Result<Machine> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
        Ok(Machine {
            kernel: kernel.trim().to_owned(),
            cpus: available_parallelism()?.get(),
            criu: criu.version.clone(),
            pageferry: env!("CARGO_PKG_VERSION"),
        })
    }

    fn describe(&self) -> String {
        let Machine {
            kernel,
            cpus,
            criu,
            pageferry,
        } = self;
        format!("pageferry {pageferry}, CRIU {criu}, Linux {kernel}, {cpus} CPUs")
    }
}

/// See the module's text. It is also what goes into the file.
#[derive(Serialize)]
pub(super) struct Results<'a, R> {
    machine: Machine,
    /// When runs are ended, if at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit_s: Option<u64>,
    cases: Vec<R>,
    bars: Vec<Bar>,
    #[serde(skip)]
    judge: fn(&[R]) -> Vec<Bar>,
    #[serde(skip)]
    file: Option<&'a Path>,
}

impl<'a, R: Serialize> Results<'a, R> {
    /// Nothing is measured yet. Says what the machine is, and `how` the numbers are to be read.
    pub(super) fn begin(
        args: &'a CommonArgs,
        criu: &Criu,
        judge: fn(&[R]) -> Vec<Bar>,
        how: &str,
    ) -> Result<Results<'a, R>> {
        let machine = Machine::here(criu)?;
        println!("{}\n{how}", machine.describe());
        Ok(Results {
            machine,
            limit_s: None,
            cases: Vec::new(),
            bars: Vec::new(),
            judge,
            file: args.json.as_deref(),
        })
    }

    /// Runs are ended after so many seconds.
    pub(super) fn limited_to(self, limit_s: u64) -> Results<'a, R> {
        let limit_s = Some(limit_s);
        Results { limit_s, ..self }
    }

    /// Prints what came of a case, with its description above, and saves everything so far: a long run that
    /// is interrupted leaves what it has.
    pub(super) fn add(
        &mut self,
        description: &str,
        tables: impl std::fmt::Display,
        case: R,
    ) -> Result<()> {
        println!("\n{description}\n{tables}");
        self.cases.push(case);
        self.bars = (self.judge)(&self.cases);
        match self.file {
            Some(path) => write_json(path, self),
            None => Ok(()),
        }
    }

    /// Prints the bars.
    pub(super) fn end(self) {
        println!("\n{}", bars::table(&self.bars));
    }
}

/// Writes `results` so that the file is whole or absent.
fn write_json(path: &Path, results: &impl Serialize) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, serde_json::to_vec_pretty(results)?)
        .with_context(|| unfinished.display().to_string())?;
    fs::rename(&unfinished, path).with_context(|| path.display().to_string())
}
