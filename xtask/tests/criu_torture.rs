//! Torture, for as long as a test may take; and the fault that it must find.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::Suite;
use testbed::gate;
use testbed::workspace::{self, BIN_DIR_VARIABLE};

/// Names the fault that debug builds can have: connections to a source end orderly instead of with a reset.
const PLANTED: &str = "PAGEFERRY_TEST_SKIP_RESETS";

/// Whether it succeeded, what it counted, and what it said; nothing if it cannot run here.
fn torture(args: &[&str], planted: bool) -> Result<Option<(bool, Value, String)>> {
    if gate::criu(Suite::Sid).is_none() {
        return Ok(None);
    }
    let binary = workspace::binary("pageferry")?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .arg("torture")
        .args(args)
        .env(BIN_DIR_VARIABLE, binary.parent().context("a directory")?);
    if planted {
        command.env(PLANTED, "1");
    }
    let output = command.output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = stdout.lines().last().unwrap_or_default();
    let counts = serde_json::from_str(line).with_context(|| format!("{stdout}{errors}"))?;
    Ok(Some((output.status.success(), counts, errors)))
}

#[test]
fn nothing_is_lost_doubled_or_wrong() -> Result<()> {
    // The cases are the same each time; what happens first in each of them is not.
    let args = ["--migrations", "6", "--minutes", "2", "--seed", "20261129"];
    if let Some((_, counts, errors)) = torture(&args, false)? {
        for count in ["lost", "doubled", "wrong_pages", "leftovers", "stuck"] {
            ensure!(counts[count] == 0, "{counts}\n{errors}");
        }
        ensure!(counts["migrations"].as_u64() > Some(0), "{counts}");
    }
    Ok(())
}

#[test]
fn a_missing_reset_is_found() -> Result<()> {
    let mut args = vec!["--migrations", "30", "--minutes", "4", "--stop-at-first"];
    args.extend(["--mode", "post-copy", "--fault", "stop", "--seed", "7"]);
    if let Some((succeeded, counts, errors)) = torture(&args, true)? {
        ensure!(!succeeded, "{counts}\n{errors}");
        ensure!(counts["lost"] == 1, "{counts}\n{errors}");
    }
    Ok(())
}
