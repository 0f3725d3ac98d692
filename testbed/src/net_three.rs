//! Two hosts and a client on one link, with a service's address that can be at either.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::net::{Host, NetNs, limit};
use crate::process::run;
use crate::wait::{self, GENEROUS};

/// The hosts' device.
pub const DEVICE: &str = "ferry0";

/// The port of the service.
const PORT: u16 = 7000;

/// How long the client waits for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Two hosts and a client, each a network namespace; the link is a bridge at the client.
#[derive(Debug)]
pub struct ThreeHosts {
    /// Where the service is.
    pub source: Host,
    /// Where it goes.
    pub destination: Host,
    /// Who uses it.
    pub client: NetNs,
}

impl ThreeHosts {
    /// The service's address, with the bits of its network.
    pub const SERVICE: &'static str = "10.213.8.10/24";

    /// Makes all three; the service's address is at the source.
    ///
    /// # Errors
    /// `ip` fails: not root, or iproute2 is missing.
    pub fn new() -> Result<ThreeHosts> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let unique = format!("{}-{number}", std::process::id());
        let host = |side: &str, last| -> Result<Host> {
            Ok(Host {
                net: NetNs::new(format!("three-{side}-{unique}"))?,
                address: IpAddr::V4(Ipv4Addr::new(10, 213, 8, last)),
            })
        };
        let hosts = ThreeHosts {
            source: host("src", 1)?,
            destination: host("dst", 2)?,
            client: NetNs::new(format!("three-cli-{unique}"))?,
        };
        let client = &hosts.client;
        client.ip(&["link", "add", "bridge", "type", "bridge"])?;
        client.ip(&["addr", "add", "10.213.8.3/24", "dev", "bridge"])?;
        client.ip(&["link", "set", "bridge", "up"])?;
        for (port, host) in [("to-src", &hosts.source), ("to-dst", &hosts.destination)] {
            let peer = ["peer", "name", DEVICE, "netns", host.net.name()];
            client.ip(&[&["link", "add", port, "type", "veth"][..], &peer[..]].concat())?;
            client.ip(&["link", "set", port, "master", "bridge", "up"])?;
            let address = format!("{}/24", host.address);
            host.net.ip(&["addr", "add", &address, "dev", DEVICE])?;
            host.net.ip(&["link", "set", DEVICE, "up"])?;
        }
        let service = ["addr", "add", ThreeHosts::SERVICE, "dev", DEVICE];
        hosts.source.net.ip(&service)?;
        Ok(hosts)
    }

    /// Lets each host send no more than `bits_per_s`.
    ///
    /// # Errors
    /// `tc` fails.
    pub fn limit(&self, bits_per_s: u64) -> Result<()> {
        limit(&self.source.net, bits_per_s)?;
        limit(&self.destination.net, bits_per_s)
    }

    /// Where the service listens.
    ///
    /// # Errors
    /// None.
    pub fn service(&self) -> Result<SocketAddr> {
        let (address, _) = ThreeHosts::SERVICE.split_once('/').context("no prefix")?;
        Ok(SocketAddr::new(address.parse()?, PORT))
    }
}

/// Whether a host has an address, as `ip` shows it.
///
/// # Errors
/// `ip` fails.
pub fn has_address(net: &NetNs, cidr: &str) -> Result<bool> {
    let shown = run(net
        .command("ip")
        .args(["-o", "addr", "show", "dev", DEVICE]))?;
    Ok(String::from_utf8_lossy(&shown.stdout).contains(&format!(" {cidr} ")))
}

/// Fails if a host's firewall drops anything.
///
/// # Errors
/// It does; or nftables is missing.
pub fn expect_open(net: &NetNs) -> Result<()> {
    let shown = run(net.command("nft").args(["list", "ruleset"]))?;
    let rules = String::from_utf8_lossy(&shown.stdout).into_owned();
    ensure!(!rules.contains("drop"), "{rules}");
    ensure!(!rules.contains("table inet"), "{rules}");
    Ok(())
}

/// A client that holds one connection to an echoing service and checks each byte. Its thread ends on drop.
#[derive(Debug)]
pub struct EchoClient {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl EchoClient {
    /// Connects from `net` to the service at `address`.
    ///
    /// # Errors
    /// The service does not answer.
    pub fn start(net: &NetNs, address: SocketAddr) -> Result<EchoClient> {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        // A socket stays in the network in which it was made.
        let stream = net.enter(|| Ok(TcpStream::connect(address)?))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_nodelay(true)?;
        let (ended, counted) = (Arc::clone(&stop), Arc::clone(&answers));
        let (began, first) = mpsc::channel();
        let thread = thread::spawn(move || {
            let talked = talk(stream, &ended, &counted, || {
                let _ = began.send(());
            });
            talked.with_context(|| format!("after {} answers", counted.load(Ordering::Relaxed)))
        });
        first
            .recv_timeout(GENEROUS)
            .context("the service does not answer")?;
        Ok(EchoClient {
            stop,
            answers,
            thread: Some(thread),
        })
    }

    /// Waits for answers to questions that are asked from now on.
    ///
    /// # Errors
    /// The connection has ended, or an answer was wrong.
    pub fn expect_answers(&mut self) -> Result<()> {
        // The one under way may have been asked before.
        let enough = self.answers.load(Ordering::Relaxed) + 3;
        wait::until("answers over the connection", GENEROUS, || {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                self.finish()?;
                bail!("the conversation is over");
            }
            Ok((self.answers.load(Ordering::Relaxed) >= enough).then_some(()))
        })
    }

    /// Ends the conversation.
    ///
    /// # Errors
    /// The connection broke, or an answer was wrong.
    pub fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(talked)) => talked,
            Some(Err(_)) => bail!("the client panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for EchoClient {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("the client: {error:#}");
        }
    }
}

fn talk(
    mut stream: TcpStream,
    stop: &AtomicBool,
    answers: &AtomicU64,
    mut answered: impl FnMut(),
) -> Result<()> {
    let mut answer = [0; 1024];
    while !stop.load(Ordering::Relaxed) {
        let number = answers.load(Ordering::Relaxed);
        let mut question = [0; 1024];
        for (at, byte) in (number..).zip(question.iter_mut()) {
            *byte = at.to_le_bytes()[0];
        }
        question[..8].copy_from_slice(&number.to_le_bytes());
        stream.write_all(&question)?;
        stream.read_exact(&mut answer)?;
        ensure!(answer == question, "answer {number} is wrong");
        answers.fetch_add(1, Ordering::Relaxed);
        answered();
    }
    Ok(())
}
