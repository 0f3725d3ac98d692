//! `cargo xtask test`: everything, with all set-up.

use std::process::{Command, Stdio};

use anyhow::Result;
use testbed::criu::{self, Crit, Suite};
use testbed::gocriu::Phaul;
use testbed::pipes::LargePipes;
use testbed::wait::retried;
use testbed::workspace::{BIN_DIR_VARIABLE, target_dir};

use crate::setup::{self, CONTAINERS, NETWORK, SOURCES, cargo, run};

/// What to test.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Handed to `cargo nextest run`: names, `-E FILTER`, ... (nothing: all tests).
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    nextest: Vec<String>,
}

/// Sets up, builds, and runs documentation tests and then all others.
pub(crate) fn run_tests(args: &Args) -> Result<()> {
    setup::require_root()?;
    setup::install(NETWORK)?;
    setup::install(CONTAINERS)?;
    setup::install(SOURCES)?;
    for suite in Suite::ALL {
        let criu = criu::of_suite(suite)?;
        println!(
            "CRIU {} of {}: {}",
            criu.version,
            suite.name(),
            criu.path.display()
        );
    }
    Crit::fetched()?;
    testbed::systemd::Systemd::fetched()?;
    testbed::debian::program(Suite::Sid, "checkpointctl", "bin/checkpointctl")?;
    testbed::routes::Haproxy::fetched()?;
    Phaul::built()?;
    testbed::debian::runtimes()?;
    testbed::services::Service::Redis.system()?;
    testbed::ssh::system()?;
    let nextest = nextest()?;
    let binaries = setup::debug_binaries()?;
    // Once for all tests; each of them would raise it and put it back by itself.
    let _pipes = LargePipes::allow()?;
    run(cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
    let mut tests = Command::new(nextest);
    tests
        .current_dir(testbed::workspace::root())
        .env(BIN_DIR_VARIABLE, binaries);
    run(tests
        .args(["nextest", "run", "--workspace"])
        .args(&args.nextest))
}

/// The nextest of the machine, or one built into the target directory.
fn nextest() -> Result<std::path::PathBuf> {
    let of_machine = Command::new("cargo-nextest")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if of_machine.is_ok_and(|status| status.success()) {
        return Ok("cargo-nextest".into());
    }
    let tools = target_dir().join("tools");
    let program = tools.join("bin/cargo-nextest");
    if !program.is_file() {
        println!("building cargo-nextest, once");
        retried("cargo install cargo-nextest", || {
            run(cargo()
                .args(["install", "cargo-nextest", "--locked", "--root"])
                .arg(&tools))
        })?;
    }
    Ok(program)
}
