//! A real Redis that moves as the log of what its clients have said, between two hosts, while clients at a third write.

mod fed;
#[path = "../redis/mod.rs"]
mod redis;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use redis::{Client, Programs, digest};
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::gate::need;
use testbed::net::Host;
use testbed::net_three::ThreeHosts;
use testbed::process::Spawned;
use testbed::routes::NftRoute;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Where clients are served, on either host.
const PORT: u16 = 7000;

/// Where Redis listens behind the recorder.
const BEHIND: u16 = 7001;

/// Clients that write.
const WRITERS: usize = 4;

/// Before a client whose connection was ended connects again.
const AGAIN: Duration = Duration::from_millis(5);

/// All that a test needs.
struct Fixture<'a> {
    test_dir: &'a TestDir,
    criu: &'a Criu,
    programs: Programs,
    hosts: ThreeHosts,
}

fn with_fixture(test: impl FnOnce(&Fixture<'_>) -> Result<()>) {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let fetched = Programs::fetched();
        let Some(programs) = need("Redis", fetched.map_err(|error| format!("{error:#}"))) else {
            return Ok(());
        };
        let hosts = ThreeHosts::new()?;
        test(&Fixture {
            test_dir,
            criu,
            programs,
            hosts,
        })
    });
}

impl Fixture<'_> {
    /// The words of a Redis that has nothing on its disk.
    fn redis(&self, port: &str) -> String {
        format!(
            "exec '{}' --port {port} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no \
             --enable-debug-command yes",
            self.programs.server.display()
        )
    }

    fn start(&self, name: &str, words: &str) -> Result<Spawned> {
        let log = self.test_dir.path(&format!("{name}.log"));
        let mut command = self.hosts.source.net.command("setsid");
        command
            .args(["sh", "-c", words])
            .current_dir(self.test_dir.dir())
            .stdin(Stdio::null())
            .stdout(fs::File::create(&log)?)
            .stderr(Stdio::null());
        let process = Spawned::start_ungrouped(name, &mut command, Some(log))?;
        listens(&self.hosts.source, BEHIND)?;
        Ok(process)
    }

    fn log(&self) -> PathBuf {
        self.test_dir.path("recorded")
    }

    fn record(&self) -> Result<Spawned> {
        let recorder = self.record_again()?;
        listens(&self.hosts.source, PORT)?;
        Ok(recorder)
    }

    fn record_again(&self) -> Result<Spawned> {
        let log = self.test_dir.path("record.log");
        let mut command = self.hosts.source.net.command(binary("pageferry")?);
        command
            .args(["record", "--listen", &format!("0.0.0.0:{PORT}")])
            .args(["--to", &format!("127.0.0.1:{BEHIND}"), "--log"])
            .arg(self.log())
            // On a busy host Redis may take longer than the default to answer, and then reads in another order.
            .args(["--order-wait", "500ms"])
            .stderr(fs::File::create(&log)?);
        Spawned::start("record", &mut command, Some(log))
    }

    fn agent(&self) -> Result<Agent> {
        let insecure = ["--insecure".to_owned()];
        let dir = self.test_dir.path("agent");
        Agent::start(
            &self.criu.path,
            &dir,
            Some(&self.hosts.destination),
            &insecure,
        )
    }

    fn to_move(&self, id: &'static str, route: &NftRoute<'_>) -> Move<'_> {
        self.to_move_by(id, route, &self.redis("$PAGEFERRY_PORT"))
    }

    fn to_move_by(&self, id: &'static str, route: &NftRoute<'_>, start: &str) -> Move<'_> {
        let (service, at) = (format!("127.0.0.1:{BEHIND}"), format!("127.0.0.1:{PORT}"));
        let log = self.log().display().to_string();
        Move::new(self.criu, self.test_dir.path("source"), id)
            .in_net(&self.hosts.source.net)
            .with(&["--mode", "log-replay", "--log", &log, "--start", start])
            .with(&[
                "--service",
                &service,
                "--at",
                &at,
                "--route",
                &route.option(),
            ])
    }

    /// Moves the service; the report tells what came of it.
    fn run(&self, moves: &Move<'_>, service: &Spawned, agent: &Agent) -> Result<(String, Value)> {
        let pid = service.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], agent)?;
        command.wait(GENEROUS)?;
        let log = command.log_tail();
        let report = moves.report().with_context(|| log.clone())?;
        Ok((log, report))
    }

    /// A client of the third host.
    fn client(&self, at: SocketAddr) -> Result<Client> {
        self.hosts.client.enter(|| Client::connect_to(at))
    }

    /// Nothing of a service is at the destination.
    fn expect_nothing_there(&self, agent: &Agent, id: &str) -> Result<()> {
        let there = self.hosts.destination.at(PORT);
        let connected = self.hosts.client.enter(|| Ok(TcpStream::connect(there)))?;
        ensure!(connected.is_err(), "{id}: something listens at {there}");
        for name in ["service", "snapshot"] {
            ensure!(!agent.dir_of(id).join(name).exists(), "{id}: {name}");
        }
        Ok(())
    }
}

