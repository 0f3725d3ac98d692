//! Containers of podman, runc and crun move between two hosts: by pre-checkpoints through the `criu` of this project,
//! and by archives whose lazy pages are served from elsewhere. The memory is compared page by page.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::criu::{Criu, Suite};
use testbed::documents::HostPair;
use testbed::load::content::Content;
use testbed::load::control::Control;
use testbed::load::report::{Report, expect_faults};
use testbed::load::scenarios::{reading, verifying};
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Step};
use testbed::rounds::pages_file_bytes;
use testbed::runc::{self, LOAD_DIR};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{debian, for_each_criu, gate};

for_each_criu!(runc_pre_dumps);

/// Pages of the load's largest area: 24 MiB.
const PAGES: u32 = 6144;

/// What hides control groups of version 1 beside those of version 2 from CRIU under crun, on both hosts.
const SETTINGS: &str = "manage-cgroups=ignore\n";

/// Two hosts, and a load in a container of theirs.
struct Moving {
    pair: HostPair,
    dir: PathBuf,
    load: Control,
    before: Vec<Report>,
}

impl Moving {
    /// Hosts with `start` carried out at the source, which runs the load as `c1`; nothing without runtimes. The
    /// root file system is `/shared/rootfs`, `$SPEC` the load's description.
    fn start(test_dir: &TestDir, criu: &Criu, start: &str) -> Result<Option<Moving>> {
        let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
            return Ok(None);
        };
        let mut pair = HostPair::new(test_dir, &system, criu, "shared")?;
        let dir = test_dir.path("shared");
        runc::make_root(&dir.join("bundle/rootfs"))?;
        fs::create_dir_all(dir.join("load"))?;
        let spec = LoadSpec {
            processes: 2,
            ..LoadSpec::new(
                LOAD_DIR,
                vec![
                    AreaSpec::new(Mapping::Private, PAGES, Content::Mixed),
                    AreaSpec::new(Mapping::Private, PAGES / 4, Content::Text).untouched_every(3),
                    AreaSpec::new(Mapping::ReadOnly, PAGES / 4, Content::Random),
                ],
            )
        };
        let described = serde_json::to_string(&spec)?;
        let mut config = runc::config(&described);
        let mounts = config["mounts"].as_array_mut().context("mounts")?;
        mounts.push(
            json!({"destination": LOAD_DIR, "type": "bind", "source": "/shared/load", "options": ["bind"]}),
        );
        fs::write(dir.join("bundle/config.json"), config.to_string())?;
        pair.set("SPEC", &described);
        for machine in &pair.machines {
            machine.script(&format!("echo '{SETTINGS}' > /etc/criu/crun.conf"))?;
        }
        pair.machines[0].script(start)?;
        let load = Control::new(spec, dir.join("load"));
        load.wait_until_started(|| Ok(()))?;
        let before = load.run_everywhere(&[Step::Status])?;
        Ok(Some(Moving {
            pair,
            dir,
            load,
            before,
        }))
    }

    fn at_source(&self, script: &str) -> Result<()> {
        self.pair.machines[0].script(script)
    }

    fn at_destination(&self, script: &str) -> Result<()> {
        self.pair.machines[1].script(script)
    }

    /// Lets every process write some of its pages.
    fn write(&self) -> Result<()> {
        let order = Order::Ascending;
        for report in self
            .load
            .run_everywhere(&[Step::Write { every: 64, order }])?
        {
            report.expect_right()?;
        }
        Ok(())
    }

    /// Every page of every process is right, and they are those that ran at the source.
    fn expect_arrived(&self, steps: &[Step]) -> Result<Vec<Report>> {
        let after = self.load.run_everywhere(steps)?;
        for (before, after) in self.before.iter().zip(&after) {
            after.expect_right()?;
            ensure!(after.nonce == before.nonce, "another process");
        }
        Ok(after)
    }
}

/// Runs the container by runc or crun, of the bundle that both hosts have.
const RUN: &str = "$RUNTIME run -d --bundle /shared/bundle c1 < /dev/null > /dev/null 2>&1";

/// Puts the `criu` of this project before the real one.
const SHIM: &str = "export PATH=/usr/local/lib/pageferry:$PATH PAGEFERRY_EMULATE_PRE_DUMP=always\n";

/// Two pre-dumps and a checkpoint on top of them by `runtime`, each round with what has changed alone.
fn pre_dumps(test_dir: &TestDir, criu: &Criu, runtime: &str) -> Result<()> {
    let run = RUN.replace("$RUNTIME", runtime);
    let Some(moving) = Moving::start(test_dir, criu, &run)? else {
        return Ok(());
    };
    let round = |number: u32, more: &str| {
        let images = format!("/shared/{number}");
        moving.at_source(&format!(
            "{SHIM}{runtime} checkpoint --image-path {images} --work-path {images} {more} c1"
        ))
    };
    round(1, "--pre-dump")?;
    moving.write()?;
    round(2, "--pre-dump --parent-path ../1")?;
    moving.write()?;
    round(3, "--parent-path ../2")?;
    let bytes = |number: u32| pages_file_bytes(&moving.dir.join(number.to_string()));
    let (all, second, third) = (bytes(1)?, bytes(2)?, bytes(3)?);
    ensure!(
        second < all / 4 && third < all / 4,
        "{all}, {second}, {third} bytes"
    );
    moving.at_destination(&format!(
        "{runtime} restore -d --bundle /shared/bundle --image-path /shared/3 --work-path /shared/3 c1 \
         < /dev/null > /dev/null 2>&1"
    ))?;
    moving.expect_arrived(&reading()).map(drop)
}

