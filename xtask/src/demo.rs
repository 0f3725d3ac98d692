//! `cargo xtask demo`: one process moves from one host to another while it works.
//!
//! ```text
//!   host "source" (network namespace)                 host "destination"
//!   testload --- criu dump --lazy-pages  <--veth-->  lazy-client --- criu restore --lazy-pages
//! ```

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::bed::Bed;
use testbed::criu::{self, Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::load::Load;
use testbed::load::report::{Latency, Report};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::net::TwoHosts;
use testbed::transfer::{Copied, copy_files};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::use_binaries;

use crate::setup::{self, NETWORK};

/// Port of the dump on the source: the namespace has no other.
const PORT: u16 = 27_000;

/// What to move, and how.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Memory of the process, MiB.
    #[arg(long, default_value_t = 384, value_parser = clap::value_parser!(u32).range(16..=16_384))]
    mib: u32,

    /// Pages that the process rewrites every second, on both hosts.
    #[arg(long, default_value_t = 5_000)]
    dirty: u32,

    /// Rate of the link between the hosts, Mbit/s.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rate: u64,

    /// A CRIU version or Debian suite [default: the machine's own CRIU, else that of sid].
    #[arg(long)]
    criu: Option<String>,
}

/// What each phase took.
struct Phases {
    freeze: Duration,
    metadata: Duration,
    copied: Copied,
    resume: Duration,
    drained: Duration,
}

/// Moves the process, checks it, and prints the table.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    setup::install(NETWORK)?;
    use_binaries(setup::release_binaries()?);
    let criu = find_criu(args.criu.as_deref())?;
    println!("CRIU {} ({})", criu.version, criu.path.display());
    let bed = Bed::new()?;
    let moved = migrate(args, &criu, &bed);
    if moved.is_err() && !wait::is_interrupted() {
        bed.show_logs();
    }
    moved
}

fn find_criu(wanted: Option<&str>) -> Result<Criu> {
    match wanted {
        Some(version) => criu::of_version(version),
        None => criu::of_machine().map_or_else(|| criu::of_suite(Suite::Sid), Ok),
    }
}

fn migrate(args: &Args, criu: &Criu, bed: &Bed) -> Result<()> {
    let hosts = TwoHosts::new(Some(args.rate * 1_000_000))?;
    println!(
        "two hosts, {} and {}, with {} Mbit/s between them",
        hosts.source.address, hosts.destination.address, args.rate
    );
    let spec = LoadSpec::mixed(bed.path("load"), args.mib);
    let mut load = Load::start(spec, Some(&hosts.source.net))?;
    load.run(
        0,
        &[Step::Dirty {
            pages_per_s: args.dirty,
        }],
    )?;
    let before = load.run(
        0,
        &[Step::Verify(Pass::full(Order::Ascending)), Step::Status],
    )?;
    before.expect_right()?;
    println!(
        "pid {} holds {} MiB, rewrites {} pages a second, and counts: {}\n",
        before.pid, args.mib, args.dirty, before.counter
    );

    let (there, here) = (bed.path("source"), bed.path("destination"));
    let started = Instant::now();
    let dump = Dump::new(criu, load.pid(), &there).in_net(&hosts.source.net);
    let mut dump = dump.serve_lazily(hosts.source.at(PORT))?;
    let freeze = started.elapsed();
    let copied = copy_files(&hosts, &there, &here)?;
    let metadata = started.elapsed() - freeze;

    let summary_file = bed.path("summary.json");
    let options = Options::new(&here)
        .at(&hosts.destination.net, hosts.destination.address)
        .with(&["--summary-json", &summary_file.to_string_lossy()])
        .log_to("lazy.log");
    let mut daemon = LazyDaemon::start(Make::Ours, &options, Some(hosts.source.at(PORT)))?;
    // Carried out by the restored process, the moment it runs: it needs all of its memory at once.
    let sent = load.send(0, &[Step::Verify(Pass::full(Order::Random))])?;
    let restore = Restore::new(criu, &here)
        .in_net(&hosts.destination.net)
        .lazily();
    let restored = restore.run()?;
    let resume = started.elapsed() - freeze - metadata;
    load.steer(restored.init()?)?;

    daemon.process().succeed(GENEROUS)?;
    let drained = started.elapsed() - freeze - metadata - resume;
    dump.succeed(GENEROUS)?;
    load.wait_until_gone()?;
    let at_once = load.receive(0, sent, GENEROUS)?;
    let phases = Phases {
        freeze,
        metadata,
        copied,
        resume,
        drained,
    };
    print_phases(&phases);
    print_memory(&at_once, &summary_file)?;
    prove(&load, &before, &at_once)
}

