//! `cargo xtask zdtm`: CRIU's own test suite, with CRIU's daemons and with pageferry's in their place.
//!
//! ```text
//! for each way and flavour:  zdtm.py --criu-bin CRIU       -> passed, failed, skipped
//!                            zdtm.py --criu-bin criu-shim  -> passed, failed, skipped
//!                            what differs is run again by itself, with both
//! ```

mod modes;
mod outcome;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use testbed::criu::{self, Criu, Suite};
use testbed::hugepages::HugePages;
use testbed::pipes::LargePipes;
use testbed::shim;
use testbed::wait;
use testbed::workspace::use_binaries;

use crate::setup;
use modes::{MODES, Mode, OF_THE_MACHINE, WAITING};
use outcome::{Outcomes, Passes};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The root of CRIU's sources; it is copied and stays as it is [default: fetched from the Debian archive].
    #[arg(long)]
    source: Option<PathBuf>,

    /// A CRIU version or Debian suite [default: that of sid].
    #[arg(long)]
    criu: Option<String>,

    /// Names of ways, and flavours behind a colon: page-server, lazy-pages:ns [default: all].
    #[arg(long, value_delimiter = ',')]
    modes: Vec<String>,

    /// A regular expression of Python's for names of tests [default: all but those of control groups].
    #[arg(long)]
    tests: Option<String>,

    /// Regular expressions of Python's for names of tests to leave out.
    #[arg(long)]
    exclude: Vec<String>,

    /// Tests at a time.
    #[arg(long, default_value_t = 2)]
    parallel: u32,
}

/// Each step of a test has a limit of a minute: without a word for so long, a test waits for ever.
const SILENCE: Duration = Duration::from_secs(300);

/// How often a test that differs is run again.
const REPEATS: u32 = 3;

/// Huge pages that the suite's tests ask for.
const HUGE_PAGES: u64 = 20;

/// One way in one flavour.
type Run = (&'static Mode, &'static str);

/// One suite and the two sides that it compares.
struct Comparison {
    home: PathBuf,
    stock: Criu,
    ours: Criu,
    tests: Option<String>,
    exclude: Vec<String>,
    parallel: u32,
    tracks: bool,
    /// What passed with stock CRIU through a plain page server, by flavour.
    plain: BTreeMap<&'static str, Outcomes>,
}

/// Runs the suite with both sides. Fails if a test that passes with CRIU's daemons does not with pageferry's.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    let runs = chosen(&args.modes)?;
    let criu = match &args.criu {
        Some(version) => criu::of_version(version)?,
        None => criu::of_suite(Suite::Sid)?,
    };
    use_binaries(setup::debug_binaries()?);
    let home = source::built(args.source.as_deref(), &criu)?;
    let _pipes = LargePipes::allow()?;
    let _huge = HugePages::allow(HUGE_PAGES)?;
    let feature = ["check", "--feature", "mem_dirty_track"];
    let check = Command::new(&criu.path).args(feature).output()?;
    let mut comparison = Comparison {
        ours: shim::before(&criu, &home.join("shim"), "")?,
        stock: criu,
        home,
        tests: args.tests.clone(),
        exclude: args.exclude.clone(),
        parallel: args.parallel,
        tracks: check.status.success(),
        plain: BTreeMap::new(),
    };
    println!(
        "| way | flavour | passed with CRIU {} | with pageferry | failed with both | skipped | differences |",
        comparison.stock.version
    );
    println!("|---|---|---|---|---|---|---|");
    let mut faults = Vec::new();
    for run in runs {
        faults.extend(comparison.compare(run)?);
    }
    ensure!(
        faults.is_empty(),
        "these pass with CRIU's daemons alone: {}",
        faults.join(", ")
    );
    Ok(())
}

/// The ways that were asked for.
fn chosen(names: &[String]) -> Result<Vec<Run>> {
    let all = MODES
        .iter()
        .flat_map(|mode| mode.flavors.iter().map(move |flavor| (mode, *flavor)));
    let all: Vec<Run> = all.collect();
    if names.is_empty() {
        return Ok(all);
    }
    let mut runs = Vec::new();
    for name in names {
        let asked = |(mode, flavor): &&Run| match name.split_once(':') {
            Some((way, of)) => mode.name == way && *flavor == of,
            None => mode.name == name,
        };
        let found: Vec<Run> = all.iter().filter(asked).copied().collect();
        let known: BTreeSet<&str> = all.iter().map(|(mode, _)| mode.name).collect();
        ensure!(!found.is_empty(), "no way {name}: there are {known:?}");
        runs.extend(found);
    }
    Ok(runs)
}

impl Comparison {
    /// Runs one way with both sides, prints a line, and tells the faults.
    fn compare(&mut self, run: Run) -> Result<Vec<String>> {
        let (mode, flavor) = run;
        let _faults_of_users = (flavor == "uns").then(UserFaults::allow).transpose()?;
        let (stock, without) = self.stock(run)?;
        let ours = self.outcomes(run, &self.ours, None)?;
        let mut differing = Vec::new();
        let mut faults = Vec::new();
        for name in stock.differing(&ours) {
            let mut passes = Passes::default();
            passes.count(&name, &stock, &ours);
            for _ in 0..REPEATS {
                let again = match without {
                    true => stock.clone(),
                    false => self.outcomes(run, &self.stock, Some(&name))?,
                };
                let ours = self.outcomes(run, &self.ours, Some(&name))?;
                passes.count(&name, &again, &ours);
            }
            let runs = REPEATS + 1;
            let Passes { stock, ours } = passes;
            differing.push(format!(
                "{name}: {stock} of {runs} with CRIU, {ours} with pageferry"
            ));
            if passes.is_fault() {
                faults.push(format!("{name} ({}, {flavor})", mode.name));
            }
        }
        if differing.is_empty() {
            differing.push("none".to_owned());
        }
        let both = stock
            .failed
            .keys()
            .filter(|name| ours.failed.contains_key(*name));
        println!(
            "| {}{} | {flavor} | {} | {} | {} | {} | {} |",
            mode.name,
            if without {
                ", with CRIU without pre-dumps"
            } else {
                ""
            },
            stock.passed.len(),
            ours.passed.len(),
            both.count(),
            ours.skipped.len(),
            differing.join("; ")
        );
        Ok(faults)
    }

