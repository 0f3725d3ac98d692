//! Containers of crun and of a current runc move by one command, between hosts with control groups of version 2 alone;
//! and what is in the way of a container is told before anything is touched.
//!
//! One mode runs always. All the others:
//!
//! ```text
//! cargo nextest run -p pageferry --test criu_containers --run-ignored only
//! ```

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testbed::container_pair::{AGENT, ContainerPair};
use testbed::criu::{Criu, Suite};
use testbed::documents::HostPair;
use testbed::load::control::Control;
use testbed::load::report::Report;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::runc::{self, LOAD_DIR};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{debian, gate};

const MIB: u32 = 16;

const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// A load in a container `c1` at the first host.
struct Moving {
    hosts: ContainerPair,
    load: Control,
    before: Vec<Report>,
}

impl Moving {
    /// Nothing without runtimes.
    fn start(
        test_dir: &TestDir,
        criu: &Criu,
        runtime: &'static str,
        name: &str,
    ) -> Result<Option<Moving>> {
        let spec = LoadSpec::tree(LOAD_DIR, MIB, 3);
        let started = ContainerPair::start(test_dir, criu, (runtime, name), |bundle| {
            runc::make_root(&bundle.join("rootfs"))?;
            let config = runc::config(&serde_json::to_string(&spec)?);
            Ok(fs::write(bundle.join("config.json"), config.to_string())?)
        })?;
        let Some(hosts) = started else {
            return Ok(None);
        };
        hosts.pair.machines[0].script(&format!(
            "{runtime} run -d --bundle /shared/bundle c1 < /dev/null > /dev/null 2>&1"
        ))?;
        let load = Control::new(spec, hosts.dir.join("bundle/rootfs/load"));
        load.wait_until_started(|| Ok(()))?;
        let before = load.run_everywhere(&[Step::Status])?;
        Ok(Some(Moving {
            hosts,
            load,
            before,
        }))
    }

    /// Every page of every process is right, and they are those that ran at the source.
    fn expect_right(&self) -> Result<()> {
        for (before, after) in self
            .before
            .iter()
            .zip(self.load.run_everywhere(&verifying())?)
        {
            after.expect_right()?;
            ensure!(after.nonce == before.nonce, "another process answers");
            ensure!(after.counter >= before.counter, "its counter went back");
        }
        Ok(())
    }

    /// How the container stands at a host: `running`, or nothing.
    fn status(&self, host: usize, container: &str) -> Result<String> {
        let state = self.hosts.pair.machines[host].output(&format!(
            "{} state {container} 2> /dev/null || echo '{{}}'",
            self.hosts.runtime
        ))?;
        let state: Value = serde_json::from_str(&state).with_context(|| state.clone())?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }
}

fn moves(test_dir: &TestDir, criu: &Criu, runtime: &'static str, mode: &str) -> Result<()> {
    let Some(moving) = Moving::start(test_dir, criu, runtime, mode)? else {
        return Ok(());
    };
    let report = moving
        .hosts
        .migrate("c1", mode, &format!("--mode {mode} --max-rounds 3"));
    let report = report.map_err(anyhow::Error::msg)?;
    ensure!(
        report["result"] == "moved" && report["mode"] == mode,
        "{report}"
    );
    let (here, there) = (moving.status(0, "c1")?, moving.status(1, "c1")?);
    ensure!(
        here.is_empty() && there == "running",
        "{here:?} at the source, {there:?} at the destination"
    );
    moving.expect_right()?;
    // The runtime there enters it, ends it and forgets it.
    moving.hosts.pair.machines[1].script(&format!(
        "{runtime} exec c1 /bin/testload --help > /dev/null < /dev/null; {runtime} delete --force c1"
    ))?;
    let there = moving.status(1, "c1")?;
    ensure!(there.is_empty(), "{there:?} after it was deleted");
    Ok(())
}

/// What is in the way is told by name, and the container at the source is as before.
fn refusals(test_dir: &TestDir, criu: &Criu, runtime: &'static str) -> Result<()> {
    let name = format!("refusing-{runtime}");
    let Some(moving) = Moving::start(test_dir, criu, runtime, &name)? else {
        return Ok(());
    };
    let [source, destination] = &moving.hosts.pair.machines;
    let create = "create --bundle /shared/bundle";
    let quiet = "< /dev/null > /dev/null 2>&1";
    let expect = |container: &str, id: &str, words: &[&str]| -> Result<()> {
        match moving.hosts.migrate(container, id, "--mode cold") {
            Ok(report) => bail!("{id}: {report}"),
            Err(error) => {
                let named = words.iter().all(|word| error.contains(word));
                ensure!(named, "{id}: {words:?} is not in {error}");
            }
        }
        let here = moving.status(0, "c1")?;
        ensure!(here == "running", "{id}: {here:?} at the source");
        moving.expect_right().with_context(|| id.to_owned())
    };
    source.script(&format!("{runtime} {create} c2 {quiet}"))?;
    expect("c2", "created", &["c2 is created", "only a running one"])?;
    source.script(&format!("{runtime} delete --force c2"))?;
    expect("c3", "unknown", &["knows no container c3"])?;

    destination.script(&format!("{runtime} {create} c1 {quiet}"))?;
    expect("c1", "taken", &["has a container c1 already", "delete it"])?;
    destination.script(&format!("{runtime} delete --force c1"))?;

    // A link in /usr/local would be found first.
    let program = destination.output(&format!("command -v {runtime}"))?;
    destination.script(&format!("mv {program} {program}.away"))?;
    expect(
        "c1",
        "missing",
        &["at the destination", &format!("no {runtime} on PATH")],
    )?;
    destination.script(&format!("mv {program}.away {program}"))?;

    // Nothing of this was in the way of the move itself.
    let moved = moving.hosts.migrate("c1", "at-last", "--mode cold");
    moved.map_err(anyhow::Error::msg)?;
    moving.expect_right()
}

