//! What a migration looks like from outside: to a probe, to clients whose connections are closed, to neighbours on the
//! link, and to the guard that finishes it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::announcements::{Announcements, mac_of};
use testbed::criu::{Criu, Suite};
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::net_three::{DEVICE, ThreeHosts};
use testbed::process::{Spawned, run};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// A second address of the service.
const SERVICE_V6: &str = "fd00:213:8::10/64";

/// An echoing service at the source, and an agent at the destination.
struct Fixture {
    // Dropped in this order: processes, then networks.
    service: Spawned,
    agent: Agent,
    hosts: ThreeHosts,
}

impl Fixture {
    fn new(test_dir: &TestDir, criu: &Criu, name: &str) -> Result<Fixture> {
        let hosts = ThreeHosts::new()?;
        let address = hosts.service()?.to_string();
        let mut command: Command = hosts.source.net.command("setsid");
        command.arg(binary("echo")?).args(["--listen", &address]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let service = Spawned::start_ungrouped("echo", &mut command, None)?;
        let insecure = ["--insecure".to_owned()];
        let dir = test_dir.path(&format!("agent-{name}"));
        let agent = Agent::start(&criu.path, &dir, Some(&hosts.destination), &insecure)?;
        Ok(Fixture {
            service,
            agent,
            hosts,
        })
    }

    /// A client's connection, over which one answer has come.
    fn connect(&self) -> Result<TcpStream> {
        let address = self.hosts.service()?;
        let mut stream = wait::until("the service", GENEROUS, || {
            self.hosts
                .client
                .enter(|| Ok(TcpStream::connect(address).ok()))
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        ask(&mut stream)?;
        Ok(stream)
    }

    /// Moves the service with its address, and tells the report.
    fn migrate(
        &self,
        test_dir: &TestDir,
        criu: &Criu,
        id: &'static str,
        options: &[&str],
    ) -> Result<Value> {
        let address = format!("{}@{DEVICE}", ThreeHosts::SERVICE);
        let serve_on = self.hosts.source.address.to_string();
        let moves = Move::new(criu, test_dir.path("source"), id)
            .in_net(&self.hosts.source.net)
            .with(&["--address", &address, "--serve-on", &serve_on])
            .with(options);
        let pid = self.service.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], &self.agent)?;
        command
            .succeed(GENEROUS)
            .with_context(|| format!("{id}: {}", self.agent.log()))?;
        moves.report()
    }
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"question")?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"question", "{answer:?}");
    Ok(())
}

#[test]
fn a_probe_tells_when_the_service_answers() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let mark = test_dir.path("asked");
        // Its first answer is a failure.
        let command = format!(
            "test -e '{mark}' && test -n \"$PAGEFERRY_HOST\" || {{ touch '{mark}'; false; }}",
            mark = mark.display()
        );
        for (id, mode, probe) in [
            ("port", "cold", "tcp:7000"),
            ("command", "hybrid", command.as_str()),
        ] {
            let fixture = Fixture::new(test_dir, criu, id)?;
            wait::until("the service", GENEROUS, || {
                let address = fixture.hosts.service()?;
                fixture
                    .hosts
                    .client
                    .enter(|| Ok(TcpStream::connect(address).ok().map(drop)))
            })?;
            let options = ["--mode", mode, "--tcp", "close", "--probe", probe];
            let report = fixture.migrate(test_dir, criu, id, &options)?;
            let of = |name: &str| report[name].as_f64().with_context(|| report.to_string());
            ensure!(of("resume_ms")? > 0.0, "{report}");
            let warnings = report["warnings"].as_array().context("warnings")?;
            ensure!(warnings.is_empty(), "{report}");
            fixture.connect().map(drop)?;
        }
        ensure!(mark.exists(), "the command was not run");
        Ok(())
    });
}

#[test]
fn closed_connections_are_closed_and_new_ones_are_taken() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        for mode in ["cold", "post-copy"] {
            let fixture = Fixture::new(test_dir, criu, mode)?;
            let mut before = fixture.connect()?;
            fixture.migrate(test_dir, criu, mode, &["--mode", mode, "--tcp", "close"])?;
            let mut after = fixture.connect().with_context(|| mode)?;
            ask(&mut after)?;
            let answered = ask(&mut before);
            let error = answered.err().context("the old connection is still open")?;
            let error = error.downcast::<std::io::Error>()?;
            ensure!(
                error.kind() != std::io::ErrorKind::WouldBlock,
                "{mode}: the client is never told: {error}"
            );
        }
        Ok(())
    });
}

