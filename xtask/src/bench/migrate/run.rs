//! One migration, by pageferry or by CRIU alone, with a prober in the process and a client outside.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::scenarios::verifying;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::Step;
use testbed::migration::{Dump, Restore, Restored};
use testbed::net::TwoHosts;
use testbed::test_dir::TestDir;
use testbed::transfer::copy_files;

use super::client::Client;
use super::{Case, Contender};

/// Where the process answers datagrams, on both hosts.
const PROBE_PORT: u16 = 4711;

/// Where a lazy dump serves.
const DUMP_PORT: u16 = 27_000;

/// The longest migration: with 4 GiB and 1 Gbit/s, rounds that do not shrink take minutes. That of `--timeout` and some.
const LIMIT: Duration = Duration::from_secs(900);

/// Pages of a MiB.
const MIB_PAGES: u32 = 256;

/// What one migration took. Times are ms by CLOCK_REALTIME.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Run {
    /// The longest pause of a thread of the process that wakes each millisecond.
    pub(super) pause_ms: f64,
    /// The longest time without an answer to a client outside.
    pub(super) silence_ms: f64,
    /// From the end of the pause until all memory is there.
    pub(super) complete_ms: f64,
    /// The whole migration.
    pub(super) total_ms: f64,
    /// Bytes that left the source, with all headers.
    pub(super) wire_bytes: u64,
    /// The freeze of `criu dump --lazy-pages` and `criu restore --lazy-pages`, without what lies between.
    pub(super) floor_ms: Option<f64>,
    /// The tool's own report.
    pub(super) report: Option<Value>,
}

impl Run {
    /// A number of the tool's report.
    pub(super) fn reported(&self, field: &str) -> Option<f64> {
        self.report.as_ref()?[field].as_f64()
    }
}

/// Moves a process as `who` does.
pub(super) fn run(criu: &Criu, case: &Case, who: Contender, options: &[&str]) -> Result<Run> {
    let test_dir = TestDir::new()?;
    let ended = move_one(&test_dir, criu, case, who, options);
    if ended.is_err() {
        test_dir.show_logs();
    }
    ended.with_context(|| format!("{who:?}, {}", case.describe()))
}

fn move_one(
    test_dir: &TestDir,
    criu: &Criu,
    case: &Case,
    who: Contender,
    options: &[&str],
) -> Result<Run> {
    let hosts = TwoHosts::new(case.link.bits_per_s())?;
    let pages = case.mib * MIB_PAGES;
    let area = AreaSpec::new(Mapping::Private, pages, Content::Mixed);
    let mut spec = LoadSpec::new(test_dir.path("load"), vec![area]);
    spec.probed_at = Some(PROBE_PORT);
    let mut load = Load::start(spec, Some(&hosts.source.net))?;
    let pages_per_s = case.dirty_pages_per_s();
    load.run(0, &[Step::Dirty { pages_per_s }])?;
    let addresses = vec![
        ([127, 0, 0, 1], PROBE_PORT).into(),
        hosts.destination.at(PROBE_PORT),
    ];
    let client = Client::start(&hosts.source.net, addresses)?;
    // Whatever the start took is forgotten.
    load.run(0, &[Step::Status])?;
    let before = hosts.bytes_to_destination()?;
    let mut run = Run::default();
    let started = Instant::now();
    let fixture = Fixture {
        test_dir,
        criu,
        hosts: &hosts,
    };
    match who.mode() {
        Some(mode) => {
            let agent = fixture.pageferry(&mut load, mode, options, &mut run)?;
            run.total_ms = ms(started.elapsed());
            load.steer(agent.init()?)?;
            fixture.finish(&load, client, before, &mut run)?;
        }
        None => {
            let restored = match who {
                Contender::CriuCold => fixture.criu_cold(&mut load, &mut run)?,
                _ => fixture.criu_post_copy(&mut load, &mut run)?,
            };
            run.total_ms = ms(started.elapsed());
            load.steer(restored.init()?)?;
            fixture.finish(&load, client, before, &mut run)?;
        }
    }
    Ok(run)
}

struct Fixture<'a> {
    test_dir: &'a TestDir,
    criu: &'a Criu,
    hosts: &'a TwoHosts,
}

