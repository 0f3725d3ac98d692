//! A real Redis behind `pageferry record`, and others to which `pageferry replay` tells the same.

mod redis;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use nix::sys::signal::Signal;
use redis::{Client, Programs, digest};
use serde_json::Value;
use testbed::gate::need;
use testbed::net::free_port;
use testbed::process::{Spawned, tail};
use testbed::test_dir::{TestDir, with_test_dir};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Clients that write; two more pop what they push.
const WRITERS: u64 = 6;

/// Commands of each.
const COMMANDS: u64 = 100;

fn with_redis(test: impl FnOnce(&TestDir, &Programs) -> Result<()>) {
    let fetched = Programs::fetched();
    let Some(programs) = need("Redis", fetched.map_err(|error| format!("{error:#}"))) else {
        return;
    };
    with_test_dir(|test_dir| test(test_dir, &programs));
}

/// A Redis without anything on its disk.
struct Redis {
    _process: Spawned,
    port: u16,
}

impl Redis {
    fn start(programs: &Programs, test_dir: &TestDir, name: &str) -> Result<Redis> {
        let port = free_port()?;
        let log = test_dir.path(&format!("{name}.log"));
        let mut command = Command::new(&programs.server);
        command
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no"])
            .args(["--enable-debug-command", "yes", "--dir"])
            .arg(test_dir.dir())
            .stdout(fs::File::create(&log)?);
        let process = Spawned::start(name, &mut command, Some(log))?;
        wait::until("Redis to listen", GENEROUS, || {
            Ok(TcpStream::connect(("127.0.0.1", port)).ok())
        })?;
        Ok(Redis {
            _process: process,
            port,
        })
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// Counters that all writers share, lists whose order tells who came first, transactions.
fn write(port: u16, number: u64) -> Result<u64> {
    let mut client = Client::connect(port)?;
    let mut rng = Rng::with_seed(number);
    let mut acknowledged = 0;
    for at in 0..COMMANDS {
        match rng.u32(0..4) {
            0 => drop(client.ask(&format!("LPUSH list:{} {number}-{at}", at % 3))?),
            1 => {
                client.ask("MULTI")?;
                client.ask(&format!("RPUSH list:0 {number}"))?;
                client.ask("INCR transactions")?;
                let answer = client.ask("EXEC")?;
                ensure!(answer.len() == 2, "{answer:?}");
            }
            2 => drop(client.ask(&format!(
                "SET large:{number} {}",
                "x".repeat(rng.usize(..9_000))
            ))?),
            _ => {
                client.ask("INCR total")?;
                acknowledged += 1;
            }
        }
        if at % 5 == 0 {
            client.ask(&format!("RPUSH queue {number}-{at}"))?;
        }
    }
    Ok(acknowledged)
}

/// Takes its half of what the writers put into the queue.
fn pop(port: u16) -> Result<()> {
    let mut client = Client::connect(port)?;
    for at in 0..WRITERS * COMMANDS / 5 / 2 {
        let answer = client.ask("BLPOP queue 0")?;
        // Whoever takes a value writes it down: so the order of the takers is part of the state.
        client.ask(&format!("RPUSH taken {}", answer[1]))?;
        client.ask(&format!("SET last {at}"))?;
    }
    Ok(())
}

/// Everybody at once. Returns how often the counter was increased.
fn write_all(port: u16) -> Result<u64> {
    let poppers: Vec<_> = (0..2).map(|_| thread::spawn(move || pop(port))).collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| thread::spawn(move || write(port, number)))
        .collect();
    let mut acknowledged = 0;
    for writer in writers {
        acknowledged += writer.join().expect("a writer panicked")?;
    }
    for popper in poppers {
        popper.join().expect("a popper panicked")?;
    }
    Ok(acknowledged)
}

/// A recorder before a Redis; and its port.
fn record(test_dir: &TestDir, to: &Redis, name: &str, more: &[&str]) -> Result<(Spawned, u16)> {
    let port_file = test_dir.path("port");
    let _ = fs::remove_file(&port_file);
    let log = test_dir.path(&format!("{name}.log"));
    let mut command = Command::new(binary("pageferry")?);
    command
        .args(["record", "--listen", "127.0.0.1:0", "--to", &to.address()])
        .arg("--log")
        .arg(test_dir.path("recorded"))
        .arg("--port-file")
        .arg(&port_file)
        // On a busy host Redis may take longer than the default to read a piece, and then reads in another order.
        .args(["--order-wait", "20ms"])
        .args(more)
        .stderr(fs::File::create(&log)?);
    let mut recorder = Spawned::start(name, &mut command, Some(log))?;
    let port = wait::until("the recorder to listen", GENEROUS, || {
        if let Some(ended) = recorder.ended()? {
            bail!("{}{}", ended.status, recorder.log_tail());
        }
        let text = fs::read_to_string(&port_file).unwrap_or_default();
        Ok(text.strip_suffix('\n').and_then(|port| port.parse().ok()))
    })?;
    Ok((recorder, port))
}

fn end(mut recorder: Spawned) -> Result<()> {
    recorder.signal(Signal::SIGTERM)?;
    recorder.succeed(GENEROUS).map(drop)
}

/// A replay of the log against a Redis.
fn replay(test_dir: &TestDir, to: &Redis, name: &str, more: &[&str]) -> Result<Spawned> {
    let log = test_dir.path(&format!("{name}.log"));
    let mut command = Command::new(binary("pageferry")?);
    command
        .args(["replay", "--to", &to.address(), "--log"])
        .arg(test_dir.path("recorded"))
        .arg("--report")
        .arg(test_dir.path("report"))
        .args(more)
        .stderr(fs::File::create(&log)?);
    Spawned::start(name, &mut command, Some(log))
}

fn report(test_dir: &TestDir) -> Result<Value> {
    let report = serde_json::from_slice(&fs::read(test_dir.path("report"))?)?;
    testbed::schema::expect("replay-report", &report)?;
    Ok(report)
}

fn log_of(process: &Spawned) -> Result<String> {
    let log = process.log().context("a log")?;
    Ok(fs::read_to_string(log)?)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.to_string_lossy().contains("log-") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn mixed_writers_are_replayed_and_a_wrong_order_is_caught() {
    with_redis(|test_dir, programs| {
        let source = Redis::start(programs, test_dir, "source")?;
        let digest = digest(programs);
        let options = ["--file-bytes", "64K", "--digest", &digest];
        let (recorder, port) = record(test_dir, &source, "record", &options)?;
        let acknowledged = write_all(port)?;
        end(recorder)?;
        ensure!(
            files(&test_dir.path("recorded"))?.len() > 2,
            "nothing was rotated"
        );

        let second = Redis::start(programs, test_dir, "second")?;
        let options = ["--verify", "--digest", &digest];
        replay(test_dir, &second, "replay", &options)?.succeed(GENEROUS)?;
        let report = report(test_dir)?;
        ensure!(report["digests_agree"] == true, "{report}");
        ensure!(report["is_whole"] == true, "{report}");
        ensure!(report["connections"] == WRITERS + 2, "{report}");
        let total = Client::connect(second.port)?.ask("GET total")?;
        ensure!(total == [acknowledged.to_string()], "{total:?}");

        let third = Redis::start(programs, test_dir, "third")?;
        let options = ["--verify", "--wrong-order", "--stall", "5s"];
        let mut wrong = replay(test_dir, &third, "wrong", &options)?;
        wrong.fail(GENEROUS)?;
        let log = log_of(&wrong)?;
        ensure!(log.contains("connection "), "{log}");
        ensure!(log.contains("entry "), "{log}");
        Ok(())
    });
}

#[test]
fn a_service_that_answers_otherwise_is_refused_with_evidence() {
    with_redis(|test_dir, programs| {
        let source = Redis::start(programs, test_dir, "source")?;
        let (recorder, port) = record(test_dir, &source, "record", &[])?;
        let mut client = Client::connect(port)?;
        client.ask("SET a b")?;
        client.ask("TIME")?;
        client.ask("SET a c")?;
        drop(client);
        end(recorder)?;
        let second = Redis::start(programs, test_dir, "second")?;
        let mut refused = replay(test_dir, &second, "refused", &["--verify"])?;
        refused.fail(GENEROUS)?;
        let log = log_of(&refused)?;
        ensure!(log.contains("answers differ before byte"), "{log}");
        ensure!(log.contains("recorded \"*2"), "{log}");
        // Nothing behind the difference was told.
        let value = Client::connect(second.port)?.ask("GET a")?;
        ensure!(value == ["b"], "{value:?}");
        Ok(())
    });
}

#[test]
fn a_killed_recorder_loses_nothing_that_was_acknowledged() {
    with_redis(|test_dir, programs| {
        let source = Redis::start(programs, test_dir, "source")?;
        let (mut recorder, port) = record(test_dir, &source, "killed", &[])?;
        let mut client = Client::connect(port)?;
        for _ in 0..50 {
            client.ask("INCR a")?;
        }
        recorder.kill()?;
        // The beginning of an entry that was not written whole.
        let first = files(&test_dir.path("recorded"))?.remove(0);
        let mut file = fs::File::options().append(true).open(first)?;
        file.write_all(&[40, 0, 0, 0, 1, 2, 3, 4, 5])?;

        let second = Redis::start(programs, test_dir, "second")?;
        let mut torn = replay(test_dir, &second, "torn", &["--verify"])?;
        torn.succeed(GENEROUS)?;
        ensure!(
            report(test_dir)?["torn_bytes"] == 9,
            "{}",
            report(test_dir)?
        );
        ensure!(Client::connect(second.port)?.ask("GET a")? == ["50"]);

        let (again, port) = record(test_dir, &source, "again", &[])?;
        ensure!(
            log_of(&again)?.contains("9 bytes of an entry"),
            "{}",
            log_of(&again)?
        );
        let mut client = Client::connect(port)?;
        ensure!(client.ask("INCR a")? == ["51"]);
        end(again)?;
        let third = Redis::start(programs, test_dir, "third")?;
        replay(test_dir, &third, "whole", &["--verify"])?.succeed(GENEROUS)?;
        ensure!(
            report(test_dir)?["is_whole"] == true,
            "{}",
            report(test_dir)?
        );
        ensure!(Client::connect(third.port)?.ask("GET a")? == ["51"]);

        // A flipped bit in the middle is no torn tail.
        let first = files(&test_dir.path("recorded"))?.remove(0);
        let mut bytes = fs::read(&first)?;
        bytes[200] ^= 1;
        fs::write(&first, bytes)?;
        let fourth = Redis::start(programs, test_dir, "fourth")?;
        let mut damaged = replay(test_dir, &fourth, "damaged", &[])?;
        damaged.fail(GENEROUS)?;
        let log = test_dir.path("damaged.log");
        ensure!(
            log_of(&damaged)?.contains("is damaged at byte"),
            "{}",
            tail(&log)
        );
        Ok(())
    });
}

#[test]
fn a_replay_follows_a_recording_and_holds_or_gives_up() {
    with_redis(|test_dir, programs| {
        let source = Redis::start(programs, test_dir, "source")?;
        let digest = digest(programs);
        let (recorder, port) = record(test_dir, &source, "record", &["--digest", &digest])?;
        write_all(port)?;
        let second = Redis::start(programs, test_dir, "second")?;
        let options = ["--follow", "--max-lag", "1", "--on-lag", "cancel"];
        let mut slow = replay(test_dir, &second, "cancel", &options)?;
        slow.fail(GENEROUS)?;
        ensure!(
            log_of(&slow)?.contains("slower than what arrives"),
            "{}",
            log_of(&slow)?
        );

        let third = Redis::start(programs, test_dir, "third")?;
        let options = [
            "--follow",
            "--verify",
            "--max-lag",
            "1",
            "--on-lag",
            "pause-clients",
            "--digest",
            &digest,
        ];
        let mut follower = replay(test_dir, &third, "follow", &options)?;
        // Clients wait now and then, and none is failed.
        write_all(port)?;
        wait::until("clients to be held", GENEROUS, || {
            ensure!(follower.ended()?.is_none(), "{}", follower.log_tail());
            Ok(log_of(&follower)?
                .contains("clients are held")
                .then_some(()))
        })?;
        end(recorder)?;
        follower.succeed(GENEROUS)?;
        let followed = report(test_dir)?;
        ensure!(followed["digests_agree"] == true, "{followed}");
        ensure!(followed["holds"].as_u64() > Some(0), "{followed}");

        // Without a recorder there is nobody to hold: what is recorded is replayed all the same.
        let fourth = Redis::start(programs, test_dir, "fourth")?;
        let mut late = replay(test_dir, &fourth, "late", &options)?;
        late.succeed(GENEROUS)?;
        ensure!(
            log_of(&late)?.contains("are held no more"),
            "{}",
            log_of(&late)?
        );
        let replayed = report(test_dir)?;
        ensure!(replayed["digests_agree"] == true, "{replayed}");
        ensure!(replayed["holds"] == 0, "{replayed}");
        Ok(())
    });
}

#[test]
fn a_log_that_exists_is_fed_to_a_command() {
    with_redis(|test_dir, programs| {
        let (source, second) = (
            Redis::start(programs, test_dir, "source")?,
            Redis::start(programs, test_dir, "second")?,
        );
        let commands = "SET a 1\r\nINCR a\r\nRPUSH l x y\r\n";
        fs::write(test_dir.path("recorded"), commands)?;
        for line in commands.lines() {
            Client::connect(source.port)?.ask(line)?;
        }
        let feed = format!("'{}' -p {} --pipe", programs.client.display(), second.port);
        let (digest, from) = (digest(programs), source.address());
        let options = ["--replay", &feed, "--digest", &digest, "--source", &from];
        replay(test_dir, &second, "feed", &options)?.succeed(GENEROUS)?;
        Client::connect(source.port)?.ask("SET a 9")?;
        let options = ["--replay", "cat", "--digest", &digest, "--source", &from];
        let mut differs = replay(test_dir, &second, "differs", &options)?;
        differs.fail(GENEROUS)?;
        ensure!(
            log_of(&differs)?.contains("the digests differ"),
            "{}",
            log_of(&differs)?
        );
        Ok(())
    });
}