#[test]
fn neighbours_are_told_where_the_addresses_are() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let fixture = Fixture::new(test_dir, criu, "neighbours")?;
        let (source, destination) = (&fixture.hosts.source.net, &fixture.hosts.destination.net);
        let add = ["addr", "add", SERVICE_V6, "dev", DEVICE, "nodad"];
        run(source.command("ip").args(add))?;
        let (v6, _) = SERVICE_V6.split_once('/').context("no prefix")?;
        let addresses = [fixture.hosts.service()?.ip(), v6.parse()?];
        let capture = |address| Announcements::capture(&fixture.hosts.client, address);
        let (arp, advertisements) = (capture(addresses[0])?, capture(addresses[1])?);
        let mac = mac_of(destination, DEVICE)?;
        let second = format!("{SERVICE_V6}@{DEVICE}");
        let options = ["--mode", "cold", "--tcp", "close", "--address", &second];
        fixture.migrate(test_dir, criu, "neighbours", &options)?;
        arp.expect(addresses[0], mac)?;
        advertisements.expect(addresses[1], mac)
    });
}

/// A CRIU whose restore does not come, and a file that says that it was asked for.
fn hanging(test_dir: &TestDir, criu: &Criu) -> Result<(std::path::PathBuf, std::path::PathBuf)> {
    let (path, began) = (
        test_dir.path("hanging-criu"),
        test_dir.path("restore-began"),
    );
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = restore ] && {{ touch '{}'; exec sleep 600; }}\nexec '{}' \"$@\"\n",
        began.display(),
        criu.path.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok((path, began))
}

#[test]
fn the_guard_runs_the_hook_of_a_command_that_was_killed() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let (hangs, began) = hanging(test_dir, criu)?;
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 8, 2), None)?;
        let agent = Agent::start(&hangs, &test_dir.path("agent"), None, &[])?;
        let path = test_dir.path("told");
        let hook = format!(
            "echo $PAGEFERRY_HOOK $PAGEFERRY_ID $PAGEFERRY_PID >> '{}'",
            path.display()
        );
        let moves = Move::new(criu, test_dir.path("source"), "guarded");
        let moves = moves.with(&["--mode", "cold", "--on-failure", &hook]);
        let mut command = moves.start(&load, &agent)?;
        wait::until("the restore to begin", GENEROUS, || {
            let ended = command.ended()?;
            ensure!(ended.is_none(), "it has ended: {}", command.log_tail());
            Ok(began.exists().then_some(()))
        })?;
        command.kill()?;
        let wanted = format!("on-failure guarded {}\n", load.pid());
        wait::until("the guard's run of the hook", GENEROUS, || {
            Ok(fs::read_to_string(&path)
                .is_ok_and(|text| !text.is_empty())
                .then_some(()))
        })?;
        load.expect_running()?;
        for report in load.run_everywhere(&verifying())? {
            report.expect_right()?;
        }
        // Whoever looks again finds it done: a hook runs once.
        let resumed = moves.resume(&agent)?.wait(GENEROUS)?;
        ensure!(resumed.status.code().is_some(), "{}", resumed.status);
        let text = fs::read_to_string(&path)?;
        ensure!(text == wanted, "{text:?} instead of {wanted:?}");
        Ok(())
    });
}

/// Migrations that are killed as soon as a call is written down that is to be injected.
const KILLED: [&str; 6] = ["first", "second", "third", "fourth", "fifth", "sixth"];

#[test]
fn a_command_that_is_killed_while_it_injects_leaves_the_process_unharmed() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 8, 3), None)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let mut met = 0;
        for id in KILLED {
            let moves = Move::new(criu, test_dir.path("source"), id);
            let moves = moves.with(&["--mode", "hybrid", "--track", "wp", "--max-rounds", "2"]);
            let mut command = moves.start(&load, &agent)?;
            let file = moves.dir().join("injection.json");
            // No pause: the file is there for less than a millisecond.
            while !file.exists() && command.ended()?.is_none() {}
            if command.ended()?.is_some() {
                ensure!(
                    command
                        .log_tail()
                        .contains("this kernel or machine does not have it"),
                    "{}",
                    command.log_tail()
                );
                return Ok(());
            }
            command.kill()?;
            met += u32::from(file.exists());
            load.expect_running()?;
            for report in load.run_everywhere(&verifying())? {
                report.expect_right().with_context(|| id)?;
            }
            wait::until("the guard", GENEROUS, || Ok((!file.exists()).then_some(())))?;
        }
        eprintln!("{met} of {} kills met an injection under way", KILLED.len());
        Ok(())
    });
}
