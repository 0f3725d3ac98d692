//! Two hosts with a service and an agent, and a network for its clients.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Service;
use crate::container_host::ContainerHost;
use crate::criu::Criu;
use crate::net::{Host, NetNs};
use crate::net_three::{DEVICE, ThreeHosts, expect_open, has_address};
use crate::process::Spawned;
use crate::test_dir::TestDir;
use crate::wait::{self, GENEROUS};

/// Pids of the service begin here: those below are taken at the destination, by its agent and CRIU.
const FIRST_PID: u32 = 5000;

/// Where the agent listens.
const AGENT_PORT: u16 = 9191;

/// One of the hosts. Its agent ends before it.
#[derive(Debug)]
struct Side {
    agent: Spawned,
    host: ContainerHost,
}

/// Both hosts, each with an agent. Everything ends on drop.
#[derive(Debug)]
pub struct ServiceHosts {
    service: Option<Spawned>,
    // Ended before their networks go.
    sides: [Side; 2],
    three: ThreeHosts,
    shared: PathBuf,
    /// Moves so far: after an odd number of them the service is at the second host.
    moves: usize,
}

impl ServiceHosts {
    /// Hosts whose root is `system`, with files in the directory `name` of the test's.
    ///
    /// # Errors
    /// As [`ContainerHost::start`]; or an agent does not listen.
    pub fn start(
        test_dir: &TestDir,
        system: &Path,
        criu: &Criu,
        name: &str,
    ) -> Result<ServiceHosts> {
        let three = ThreeHosts::new()?;
        let shared = test_dir.path(name);
        fs::create_dir_all(&shared)?;
        for dir in [test_dir.dir(), &shared] {
            // Services run as users of their own.
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        }
        let side = |host: &Host, side| -> Result<Side> {
            let log = shared.join(format!("agent-{side}.log"));
            let at = host.at(AGENT_PORT).to_string();
            let host = ContainerHost::start(host, system, &shared, side, criu)?;
            let agent = start_agent(&host, &at, log)?;
            Ok(Side { agent, host })
        };
        let sides = [
            side(&three.source, "source")?,
            side(&three.destination, "destination")?,
        ];
        Ok(ServiceHosts {
            service: None,
            sides,
            three,
            shared,
            moves: 0,
        })
    }

    /// The hosts' networks, first the one where the service is.
    fn networks(&self) -> [&Host; 2] {
        let (first, second) = (&self.three.source, &self.three.destination);
        match self.moves % 2 {
            0 => [first, second],
            _ => [second, first],
        }
    }

    /// The hosts in the same order.
    fn hosts(&self) -> [&Side; 2] {
        let [first, second] = &self.sides;
        match self.moves % 2 {
            0 => [first, second],
            _ => [second, first],
        }
    }

    /// Starts a service at the first host, and tells its pid there.
    ///
    /// # Errors
    /// It does not start.
    pub fn serve(&mut self, service: Service) -> Result<u32> {
        let becomes = service.prepare(&self.shared)?;
        let script = format!(
            "exec 2> /shared/{name}.log\n\
             echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid\n\
             (echo $BASHPID > /shared/pid.new; mv /shared/pid.new /shared/pid\n\
             {becomes}) < /dev/null > /dev/null & wait",
            name = service.name()
        );
        let log = self.shared.join(format!("{}.log", service.name()));
        let mut command = self.sides[0].host.command(&["bash", "-e", "-c", &script]);
        command.stdout(Stdio::null());
        let mut process = Spawned::start(service.name(), &mut command, Some(log))?;
        let file = self.shared.join("pid");
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

    /// Moves the tree of `pid` with the service's address and its connections to the other host, and tells the
    /// report.
    ///
    /// # Errors
    /// The migration fails; the error shows both sides' logs.
    pub fn migrate(&mut self, pid: u32, mode: &str, options: &[&str]) -> Result<Value> {
        let ([here, there], [net_here, net_there]) = (self.hosts(), self.networks());
        let id = format!("{mode}-{}", self.moves);
        let log = self.shared.join(format!("migrate-{id}.log"));
        let to = net_there.at(AGENT_PORT).to_string();
        let address = format!("{}@{DEVICE}", ThreeHosts::SERVICE);
        let mut command = here.host.command(&["pageferry", "migrate"]);
        command
            .args(["--pid", &pid.to_string(), "--to", &to, "--mode", mode])
            .args(["--id", &id, "--state-dir", "/root/state"])
            .args(["--report", "/root/report.json", "--criu", "/criu/criu"])
            .args(["--serve-on", &net_here.address.to_string()])
            .args(["--tcp", "established", "--address", &address])
            .args(options)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        let mut moves = Spawned::start("pageferry migrate", &mut command, Some(log))?;
        moves
            .succeed(GENEROUS)
            .with_context(|| format!("{mode}:{}", there.agent.log_tail()))?;
        let report = here.host.home().join("report.json");
        let report = serde_json::from_slice(&fs::read(report)?)?;
        crate::schema::expect("migrate-report", &report)?;
        self.moves += 1;
        Ok(report)
    }

    /// The one copy is where the last move went, with its address, and both networks are open.
    ///
    /// # Errors
    /// It is not.
    pub fn expect_moved(&mut self, pid: u32) -> Result<()> {
        if let Some(mut service) = self.service.take() {
            // What started it ends with its last process.
            service.wait(GENEROUS)?;
        }
        let alive = format!("kill -0 {pid} 2> /dev/null && echo lives || echo gone");
        let [now, before] = self.hosts().map(|side| side.host.output(&alive));
        let (now, before) = (now?, before?);
        ensure!(
            before == "gone" && now == "lives",
            "pid {pid}: {before} at the source, {now} at the destination"
        );
        let [now, before] = self.networks().map(|host| &host.net);
        let at = |net| has_address(net, ThreeHosts::SERVICE);
        ensure!(!at(before)? && at(now)?, "the address did not move");
        expect_open(before)?;
        expect_open(now)
    }
}

/// An agent on `host` that listens at `listen`.
fn start_agent(host: &ContainerHost, listen: &str, log: PathBuf) -> Result<Spawned> {
    let mut command = host.command(&["pageferry", "agent", "--listen", listen]);
    command
        .args(["--dir", "/root/agent", "--port-file", "/root/port.json"])
        .args(["--criu", "/criu/criu", "--insecure"])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?);
    let mut agent = Spawned::start("pageferry agent", &mut command, Some(log))?;
    let port_file = host.home().join("port.json");
    wait::until("the agent to listen", GENEROUS, || {
        let ended = agent.ended()?.is_some();
        ensure!(!ended, "the agent has ended{}", agent.log_tail());
        Ok(port_file.exists().then_some(()))
    })?;
    Ok(agent)
}