#[test]
fn a_container_of_crun_moves() {
    with_criu(Suite::Sid, |test_dir, criu| {
        moves(test_dir, criu, "crun", "hybrid")
    });
}

#[test]
fn what_is_in_the_way_of_crun_is_told() {
    with_criu(Suite::Sid, |test_dir, criu| {
        refusals(test_dir, criu, "crun")
    });
}

#[test]
fn what_is_in_the_way_of_runc_is_told() {
    with_criu(Suite::Sid, |test_dir, criu| {
        refusals(test_dir, criu, "runc")
    });
}

/// The project's `criu`, which looks for the real one in PATH, where the migration has a wrapper of its own.
#[test]
fn a_container_moves_by_the_projects_criu() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let Some(moving) = Moving::start(test_dir, criu, "runc", "by-shim")? else {
            return Ok(());
        };
        let options = "--mode cold --criu /usr/local/lib/pageferry/criu";
        let report = moving.hosts.migrate("c1", "by-shim", options);
        let report = report.map_err(anyhow::Error::msg)?;
        ensure!(report["result"] == "moved", "{report}");
        moving.expect_right()
    });
}

/// What both hosts of a container without state begin with.
const WITHOUT_STATE: &str = r#"
mkdir -p bundle/rootfs/bin
cp /shared/config.json bundle/
cp /usr/bin/busybox bundle/rootfs/bin/
ln -s busybox bundle/rootfs/bin/sh
$RUNTIME run -d --bundle $PWD/bundle c1 < /dev/null > /dev/null 2>&1
until [ -e bundle/rootfs/ready ]; do sleep 0.05; done
echo mark > bundle/rootfs/mark
"#;

/// It is ready once it has counted that it was started, and ends when it is told to.
const COUNTS: &str = "trap 'exit 0' TERM; echo started >> /starts; echo > /ready; \
                      while :; do busybox sleep 0.05; done";

/// A container moves without its memory: its files come along, and it begins anew.
fn moves_without_state(
    test_dir: &TestDir,
    criu: &Criu,
    runtime: &'static str,
    mode: &str,
) -> Result<()> {
    let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
        return Ok(());
    };
    let name = format!("stateless-{mode}");
    let mut pair = HostPair::new(test_dir, &system, criu, &name)?;
    pair.set("RUNTIME", runtime);
    let dir = test_dir.path(&name);
    let mut config = runc::config("");
    config["process"]["args"] = json!(["/bin/sh", "-c", COUNTS]);
    fs::write(dir.join("config.json"), config.to_string())?;
    let [source, destination] = &pair.machines;
    destination.script(AGENT)?;
    source.script(WITHOUT_STATE)?;
    source
        .script(&format!(
            "pageferry migrate --container c1 --runtime {runtime} --to $DESTINATION:9191 --stateless --mode {mode} \
             --ready 'exec:test $(busybox wc -l < /starts) = 2' --route exec:true --drain 0 --state-dir /root/state --id moved \
             --report /root/report.json > moved.log 2>&1 || {{ cat moved.log; exit 1; }}"
        ))
        .with_context(|| fs::read_to_string(dir.join("source/moved.log")).unwrap_or_default())?;
    let report: Value = serde_json::from_slice(&fs::read(dir.join("source/report.json"))?)?;
    ensure!(
        report["result"] == "moved" && report["mode"] == format!("{mode}-stateless"),
        "{report}"
    );
    let status = format!("{runtime} state c1 2> /dev/null || echo '{{}}'");
    let [here, there] = [source, destination].map(|host| host.output(&status));
    let (here, there) = (here?, there?);
    ensure!(here == "{}" && there.contains("running"), "{here} {there}");
    let root = dir.join("destination/agent/moved/bundle/rootfs");
    for (file, text) in [("mark", "mark\n"), ("starts", "started\nstarted\n")] {
        let found = fs::read_to_string(root.join(file))?;
        ensure!(found == text, "{file}: {found}");
    }
    destination.script(&format!("{runtime} delete --force c1"))
}

#[test]
fn a_container_of_crun_moves_without_state() {
    with_criu(Suite::Sid, |test_dir, criu| {
        ["cold", "live"].iter().try_for_each(|mode| {
            moves_without_state(test_dir, criu, "crun", mode).with_context(|| (*mode).to_owned())
        })
    });
}

fn in_each_mode(suite: Suite, runtime: &'static str) {
    with_criu(suite, |test_dir, criu| {
        MODES.iter().try_for_each(|mode| {
            moves(test_dir, criu, runtime, mode).with_context(|| format!("{runtime} {mode}"))
        })
    });
}

#[test]
#[ignore = "four migrations: a minute"]
fn crun_moves_in_each_mode() {
    in_each_mode(Suite::Sid, "crun");
}

#[test]
#[ignore = "four migrations: a minute"]
fn crun_moves_in_each_mode_by_a_newer_criu() {
    in_each_mode(Suite::Experimental, "crun");
}

#[test]
#[ignore = "four migrations: a minute"]
fn runc_moves_in_each_mode() {
    in_each_mode(Suite::Sid, "runc");
}
