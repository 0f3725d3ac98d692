//! Images that a page server has received, in the hands of tools: CRIU's own `crit` and checkpointctl
//! see the memory that is there, and CRIU 4.1.1 restores what newer ones have dumped.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::{Crit, Criu};
use testbed::daemons::{Make, Options, PageServer};
use testbed::debian::{self, Suite};
use testbed::images::page_size;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::rounds::pages_file_bytes;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::{for_each_criu, gate};

for_each_criu!(
    tools_see_the_memory,
    criu_4_1_1_restores_what_newer_ones_dump
);

/// Dumps a load of 8 MiB into a page server of ours.
fn dump(test_dir: &TestDir, criu: &Criu) -> Result<(Load, std::path::PathBuf)> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 8), None)?;
    let images = test_dir.path("checkpoint");
    let server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
    Dump::new(criu, load.pid(), &images)
        .to(server.address())
        .run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    Ok((load, images))
}

fn tools_see_the_memory(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, images) = dump(test_dir, criu)?;
    let pages = pages_file_bytes(&images)? / page_size()?.bytes();
    if let Some(crit) = gate::crit() {
        expect_crit_to_see(&crit, &images, &load, pages)?;
    }
    let checkpointctl = debian::program(Suite::Sid, "checkpointctl", "bin/checkpointctl");
    if let Some(checkpointctl) = gate::need("checkpointctl", checkpointctl) {
        let output = output_of_checkpointctl(&checkpointctl, test_dir)?;
        let mib = (pages * page_size()?.bytes()) as f64 / f64::from(1 << 20);
        let size = format!("{mib:.1} MiB");
        ensure!(output.contains(&size), "not {size}: {output}");
    }
    Ok(())
}

fn expect_crit_to_see(crit: &Crit, images: &Path, load: &Load, pages: u64) -> Result<()> {
    let pagemap = images.join(format!("pagemap-{}.img", load.pid()));
    let decoded = crit.decode(&pagemap)?;
    let entries = decoded["entries"].as_array().context("entries")?;
    let count = |entry: &Value, name: &str| entry[name].as_u64().unwrap_or(0);
    let sum = |name: &str| entries.iter().map(|entry| count(entry, name)).sum::<u64>();
    ensure!(sum("nr_pages") == pages, "{pages} pages: {decoded}");
    ensure!(sum("compat_nr_pages") == pages, "{pages} pages: {decoded}");
    let resident = crit.resident(images)?;
    // A line of the first column is an address and a count.
    let counts = resident.lines().filter_map(|line| {
        let (address, rest) = line.split_once(" / ")?;
        let count = rest.split_whitespace().next()?;
        let is_first = u64::from_str_radix(address.trim_start_matches('\t'), 16).is_ok();
        count.parse::<u64>().ok().filter(|_| is_first)
    });
    let resident = counts.sum::<u64>();
    ensure!(resident == pages, "crit sees {resident} of {pages} pages");
    Ok(())
}

/// What `checkpointctl memparse` says of the images, packed as an engine of containers packs them.
fn output_of_checkpointctl(checkpointctl: &Path, test_dir: &TestDir) -> Result<String> {
    std::fs::write(
        test_dir.path("config.dump"),
        r#"{"id":"1","name":"load","rootfsImageName":"none","runtime":"none","createdTime":"2026-01-01T00:00:00Z"}"#,
    )?;
    std::fs::write(
        test_dir.path("spec.dump"),
        r#"{"ociVersion":"1.0.0","annotations":{}}"#,
    )?;
    let archive = test_dir.path("checkpoint.tar");
    let packed = Command::new("tar")
        .arg("-C")
        .arg(test_dir.dir())
        .arg("-cf")
        .arg(&archive)
        .args(["config.dump", "spec.dump", "checkpoint"])
        .status()?;
    ensure!(packed.success(), "tar: {packed}");
    let output = Command::new(checkpointctl)
        .arg("memparse")
        .arg(&archive)
        .output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "checkpointctl: {}: {stdout}{complained}",
        output.status
    );
    Ok(stdout)
}

fn criu_4_1_1_restores_what_newer_ones_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, images) = dump(test_dir, criu)?;
    let Some(oldest) = gate::criu(Suite::Trixie) else {
        return Ok(());
    };
    let _restored = Restore::new(&oldest, &images).run()?;
    load.expect_first_memory().map(drop)
}
