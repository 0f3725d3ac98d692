//! The policies of `examples/`: each is compared with today's by simulation, and restores a real process. A recorded trace
//! is fed to a policy.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pageferry::observe::trace::{Access, Answer, TraceReader};
use testbed::daemons::Make;
use testbed::debian::Suite;
use testbed::load::content::Content;
use testbed::load::scenarios::verifying;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::process::run;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::workspace::example;

/// Pages of the process that is restored.
const PAGES: u32 = 4096;

fn spec(test_dir: &TestDir, name: &str) -> LoadSpec {
    let areas = vec![AreaSpec::new(Mapping::Private, PAGES, Content::Mixed)];
    LoadSpec::new(test_dir.path(name), areas)
}

/// A directory in which an example is lazy-client.
fn as_lazy_client(test_dir: &TestDir, name: &str) -> Result<PathBuf> {
    let dir = test_dir.path(&format!("{name}-bin"));
    fs::create_dir_all(&dir)?;
    symlink(example(name)?, dir.join("lazy-client"))?;
    Ok(dir)
}

#[test]
fn policies_are_simulated_and_restore() {
    with_criu(Suite::Sid, |test_dir, criu| {
        for name in ["in_order", "whole_regions"] {
            let output = run(Command::new(example(name)?).arg("simulate"))?;
            let output = String::from_utf8(output.stdout)?;
            ensure!(output.lines().count() == 5, "{output}");
            for who in ["today's", "this"] {
                ensure!(output.matches(who).count() == 2, "{output}");
            }
            let dir = as_lazy_client(test_dir, name)?;
            let plan = Plan::new(criu, Source::Dump, Make::Build(&dir));
            let mut moved = PostCopy::start(test_dir, &plan, spec(test_dir, name), &verifying())?;
            moved.reports()?;
            moved.finish()?;
            drop(moved);
            fs::rename(
                test_dir.path("dumped"),
                test_dir.path(&format!("dumped-{name}")),
            )?;
        }
        Ok(())
    });
}

#[test]
fn a_recorded_trace_is_fed_to_a_policy() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let trace = test_dir.path("faults.trace");
        let plan = Plan {
            client_options: vec!["--trace".into(), trace.display().to_string()],
            ..Plan::new(criu, Source::Local, Make::Ours)
        };
        let mut moved = PostCopy::start(test_dir, &plan, spec(test_dir, "load"), &verifying())?;
        moved.reports()?;
        moved.finish()?;
        expect_whole_records(&trace)?;
        for policy in ["adaptive", "recording"] {
            let mut replay = Command::new(example("replay")?);
            replay.arg(&trace).arg(test_dir.path("dumped")).arg(policy);
            let output = run(&mut replay)?;
            let output = String::from_utf8(output.stdout)?;
            let mut lines = output.lines();
            ensure!(
                lines.next() == Some("time_us,pid,address,bytes,class"),
                "{output}"
            );
            let bytes = lines.map(|line| {
                let bytes = line.split(',').nth(3).context("four fields")?;
                Ok(bytes.parse::<u64>()?)
            });
            // What the process has of its own is little beside its area.
            let bytes = bytes.sum::<Result<u64>>()?;
            ensure!(bytes >= u64::from(PAGES) << 12, "{policy}: {bytes} bytes");
        }
        Ok(())
    });
}

/// Each fault of a restore from local images says what was done, how it was answered, and what came with its page.
fn expect_whole_records(trace: &Path) -> Result<()> {
    let answers = [Answer::Local, Answer::Zero, Answer::Gone].map(|answer| answer as u16);
    let mut local = 0;
    for record in TraceReader::open(trace)? {
        let record = record?;
        let range = record.start..record.start.saturating_add(record.bytes);
        ensure!(record.access != Access::Unknown as u16, "{record}");
        ensure!(answers.contains(&record.answer), "{record}");
        ensure!(range.contains(&record.address), "{record}");
        local += u64::from(record.answer == Answer::Local as u16);
    }
    ensure!(local > 0, "no fault was answered from the images");
    Ok(())
}
