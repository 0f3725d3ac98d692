//! One move of a Redis, by its log or with its memory.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::debian::{self, Suite};
use testbed::net::Host;
use testbed::net_three::{DEVICE, ThreeHosts};
use testbed::process::Spawned;
use testbed::routes::NftRoute;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

use super::writers::{Writers, fill};
use super::{Case, Contend, Contender};

/// Of the link of each host.
const BITS_PER_S: u64 = 1_000_000_000;

/// Where clients are served.
const PORT: u16 = 7000;

/// Where Redis listens behind the recorder.
const BEHIND: u16 = 7001;

/// The longest move.
const LIMIT: Duration = Duration::from_secs(900);

/// How long the recorder waits for an answer before it passes the next piece: longer than a busy host lets Redis wait.
const ORDER_WAIT: &str = "100ms";

/// Redis, and what asks it.
pub(super) struct Programs {
    server: PathBuf,
    client: PathBuf,
}

impl Programs {
    /// Fetched, unless they are here.
    pub(super) fn fetched() -> Result<Programs> {
        let of = |program: &str| debian::program(Suite::Trixie, "redis-server", program);
        Ok(Programs {
            server: of("bin/redis-server")?,
            client: of("bin/redis-cli")?,
        })
    }
}

/// What one move took. Times are ms.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Run {
    /// As the report has it.
    pub(super) downtime_ms: f64,
    /// The longest time in which no client had an answer.
    pub(super) silence_ms: f64,
    /// Until clients are held, or the processes are frozen for good.
    pub(super) preparation_ms: f64,
    /// The whole move.
    pub(super) total_ms: f64,
    /// Writes that were due during the move, and had no answer at its end.
    pub(super) late_percent: f64,
    /// What was sent of the log, bytes.
    pub(super) log_bytes: Option<u64>,
}

/// Moves a Redis as `who` does, while clients write.
pub(super) fn run(criu: &Criu, programs: &Programs, case: &Case, who: Contender) -> Result<Run> {
    let test_dir = TestDir::new()?;
    let hosts = ThreeHosts::new()?;
    hosts.limit(BITS_PER_S)?;
    let setup = Setup {
        test_dir: &test_dir,
        criu,
        programs,
        hosts: &hosts,
    };
    let ran = match who {
        Contender::LogReplay => setup.by_log(case),
        Contender::Cold | Contender::Hybrid => setup.with_memory(case, who.name()),
    };
    if ran.is_err() {
        test_dir.show_logs();
    }
    ran.with_context(|| format!("{who:?}, {}", case.describe()))
}

struct Setup<'a> {
    test_dir: &'a TestDir,
    criu: &'a Criu,
    programs: &'a Programs,
    hosts: &'a ThreeHosts,
}