fn runc_pre_dumps(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    pre_dumps(test_dir, criu, "runc")
}

/// Runs the container by podman, of an image that both hosts have.
const PODMAN_RUN: &str = r#"
tar -C /shared/bundle/rootfs -c . | podman import - load
podman save -o /shared/load.tar load
podman run -d --name c1 -v /shared/load:/load load /bin/testload --spec "$SPEC"
"#;

fn start_by_podman(test_dir: &TestDir, criu: &Criu) -> Result<Option<Moving>> {
    let moving = Moving::start(test_dir, criu, PODMAN_RUN)?;
    if let Some(moving) = &moving {
        moving.at_destination("podman load -i /shared/load.tar")?;
    }
    Ok(moving)
}

/// Sum of the sizes of pages images in an archive's directory.
fn pages_of(moving: &Moving, archive: &str, dir: &str) -> Result<u64> {
    let unpacked = format!("{archive}-unpacked");
    moving.at_source(&format!(
        "mkdir /shared/{unpacked} && tar -C /shared/{unpacked} -xf /shared/{archive}"
    ))?;
    pages_file_bytes(&moving.dir.join(unpacked).join(dir))
}

fn podman_pre_checkpoints(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(moving) = start_by_podman(test_dir, criu)? else {
        return Ok(());
    };
    let checkpoint = "podman container checkpoint --compress none";
    moving.at_source(&format!(
        "{SHIM}{checkpoint} --pre-checkpoint -e /shared/pre.tar c1"
    ))?;
    moving.write()?;
    moving.at_source(&format!(
        "{SHIM}{checkpoint} --with-previous -e /shared/c1.tar c1"
    ))?;
    let all = pages_of(&moving, "pre.tar", "pre-checkpoint")?;
    let changed = pages_of(&moving, "c1.tar", "checkpoint")?;
    ensure!(changed < all / 4, "{changed} of {all} bytes");
    moving.at_destination(
        "podman container restore --import-previous /shared/pre.tar --import /shared/c1.tar",
    )?;
    moving.expect_arrived(&reading()).map(drop)
}

/// Restores `archive` at the destination lazily, with the pages that it lacks from `source`.
fn restore_lazily(moving: &Moving, archive: &str, source: &str) -> Result<()> {
    let bytes = fs::metadata(moving.dir.join(archive))?.len();
    ensure!(bytes < 4 << 20, "an archive of {bytes} bytes");
    moving.at_destination(&format!(
        "printf 'lazy-pages\\nwork-dir /root/work\\n' >> /etc/criu/crun.conf\n\
         mkdir work images\n\
         tar -C images -xf /shared/{archive}\n\
         lazy-client -d -D images/checkpoint -W work -o lazy.log -v4 --page-server --address {source} --port 27001\n\
         podman container restore --import /shared/{archive}"
    ))?;
    let after = moving.expect_arrived(&reading())?;
    expect_faults(&after)?;
    moving.expect_arrived(&verifying()).map(drop)
}

/// The memory goes straight to the destination, where a page server keeps lazy pages apart, and the archive is
/// completed with the rest.
fn received_apart(test_dir: &TestDir, criu: &Criu, compress: &str) -> Result<()> {
    let Some(moving) = start_by_podman(test_dir, criu)? else {
        return Ok(());
    };
    moving.at_destination(&format!(
        "mkdir pages\n\
         page-server -d -D pages --split-lazy $PWD/lazy --port 27000 {compress}"
    ))?;
    moving.at_source(
        "printf \"page-server\\naddress $DESTINATION\\nport 27000\\n\" >> /etc/criu/crun.conf\n\
         podman container checkpoint --compress none -e /shared/c1.tar c1",
    )?;
    moving.at_destination(
        "mkdir c1 && tar -C c1 -xf /shared/c1.tar\n\
         cp pages/*.img c1/checkpoint/\n\
         tar -C c1 -cf /shared/small.tar .\n\
         page-server -d -D lazy --lazy-pages --port 27001",
    )?;
    let lazy = pages_file_bytes(&moving.dir.join("destination/lazy"))?;
    ensure!(lazy > 20 << 20, "only {lazy} bytes are apart");
    restore_lazily(&moving, "small.tar", "127.0.0.1")
}

/// An archive that podman has written is split, and restored from the source's page server.
fn split_afterwards(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(moving) = start_by_podman(test_dir, criu)? else {
        return Ok(());
    };
    moving.at_source(
        "podman container checkpoint --compress none -e c1.tar c1\n\
         mkdir c1 && tar -C c1 -xf c1.tar\n\
         pageferry split c1/checkpoint -o lazy\n\
         tar -C c1 -cf /shared/small.tar .\n\
         page-server -d -D lazy --lazy-pages --port 27001",
    )?;
    restore_lazily(&moving, "small.tar", "$SOURCE")
}

/// Tests with the CRIUs that read files of options for crun, which are those from 4.2 on.
macro_rules! with_newer_criu {
    ($($name:ident: $test:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn sid() {
                with_criu(Suite::Sid, $test);
            }

            #[test]
            fn experimental() {
                with_criu(Suite::Experimental, $test);
            }
        }
    )+};
}

with_newer_criu! {
    crun_pre_dumps: |test_dir, criu| pre_dumps(test_dir, criu, "crun");
    podman_pre_checkpoints_move: podman_pre_checkpoints;
    podman_restores_lazily_what_was_received_apart: |test_dir, criu| received_apart(test_dir, criu, "");
    podman_restores_lazily_what_was_compressed_apart: |test_dir, criu| received_apart(test_dir, criu, "--compress");
    podman_restores_lazily_what_was_split: split_afterwards;
}
