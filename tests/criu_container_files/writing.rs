//! Two hosts, and a container at the first that changes files all the time.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::criu::Criu;
use testbed::documents::HostPair;
use testbed::runc;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::{debian, gate, workspace};

/// What hides control groups of version 1 beside those of version 2 from CRIU under crun, on both hosts.
const SETTINGS: &str = "echo manage-cgroups=ignore > /etc/criu/crun.conf";

/// Starts an agent at the host `$HERE`.
pub(crate) const AGENT: &str = "pageferry agent --listen $HERE:9191 --insecure --dir /root/agent --criu /criu/criu \
     --bundles /root/bundles --port-file /root/port.json > agent.log 2>&1 < /dev/null & echo $! > agent.pid\n\
     until [ -e port.json ]; do sleep 0.05; done";

/// Two hosts, an agent at each, and a container at the first that changes files all the time.
pub(crate) struct Writing {
    pub(crate) pair: HostPair,
    dir: PathBuf,
    commands: u64,
}

impl Writing {
    /// Nothing without runtimes.
    pub(crate) fn start(test_dir: &TestDir, criu: &Criu, name: &str) -> Result<Option<Writing>> {
        Writing::start_on(test_dir, criu, name, None)
    }

    /// The same with a root that is an overlay: `mount` mounts it at `bundles/c1/rootfs` of the first host, over `base`.
    pub(crate) fn start_on(
        test_dir: &TestDir,
        criu: &Criu,
        name: &str,
        mount: Option<&str>,
    ) -> Result<Option<Writing>> {
        let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
            return Ok(None);
        };
        let pair = HostPair::new(test_dir, &system, criu, name)?;
        let dir = test_dir.path(name);
        let bundle = dir.join("source/bundles/c1");
        let root = match mount {
            Some(_) => dir.join("source/base"),
            None => bundle.join("rootfs"),
        };
        fs::create_dir_all(&bundle)?;
        runc::make_root(&root)?;
        let program = workspace::binary("filewriter")?;
        fs::copy(&program, root.join("bin/filewriter"))?;
        fs::create_dir_all(root.join("control"))?;
        fs::create_dir_all(dir.join("source/volume"))?;
        fs::write(dir.join("source/volume/fixed"), "of the volume")?;
        fs::create_dir_all(root.join("volume"))?;
        let mut config = runc::config("");
        config["process"]["args"] = json!(["/bin/filewriter", "/data", "/control"]);
        let mounts = config["mounts"].as_array_mut().context("mounts")?;
        mounts.push(
            json!({"destination": "/volume", "type": "bind", "source": "/root/volume",
            "options": ["bind"]}),
        );
        fs::write(bundle.join("config.json"), config.to_string())?;
        for (machine, variable) in pair.machines.iter().zip(["SOURCE", "DESTINATION"]) {
            machine.script(SETTINGS)?;
            machine.script(&AGENT.replace("$HERE", &format!("${variable}")))?;
        }
        if let Some(mount) = mount {
            pair.machines[0].script(mount)?;
        }
        pair.machines[0]
            .script("runc run -d --bundle /root/bundles/c1 c1 < /dev/null > /dev/null 2>&1")?;
        let mut writing = Writing {
            pair,
            dir,
            commands: 0,
        };
        wait::until("files to be written", GENEROUS, || {
            // The mount is seen on the host alone.
            let writable = match mount {
                Some(_) => bundle.join("upper"),
                None => root.clone(),
            };
            let log = fs::metadata(writable.join("data/log"));
            Ok(log.is_ok_and(|log| log.len() > 100).then_some(()))
        })?;
        writing.send(0, "verify")?;
        Ok(Some(writing))
    }

    /// A path in the directory that both hosts have as `/shared`.
    pub(crate) fn stage_path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn home(&self, host: usize) -> PathBuf {
        self.dir.join(["source", "destination"][host])
    }

    pub(crate) fn root(&self, host: usize) -> PathBuf {
        self.home(host).join("bundles/c1/rootfs")
    }

    /// Tells the container at a host what to do, and expects that all is right.
    pub(crate) fn send(&mut self, host: usize, word: &str) -> Result<()> {
        self.commands += 1;
        let number = self.commands;
        // By way of the host, which alone sees what is mounted there.
        let answer = self.pair.machines[host].output(&format!(
            "cd bundles/c1/rootfs/control; echo '{number} {word}' > next; mv next command\n\
             for try in $(seq 3000); do [ ! -e answer-{number} ] || break; sleep 0.02; done; cat answer-{number}"
        ))?;
        ensure!(answer == "right", "{word} at host {host}: {answer}");
        Ok(())
    }

    /// Moves the container from a host to the other; what the command says, if it fails.
    pub(crate) fn migrate(&self, from: usize, id: &str, options: &str) -> Result<Value, String> {
        self.migrate_other("c1", from, id, options)
    }

    /// The same for another container.
    pub(crate) fn migrate_other(
        &self,
        container: &str,
        from: usize,
        id: &str,
        options: &str,
    ) -> Result<Value, String> {
        let to = ["$DESTINATION", "$SOURCE"][from];
        let here = ["$SOURCE", "$DESTINATION"][from];
        let output = self.pair.machines[from].output(&format!(
            "pageferry migrate --container {container} --to {to}:9191 --serve-on {here} --state-dir /root/state --id {id} \
             --report /root/{id}.json --criu /criu/criu {options} > {id}.log 2>&1 \
             || {{ tail -n 20 {id}.log; echo failed; }}"
        ));
        let output = output.map_err(|error| format!("{error:#}"))?;
        if output.ends_with("failed") {
            return Err(output);
        }
        let report = fs::read(self.home(from).join(format!("{id}.json")));
        let report = report.map_err(|error| error.to_string())?;
        serde_json::from_slice(&report).map_err(|error| error.to_string())
    }

    pub(crate) fn status(&self, host: usize) -> Result<String> {
        let state = self.pair.machines[host].output("runc state c1 2> /dev/null || echo '{}'")?;
        let state: Value = serde_json::from_str(&state).with_context(|| state.clone())?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }
}
