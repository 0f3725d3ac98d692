//! `pageferry doctor`: what works on this host, what does not, and what to do about it.
//!
//! Facts come from the modules that rely on them: the start checks of lazy-client, what `pageferry plan` asks of
//! hosts, the configuration files as the programs read them.

mod kernel;
mod limits;
mod software;

use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::observe::schema::Output;
use schemars::JsonSchema;
use serde::Serialize;

use crate::programs::ProgramArgs;

/// Names the fields' meaning: another one when a field changes or goes.
const SCHEMA: &str = "pageferry-doctor-1";

/// Tells what works on this host, what does not, and what to do about it.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Print JSON
    ///
    /// The fields are described in docs/reference/fields.md.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    programs: ProgramArgs,
}

/// How well something works.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// It works.
    Works,
    /// It works in part, or something else is used in its place.
    Limited,
    /// It is not there, and nothing here needs it.
    Absent,
    /// A job cannot be done.
    Missing,
}

/// What these programs are for.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Job {
    /// CRIU dumps and restores.
    DumpAndRestore,
    /// page-server receives, serves and forwards.
    CarryMemory,
    /// lazy-client answers page faults.
    LazyRestore,
}

const JOBS: [(Job, &str); 3] = [
    (Job::DumpAndRestore, "dump and restore by CRIU"),
    (Job::CarryMemory, "carry memory by page-server"),
    (Job::LazyRestore, "restore lazily by lazy-client"),
];

/// One line.
#[derive(Serialize, Debug, JsonSchema)]
struct Check {
    /// `kernel`, `permissions`, `limits`, `CRIU`, `pageferry` or `runtimes`.
    area: &'static str,
    /// What it is.
    name: String,
    /// How well it works.
    state: State,
    /// What was found.
    value: String,
    /// What to do, or what follows; null if there is nothing to say.
    advice: Option<String>,
    /// The jobs that cannot be done for it.
    stops: Vec<Job>,
}

/// One job.
#[derive(Serialize, Debug, JsonSchema)]
struct JobState {
    /// Which.
    job: Job,
    /// Whether nothing stops it.
    works: bool,
}

/// What works on this host.
#[derive(Serialize, Debug, JsonSchema)]
struct Report {
    /// Name of this format. It changes if a field gets another meaning or is removed.
    #[schemars(extend("const" = SCHEMA))]
    schema: &'static str,
    /// Version of this program.
    pageferry: &'static str,
    /// What was checked.
    checks: Vec<Check>,
    /// What can be done here.
    jobs: Vec<JobState>,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("doctor", "pageferry doctor --json")
}

/// Checks, in the order in which they are shown.
#[derive(Default, Debug)]
struct Checks {
    area: &'static str,
    list: Vec<Check>,
}

impl Checks {
    fn area(&mut self, area: &'static str) {
        self.area = area;
    }

    fn works(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.add(name.into(), State::Works, value.into(), None, &[]);
    }

    fn absent(&mut self, name: impl Into<String>) {
        let value = "not there, and not needed".to_owned();
        self.add(name.into(), State::Absent, value, None, &[]);
    }

    fn limited(
        &mut self,
        name: impl Into<String>,
        value: impl Into<String>,
        advice: impl Into<String>,
    ) {
        let advice = Some(advice.into());
        self.add(name.into(), State::Limited, value.into(), advice, &[]);
    }

    fn missing(
        &mut self,
        name: impl Into<String>,
        value: impl Into<String>,
        advice: impl Into<String>,
        stops: &[Job],
    ) {
        let advice = Some(advice.into());
        self.add(name.into(), State::Missing, value.into(), advice, stops);
    }

    fn add(
        &mut self,
        name: String,
        state: State,
        value: String,
        advice: Option<String>,
        stops: &[Job],
    ) {
        self.list.push(Check {
            area: self.area,
            name,
            state,
            value,
            advice,
            stops: stops.to_vec(),
        });
    }
}

/// Prints what was found. Fails unless all jobs can be done here.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let mut checks = Checks::default();
        kernel::check(&mut checks);
        limits::check(&mut checks);
        software::check(&mut checks, &args.programs).await;
        let checks = checks.list;
        let works = |job: &Job| checks.iter().all(|check| !check.stops.contains(job));
        let jobs = JOBS.map(|(job, _)| JobState {
            job,
            works: works(&job),
        });
        let report = Report {
            schema: SCHEMA,
            pageferry: env!("CARGO_PKG_VERSION"),
            jobs: jobs.into(),
            checks,
        };
        match args.json {
            true => crate::print_json(&report),
            false => print(&report),
        }
        verdict(&report)
    })
}

fn print(report: &Report) {
    let mut area = "";
    for check in &report.checks {
        if check.area != area {
            area = check.area;
            println!("{area}");
        }
        let state = match check.state {
            State::Works => "works",
            State::Limited => "limited",
            State::Absent => "absent",
            State::Missing => "missing",
        };
        println!("  {state:<8} {:<32} {}", check.name, check.value);
        if let Some(advice) = &check.advice {
            println!("  {:<8} {:<32} -> {advice}", "", "");
        }
    }
    println!("jobs");
    for (job, (_, title)) in report.jobs.iter().zip(JOBS) {
        let state = if job.works { "works" } else { "missing" };
        println!("  {state:<8} {title}");
    }
}

fn verdict(report: &Report) -> Result<()> {
    let stopped = report.jobs.iter().zip(JOBS).filter(|(job, _)| !job.works);
    let stopped: Vec<&str> = stopped.map(|(_, (_, title))| title).collect();
    match stopped.is_empty() {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Unsupported,
            format!("this host cannot: {}", stopped.join("; ")),
        )),
    }
}
