//! What leads clients to a service at one of two hosts: a map of nftables at the source, and HAProxy at the client.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::debian::{Suite, program};
use crate::net_three::{DEVICE, ThreeHosts};
use crate::process::{Spawned, run};
use crate::test_dir::TestDir;
use crate::wait::{self, GENEROUS};

/// The port at which clients ask.
const FRONT_PORT: u16 = 80;

/// A map at the source that leads connections to its service's address on to either host.
#[derive(Debug)]
pub struct NftRoute<'a> {
    hosts: &'a ThreeHosts,
    port: u16,
}

impl<'a> NftRoute<'a> {
    /// Leads to the service at the source's port `port`.
    ///
    /// # Errors
    /// nftables is missing, or the kernel has no NAT.
    pub fn new(hosts: &'a ThreeHosts, port: u16) -> Result<NftRoute<'a>> {
        let (service, _) = ThreeHosts::SERVICE.split_once('/').context("no prefix")?;
        let (here, there) = (hosts.source.address, hosts.destination.address);
        let rules = format!(
            "table ip front {{\n\
             map services {{ type inet_service : ipv4_addr . inet_service; elements = {{ {FRONT_PORT} : {here} . {port} }}; }}\n\
             chain pre {{ type nat hook prerouting priority dstnat;\n\
             ip daddr {service} dnat ip addr . port to tcp dport map @services; }}\n\
             chain post {{ type nat hook postrouting priority srcnat;\n\
             ct status dnat ip daddr {there} masquerade; }}\n\
             }}\n"
        );
        let net = &hosts.source.net;
        run(net.command("nft").arg(rules))?;
        // Clients are on the same link: they are not told a shorter way.
        let settings = format!(
            "echo 1 > /proc/sys/net/ipv4/ip_forward; cd /proc/sys/net/ipv4/conf; \
             echo 0 > all/send_redirects; echo 0 > {DEVICE}/send_redirects"
        );
        run(net.command("sh").args(["-e", "-c", &settings]))?;
        Ok(NftRoute { hosts, port })
    }

    /// Where clients ask.
    ///
    /// # Errors
    /// None.
    pub fn front(&self) -> Result<SocketAddr> {
        let mut front = self.hosts.service()?;
        front.set_port(FRONT_PORT);
        Ok(front)
    }

    /// The option's value that leads to the destination.
    pub fn option(&self) -> String {
        let (here, there) = (&self.hosts.source, &self.hosts.destination);
        format!(
            "nft:ip/front/services/{FRONT_PORT}={}->{}",
            here.at(self.port),
            there.at(self.port)
        )
    }

    /// Fails unless the map leads to the source.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_here(&self) -> Result<()> {
        self.expect(self.hosts.source.at(self.port))
    }

    /// Fails unless the map leads to the destination.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_there(&self) -> Result<()> {
        self.expect(self.hosts.destination.at(self.port))
    }

    fn expect(&self, at: SocketAddr) -> Result<()> {
        let list = ["list", "map", "ip", "front", "services"];
        let shown = run(self.hosts.source.net.command("nft").args(list))?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let wanted = format!("{FRONT_PORT} : {} . {}", at.ip(), at.port());
        ensure!(shown.contains(&wanted), "{shown}");
        Ok(())
    }
}

/// HAProxy at the client's host, in front of both hosts. It ends on drop.
#[derive(Debug)]
pub struct Haproxy {
    process: Spawned,
    socket: PathBuf,
    front: SocketAddr,
}

impl Haproxy {
    /// The program of Debian's, fetched unless it is here.
    ///
    /// # Errors
    /// No Debian archive, or no network.
    pub fn fetched() -> Result<PathBuf> {
        program(Suite::Trixie, "haproxy", "sbin/haproxy")
    }

    /// Starts it with the servers `here` and `there` in the backend `web`; the second takes no requests. `settings` are
    /// further words of both.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(
        test_dir: &TestDir,
        hosts: &ThreeHosts,
        port: u16,
        settings: &str,
    ) -> Result<Haproxy> {
        let socket = test_dir.path("haproxy.sock");
        let front = SocketAddr::new("10.213.8.3".parse()?, FRONT_PORT);
        let text = format!(
            "global\n  stats socket {} mode 600 level admin\n\
             defaults\n  mode http\n  timeout connect 10s\n  timeout client 60s\n  timeout server 60s\n\
             frontend front\n  bind {front}\n  default_backend web\n\
             backend web\n  http-reuse never\n  default-server {settings}\n  server here {}\n  server there {} disabled\n",
            socket.display(),
            hosts.source.at(port),
            hosts.destination.at(port)
        );
        let file = test_dir.path("haproxy.cfg");
        fs::write(&file, text)?;
        let log = test_dir.path("haproxy.log");
        let mut command = hosts.client.command(Haproxy::fetched()?);
        command.args(["-db", "-f"]).arg(&file);
        command
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        let process = Spawned::start("haproxy", &mut command, Some(log))?;
        let mut haproxy = Haproxy {
            process,
            socket,
            front,
        };
        wait::until("haproxy to listen", GENEROUS, || {
            let ended = haproxy.process.ended()?.is_some();
            ensure!(!ended, "haproxy: {}", haproxy.process.log_tail());
            Ok(std::os::unix::net::UnixStream::connect(&haproxy.socket).ok())
        })?;
        Ok(haproxy)
    }

    /// Where clients ask.
    pub fn front(&self) -> SocketAddr {
        self.front
    }

    /// The option's value that leads to the destination.
    pub fn option(&self) -> String {
        format!("haproxy:{}/web/here->there", self.socket.display())
    }

    /// The socket of its runtime API.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// State and weight of both servers, as HAProxy shows them: what the administrator asked for.
    ///
    /// # Errors
    /// It does not answer.
    pub fn servers(&self) -> Result<Vec<(String, u32, u32)>> {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(&self.socket)?;
        stream.write_all(b"show servers state web\n")?;
        let mut shown = String::new();
        stream.read_to_string(&mut shown)?;
        let rows = shown.lines().filter(|line| line.contains(" web "));
        rows.map(|row| {
            let words: Vec<&str> = row.split(' ').collect();
            let word = |at: usize| words.get(at).copied().context("a short line");
            Ok((word(3)?.to_owned(), word(6)?.parse()?, word(7)?.parse()?))
        })
        .collect()
    }
}
