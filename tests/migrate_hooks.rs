//! The user's commands at three points of a migration: what they are told, and what their failure means.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

const MIB: u32 = 8;

/// A command that writes its facts to `path`.
fn writing_facts(path: &Path) -> String {
    format!("env | grep ^PAGEFERRY_ > '{}'", path.display())
}

fn facts(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

#[test]
fn hooks_are_told_the_facts() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let (before, after) = (test_dir.path("before"), test_dir.path("after"));
        let moves = Move::new(criu, test_dir.path("source"), "told").with(&[
            "--mode",
            "cold",
            "--pre-freeze",
            &writing_facts(&before),
            "--post-resume",
            &format!("{}; exit 3", writing_facts(&after)),
            "--on-failure",
            "false",
        ]);
        moves.start(&load, &agent)?.succeed(GENEROUS)?;
        load.wait_until_gone()?;
        let root = load.pid().to_string();
        for (path, hook) in [(&before, "pre-freeze"), (&after, "post-resume")] {
            let facts = facts(path)?;
            ensure!(facts["PAGEFERRY_HOOK"] == hook, "{facts:?}");
            ensure!(
                facts["PAGEFERRY_ID"] == "told" && facts["PAGEFERRY_PID"] == root,
                "{facts:?}"
            );
            ensure!(facts["PAGEFERRY_MODE"] == "cold", "{facts:?}");
            let memory: u64 = facts["PAGEFERRY_MEMORY_BYTES"].parse()?;
            ensure!(memory > u64::from(MIB) << 19, "{facts:?}");
        }
        let downtime: f64 = facts(&after)?["PAGEFERRY_DOWNTIME_MS"].parse()?;
        ensure!(downtime > 0.0);
        // The processes live there whatever that hook does: its failure is told.
        let report = moves.report()?;
        ensure!(report["result"] == "moved", "{report}");
        let warning = report["warnings"][0].as_str().unwrap_or_default();
        ensure!(warning.contains("--post-resume"), "{report}");
        Ok(())
    });
}

#[test]
fn a_hook_that_fails_or_hangs_before_the_freeze_leaves_the_processes_here() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        for (id, command, why) in [
            ("fails", "exit 7", "exit status: 7"),
            ("hangs", "sleep 600", "--hook-limit"),
        ] {
            let path = test_dir.path(id);
            let moves = Move::new(criu, test_dir.path("source"), id).with(&[
                "--mode",
                "cold",
                "--hook-limit",
                "200ms",
                "--pre-freeze",
                command,
                "--on-failure",
                &writing_facts(&path),
            ]);
            moves.start(&load, &agent)?.fail(GENEROUS)?;
            load.expect_running()?;
            for report in load.run_everywhere(&verifying())? {
                report.expect_right()?;
            }
            let facts = facts(&path)?;
            ensure!(facts["PAGEFERRY_PROBLEM"].contains(why), "{facts:?}");
            ensure!(facts["PAGEFERRY_HOOK"] == "on-failure", "{facts:?}");
        }
        Ok(())
    });
}
