//! What a run took, and what all runs have in common.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use pageferry::criu::header::Wire;
use pageferry::tls::{Tls, TlsArgs};
use pageferry::units::PageSize;
use serde::Serialize;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options};
use testbed::pki::{Authority, Credentials, Host};
use testbed::test_dir::TestDir;

use super::super::rounds::Measure;
use super::super::stats::Sample;
use super::case::{Contender, Link, Target};
pub(super) use super::connection::TIMEOUT;
use super::connection::{Connection, LOOK_UP};

/// Warnings and errors, CRIU's default: the harness logs everything, which would be measured too.
const VERBOSITY: &str = "-v2";

const MIB: f64 = (1u32 << 20) as f64;
const GIB: f64 = (1u32 << 30) as f64;

/// What a run took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    /// Receiving: from the connection to the answer to CLOSE. Serving: from the first request to the
    /// last answer. A dump: how long the process stood still. Seconds.
    pub(super) wall_s: f64,
    /// Bytes of pages moved.
    pub(super) bytes: u64,
    /// Latency of a round trip, µs.
    pub(super) p50_us: Option<f64>,
    /// The same.
    pub(super) p99_us: Option<f64>,
    /// User and system time of the server from the moment it listened, s.
    pub(super) cpu_s: f64,
    /// Most memory that the server had resident, MiB.
    pub(super) peak_mib: f64,
}

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    /// Seconds: see [`Run::wall_s`].
    Wall,
    /// GiB of pages a second.
    Rate,
    /// Median round trip, µs.
    P50,
    /// Its 99th percentile, µs.
    P99,
    /// CPU seconds of the server a GiB.
    Cpu,
    /// Its peak memory, MiB.
    Peak,
}

impl Metric {
    pub(super) const ALL: [Metric; 6] = [
        Metric::Wall,
        Metric::Rate,
        Metric::P50,
        Metric::P99,
        Metric::Cpu,
        Metric::Peak,
    ];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Wall => "s",
            Metric::Rate => "GiB/s",
            Metric::P50 => "p50 µs",
            Metric::P99 => "p99 µs",
            Metric::Cpu => "CPU s/GiB",
            Metric::Peak => "peak MiB",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        let gib = run.bytes as f64 / GIB;
        let value = match self {
            Metric::Wall => run.wall_s,
            Metric::Rate => gib / run.wall_s,
            Metric::P50 => run.p50_us?,
            Metric::P99 => run.p99_us?,
            Metric::Cpu => run.cpu_s / gib,
            Metric::Peak => run.peak_mib,
        };
        Some(Sample::exact(value))
    }
}

impl Run {
    /// A run of a server that used `cpu`, and had `peak_rss_bytes` resident at most.
    pub(super) fn new(wall: Duration, bytes: u64, cpu: Duration, peak_rss_bytes: u64) -> Run {
        Run {
            wall_s: wall.as_secs_f64(),
            bytes,
            p50_us: None,
            p99_us: None,
            cpu_s: cpu.as_secs_f64(),
            peak_mib: peak_rss_bytes as f64 / MIB,
        }
    }
}

/// What all runs have in common.
pub(super) struct Bench<'a> {
    pub(super) criu: &'a Criu,
    pub(super) page: PageSize,
    /// A directory on a disk.
    pub(super) disk: &'a Path,
    /// Pages asked for by each run that serves, MiB.
    pub(super) asked_mib: u32,
    credentials: Credentials,
    /// Holds what runs share: the certificates, recordings and images to serve.
    test_dir: TestDir,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        criu: &'a Criu,
        page: PageSize,
        disk: &'a Path,
        asked_mib: u32,
    ) -> Result<Bench<'a>> {
        let test_dir = TestDir::new_in(&Target::Tmpfs.dir(disk)?)?;
        let credentials = Authority::new(test_dir.dir(), "ca")?.issue(&Host::LOOPBACK)?;
        Ok(Bench {
            criu,
            page,
            disk,
            asked_mib,
            credentials,
            test_dir,
        })
    }

    /// A path for what runs share, in memory.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.test_dir.path(name)
    }

    /// Where it is.
    pub(super) fn dir(&self) -> &Path {
        self.test_dir.dir()
    }

    /// What the CRIU in use speaks.
    pub(super) fn wire(&self) -> Result<Wire> {
        let is_v1 = self.criu.speaks_v1()?;
        Ok(if is_v1 { Wire::V1 } else { Wire::V2 })
    }

    pub(super) fn make(&self, who: Contender) -> Make<'a> {
        if who.is_ours() {
            Make::Ours
        } else {
            Make::Criu(self.criu)
        }
    }

    /// The options of a server with its images in `images`.
    pub(super) fn options(&self, images: &Path, link: Link) -> Options<'static> {
        let secured = self.tls_options(link);
        let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
        Options::new(images).with(&[VERBOSITY]).with(&secured)
    }

    /// What either make is told of `link`.
    pub(super) fn tls_options(&self, link: Link) -> Vec<String> {
        match link {
            Link::Plain => Vec::new(),
            Link::Tls => self.credentials.options(),
        }
    }

    /// Connects to a server.
    pub(super) fn connect(&self, address: SocketAddr, link: Link) -> Result<Connection> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LOOK_UP))?;
        socket.set_write_timeout(Some(LOOK_UP))?;
        if link == Link::Plain {
            return Ok(Connection::Plain(socket));
        }
        let args = TlsArgs {
            tls: true,
            tls_cacert: Some(self.credentials.cacert.clone()),
            tls_cert: Some(self.credentials.cert.clone()),
            tls_key: Some(self.credentials.key.clone()),
            ..TlsArgs::default()
        };
        let tls = Tls::load(&args)?.context("TLS is asked for")?;
        let stream = tls.connect(socket.into(), &address.ip().to_string())?;
        // The handshake had a limit of its own.
        stream.socket().set_read_timeout(Some(LOOK_UP))?;
        Ok(Connection::Secure(Box::new(stream)))
    }
}
