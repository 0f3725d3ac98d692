//! The rounds of a case: one process, dumped by all contenders in turn, changed, dumped again.
//!
//! ```text
//!   source                                     destination
//!   process <- criu dump ------------------->  criu page-server       CRIU
//!              criu dump ------------------->  page-server            plain
//!              criu dump -> page-server  ~~~>  page-server            ferry
//!                           --forward          --prev-images-dir
//! ```
//!
//! All dump the same memory; a round's ratio compares them. The images of CRIU and of the plain server
//! are thrown away after each dump, those of ferry are the chain that the next round builds on.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::migration::Dump;
use testbed::net::{NetNs, TwoHosts, free_port};
use testbed::stats;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

use super::super::TMPFS;
use super::subject::Subject;
use super::{Case, Contender, LinkKind};

/// Warnings and errors, CRIU's default: the harness logs everything, which would be measured too.
const VERBOSITY: &str = "-v2";
/// Length of a page, bytes.
const PAGE_BYTES: u64 = 4096;

/// What a dump took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    /// From the start of `criu dump` to its end: how long the process stands still, and the little
    /// before and after.
    pub(super) seconds: f64,
    /// Over the link: as its interface counts, or of pages where there is none.
    pub(super) bytes: u64,
    /// User and system time of all programs at both ends.
    pub(super) cpu_s: f64,
    /// ferry's account of the bytes of each kind.
    pub(super) sent: Option<Value>,
}

/// Everything that a case runs on.
struct Fixture<'a> {
    criu: &'a Criu,
    test_dir: &'a TestDir,
    hosts: Option<&'a TwoHosts>,
    /// Where ferry's far end listens, round after round.
    far_port: u16,
    dumps: u32,
}

/// Runs a case: the runs of each round, in the order of its contenders.
///
/// # Errors
/// Something fails that none of the contenders may fail at.
pub(super) fn run(criu: &Criu, case: Case, rounds: u32) -> Result<Vec<Vec<Run>>> {
    let test_dir = TestDir::new_in(Path::new(TMPFS))?;
    let hosts = match case.link {
        LinkKind::Loopback => None,
        LinkKind::Gigabit => Some(TwoHosts::new(Some(LinkKind::GIGABIT_BITS_PER_S))?),
    };
    let net = hosts.as_ref().map(|hosts| &hosts.source.net);
    let (mib, percent) = (case.mib, case.percent);
    let subject_dir = test_dir.path("subject");
    let mut subject = Subject::start(case.memory, mib, percent, &subject_dir, net)?;
    let mut fixture = Fixture {
        criu,
        test_dir: &test_dir,
        hosts: hosts.as_ref(),
        far_port: free_port()?,
        dumps: 0,
    };
    let measured = fixture.rounds(&mut subject, case.contenders(), rounds);
    if measured.is_err() {
        test_dir.show_logs();
    }
    measured.with_context(|| case.describe())
}

