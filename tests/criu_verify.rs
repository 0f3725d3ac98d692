//! `pageferry verify` against a real `criu restore`: real images, damaged in each way that a table lists.
//!
//! What CRIU cannot restore, or restores wrong, is never called good; what it restores right is no fault.

mod damage;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use damage::{ALONE, Damage, Images, ON_PARENT};
use pageferry::image::dir::PARENT_LINK;
use serde_json::Value;
use testbed::criu::Criu;
use testbed::debian::Suite;
use testbed::images::move_same_pages_to_parent;
use testbed::load::Load;
use testbed::load::report::FAILURE_FILE;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

/// A restore whose log is longer never ends: CRIU reads behind the end of a file again and again, and says so.
const ENDLESS_LOG_BYTES: u64 = 4 << 20;

/// What `verify` says.
struct Verdict {
    good: bool,
    /// Codes of faults.
    faults: Vec<String>,
    text: String,
}

fn verify(images: &Path, extra: &[&str]) -> Result<Verdict> {
    let mut command = Command::new(workspace::binary("pageferry")?);
    let output = command
        .args(["verify", "--json"])
        .args(extra)
        .arg(images)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(&text)
        .with_context(|| format!("{}{}", text, String::from_utf8_lossy(&output.stderr)))?;
    let findings = report["findings"].as_array().context("no findings")?;
    let faults = findings.iter().filter(|one| one["severity"] == "fault");
    let faults: Vec<String> = faults
        .filter_map(|one| one["code"].as_str().map(str::to_owned))
        .collect();
    let good = report["good"] == true;
    ensure!(good == faults.is_empty(), "{text}");
    ensure!(
        output.status.code() == Some(i32::from(!good)),
        "{}: {text}",
        output.status
    );
    Ok(Verdict { good, faults, text })
}

/// Restores, and lets every process compare every page: an error is a restore that fails or memory that is wrong.
fn restore(criu: &Criu, load: &Load, images: &Path) -> Result<()> {
    let restored = Restore::new(criu, images).start()?;
    let ended = wait::until("the restore", GENEROUS, || {
        let log_bytes = fs::metadata(restored.log()).map_or(0, |meta| meta.len());
        ensure!(log_bytes < ENDLESS_LOG_BYTES, "the restore never ends");
        Ok(restored.how_ended("restore"))
    })?;
    ensure!(ended == "exited 0", "the restore {ended}");
    let root = load.pid().to_string();
    load.steer(restored.init()?)?;
    let sent = load.send_everywhere(&[Step::Verify(Pass::full(Order::Ascending))])?;
    for (process, seq) in sent {
        let report = wait::until("a report", GENEROUS, || {
            if let Some(ended) = restored.how_ended(&root) {
                bail!("the restored process {ended}");
            }
            load.report(process, seq)
        })?;
        report.expect_right()?;
        let digest = load.spec().initial_digest(process);
        ensure!(
            report.steps[0].digest == Some(digest),
            "process {process} has other memory"
        );
    }
    Ok(())
}

/// A small tree with private and shared memory, dumped; with `parent` on top of a dump before.
fn dumped(test_dir: &TestDir, criu: &Criu, parent: bool) -> Result<Load> {
    let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 4, 2), None)?;
    if parent {
        Dump::new(criu, load.pid(), test_dir.path("before"))
            .leave_running()
            .run()?;
    }
    Dump::new(criu, load.pid(), test_dir.path("good")).run()?;
    load.wait_until_gone()?;
    if parent {
        let moved = move_same_pages_to_parent(&test_dir.path("good"), &test_dir.path("before"))?;
        ensure!(moved > 500, "only {moved} pages are in the parent");
    }
    Ok(load)
}

/// Copies what `damage` is to change, and changes it.
fn damaged(test_dir: &TestDir, load: &Load, damage: &Damage, parent: bool) -> Result<Images> {
    let images = Images {
        dir: test_dir.path("damaged"),
        pid: u32::try_from(load.pid().as_raw())?,
    };
    for dir in ["damaged", "damaged-before"] {
        if test_dir.path(dir).exists() {
            fs::remove_dir_all(test_dir.path(dir))?;
        }
    }
    copy(&test_dir.path("good"), &images.dir)?;
    if parent {
        copy(&test_dir.path("before"), &test_dir.path("damaged-before"))?;
        symlink("../damaged-before", images.dir.join(PARENT_LINK))?;
    }
    (damage.apply)(&images)?;
    Ok(images)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().context("a name")?))?;
        }
    }
    Ok(())
}

/// Compares what `verify` says of each damage with what CRIU does.
fn compare(test_dir: &TestDir, criu: &Criu, table: &[Damage], parent: bool) -> Result<()> {
    let document = fs::read_to_string(workspace::root().join("docs/reference/commands.md"))?;
    let undocumented = |code: &&str| !document.contains(&format!("`{code}`"));
    let codes: Vec<&str> = table.iter().filter_map(|damage| damage.code).collect();
    ensure!(!codes.iter().any(undocumented), "{codes:?}");
    let load = dumped(test_dir, criu, parent)?;
    let mut wrong = Vec::new();
    for damage in table {
        let images = damaged(test_dir, &load, damage, parent)?;
        let verdict = verify(&images.dir, &["--criu", &criu.path.to_string_lossy()])?;
        let restored = restore(criu, &load, &images.dir);
        let _ = fs::remove_file(test_dir.path("load").join(FAILURE_FILE));
        let said = match &restored {
            Ok(()) => "right".to_owned(),
            Err(error) => format!("{:.160}", format!("{error:#}").replace('\n', " ")),
        };
        eprintln!(
            "{}: verify {:?}, restore {said}",
            damage.name, verdict.faults
        );
        let agree = match (verdict.good, &restored) {
            (true, Ok(())) | (false, Err(_)) => true,
            (false, Ok(())) => damage.may_be_right,
            (true, Err(_)) => false,
        };
        let refused = damage.checked_by_4_3 && criu.release()? >= (4, 3);
        let named = match damage.code {
            None if refused => !verdict.good,
            Some(code) => verdict.faults.iter().any(|fault| fault == code),
            None => verdict.good,
        };
        if !agree || !named {
            wrong.push(format!(
                "{}: restore {said}, verify {}",
                damage.name, verdict.text
            ));
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(())
}

#[test]
fn damage_is_told_as_criu_4_2_sees_it() {
    with_criu(Suite::Sid, |test_dir, criu| {
        compare(test_dir, criu, ALONE, false)
    });
}

#[test]
fn damage_is_told_as_criu_4_1_sees_it() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        compare(test_dir, criu, ALONE, false)
    });
}

#[test]
fn damage_is_told_as_criu_4_3_sees_it() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        compare(test_dir, criu, ALONE, false)
    });
}

#[test]
fn damaged_parents_are_told() {
    with_criu(Suite::Sid, |test_dir, criu| {
        compare(test_dir, criu, ON_PARENT, true)
    });
}
