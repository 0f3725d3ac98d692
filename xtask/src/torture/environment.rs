//! Two hosts with small disks, and a proxy for each direction between them.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping, OnLostPage};
use testbed::load::steps::Step;
use testbed::net::TwoHosts;
use testbed::pki::{Authority, Host};
use testbed::process::run;
use testbed::proxy::{Link, Proxy};
use testbed::test_dir::TestDir;

use super::case::{Case, Side};

/// The migration's name: each has directories of its own.
pub(super) const NAME: &str = "torture";

/// Memory of the processes, MiB.
const LOAD_MIB: u32 = 8;

/// Processes of the tree.
const PROCESSES: u32 = 2;

/// Room on each side's disk, MiB: some times what a migration needs.
const DISK_MIB: u32 = 160;

/// What all migrations share.
pub(super) struct Environment {
    // Dropped in this order: the proxies are in the hosts' networks.
    /// On the way of connections that a host makes to the other.
    from_source: Proxy,
    from_destination: Proxy,
    pub(super) hosts: TwoHosts,
    pub(super) criu: Criu,
    credentials: Vec<String>,
    _pki: TestDir,
}

impl Environment {
    pub(super) fn new(criu: &Criu) -> Result<Environment> {
        let pki = TestDir::new()?;
        let hosts = TwoHosts::new(None)?;
        let (source, destination) = (&hosts.source, &hosts.destination);
        let link = Link::default();
        let names = [
            source.address.to_string(),
            destination.address.to_string(),
            "127.0.0.1".to_owned(),
        ];
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let host = Host {
            alternative_names: &names,
            ..Host::LOOPBACK
        };
        let credentials = Authority::new(pki.dir(), "ca")?.issue(&host)?;
        Ok(Environment {
            from_source: Proxy::between(&source.net, destination.address, link)?,
            from_destination: Proxy::between(&destination.net, source.address, link)?,
            hosts,
            criu: criu.clone(),
            credentials: credentials.options(),
            _pki: pki,
        })
    }

    /// The proxy of connections that `side` makes.
    pub(super) fn proxy(&self, side: Side) -> &Proxy {
        match side {
            Side::Source => &self.from_source,
            Side::Destination => &self.from_destination,
        }
    }

    /// Takes the link down, or brings it up.
    pub(super) fn set_link(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        let args = ["link", "set", "ferry0", state];
        run(self.hosts.source.net.command("ip").args(args)).map(drop)
    }

    fn options(&self, case: &Case) -> Vec<String> {
        match case.tls {
            true => self.credentials.clone(),
            false => Vec::new(),
        }
    }
}

/// One migration's processes and directories.
pub(super) struct Fixture {
    // Dropped in this order: processes before the disks and the directory that they use.
    pub(super) load: Load,
    pub(super) agent: Agent,
    disks: [Disk; 2],
    pub(super) test_dir: TestDir,
}

impl Fixture {
    pub(super) fn new(environment: &Environment, case: &Case) -> Result<Fixture> {
        let test_dir = TestDir::new()?;
        let disks = [
            Disk::mount(test_dir.path("source"))?,
            Disk::mount(test_dir.path("agent"))?,
        ];
        let mut options = environment.options(case);
        if !case.tls {
            options.push("--insecure".to_owned());
        }
        let hosts = &environment.hosts;
        let load = Load::start(spec(&test_dir, case), Some(&hosts.source.net))?;
        if case.dirty_pages_per_s > 0 {
            let pages_per_s = case.dirty_pages_per_s;
            load.run_everywhere(&[Step::Dirty { pages_per_s }])?;
        }
        let dir = test_dir.path("agent");
        let agent = Agent::start(
            &environment.criu.path,
            &dir,
            Some(&hosts.destination),
            &options,
        )?;
        Ok(Fixture {
            load,
            agent,
            disks,
            test_dir,
        })
    }

    /// The command that is to be run.
    pub(super) fn command<'a>(&self, environment: &'a Environment, case: &Case) -> Move<'a> {
        let source = &environment.hosts.source;
        let serve_on = source.address.to_string();
        let command = Move::new(&environment.criu, self.source_dir(), NAME)
            .in_net(&source.net)
            .with(&["--mode", case.mode, "--serve-on", &serve_on])
            .secured(environment.options(case));
        match case.connected {
            true => command.with(&["--tcp", "established"]),
            false => command,
        }
    }

    /// The source's directory of all migrations.
    pub(super) fn source_dir(&self) -> PathBuf {
        self.test_dir.path("source")
    }

    /// The agent's directory of the migration.
    pub(super) fn agent_dir(&self) -> PathBuf {
        self.test_dir.path("agent").join(NAME)
    }

    /// Gives the room of both disks back.
    pub(super) fn free_disks(&self) {
        self.disks.iter().for_each(Disk::free);
    }

    pub(super) fn disk(&self, side: Side) -> &Disk {
        match side {
            Side::Source => &self.disks[0],
            Side::Destination => &self.disks[1],
        }
    }
}

fn spec(test_dir: &TestDir, case: &Case) -> LoadSpec {
    let mut spec = LoadSpec::tree(test_dir.path("load"), LOAD_MIB, PROCESSES);
    let eager = [Mapping::Locked, Mapping::PrivateFile];
    let areas = eager.map(|mapping| AreaSpec::new(mapping, LOAD_MIB * 16, Content::Mixed));
    spec.areas.extend(areas);
    spec.connected = case.connected;
    spec.on_lost_page = OnLostPage::Count;
    spec
}

/// A small file system.
#[derive(Debug)]
pub(super) struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Result<Disk> {
        fs::create_dir_all(&at)?;
        let size = format!("size={DISK_MIB}m");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&at))?;
        Ok(Disk(at))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Leaves no room.
    pub(super) fn fill(&self) -> Result<()> {
        let path = self.ballast();
        let mut file = File::create(&path).with_context(|| path.display().to_string())?;
        let bytes = [0; 1 << 16];
        // Until the disk is full.
        while file.write_all(&bytes).is_ok() {}
        Ok(())
    }

    /// Gives the room back.
    fn free(&self) {
        // It may not have been filled.
        let _ = fs::remove_file(self.ballast());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("-l").arg(&self.0)) {
            eprintln!("unmounting {}: {error:#}", self.0.display());
        }
    }
}
