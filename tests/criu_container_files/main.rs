//! Files move with a container that writes them: the destination's tree is the source's at the freeze, and what fails
//! before the decision leaves no half of a tree.

mod cuts;
mod layers;
mod pid;
mod power_cut;
mod trees;
mod writing;

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

use trees::expect_same_trees;
use writing::Writing;

/// There and back again: the first time it writes up to the freeze and knows what it must find, the second time it
/// stands still, so that both trees can be compared.
fn files_move_with_a_container(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start(test_dir, criu, "moving")? else {
        return Ok(());
    };
    let options = "--mode hybrid --max-rounds 2 --volume /root/volume";
    let report = writing.migrate(0, "there", options);
    let report = report.map_err(anyhow::Error::msg)?;
    ensure!(report["result"] == "moved", "{report}");
    let (here, there) = (writing.status(0)?, writing.status(1)?);
    ensure!(here.is_empty() && there == "running", "{here:?}, {there:?}");
    writing.send(1, "verify")?;
    let files = &report["files"];
    let rounds = files["rounds"].as_array().context("rounds")?;
    let bytes = |round: &Value| round["bytes"].as_u64().unwrap_or_default();
    ensure!(bytes(&rounds[0]) > 1 << 20, "{files}");
    ensure!(bytes(&files["freeze"]) < bytes(&rounds[0]) / 2, "{files}");
    let deleted = files["deleted"][0]["path"].as_str().unwrap_or_default();
    ensure!(deleted == "/data/deleted", "{files}");
    let volume = writing.home(1).join("volume");
    expect_same_trees(&writing.home(0).join("volume"), &volume)?;
    ensure!(!writing.home(1).join("volume.pageferry/tree").exists());

    writing.send(1, "pause")?;
    let report = writing.migrate(1, "back", options);
    let report = report.map_err(anyhow::Error::msg)?;
    let rounds = &report["files"]["rounds"];
    // What had stayed here is where it began.
    ensure!(bytes(&rounds[0]) < 1 << 20, "{rounds}");
    expect_same_trees(&writing.root(1), &writing.root(0))?;
    writing.send(0, "verify")?;
    writing.send(0, "go")?;
    writing.send(0, "verify")
}

#[test]
fn files_move_there_and_back() {
    with_criu(Suite::Sid, files_move_with_a_container);
}

/// What is sent ahead moves nothing, stays, and is gone on with.
fn files_are_sent_ahead(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start(test_dir, criu, "ahead")? else {
        return Ok(());
    };
    let bytes = |report: &Value| report["files"]["rounds"][0]["bytes"].as_u64();
    let ahead = writing.migrate(0, "ahead", "--preload --volume /root/volume");
    let ahead = ahead.map_err(anyhow::Error::msg)?;
    ensure!(ahead["result"] == "sent ahead", "{ahead}");
    ensure!(writing.status(0)? == "running" && writing.status(1)?.is_empty());
    ensure!(!writing.root(1).exists(), "it is a root already");
    writing.send(0, "verify")?;
    let moved = writing.migrate(0, "moved", "--mode cold --volume /root/volume");
    let moved = moved.map_err(anyhow::Error::msg)?;
    ensure!(moved["result"] == "moved", "{moved}");
    ensure!(
        bytes(&moved) < bytes(&ahead).map(|bytes| bytes / 2),
        "{ahead}\n{moved}"
    );
    writing.send(1, "verify")
}

#[test]
fn files_that_were_sent_ahead_are_gone_on_with() {
    with_criu(Suite::Sid, files_are_sent_ahead);
}

/// Nothing of the container is at the destination's places.
fn expect_nothing_there(writing: &Writing) -> Result<()> {
    let bundles = writing.home(1).join("bundles");
    let left: Vec<_> = fs::read_dir(&bundles)
        .map(|names| names.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    ensure!(left.is_empty(), "{left:?} is left");
    for name in ["volume", "volume.pageferry"] {
        ensure!(!writing.home(1).join(name).exists(), "{name} is left");
    }
    Ok(())
}

fn what_fails_leaves_no_tree(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start(test_dir, criu, "failing")? else {
        return Ok(());
    };
    let cold = "--mode cold --volume /root/volume";
    // Before the freeze.
    let output = writing.migrate(0, "hook", &format!("{cold} --pre-freeze false"));
    ensure!(output.is_err(), "{output:?}");
    expect_nothing_there(&writing)?;
    writing.send(0, "verify")?;
    // A disk that is too small for the files is told before, and one that has no room for names when they come.
    for (id, option, error) in [
        ("full", "size=1m", "the destination has 1 MiB of free space"),
        ("names", "nr_inodes=12", "No space left"),
    ] {
        writing.pair.machines[1].script(&format!(
            "mkdir -p bundles && mount -t tmpfs -o {option} tmpfs bundles"
        ))?;
        let output = writing.migrate(0, id, cold);
        let output = output.err().context("it fits")?;
        ensure!(output.contains(error), "{output}");
        let left = writing.pair.machines[1].output("ls -A bundles")?;
        ensure!(left.is_empty(), "{left} is left");
        ensure!(!writing.home(1).join("volume").exists());
        writing.pair.machines[1].script("umount bundles")?;
        writing.send(0, "verify")?;
    }
    // The agent dies while everything is at its place and nothing is decided; another one finds what is left.
    writing.pair.machines[1].script(&format!("{DEADLY}\n{}", agent("/root/deadly")))?;
    let output = writing.migrate(0, "dead", cold);
    ensure!(output.is_err(), "{output:?}");
    writing.send(0, "verify")?;
    ensure!(writing.status(0)? == "running");
    ensure!(writing.root(1).join("bin").exists(), "it died too early");
    writing.pair.machines[1].script(&format!(
        "rm port.json\n{}\nwhile [ -e bundles/c1 ]; do sleep 0.05; done",
        agent("/criu/criu")
    ))?;
    expect_nothing_there(&writing)
}

/// Ends the agent, and makes a CRIU that kills the next one as soon as a runtime comes to it.
const DEADLY: &str = "\
kill $(cat agent.pid); while kill -0 $(cat agent.pid) 2> /dev/null; do sleep 0.05; done; rm port.json
printf '#!/bin/sh\\n[ \"$1\" = swrk ] && kill -9 $(cat /root/agent.pid)\\nexec /criu/criu \"$@\"\\n' > deadly
chmod +x deadly";

pub(crate) fn agent(criu: &str) -> String {
    writing::AGENT
        .replace("$HERE", "$DESTINATION")
        .replace("/criu/criu", criu)
}

#[test]
fn a_migration_that_fails_leaves_no_files() {
    with_criu(Suite::Sid, what_fails_leaves_no_tree);
}
