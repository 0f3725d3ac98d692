//! The destination loses its power: what its disk holds at that moment is the source's tree at the freeze, or the
//! container lives at the source.
//!
//! The disk is a file system in a file. Of what was written to it, that file has what was brought to the disk, and
//! nothing that waits in memory: a copy of it is the disk after a cut.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::process::run;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

use crate::trees::expect_same_trees;
use crate::writing::Writing;

/// Everything of the agent on one disk, which writes nothing by itself for a long time.
const DISK: &str = "\
kill $(cat agent.pid); while kill -0 $(cat agent.pid) 2> /dev/null; do sleep 0.05; done; rm port.json
mkdir disk && mount -o loop,commit=600 /shared/disk.img disk && mkdir disk/bundles
printf '#!/bin/sh\\n[ \"$1\" = swrk ] && cp /shared/disk.img /shared/restoring.img\\nexec /criu/criu \"$@\"\\n' > criu
chmod +x criu
pageferry agent --listen $DESTINATION:9191 --insecure --dir /root/disk/agent --criu /root/criu \
    --bundles /root/disk/bundles --port-file /root/port.json > agent.log 2>&1 < /dev/null & echo $! > agent.pid
until [ -e port.json ]; do sleep 0.05; done";

/// The disk as it was at a moment, mounted; unmounted on drop.
struct Cut(PathBuf);

impl Cut {
    fn mount(writing: &Writing, name: &str) -> Result<Cut> {
        let image = writing.stage_path(&format!("{name}.img"));
        let at = writing.stage_path(name);
        fs::create_dir_all(&at)?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&at))?;
        Ok(Cut(at))
    }

    fn root(&self) -> PathBuf {
        self.0.join("bundles/c1/rootfs")
    }

    /// The agent's last record of the migration; empty if there is none.
    fn record(&self) -> String {
        fs::read_to_string(self.0.join("agent/cut/record.json")).unwrap_or_default()
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let gone = run(Command::new("umount").arg("--lazy").arg(&self.0));
        if let Err(error) = gone {
            eprintln!("{} stays mounted: {error:#}", self.0.display());
        }
    }
}

fn power_is_cut_at_each_step(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start(test_dir, criu, "cut")? else {
        return Ok(());
    };
    // From here on only the hook changes files: what the container did after the move would be on the disk as well.
    writing.send(0, "pause")?;
    let disk = writing.stage_path("disk.img");
    fs::File::create(&disk)?.set_len(512 << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk))?;
    writing.pair.machines[1].script(DISK)?;
    // The first hook makes the last difference; the second sees the disk as soon as the decision is known.
    let options = "--mode cold --volume /root/volume \
        --pre-freeze 'cp /shared/disk.img /shared/rounds.img; echo late > /root/bundles/c1/rootfs/late; \
            dd if=/dev/urandom of=/root/bundles/c1/rootfs/late-too bs=1M count=3 status=none' \
        --post-resume 'cp /shared/disk.img /shared/decided.img'";
    let report = writing.migrate(0, "cut", options);
    report.map_err(anyhow::Error::msg)?;
    writing.status(1).and_then(|status| {
        ensure!(status == "running", "{status}");
        Ok(())
    })?;
    let rounds = Cut::mount(&writing, "rounds")?;
    ensure!(
        rounds.record().is_empty() && !rounds.root().exists(),
        "before the freeze"
    );
    let decided = Cut::mount(&writing, "decided")?;
    // Soon after the decision all memory is there.
    let record = decided.record();
    ensure!(
        record.contains("committed") || record.contains("complete"),
        "{:?}",
        decided.record()
    );
    expect_same_trees(&writing.root(0), &decided.root()).context("after the decision")?;
    // In between: whole, and another agent takes it back, since nothing was decided.
    {
        let restoring = Cut::mount(&writing, "restoring")?;
        ensure!(restoring.record().is_empty(), "{:?}", restoring.record());
        expect_same_trees(&writing.root(0), &restoring.root()).context("during the restore")?;
    }
    writing.pair.machines[1].script(
        "kill -9 $(cat agent.pid); umount -l disk; mount -o loop /shared/restoring.img disk; rm port.json\n\
         pageferry agent --listen $DESTINATION:9191 --insecure --dir /root/disk/agent --criu /criu/criu \
             --bundles /root/disk/bundles --port-file /root/port.json > again.log 2>&1 < /dev/null & echo $! > agent.pid\n\
         until [ -e port.json ]; do sleep 0.05; done\n\
         until ! [ -e disk/bundles/c1/rootfs ]; do sleep 0.05; done",
    )
}

#[test]
fn power_is_cut() {
    with_criu(Suite::Sid, power_is_cut_at_each_step);
}
