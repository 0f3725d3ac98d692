//! Two hosts with a service and an agent, and a network for its clients.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Service;
use crate::bed::Bed;
use crate::container_host::ContainerHost;
use crate::criu::Criu;
use crate::net::NetNs;
use crate::net_three::{DEVICE, ThreeHosts, expect_open, has_address};
use crate::process::Spawned;
use crate::wait::{self, GENEROUS};

/// Pids of the service begin here: those below are taken at the destination, by its agent and CRIU.
const FIRST_PID: u32 = 5000;

/// Where the agent listens.
const AGENT_PORT: u16 = 9191;

/// Both hosts, with an agent at the destination. Everything ends on drop.
#[derive(Debug)]
pub struct ServiceHosts {
    // Dropped in this order: what runs on hosts, the hosts, their networks.
    agent: Spawned,
    service: Option<Spawned>,
    source: ContainerHost,
    destination: ContainerHost,
    three: ThreeHosts,
    stage: PathBuf,
}

impl ServiceHosts {
    /// Hosts whose root is `system`, with files in the directory `name` of the test's.
    ///
    /// # Errors
    /// As [`ContainerHost::start`]; or the agent does not listen.
    pub fn start(bed: &Bed, system: &Path, criu: &Criu, name: &str) -> Result<ServiceHosts> {
        let three = ThreeHosts::new()?;
        let stage = bed.path(name);
        fs::create_dir_all(&stage)?;
        for dir in [bed.dir(), &stage] {
            // Services run as users of their own.
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        }
        let host = |host, side| ContainerHost::start(host, system, &stage, side, criu);
        let source = host(&three.source, "source")?;
        let destination = host(&three.destination, "destination")?;
        let log = stage.join("agent.log");
        let listen = format!("{}:{AGENT_PORT}", three.destination.address);
        let mut command = destination.command(&["pageferry", "agent", "--listen", &listen]);
        command
            .args(["--dir", "/root/agent", "--port-file", "/root/port.json"])
            .args(["--criu", "/criu/criu", "--insecure"])
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        let mut agent = Spawned::start("pageferry agent", &mut command, Some(log))?;
        let port_file = destination.home().join("port.json");
        wait::until("the agent to listen", GENEROUS, || {
            let ended = agent.ended()?.is_some();
            ensure!(!ended, "the agent has ended{}", agent.log_tail());
            Ok(port_file.exists().then_some(()))
        })?;
        Ok(ServiceHosts {
            agent,
            service: None,
            source,
            destination,
            three,
            stage,
        })
    }

    /// Starts a service at the source, and tells its pid there.
    ///
    /// # Errors
    /// It does not start.
    pub fn serve(&mut self, service: Service) -> Result<u32> {
        let becomes = service.prepare(&self.stage)?;
        let script = format!(
            "exec 2> /stage/{name}.log\n\
             echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid\n\
             (echo $BASHPID > /stage/pid.new; mv /stage/pid.new /stage/pid\n\
             {becomes}) < /dev/null > /dev/null & wait",
            name = service.name()
        );
        let log = self.stage.join(format!("{}.log", service.name()));
        let mut command = self.source.command(&["bash", "-e", "-c", &script]);
        command.stdout(Stdio::null());
        let mut process = Spawned::start(service.name(), &mut command, Some(log))?;
        let file = self.stage.join("pid");
        let pid = wait::until("the service's pid", GENEROUS, || {
            let ended = process.ended()?.is_some();
            ensure!(!ended, "{} has ended{}", service.name(), process.log_tail());
            Ok(fs::read_to_string(&file).ok())
        })?;
        self.service = Some(process);
        Ok(pid.trim().parse()?)
    }

    /// The service's address.
    ///
    /// # Errors
    /// None.
    pub fn address(&self) -> Result<IpAddr> {
        Ok(self.three.service()?.ip())
    }

    /// The clients' network.
    pub fn client(&self) -> &NetNs {
        &self.three.client
    }

    /// Moves the tree of `pid` with the service's address and its connections, and tells the report.
    ///
    /// # Errors
    /// The migration fails; the error shows both sides' logs.
    pub fn migrate(&self, pid: u32, mode: &str, options: &[&str]) -> Result<Value> {
        let log = self.stage.join(format!("migrate-{mode}.log"));
        let to = format!("{}:{AGENT_PORT}", self.three.destination.address);
        let address = format!("{}@{DEVICE}", ThreeHosts::SERVICE);
        let mut command = self.source.command(&["pageferry", "migrate"]);
        command
            .args(["--pid", &pid.to_string(), "--to", &to, "--mode", mode])
            .args(["--id", mode, "--state-dir", "/root/state"])
            .args(["--report", "/root/report.json", "--criu", "/criu/criu"])
            .args(["--serve-on", &self.three.source.address.to_string()])
            .args(["--tcp", "established", "--address", &address])
            .args(options)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        let mut moves = Spawned::start("pageferry migrate", &mut command, Some(log))?;
        moves
            .succeed(GENEROUS)
            .with_context(|| format!("{mode}:{}", self.agent.log_tail()))?;
        let report = self.source.home().join("report.json");
        Ok(serde_json::from_slice(&fs::read(report)?)?)
    }

    /// The one copy is at the destination, with its address, and both networks are open.
    ///
    /// # Errors
    /// It is not.
    pub fn expect_moved(&mut self, pid: u32) -> Result<()> {
        if let Some(mut service) = self.service.take() {
            // Its guard at the source ends with its last process.
            service.wait(GENEROUS)?;
        }
        let alive = format!("kill -0 {pid} 2> /dev/null && echo lives || echo gone");
        let (here, there) = (self.source.tell(&alive)?, self.destination.tell(&alive)?);
        ensure!(
            here == "gone" && there == "lives",
            "pid {pid}: {here} at the source, {there} at the destination"
        );
        let (source, destination) = (&self.three.source.net, &self.three.destination.net);
        let at = |net| has_address(net, ThreeHosts::SERVICE);
        ensure!(!at(source)? && at(destination)?, "the address did not move");
        expect_open(source)?;
        expect_open(destination)
    }
}