fn listens(host: &Host, port: u16) -> Result<()> {
    let at = SocketAddr::new(host.address, port);
    wait::until("the service to listen", GENEROUS, || {
        host.net.enter(|| Ok(TcpStream::connect(at).ok()))
    })
    .map(drop)
}

/// A client that counts, and connects again when its connection ends. Its thread ends on drop.
struct Writer {
    stop: Arc<AtomicBool>,
    /// The last number that was acknowledged.
    acknowledged: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    fn start(fixture: &Fixture<'_>, at: SocketAddr, number: usize) -> Writer {
        let (stop, acknowledged) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (ended, counted) = (Arc::clone(&stop), Arc::clone(&acknowledged));
        let enter = fixture.hosts.client.entrance();
        let thread = thread::spawn(move || {
            enter()?;
            write(at, number, &ended, &counted)
        });
        Writer {
            stop,
            acknowledged,
            thread: Some(thread),
        }
    }

    fn count(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits for answers to what is said from now on.
    fn expect_answers(&mut self) -> Result<()> {
        let enough = self.count() + 3;
        wait::until("a writer's answers", GENEROUS, || {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                self.finish()?;
                bail!("the writer has ended");
            }
            Ok((self.count() >= enough).then_some(()))
        })
        .map(drop)
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(written)) => written,
            Some(Err(_)) => bail!("a writer panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("a writer: {error:#}");
        }
    }
}

fn write(at: SocketAddr, number: usize, stop: &AtomicBool, acknowledged: &AtomicU64) -> Result<()> {
    let mut client: Option<Client> = None;
    while !stop.load(Ordering::SeqCst) {
        let Some(open) = &mut client else {
            client = Client::connect_to(at).ok();
            thread::sleep(AGAIN);
            continue;
        };
        let before = acknowledged.load(Ordering::SeqCst);
        let Ok(answer) = open.ask(&format!("INCR counter:{number}")) else {
            client = None;
            continue;
        };
        let now: u64 = answer.first().context("an answer")?.parse()?;
        // What was said and not acknowledged may count.
        ensure!(
            now > before,
            "{now} came after {before}: acknowledged writes are lost"
        );
        acknowledged.store(now, Ordering::SeqCst);
        // The order of all of them is part of the state.
        if open.ask(&format!("RPUSH order {number}")).is_err() {
            client = None;
        }
    }
    Ok(())
}

