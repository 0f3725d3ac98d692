//! The command lines of the programs that the source runs.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::TcpConnections;
use pageferry::tls::TlsArgs;
use tokio::process::Command;

use crate::commands::{LOG_ALL, criu, with_tls};
use crate::programs::Programs;

/// Names of what a page-server writes, in a migration's directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Notes {
    /// Where it tells its port.
    pub(super) port: &'static str,
    /// Where it tells what it sent.
    pub(super) summary: &'static str,
    pub(super) log: &'static str,
}

/// Of the one that rounds and whole dumps go through.
pub(super) const FORWARDER: Notes = Notes {
    port: "forwarder.port",
    summary: "forwarder.json",
    log: "forwarder.log",
};

/// Of the one that serves memory after the resume.
pub(super) const MEMORY: Notes = Notes {
    port: "memory.port",
    summary: "memory.json",
    log: "memory.log",
};

/// Hashes of what the destination has after the last session of the forwarder.
const ROUND_HASHES: &str = "rounds.hashes";

/// Those after the last round: sessions that follow write over the others.
const KNOWN_HASHES: &str = "known.hashes";

/// Where the forwarder of a migration keeps the hashes of what the destination has, in its directory `dir`.
pub(super) fn round_hashes(dir: &Path) -> PathBuf {
    dir.join(ROUND_HASHES)
}

/// The rounds are over: keeps the hashes of what they have left at the destination, in the migration's directory `dir`.
pub(super) fn keep_hashes(dir: &Path) -> std::io::Result<()> {
    std::fs::copy(dir.join(ROUND_HASHES), dir.join(KNOWN_HASHES)).map(drop)
}

/// The hashes are of no use any more: whoever can read them can make pages of the same hash.
pub(super) fn forget_hashes(dir: &Path) {
    for name in [ROUND_HASHES, KNOWN_HASHES] {
        // Only a migration with rounds has made them.
        let _ = std::fs::remove_file(dir.join(name));
    }
}

/// A page-server that sends dumps and rounds on to the receiver at `far_end`.
pub(super) fn forwarder(programs: &Programs, tls: &TlsArgs, dir: &Path, far_end: &Peer) -> Command {
    let mut command = page_server(programs, dir, dir, FORWARDER);
    command
        .args(["--address", &Ipv4Addr::LOCALHOST.to_string(), "--keep"])
        .args(["--forward", &far_end.to_string()])
        .arg("--save-hashes")
        .arg(dir.join(ROUND_HASHES));
    with_tls(&mut command, tls);
    command
}

/// A page-server that takes over the memory of the lazy dump at `dump` and serves it at `address`.
pub(super) fn lazy_forwarder(
    programs: &Programs,
    tls: &TlsArgs,
    place: (&Path, &Path),
    dump_port: u16,
    address: &str,
) -> Command {
    let (dir, images) = place;
    let mut command = page_server(programs, dir, images, MEMORY);
    command.args(["--address", address]).args([
        "--forward-lazy",
        &format!("{}:{dump_port}", Ipv4Addr::LOCALHOST),
    ]);
    let known = dir.join(KNOWN_HASHES);
    if known.exists() {
        command.arg("--known-hashes").arg(known);
    }
    with_tls(&mut command, tls);
    command
}

fn page_server(programs: &Programs, dir: &Path, images: &Path, notes: Notes) -> Command {
    let mut command = Command::new(&programs.page_server);
    command
        .arg("-D")
        .arg(images)
        .arg("-W")
        .arg(dir)
        .args(["-o", notes.log, "-v3", "--port", "0"])
        .args(["--port-file", notes.port, "--summary-json", notes.summary]);
    command
}

/// A dump of the tree under `pid` into `images`, without its pages.
pub(super) fn dump(
    programs: &Programs,
    pid: i32,
    images: &Path,
    pages: Pages,
    tcp: TcpConnections,
) -> Command {
    let mut command = criu(programs, ("dump", images), LOG_ALL, tcp);
    command
        .args(["-t", &pid.to_string()])
        .args(["--address", &Ipv4Addr::LOCALHOST.to_string()]);
    match pages {
        Pages::ServedAt(port) => command.args(["--lazy-pages", "--port", &port.to_string()]),
        // They stay stopped until it is decided where they live.
        Pages::SentTo(port) => command.args([
            "--page-server",
            "--leave-stopped",
            "--port",
            &port.to_string(),
        ]),
    };
    command
}

/// What becomes of a dump's pages: the port on loopback.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pages {
    /// CRIU serves them there.
    ServedAt(u16),
    /// A page-server receives them there.
    SentTo(u16),
}

/// A port that nobody listens on at the moment: CRIU's page server takes no other way.
pub(super) fn free_port() -> Result<u16> {
    let socket = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = socket.and_then(|socket| socket.local_addr());
    let failed = |error| Error::wrap(Kind::Io, "cannot find a free port", error);
    Ok(address.map_err(failed)?.port())
}
