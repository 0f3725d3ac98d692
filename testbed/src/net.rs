//! Two hosts on one machine: network namespaces joined by a veth pair.

use std::ffi::OsStr;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// A free TCP port on loopback, at the moment: for programs that cannot choose one themselves.
///
/// # Errors
/// No socket can be bound.
pub fn free_port() -> Result<u16> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

/// A network namespace, removed on drop.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    pub(crate) fn new(name: String) -> Result<NetNs> {
        ip(&["netns", "add", &name])?;
        let namespace = NetNs { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg("--")
            .arg(program);
        command
    }

    /// Lets `work` run in the namespace, in a thread of its own.
    ///
    /// # Errors
    /// Those of `work`, and when the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.name);
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let namespace = File::open(&path).with_context(|| path.clone())?;
                setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering a namespace")?;
                work()
            });
            inside
                .join()
                .unwrap_or_else(|_| bail!("the work in {} panicked", self.name))
        })
    }

    /// What takes the thread that calls it into the namespace, for good.
    pub fn entrance(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let path = format!("/run/netns/{}", self.name);
        move || {
            let namespace = File::open(&path).with_context(|| path.clone())?;
            Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?)
        }
    }

    pub(crate) fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("removing network namespace {}: {error:#}", self.name);
        }
    }
}

/// A command in a namespace, or in the harness's own.
pub fn command_in(namespace: Option<&NetNs>, program: impl AsRef<OsStr>) -> Command {
    match namespace {
        Some(namespace) => namespace.command(program),
        None => Command::new(program),
    }
}

fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args)).map(drop)
}

/// One of the two hosts.
#[derive(Debug)]
pub struct Host {
    /// Its network.
    pub net: NetNs,
    /// Its address on the link between them.
    pub address: IpAddr,
}

impl Host {
    /// A socket address on the host.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}

/// Two hosts and the link between them.
#[derive(Debug)]
pub struct TwoHosts {
    /// Where processes come from.
    pub source: Host,
    /// Where they go.
    pub destination: Host,
}

impl TwoHosts {
    /// Makes both, with a link of `bits_per_s` each way, or as fast as the machine is.
    ///
    /// # Errors
    /// `ip` or `tc` fail: not root, or iproute2 is missing.
    pub fn new(bits_per_s: Option<u64>) -> Result<TwoHosts> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let unique = format!(
            "{}-{}",
            std::process::id(),
            MADE.fetch_add(1, Ordering::Relaxed)
        );
        let host = |side: &str, last| -> Result<Host> {
            let address = IpAddr::V4(Ipv4Addr::new(10, 213, 7, last));
            Ok(Host {
                net: NetNs::new(format!("ferry-{side}-{unique}"))?,
                address,
            })
        };
        let hosts = TwoHosts {
            source: host("src", 1)?,
            destination: host("dst", 2)?,
        };
        let peer = [
            "peer",
            "name",
            "ferry0",
            "netns",
            hosts.destination.net.name(),
        ];
        let link = ["link", "add", "ferry0", "type", "veth"];
        hosts.source.net.ip(&[&link[..], &peer[..]].concat())?;
        for host in [&hosts.source, &hosts.destination] {
            host.net.ip(&[
                "addr",
                "add",
                &format!("{}/30", host.address),
                "dev",
                "ferry0",
            ])?;
            host.net.ip(&["link", "set", "ferry0", "up"])?;
            if let Some(bits_per_s) = bits_per_s {
                limit(&host.net, bits_per_s)?;
            }
        }
        Ok(hosts)
    }
}

impl TwoHosts {
    /// Bytes that the source has sent to the destination so far, with all headers.
    ///
    /// # Errors
    /// The interface cannot be asked.
    pub fn bytes_to_destination(&self) -> Result<u64> {
        let show = ["-json", "-stats", "link", "show", "dev", "ferry0"];
        let shown = run(self.source.net.command("ip").args(show))?;
        let links: serde_json::Value = serde_json::from_slice(&shown.stdout)?;
        let bytes = links[0]["stats64"]["tx"]["bytes"].as_u64();
        bytes.context("ip tells no bytes")
    }
}

/// Limits what a namespace sends, with a queue of 20 ms.
pub(crate) fn limit(namespace: &NetNs, bits_per_s: u64) -> Result<()> {
    // A bucket of 4 ms lets the rate be reached with coarse timers.
    let burst = (bits_per_s / 8 / 250).max(16 << 10).to_string();
    let rate = format!("{bits_per_s}bit");
    let qdisc = [
        "qdisc", "add", "dev", "ferry0", "root", "tbf", "rate", &rate,
    ];
    let shape = ["burst", &burst, "latency", "20ms"];
    run(namespace.command("tc").args(qdisc).args(shape)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate;

    #[test]
    fn hosts_reach_each_other_and_go_away() {
        let Some(()) = gate::root() else { return };
        let hosts = TwoHosts::new(Some(100_000_000)).unwrap();
        let name = hosts.source.net.name().to_owned();
        let address = hosts.destination.address.to_string();
        let routes = run(hosts
            .source
            .net
            .command("ip")
            .args(["route", "get", &address]))
        .unwrap();
        assert!(String::from_utf8_lossy(&routes.stdout).contains("dev ferry0"));
        drop(hosts);
        let left = run(Command::new("ip").args(["netns", "list"])).unwrap();
        assert!(!String::from_utf8_lossy(&left.stdout).contains(&name));
    }
}