fn print_phases(phases: &Phases) {
    let ms = |duration: Duration| format!("{:.0} ms", duration.as_secs_f64() * 1e3);
    println!("{:<12}{:>10}   what happened", "phase", "took");
    let line = |phase: &str, took: Duration, what: String| {
        println!("{phase:<12}{:>10}   {what}", ms(took));
    };
    line(
        "freeze",
        phases.freeze,
        "criu dump stopped the process and took all but its memory".to_owned(),
    );
    line(
        "metadata",
        phases.metadata,
        format!(
            "{} images, {} KiB, over the link",
            phases.copied.files,
            phases.copied.bytes >> 10
        ),
    );
    line(
        "resume",
        phases.resume,
        "criu restore, until the process ran again".to_owned(),
    );
    let downtime = phases.freeze + phases.metadata + phases.resume;
    line(
        "= downtime",
        downtime,
        "from the first phase to here the process stood still".to_owned(),
    );
    line(
        "drained",
        phases.drained,
        "lazy-client brought all the memory that was missing".to_owned(),
    );
}

fn print_memory(at_once: &Report, summary_file: &Path) -> Result<()> {
    let text = fs::read(summary_file).with_context(|| summary_file.display().to_string())?;
    let summary: Value = serde_json::from_slice(&text)?;
    let number = |value: &Value, name: &str| {
        value[name]
            .as_u64()
            .with_context(|| format!("no {name} in {}", summary_file.display()))
    };
    let (pages, latency) = (&summary["pages"], &summary["fault_latency"]);
    println!(
        "\nmemory      {} pages were missing, {} MiB received: {} by faults, {} around them, {} by the stream",
        number(&summary, "total_pages")?,
        number(&summary, "bytes_received")? >> 20,
        number(pages, "fault")?,
        number(pages, "around")?,
        number(pages, "stream")?,
    );
    println!(
        "faults      {} as lazy-client saw them: p50 {} µs, p99 {} µs",
        number(latency, "count")?,
        number(latency, "p50_us")?,
        number(latency, "p99_us")?,
    );
    let touches = at_once
        .every_step()
        .next()
        .map(|step| step.faults)
        .unwrap_or_default();
    let Latency {
        count,
        p50_ns,
        p99_ns,
        ..
    } = touches;
    println!(
        "            {count} as the process felt them: p50 {} µs, p99 {} µs",
        p50_ns / 1000,
        p99_ns / 1000
    );
    Ok(())
}

/// The process is the one that was dumped, has its memory, and goes on counting and writing.
fn prove(load: &Load, before: &Report, at_once: &Report) -> Result<()> {
    let after = load.run(0, &[Step::Verify(Pass::full(Order::Ascending))])?;
    for report in [at_once, &after] {
        report.expect_right()?;
        ensure!(report.nonce == before.nonce, "another process answered");
        ensure!(
            report.counter >= before.counter,
            "the process's counter went back"
        );
    }
    let goes_on = wait::until("a higher counter", GENEROUS, || {
        let now = load.run(0, &[Step::Status])?.counter;
        Ok((now > after.counter).then_some(now))
    })?;
    let digest = |report: &Report| -> Result<(u64, u64)> {
        let step = report.steps.first().context("a report without steps")?;
        let both = (
            step.digest.context("no digest")?,
            step.expected_digest.context("no digest")?,
        );
        ensure!(
            both.0 == both.1,
            "checksum {:x} instead of {:x}",
            both.0,
            both.1
        );
        Ok(both)
    };
    let (read, written) = digest(at_once)?;
    println!(
        "\nchecksum    {read:016x} read on arrival, {written:016x} as the process wrote it: equal"
    );
    println!(
        "pages       {} checked on arrival and {} once more, none wrong",
        at_once.checked(),
        after.checked()
    );
    println!(
        "counter     {} before, {} on arrival, {goes_on} now: it goes on",
        before.counter, at_once.counter
    );
    Ok(())
}