impl Setup<'_> {
    /// The words of a Redis that has nothing on its disk.
    fn redis(&self, port: &str) -> String {
        format!(
            "exec '{}' --port {port} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no \
             --enable-debug-command yes",
            self.programs.server.display()
        )
    }

    fn start(&self, port: u16) -> Result<Spawned> {
        let log = self.test_dir.path("redis.log");
        let mut command = self.hosts.source.net.command("setsid");
        command
            .args(["sh", "-c", &self.redis(&port.to_string())])
            .current_dir(self.test_dir.dir())
            .stdin(Stdio::null())
            .stdout(fs::File::create(&log)?)
            .stderr(Stdio::null());
        let service = Spawned::start_ungrouped("redis", &mut command, Some(log))?;
        listens(&self.hosts.source, port)?;
        Ok(service)
    }

    fn agent(&self) -> Result<Agent> {
        let (dir, insecure) = (self.test_dir.path("agent"), ["--insecure".to_owned()]);
        let host = Some(&self.hosts.destination);
        Agent::start(&self.criu.path, &dir, host, &insecure)
    }

    fn to_move(&self, id: &'static str) -> Move<'_> {
        Move::new(self.criu, self.test_dir.path("source"), id).in_net(&self.hosts.source.net)
    }

    fn by_log(&self, case: &Case) -> Result<Run> {
        let mut service = self.start(BEHIND)?;
        let (log, behind) = (
            self.test_dir.path("recorded"),
            format!("127.0.0.1:{BEHIND}"),
        );
        let messages = self.test_dir.path("record.log");
        let mut record = self.hosts.source.net.command(binary("pageferry")?);
        record
            .args(["record", "--listen", &format!("0.0.0.0:{PORT}"), "--to"])
            .args([&behind, "--order-wait", ORDER_WAIT, "--log"])
            .arg(&log)
            .stderr(fs::File::create(&messages)?);
        let mut recorder = Spawned::start("record", &mut record, Some(messages))?;
        listens(&self.hosts.source, PORT)?;
        let route = NftRoute::new(self.hosts, PORT)?;
        let agent = self.agent()?;
        let at = format!("127.0.0.1:{PORT}");
        let client = self.programs.client.display();
        let digest = format!("'{client}' -h $PAGEFERRY_HOST -p $PAGEFERRY_PORT debug digest");
        let (log, start) = (log.display().to_string(), self.redis("$PAGEFERRY_PORT"));
        let moves = self
            .to_move("log-replay")
            .with(&["--mode", "log-replay", "--log", &log, "--start", &start])
            .with(&["--service", &behind, "--at", &at])
            .with(&["--route", &route.option(), "--digest", &digest]);
        let (report, mut run) = self.carry_out(case, &moves, (&service, &agent), route.front()?)?;
        route.expect_there()?;
        recorder.succeed(GENEROUS)?;
        service.wait(GENEROUS)?;
        run.log_bytes = report["log"]["bytes"].as_u64();
        Ok(run)
    }

    fn with_memory(&self, case: &Case, mode: &'static str) -> Result<Run> {
        let mut service = self.start(PORT)?;
        let agent = self.agent()?;
        let address = format!("{}@{DEVICE}", ThreeHosts::SERVICE);
        let serve_on = self.hosts.source.address.to_string();
        let moves = self
            .to_move(mode)
            .with(&["--mode", mode, "--serve-on", &serve_on])
            .with(&["--tcp", "established", "--address", &address]);
        let mut at = self.hosts.service()?;
        at.set_port(PORT);
        let (_, run) = self.carry_out(case, &moves, (&service, &agent), at)?;
        service.wait(GENEROUS)?;
        Ok(run)
    }

    /// Fills the Redis, moves it while clients write, and looks for what they wrote.
    fn carry_out(
        &self,
        case: &Case,
        moves: &Move<'_>,
        (service, agent): (&Spawned, &Agent),
        at: SocketAddr,
    ) -> Result<(Value, Run)> {
        let clients = &self.hosts.client;
        clients.enter(|| fill(at, case)).context("filling")?;
        let mut writers = Writers::start(clients, at, case)?;
        // Whatever the start took is forgotten.
        writers.take_longest();
        let (before, began) = (writers.answers(), Instant::now());
        let pid = service.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], agent)?;
        command.succeed(LIMIT).with_context(|| agent.log())?;
        let (came, took) = (writers.answers() - before, began.elapsed());
        let silence = writers.take_longest();
        writers.expect_answers()?;
        writers.finish(clients, at)?;
        let report = moves.report()?;
        ensure!(report["result"] == "moved", "{report}");
        let field = |name: &str| report[name].as_f64().context(name.to_owned());
        let due = f64::from(case.writes_per_s) * took.as_secs_f64();
        #[allow(clippy::cast_precision_loss)]
        let late_percent = (100.0 * (1.0 - came as f64 / due)).max(0.0);
        let run = Run {
            downtime_ms: field("downtime_ms")?,
            silence_ms: silence.as_secs_f64() * 1e3,
            preparation_ms: field("preparation_ms")?,
            total_ms: field("total_ms")?,
            late_percent,
            log_bytes: None,
        };
        Ok((report, run))
    }
}

fn listens(host: &Host, port: u16) -> Result<()> {
    let at = host.at(port);
    let connected = || host.net.enter(|| Ok(TcpStream::connect(at).ok()));
    wait::until("the service to listen", GENEROUS, connected).map(drop)
}