impl Fixture<'_> {
    fn pageferry(
        &self,
        load: &mut Load,
        mode: &str,
        options: &[&str],
        run: &mut Run,
    ) -> Result<Agent> {
        let (source, destination) = (&self.hosts.source, &self.hosts.destination);
        let dir = self.test_dir.path("agent");
        let insecure = ["--insecure".to_owned()];
        let agent = Agent::start(&self.criu.path, &dir, Some(destination), &insecure)?;
        let serve_on = source.address.to_string();
        let moves = Move::new(self.criu, self.test_dir.path("source"), "bench")
            .in_net(&source.net)
            .with(&["--mode", mode, "--serve-on", &serve_on])
            .with(options);
        let mut command = moves.start(load, &agent)?;
        command.succeed(LIMIT)?;
        load.wait_until_gone()?;
        let report = moves.report()?;
        let field = |name: &str| report[name].as_f64().context("a field of the report");
        let resumed = field("preparation_ms")? + field("downtime_ms")?;
        run.complete_ms = (field("complete_ms")? - resumed).max(0.0);
        run.report = Some(report);
        Ok(agent)
    }

    /// As CRIU's documentation says: memory to its page server, the rest copied, and restored.
    fn criu_cold(&self, load: &mut Load, run: &mut Run) -> Result<Restored> {
        let (source, destination) = (&self.hosts.source, &self.hosts.destination);
        let (there, here) = self.image_dirs();
        let options = Options::new(&here).at(&destination.net, destination.address);
        let server = PageServer::receiving(Make::Criu(self.criu), &options)?;
        Dump::new(self.criu, load.pid(), &there)
            .in_net(&source.net)
            .to(server.address())
            .run()?;
        server.finish(LIMIT)?;
        copy_files(self.hosts, &there, &here)?;
        let restored = Restore::new(self.criu, &here)
            .in_net(&destination.net)
            .run()?;
        load.wait_until_gone()?;
        run.complete_ms = 0.0;
        Ok(restored)
    }

    /// As CRIU's documentation says: a lazy dump, the images copied, its lazy-pages daemon, and a lazy restore.
    fn criu_post_copy(&self, load: &mut Load, run: &mut Run) -> Result<Restored> {
        let (source, destination) = (&self.hosts.source, &self.hosts.destination);
        let (there, here) = self.image_dirs();
        let began = Instant::now();
        let dump = Dump::new(self.criu, load.pid(), &there).in_net(&source.net);
        let mut dump = dump.serve_lazily(source.at(DUMP_PORT))?;
        let freeze = began.elapsed();
        copy_files(self.hosts, &there, &here)?;
        let options = Options::new(&here)
            .at(&destination.net, destination.address)
            .log_to("lazy.log");
        let from = Some(source.at(DUMP_PORT));
        let mut daemon = LazyDaemon::start(Make::Criu(self.criu), &options, from)?;
        let began = Instant::now();
        let restore = Restore::new(self.criu, &here)
            .in_net(&destination.net)
            .lazily();
        let restored = restore.run()?;
        run.floor_ms = Some(ms(freeze + began.elapsed()));
        let resumed = Instant::now();
        daemon.process().succeed(LIMIT)?;
        run.complete_ms = ms(resumed.elapsed());
        dump.succeed(LIMIT)?;
        load.wait_until_gone()?;
        Ok(restored)
    }

    fn image_dirs(&self) -> (std::path::PathBuf, std::path::PathBuf) {
        (self.test_dir.path("images"), self.test_dir.path("restored"))
    }

    /// Asks the moved process and the client what they have seen.
    fn finish(&self, load: &Load, client: Client, before: u64, run: &mut Run) -> Result<()> {
        run.wire_bytes = self.hosts.bytes_to_destination()? - before;
        let report = load.run(0, &[Step::Dirty { pages_per_s: 0 }])?;
        #[allow(clippy::cast_precision_loss)]
        let pause_ms = report.longest_pause_us as f64 / 1e3;
        run.pause_ms = pause_ms;
        run.silence_ms = ms(client.end()?);
        ensure!(run.pause_ms > 0.0, "the prober has seen no pause");
        load.run(0, &verifying())?.expect_right()
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Writes a file so that it is whole or absent.
pub(super) fn write_whole(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, text).with_context(|| unfinished.display().to_string())?;
    fs::rename(&unfinished, path).with_context(|| path.display().to_string())
}
