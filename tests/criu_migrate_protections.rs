//! Children whose memory has another protection than their parent's: what the preflight warns of is what a real CRIU restores
//! otherwise, and nothing else is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::exchange;
use testbed::hugepages::HugePages;
use testbed::process::run;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

const GENERATIONS: usize = 3;

/// Of one process: places, and what they are restored as.
type Changed = BTreeMap<&'static str, &'static str>;

/// Places of the child and of the grandchild that are not restored as they were: all that is to be warned of.
fn expected() -> [Changed; GENERATIONS] {
    [
        Changed::new(),
        Changed::from([
            ("code", "rw-p"),
            ("hidden", "-w-p"),
            ("more", "rwxp"),
            ("untouched", "rw-p"),
        ]),
        Changed::from([
            ("code", "rw-p"),
            ("hidden", "-w-p"),
            ("between", "rw-p"),
            ("more", "rwxp"),
        ]),
    ]
}

/// What each generation has before a dump. Of private files nothing is foreseen: CRIU 4.2.1 and 4.3 restored that of the
/// child as it was, and that of the grandchild as the child's.
const BEFORE: [(&str, [&str; GENERATIONS]); 10] = [
    ("code", ["rw-p", "rwxp", "rwxp"]),
    ("hidden", ["---p", "rw-p", "rw-p"]),
    ("between", ["rw-p", "r-xp", "rwxp"]),
    ("more", ["rwxp", "rw-p", "rw-p"]),
    ("same", ["rw-p", "rw-p", "rw-p"]),
    ("read", ["r--p", "rw-p", "rw-p"]),
    ("unwritable", ["rw-p", "r-xp", "r--p"]),
    ("untouched", ["rw-p", "rwxp", "rw-p"]),
    ("part", ["rw-p", "rwxp", "rwxp"]),
    ("huge", ["rw-p", "rwxp", "rwxp"]),
];

/// The warnings say what `expected` does, of the processes in `dir`.
fn expect_warnings(warnings: &Value, dir: &Path) -> Result<()> {
    let warnings = warnings.as_array().context("no warnings")?;
    let warnings: Vec<&str> = warnings.iter().filter_map(Value::as_str).collect();
    let pid = |generation: usize| fs::read_to_string(dir.join(format!("pid-{generation}")));
    for (generation, changed) in expected().iter().enumerate() {
        let begin = format!("CRIU restores memory of pid {} ", pid(generation)?);
        let mut own = warnings.iter().filter(|text| text.starts_with(&begin));
        let Some(text) = own.next().filter(|_| !changed.is_empty()) else {
            ensure!(changed.is_empty(), "{begin}: nothing in {warnings:?}");
            continue;
        };
        // Three of them are named.
        let named = text.matches(" as ").count();
        let more = changed.len() - named;
        ensure!(named == 3, "{text}");
        ensure!(text.contains(&format!("and {more} more")), "{text}");
    }
    Ok(())
}

/// What each process has after a restore.
fn expect_restored(dir: &Path) -> Result<()> {
    fs::write(dir.join("go"), "")?;
    for (generation, changed) in expected().iter().enumerate() {
        let path = dir.join(format!("said-{generation}"));
        let said = wait::until("what a process has found", GENEROUS, || {
            Ok(path
                .exists()
                .then(|| fs::read_to_string(&path))
                .transpose()?)
        })?;
        for (name, before) in BEFORE {
            let line = said.lines().find(|line| line.starts_with(name));
            let found = line.and_then(|line| line.split_whitespace().nth(2));
            let wanted = changed.get(name).unwrap_or(&before[generation]);
            ensure!(
                found == Some(*wanted),
                "{name} of generation {generation} is {found:?}, not {wanted}"
            );
        }
    }
    Ok(())
}

fn is_told(test_dir: &TestDir, criu: &Criu, mode: &'static str) -> Result<()> {
    let _huge = HugePages::allow(8)?;
    let dir = test_dir.path("load");
    let place = dir.to_str().context("a directory that is no UTF-8")?;
    let mut process = exchange::start("protections", &[place], &dir, "ready")?;
    let agent = Agent::in_test(test_dir, criu, "agent")?;
    let pid = process.pid().to_string();
    let mut command = Command::new(workspace::binary("pageferry")?);
    command
        .args(["plan", "--json", "--watch", "10ms", "--pid", &pid])
        .args(["--to", &agent.address().to_string()])
        .arg("--criu")
        .arg(&criu.path)
        .arg("--state-dir")
        .arg(test_dir.path("plan"));
    let plan: Value = serde_json::from_slice(&run(&mut command)?.stdout)?;
    testbed::schema::expect("plan", &plan)?;
    expect_warnings(&plan["warnings"], &dir)?;
    let moves = Move::new(criu, test_dir.path("source"), "told").with(&["--mode", mode]);
    let mut moving = moves.start_subject(&["--pid", &pid], &agent)?;
    moving.succeed(GENEROUS).with_context(|| agent.log())?;
    process.wait(GENEROUS)?;
    expect_warnings(&moves.report()?["warnings"], &dir)?;
    expect_restored(&dir)
}

#[test]
fn what_a_restore_protects_otherwise_is_told_cold() {
    with_criu(Suite::Sid, |test_dir, criu| is_told(test_dir, criu, "cold"));
}

#[test]
fn what_a_restore_protects_otherwise_is_told_lazily() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        is_told(test_dir, criu, "hybrid")
    });
}