#[test]
fn a_service_moves_while_clients_write() {
    with_fixture(|fixture| {
        let mut service = fixture.start("redis", &fixture.redis(&BEHIND.to_string()))?;
        let mut recorder = fixture.record()?;
        let route = NftRoute::new(&fixture.hosts, PORT)?;
        let agent = fixture.agent()?;
        let front = route.front()?;
        let mut writers: Vec<Writer> = (0..WRITERS)
            .map(|number| Writer::start(fixture, front, number))
            .collect();
        // One that waits for ever takes nothing of the service that it is replayed to.
        let mut popper = fixture.client(front)?;
        popper.send("BLPOP nothing 0")?;
        for writer in &mut writers {
            writer.expect_answers()?;
        }
        let probe = format!("tcp:{PORT}");
        let digest = digest(&fixture.programs);
        let moves = fixture
            .to_move("moved", &route)
            .with(&["--digest", &digest, "--verify", "--probe", &probe]);
        let (log, report) = fixture.run(&moves, &service, &agent)?;
        ensure!(report["result"] == "moved", "{report} {log}");
        moves.expect_events(&[
            "source preflight done",
            "destination start done",
            "source replay done",
            "source hold done",
            "destination rest done",
            "destination commit done",
            "source route done",
            "destination resume done",
            "source stop done",
            "source end done",
        ])?;
        route.expect_there()?;
        for writer in &mut writers {
            writer.expect_answers()?;
            writer.finish()?;
        }
        let mut client = fixture.client(front)?;
        client.ask("RPUSH nothing x")?;
        ensure!(
            client.ask("LLEN nothing")? == ["1"],
            "a replayed client waits"
        );
        for (number, writer) in writers.iter().enumerate() {
            let count: u64 = client.ask(&format!("GET counter:{number}"))?[0].parse()?;
            ensure!(count >= writer.count(), "{count} of {}", writer.count());
        }
        // The source serves nobody any more.
        recorder.succeed(GENEROUS)?;
        service.wait(GENEROUS)?;
        let at = |name: &str| report[name].as_f64().context(name.to_owned());
        ensure!(at("preparation_ms")? <= at("switch_ms")?, "{report}");
        ensure!(at("switch_ms")? <= at("answer_ms")?, "{report}");
        ensure!(at("downtime_ms")? > 0.0, "{report}");
        for phase in ["hold", "rest", "route", "resume"] {
            ensure!(report["phases_ms"][phase].is_number(), "{phase}: {report}");
        }
        ensure!(report["log"]["bytes"].as_u64() > Some(0), "{report}");
        // Nobody records clients that are another service's.
        let mut again = fixture.record_again()?;
        again.fail(GENEROUS)?;
        ensure!(
            again.log_tail().contains("was moved"),
            "{}",
            again.log_tail()
        );
        Ok(())
    });
}

#[test]
fn whatever_fails_the_service_is_here_and_nothing_there() {
    with_fixture(|fixture| {
        let mut service = fixture.start("redis", &fixture.redis(&BEHIND.to_string()))?;
        let _recorder = fixture.record()?;
        let route = NftRoute::new(&fixture.hosts, PORT)?;
        let agent = fixture.agent()?;
        let mut writers: Vec<Writer> = (0..WRITERS)
            .map(|number| Ok(Writer::start(fixture, route.front()?, number)))
            .collect::<Result<_>>()?;
        for writer in &mut writers {
            writer.expect_answers()?;
        }
        // Both say something else each time.
        let differs = "echo $PAGEFERRY_ADDRESS";
        let digest = digest(&fixture.programs);
        let fails = "exec:[ $PAGEFERRY_ROUTE = back ]";
        let redis = fixture.redis("$PAGEFERRY_PORT");
        let no_redis = "echo no; exit 3";
        let cases: [(&'static str, &str, &[&str], &str); 5] = [
            (
                "differs",
                &redis,
                &["--digest", differs],
                "the digests differ",
            ),
            ("no-digest", &redis, &["--digest", "false"], "--digest"),
            (
                "order",
                &redis,
                &["--verify", "--wrong-order", "--digest", &digest],
                "ERROR",
            ),
            ("route", &redis, &["--route", fails], "exec:"),
            ("start", no_redis, &[], "--start"),
        ];
        for (id, start, options, why) in cases {
            let moves = fixture.to_move_by(id, &route, start).with(options);
            let (log, report) = fixture.run(&moves, &service, &agent)?;
            ensure!(report["result"] == "rolled back", "{id}: {report}");
            ensure!(log.contains(why), "{id}: {log}");
            moves.expect_events(&["source discard done", "source end failed"])?;
            route.expect_here()?;
            for writer in &mut writers {
                writer.expect_answers().with_context(|| id)?;
            }
            fixture.expect_nothing_there(&agent, id)?;
        }
        // The guard of a command that dies when clients may be led away.
        let dies = "exec:[ $PAGEFERRY_ROUTE = back ] || kill -KILL $PPID";
        let moves = fixture.to_move("killed", &route).with(&["--route", dies]);
        let pid = service.pid().to_string();
        moves
            .start_subject(&["--pid", &pid], &agent)?
            .wait(GENEROUS)?;
        wait::until("the guard's last record", GENEROUS, || {
            let record = fs::read_to_string(moves.dir().join("record.json")).unwrap_or_default();
            Ok(record.contains("rolled-back").then_some(()))
        })?;
        route.expect_here()?;
        for writer in &mut writers {
            writer.expect_answers()?;
            writer.finish()?;
        }
        fixture.expect_nothing_there(&agent, "killed")?;
        ensure!(service.ended()?.is_none(), "the service has ended");
        Ok(())
    });
}