    /// What stock CRIU does; without dirty tracking it makes no pre-dumps, and its plain dumps count.
    fn stock(&mut self, (mode, flavor): Run) -> Result<(Outcomes, bool)> {
        let plain = &MODES[0];
        let without = mode.tracks && !self.tracks;
        if !without && mode.name != plain.name {
            return Ok((self.outcomes((mode, flavor), &self.stock, None)?, false));
        }
        if !self.plain.contains_key(flavor) {
            let outcomes = self.outcomes((plain, flavor), &self.stock, None)?;
            self.plain.insert(flavor, outcomes);
        }
        let known = self.plain.get(flavor).cloned();
        Ok((known.context("just put there")?, without))
    }

    /// Runs all tests, or one, with a CRIU.
    fn outcomes(&self, (mode, flavor): Run, criu: &Criu, test: Option<&str>) -> Result<Outcomes> {
        let side = if criu.path == self.stock.path {
            "criu"
        } else {
            "pageferry"
        };
        let what = test.map_or(String::new(), |test| format!("-{}", test.replace('/', "-")));
        let log = self
            .home
            .join(format!("{}-{flavor}-{side}{what}.log", mode.name));
        let mut zdtm = self.command(mode, flavor, criu, test);
        let printed = printed(&mut zdtm, &log)?;
        let outcomes = Outcomes::parse(&printed);
        let ran = outcomes.passed.len() + outcomes.failed.len() + outcomes.skipped.len();
        ensure!(ran > 0, "zdtm ran nothing{}", testbed::process::tail(&log));
        Ok(outcomes)
    }

    fn command(&self, mode: &Mode, flavor: &str, criu: &Criu, test: Option<&str>) -> Command {
        let mut zdtm = Command::new("/usr/bin/python3");
        zdtm.current_dir(self.home.join("test"))
            .env("PATH", source::PATH)
            .env("PYTHONUNBUFFERED", "1");
        zdtm.args([
            "./zdtm.py",
            "run",
            "--keep-going",
            "--ignore-taint",
            "-k",
            "never",
        ]);
        zdtm.arg("--criu-bin").arg(&criu.path);
        zdtm.args(["-f", flavor]).args(mode.options);
        match (test, &self.tests) {
            (Some(test), _) => zdtm.args(["-t", test]),
            (None, Some(tests)) => zdtm.args(["-T", tests]),
            (None, None) => zdtm.args(["-a", "-x", OF_THE_MACHINE]),
        };
        if test.is_none() {
            zdtm.args(["-p", &self.parallel.to_string()]);
            let waiting = WAITING.iter().copied().filter(|_| mode.at_once);
            for out in waiting.chain(self.exclude.iter().map(String::as_str)) {
                zdtm.args(["-x", out]);
            }
        }
        zdtm
    }
}

/// Runs the suite and returns what it prints. Ends it with all its tests if it hangs or this program is to end.
fn printed(zdtm: &mut Command, log: &Path) -> Result<String> {
    let file = fs::File::create(log)?;
    zdtm.stdin(Stdio::null())
        .stdout(Stdio::from(file.try_clone()?))
        .stderr(Stdio::from(file))
        .process_group(0);
    let line = testbed::process::command_line(zdtm);
    let mut child = zdtm.spawn().with_context(|| line.clone())?;
    let (mut steps, mut last) = (0, Instant::now());
    let read = || fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let ended = wait::until(&line, Duration::MAX, || {
        if child.try_wait()?.is_some() {
            return Ok(Some(()));
        }
        // Reading the log costs more than a look at the process.
        std::thread::sleep(Duration::from_millis(200));
        let now = Outcomes::steps(&read()?);
        if now != steps {
            (steps, last) = (now, Instant::now());
        }
        ensure!(last.elapsed() < SILENCE, "a test waits for ever");
        Ok(None)
    });
    if ended.is_err() {
        // Tests live in PID namespaces whose first processes are in the group.
        killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
        child.wait()?;
    }
    ended.with_context(|| format!("see {}", log.display()))?;
    Ok(read()?)
}

/// `vm.unprivileged_userfaultfd`, set: in namespaces of users CRIU opens its userfaultfds by it. Put back on drop.
struct UserFaults(String);

impl UserFaults {
    const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

    fn allow() -> Result<UserFaults> {
        let before = fs::read_to_string(UserFaults::SYSCTL).context(UserFaults::SYSCTL)?;
        fs::write(UserFaults::SYSCTL, "1").context(UserFaults::SYSCTL)?;
        Ok(UserFaults(before))
    }
}

impl Drop for UserFaults {
    fn drop(&mut self) {
        let _ = fs::write(UserFaults::SYSCTL, &self.0);
    }
}
