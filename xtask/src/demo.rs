//! `cargo xtask demo`: one Redis moves from host to host in each mode, while clients use it.
//!
//! ```text
//!   first host            second host          clients' host
//!   redis    -- cold      --> redis            four connections, which last from the first move to the end
//!   redis   <-- pre-copy  --
//!            -- post-copy -->
//!           <-- hybrid    --
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::criu::{self, Criu, Suite};
use testbed::services::{Service, ServiceHosts};
use testbed::test_dir::TestDir;
use testbed::wait;
use testbed::workspace::use_binaries;

use crate::setup::{self, NETWORK};

const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// Where the Redis listens: the probe asks there.
const PROBE: &str = "tcp:6379";

/// Columns of the table: a heading, the field of the report, and what its unit is divided by.
const COLUMNS: [(&str, &str, f64); 5] = [
    ("downtime ms", "downtime_ms", 1.0),
    ("resume ms", "resume_ms", 1.0),
    ("complete ms", "complete_ms", 1.0),
    ("total ms", "total_ms", 1.0),
    ("wire MiB", "wire_bytes", 1_048_576.0),
];

/// What to move.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Memory of the Redis, MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=4096))]
    mib: u32,

    /// Most rounds before a freeze.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    rounds: u32,

    /// A CRIU version or Debian suite, from 4.2 on [default: the machine's own CRIU, else that of sid].
    #[arg(long)]
    criu: Option<String>,
}

/// One move.
struct Moved {
    mode: &'static str,
    report: Value,
    /// The longest time that a client had no answer.
    wait: Duration,
}

/// Prints what is done, and when.
struct Steps(Instant);

impl Steps {
    fn print(&self, what: &str) {
        println!("{:6.1} s  {what}", self.0.elapsed().as_secs_f64());
    }
}

/// Moves the Redis, checks it, and prints the table.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    let steps = Steps(Instant::now());
    steps.print("look for programs of the system (missing ones are installed)");
    setup::install(NETWORK)?;
    steps.print("build the programs, unless they are built (minutes the first time)");
    use_binaries(setup::release_binaries()?);
    steps.print("look for a CRIU (fetched below target/criu the first time)");
    let criu = find_criu(args.criu.as_deref())?;
    steps.print(&format!("CRIU {}: {}", criu.version, criu.path.display()));
    steps.print(
        "look for a Debian system with a Redis (fetched below target/debian the first time)",
    );
    let system = Service::Redis.system()?;
    let test_dir = TestDir::new()?;
    let moved = move_about(args, (&criu, &system), &test_dir, &steps);
    if moved.is_err() && !wait::is_interrupted() {
        test_dir.show_logs();
    }
    print_table(&moved?);
    Ok(())
}

fn find_criu(wanted: Option<&str>) -> Result<Criu> {
    match wanted {
        Some(version) => criu::of_version(version),
        None => criu::of_machine().map_or_else(|| criu::of_suite(Suite::Sid), Ok),
    }
}

fn move_about(
    args: &Args,
    (criu, system): (&Criu, &std::path::Path),
    test_dir: &TestDir,
    steps: &Steps,
) -> Result<Vec<Moved>> {
    steps.print("start two hosts and a client's, each a network namespace");
    let mut hosts = ServiceHosts::start(test_dir, system, criu, "demo")?;
    let pid = hosts.serve(Service::Redis)?;
    steps.print(&format!("four clients fill a Redis with {} MiB", args.mib));
    let mut clients = Service::Redis.talk(hosts.client(), hosts.address()?, args.mib)?;
    let rounds = args.rounds.to_string();
    let options = ["--max-rounds", rounds.as_str(), "--probe", PROBE];
    let mut moved = Vec::new();
    for mode in MODES {
        steps.print(&format!("move it to the other host: {mode}"));
        clients.take_longest();
        let report = hosts.migrate(pid, mode, &options)?;
        clients.expect_answers().context(mode)?;
        hosts.expect_moved(pid).context(mode)?;
        let wait = clients.take_longest();
        moved.push(Moved { mode, report, wait });
    }
    steps.print("compare every key with what was written last");
    clients.finish()?;
    steps.print(&format!(
        "{} answers over the same four connections, none wrong",
        clients.answers()
    ));
    Ok(moved)
}

fn print_table(moved: &[Moved]) {
    print!("\n{:<10}", "mode");
    for (heading, ..) in COLUMNS {
        print!("{heading:>13}");
    }
    println!("{:>17}", "client waited ms");
    for Moved { mode, report, wait } in moved {
        print!("{mode:<10}");
        for (_, field, unit) in COLUMNS {
            match report[field].as_f64() {
                Some(value) => print!("{:>13.0}", value / unit),
                None => print!("{:>13}", "-"),
            }
        }
        println!("{:>17}", wait.as_millis());
    }
    println!(
        "\ndowntime: freeze to running again; resume: freeze to the first answer; complete: start to the last page \
         there;\ntotal: the whole command; wire: what left the source (docs/migration.md)"
    );
}
