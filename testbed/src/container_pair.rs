//! Two hosts and an agent at the second, for containers that move from the first by one command.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use crate::criu::Criu;
use crate::documents::HostPair;
use crate::test_dir::TestDir;
use crate::{debian, gate};

/// What hides control groups of version 1 beside those of version 2 from CRIU under crun, on both hosts.
const SETTINGS: &str = "echo manage-cgroups=ignore > /etc/criu/crun.conf";

/// Starts an agent at the destination.
pub const AGENT: &str = "pageferry agent --listen $DESTINATION:9191 --insecure --dir /root/agent --criu /criu/criu \
                     --port-file /root/port.json > agent.log 2>&1 < /dev/null &\n\
                     until [ -e port.json ]; do sleep 0.05; done";

/// See the module's text.
#[derive(Debug)]
pub struct ContainerPair {
    /// The hosts. What both have at `/shared` is in [`ContainerPair::dir`].
    pub pair: HostPair,
    /// The directory of the hosts: `source/` and `destination/` are their homes.
    pub dir: PathBuf,
    /// The name of the runtime.
    pub runtime: &'static str,
}

impl ContainerPair {
    /// Hosts of `criu` and `runtime` below the directory `name`. `make_bundle` writes the bundle, which is at one path
    /// on both. Nothing without runtimes.
    ///
    /// # Errors
    /// A host or the agent does not start.
    pub fn start(
        test_dir: &TestDir,
        criu: &Criu,
        (runtime, name): (&'static str, &str),
        make_bundle: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Option<ContainerPair>> {
        let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
            return Ok(None);
        };
        let pair = HostPair::new(test_dir, &system, criu, name)?;
        let dir = test_dir.path(name);
        make_bundle(&dir.join("bundle"))?;
        for machine in &pair.machines {
            machine.script(SETTINGS)?;
        }
        pair.machines[1].script(AGENT)?;
        Ok(Some(ContainerPair { pair, dir, runtime }))
    }

    /// Moves a container, by the real CRIU unless `options` name another one. Returns the report.
    ///
    /// # Errors
    /// What the command prints, if it fails.
    pub fn migrate(&self, container: &str, id: &str, options: &str) -> Result<Value, String> {
        let criu = match options.contains("--criu ") {
            true => "",
            false => "--criu /criu/criu",
        };
        let output = self.pair.machines[0].output(&format!(
            "pageferry migrate --container {container} --runtime {} --to $DESTINATION:9191 --serve-on $SOURCE \
             --state-dir /root/state --id {id} --report /root/{id}.json {criu} {options} \
             > {id}.log 2>&1 || {{ tail -n 20 {id}.log; echo failed; }}",
            self.runtime
        ));
        let output = output.map_err(|error| format!("{error:#}"))?;
        if output.ends_with("failed") {
            return Err(output);
        }
        let report = fs::read(self.dir.join("source").join(format!("{id}.json")));
        let report = report.map_err(|error| error.to_string())?;
        serde_json::from_slice(&report).map_err(|error| error.to_string())
    }
}