impl Fixture<'_> {
    fn rounds(
        &mut self,
        subject: &mut Subject,
        contenders: &[Contender],
        rounds: u32,
    ) -> Result<Vec<Vec<Run>>> {
        // Warms up files, caches and the memory of the machine; ferry starts anew afterwards.
        let mut forwarder = Forwarder::start(self, "warm-up")?;
        for &who in contenders {
            self.dump(subject, who, &mut forwarder)?;
        }
        forwarder.end()?;
        let mut forwarder = Forwarder::start(self, "forwarder")?;
        let mut all = Vec::new();
        for round in 0..rounds {
            if round > 0 {
                subject.change()?;
            }
            let runs = contenders
                .iter()
                .map(|&who| self.dump(subject, who, &mut forwarder));
            all.push(runs.collect::<Result<Vec<Run>>>()?);
        }
        forwarder.end()?;
        Ok(all)
    }

    /// One dump by `who`.
    fn dump(
        &mut self,
        subject: &Subject,
        who: Contender,
        forwarder: &mut Forwarder,
    ) -> Result<Run> {
        self.dumps += 1;
        let images = self.test_dir.path(&format!("images-{}", self.dumps));
        let options = self.destination(&images);
        let (make, options) = match who {
            Contender::Criu => (Make::Criu(self.criu), options),
            Contender::Plain => (Make::Ours, options),
            Contender::Ferry => {
                let options = options.at_port(self.far_port);
                let options = match &forwarder.parent {
                    Some(parent) => options.on_parent(&Path::new("..").join(parent)),
                    None => options,
                };
                (Make::Ours, options)
            }
        };
        let server = PageServer::receiving(make, &options)?;
        let to = match who {
            Contender::Ferry => forwarder.server.address(),
            Contender::Criu | Contender::Plain => server.address(),
        };
        let mut dump = Dump::new(self.criu, subject.pid(), self.test_dir.path("dump"))
            .to(to)
            .leave_running()
            .with(&[VERBOSITY]);
        if let Some(net) = self.source_net() {
            dump = dump.in_net(net);
        }
        let carried_before = self.carried()?;
        let started = Instant::now();
        let dumped = dump.run()?;
        let seconds = started.elapsed().as_secs_f64();
        let mut cpu = dumped.cpu + server.finish(GENEROUS)?.cpu;
        let carried = self.carried()?.zip(carried_before);
        let mut bytes = carried.map(|(after, before)| after - before);
        let mut sent = None;
        if who == Contender::Ferry {
            let line = forwarder.next_summary()?;
            let cpu_s = line["cpu_seconds"].as_f64().unwrap_or(0.0);
            cpu += Duration::try_from_secs_f64(cpu_s)?;
            bytes = bytes.or(line["frame_bytes"].as_u64());
            sent = Some(line["sent"].clone());
            forwarder.parent = images.file_name().map(PathBuf::from);
        } else {
            fs::remove_dir_all(&images)?;
        }
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => stats::of_dump(&self.test_dir.path("dump"))?.pages_written * PAGE_BYTES,
        };
        Ok(Run {
            seconds,
            bytes,
            cpu_s: cpu.as_secs_f64(),
            sent,
        })
    }

    fn source_net(&self) -> Option<&NetNs> {
        self.hosts.map(|hosts| &hosts.source.net)
    }

    /// Options of a server at the destination.
    fn destination(&self, images: &Path) -> Options<'_> {
        let options = Options::new(images).with(&[VERBOSITY]);
        match self.hosts {
            Some(hosts) => options.at(&hosts.destination.net, hosts.destination.address),
            None => options,
        }
    }

    /// Bytes that have gone over the link so far, to the destination; `None` without a link.
    fn carried(&self) -> Result<Option<u64>> {
        self.hosts.map(TwoHosts::bytes_to_destination).transpose()
    }
}

/// ferry's near end, which stays for all rounds.
struct Forwarder {
    server: PageServer,
    summary: PathBuf,
    lines: usize,
    /// The images of the round before, beside which those of the next come.
    parent: Option<PathBuf>,
}

impl Forwarder {
    fn start(fixture: &Fixture<'_>, name: &str) -> Result<Forwarder> {
        let dir = fixture.test_dir.path(name);
        let summary = dir.join("summary.json");
        let far_end: IpAddr = match fixture.hosts {
            Some(hosts) => hosts.destination.address,
            None => Ipv4Addr::LOCALHOST.into(),
        };
        let far_end = format!("{far_end}:{}", fixture.far_port);
        let mut options = Options::new(&dir).with(&["--keep", "--forward", &far_end, VERBOSITY]);
        options = options.with(&["--summary-json", &summary.to_string_lossy()]);
        if let Some(hosts) = fixture.hosts {
            options = options.at(&hosts.source.net, Ipv4Addr::LOCALHOST.into());
        }
        Ok(Forwarder {
            server: PageServer::receiving(Make::Ours, &options)?,
            summary,
            lines: 0,
            parent: None,
        })
    }

    /// The summary of the dump that has just ended.
    fn next_summary(&mut self) -> Result<Value> {
        let line = testbed::wait::until("the forwarder's summary", GENEROUS, || {
            let text = fs::read_to_string(&self.summary)?;
            Ok(text.lines().nth(self.lines).map(ToOwned::to_owned))
        })?;
        self.lines += 1;
        let value: Value = serde_json::from_str(&line)?;
        ensure!(value["forwarded"] == true, "forwarding failed: {value}");
        Ok(value)
    }

    fn end(mut self) -> Result<()> {
        self.server.process().kill().map(drop)
    }
}
