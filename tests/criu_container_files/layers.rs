//! Layers below a container's writable one travel once, and the overlay at the destination is what it was.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

use crate::agent;
use crate::writing::Writing;

/// Bytes of a file of the layer that nothing makes smaller.
const BLOB_BYTES: u64 = 2 << 20;

/// A layer with that file and some to be deleted and hidden, and the first container's root over it.
const MOUNT: &str = "\
head -c 2097152 /dev/urandom > base/blob; echo > base/gone; mkdir base/hidden; echo > base/hidden/file
mkdir -p bundles/c1/rootfs bundles/c1/upper bundles/c1/work
mount -t overlay overlay -o lowerdir=/root/base,upperdir=/root/bundles/c1/upper,workdir=/root/bundles/c1/work \
    /root/bundles/c1/rootfs
rm bundles/c1/rootfs/gone; rm -r bundles/c1/rootfs/hidden; mkdir bundles/c1/rootfs/hidden";

/// A second container of the same layer, in whose root one file is new.
const SECOND: &str = "\
mkdir -p bundles/c2/rootfs bundles/c2/upper bundles/c2/work
mount -t overlay overlay -o lowerdir=/root/base,upperdir=/root/bundles/c2/upper,workdir=/root/bundles/c2/work \
    /root/bundles/c2/rootfs
cp bundles/c1/config.json bundles/c2/config.json
echo of c2 > bundles/c2/rootfs/second
runc run -d --bundle /root/bundles/c2 c2 < /dev/null > /dev/null 2>&1
until [ -s bundles/c2/rootfs/data/log ]; do sleep 0.05; done";

/// Fails unless the root that arrived is an overlay in which deletions are deletions.
const LOOK: &str = "\
cd bundles/c1/rootfs; [ $(stat -f -c %T .) = overlayfs ]; [ -e blob ]; [ ! -e gone ]; [ -d hidden ]; [ ! -e hidden/file ]";

const COLD: &str = "--mode cold --volume /root/volume";

fn layer(report: &Value) -> Result<&Value> {
    let layers = report["files"]["layers"].as_array().context("layers")?;
    ensure!(layers.len() == 1, "{report}");
    Ok(&layers[0])
}

fn sent(layer: &Value) -> u64 {
    layer["bytes"].as_u64().unwrap_or_default()
}

fn layers_travel_once(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start_on(test_dir, criu, "layers", Some(MOUNT))? else {
        return Ok(());
    };
    let first = writing.migrate(0, "first", COLD);
    let first = first.map_err(anyhow::Error::msg)?;
    ensure!(first["result"] == "moved", "{first}");
    ensure!(sent(layer(&first)?) > BLOB_BYTES, "{first}");
    writing.send(1, "verify")?;
    writing.pair.machines[1].script(LOOK)?;

    writing.pair.machines[0].script(SECOND)?;
    let second = writing.migrate_other("c2", 0, "second", "--mode cold");
    let second = second.map_err(anyhow::Error::msg)?;
    let wire = second["files"]["rounds"][0]["bytes"].as_u64();
    ensure!(sent(layer(&second)?) == 0, "{second}");
    ensure!(wire.is_some_and(|bytes| bytes < BLOB_BYTES), "{second}");
    let there = writing.pair.machines[1].output("cat bundles/c2/rootfs/second")?;
    ensure!(there == "of c2", "{there}");

    // Back: the layer has the same name where it is kept, and one that is mounted by hand stays in the way.
    let refused = writing.migrate(1, "refused", COLD);
    ensure!(refused.is_err_and(|error| error.contains("mount point")));
    writing.pair.machines[0].script("umount bundles/c1/rootfs")?;
    let back = writing.migrate(1, "back", COLD);
    let back = back.map_err(anyhow::Error::msg)?;
    ensure!(
        layer(&back)?["digest"] == layer(&first)?["digest"],
        "{back}"
    );
    writing.send(0, "verify")?;
    // And there again, where the overlay of the first time is still mounted.
    let again = writing.migrate(0, "again", COLD);
    let again = again.map_err(anyhow::Error::msg)?;
    ensure!(sent(layer(&again)?) == 0, "{again}");
    writing.send(1, "verify")?;
    writing.pair.machines[1].script(LOOK)
}

#[test]
fn layers_that_the_destination_has_do_not_travel() {
    with_criu(Suite::Sid, layers_travel_once);
}

/// Ends the agent, and makes a CRIU that restores nothing.
const FAILING: &str = "\
kill $(cat agent.pid); while kill -0 $(cat agent.pid) 2> /dev/null; do sleep 0.05; done; rm port.json
printf '#!/bin/sh\\n[ \"$1\" = swrk ] && exit 1\\nexec /criu/criu \"$@\"\\n' > failing
chmod +x failing";

fn what_fails_leaves_no_overlay(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start_on(test_dir, criu, "no-overlay", Some(MOUNT))? else {
        return Ok(());
    };
    let there = |writing: &Writing, script: &str| writing.pair.machines[1].output(script);
    writing.pair.machines[1].script(&format!("{FAILING}\n{}", agent("/root/failing")))?;
    let output = writing.migrate(0, "fails", COLD);
    ensure!(output.is_err(), "{output:?}");
    writing.send(0, "verify")?;
    let left = there(
        &writing,
        "grep -c /root/bundles /proc/mounts || true; ls -A bundles",
    )?;
    ensure!(left == "0", "{left}");
    // The layer came whole, and stays.
    let layers = writing.home(1).join("agent/layers");
    let kept: Vec<_> = fs::read_dir(&layers)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    ensure!(kept.iter().any(|name| name.len() == 64), "{kept:?}");
    ensure!(
        !kept
            .iter()
            .any(|name| name.to_string_lossy().contains("pageferry")),
        "{kept:?}"
    );
    // As files, without layers.
    writing.pair.machines[1].script(&format!(
        "kill $(cat agent.pid); while kill -0 $(cat agent.pid) 2> /dev/null; do sleep 0.05; done; rm port.json\n{}",
        agent("/criu/criu")
    ))?;
    let moved = writing.migrate(0, "flat", &format!("{COLD} --layers never"));
    let moved = moved.map_err(anyhow::Error::msg)?;
    ensure!(
        moved["files"]["layers"] == Value::Array(Vec::new()),
        "{moved}"
    );
    writing.send(1, "verify")?;
    let kind = there(
        &writing,
        "stat -f -c %T bundles/c1/rootfs; ls -d bundles/c1/rootfs/gone || true",
    )?;
    ensure!(
        !kind.contains("overlay") && !kind.contains("gone"),
        "{kind}"
    );
    Ok(())
}

#[test]
fn a_migration_that_fails_leaves_no_overlay() {
    with_criu(Suite::Sid, what_fails_leaves_no_overlay);
}
