//! Logs that exist: an append-only file is read by a command at the destination, and a command holds the clients.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use testbed::agent::{Agent, Move};
use testbed::process::Spawned;
use testbed::wait::{self, GENEROUS};

use crate::redis::{Client, digest};
use crate::{BEHIND, Fixture, PORT, with_fixture};

/// More than the pipe to a command that reads nothing takes, and what counts as close behind.
const LAGGING_BYTES: usize = 512 << 10;

/// A Redis with an append-only file.
fn start(fixture: &Fixture<'_>) -> Result<(Spawned, PathBuf)> {
    let redis = fixture.redis(&BEHIND.to_string()).replace(
        "--appendonly no",
        "--appendonly yes --aof-use-rdb-preamble no --dir .",
    );
    let service = fixture.start("redis", &redis)?;
    let file = fixture
        .test_dir
        .path("appendonlydir/appendonly.aof.1.incr.aof");
    Ok((service, file))
}

/// The move of that Redis: `feed` reads the file at the destination.
fn to_move<'a>(fixture: &'a Fixture<'_>, id: &'static str, feed: &str) -> Move<'a> {
    let cli = fixture.programs.client.display();
    let hold = format!(
        "case $PAGEFERRY_HOLD in hold) '{cli}' -p {BEHIND} CLIENT PAUSE 600000 WRITE;; \
         *) '{cli}' -p {BEHIND} CLIENT UNPAUSE;; esac"
    );
    let log = fixture
        .test_dir
        .path("appendonlydir/appendonly.aof.1.incr.aof");
    let (service, at) = (format!("127.0.0.1:{BEHIND}"), format!("127.0.0.1:{PORT}"));
    Move::new(fixture.criu, fixture.test_dir.path("source"), id)
        .in_net(&fixture.hosts.source.net)
        .with(&["--mode", "log-replay", "--log", &log.display().to_string()])
        .with(&["--replay", feed, "--hold", &hold, "--service", &service])
        .with(&["--start", &fixture.redis("$PAGEFERRY_PORT"), "--at", &at])
}

#[test]
fn a_log_that_exists_is_read_by_a_command_there() {
    with_fixture(|fixture| {
        let (service, _) = start(fixture)?;
        let agent = fixture.agent()?;
        let mut client = fixture.hosts.source.net.enter(|| Client::connect(BEHIND))?;
        for at in 0..100 {
            client.ask(&format!("RPUSH list {at}"))?;
        }
        let feed = format!(
            "'{}' -p $PAGEFERRY_PORT --pipe",
            fixture.programs.client.display()
        );
        let moves = |id, digest| to_move(fixture, id, &feed).with(&["--digest", digest]);
        let (log, report) = fixture.run(&moves("given-up", "false"), &service, &agent)?;
        ensure!(report["result"] == "rolled back", "{report} {log}");
        fixture.expect_nothing_there(&agent, "given-up")?;
        // Clients go on.
        ensure!(client.ask("RPUSH list last")? == ["101"]);
        let digest = digest(&fixture.programs);
        let (log, report) = fixture.run(&moves("fed", &digest), &service, &agent)?;
        ensure!(report["result"] == "moved", "{report} {log}");
        let mut there = fixture.client(fixture.hosts.destination.at(PORT))?;
        ensure!(there.ask("LLEN list")? == ["101"]);
        Ok(())
    });
}

/// A replay that does not keep up is given up, and the processes move with their memory: the same ones, with what they
/// were told.
#[test]
fn a_service_whose_replay_is_too_slow_moves_with_its_memory() {
    with_fixture(|fixture| {
        let (mut service, file) = start(fixture)?;
        let agent = fixture.agent()?;
        let mut client = fixture.hosts.source.net.enter(|| Client::connect(BEHIND))?;
        let value = "x".repeat(8 << 10);
        let mut count = 0_u64;
        while fs::metadata(&file)?.len() < LAGGING_BYTES as u64 {
            client.ask(&format!("RPUSH list {value}"))?;
            count += 1;
        }
        let run_id = run_id(&mut client)?;
        drop(client);
        let moves = to_move(fixture, "lags", "exec sleep 100000").with(&[
            "--on-lag",
            "pre-copy",
            "--max-lag",
            "1000",
            "--tcp",
            "close",
        ]);
        let (log, report) = fixture.run(&moves, &service, &agent)?;
        ensure!(report["result"] == "moved", "{report} {log}");
        ensure!(
            report["mode"] == "pre-copy" && report["id"] == "lags-pre-copy",
            "{report}"
        );
        ensure!(log.contains("the replay is slower"), "{log}");
        service.wait(GENEROUS)?;
        let mut there = fixture.client(fixture.hosts.destination.at(BEHIND))?;
        ensure!(there.ask("LLEN list")? == [count.to_string()]);
        // It is the process that ran here, and none that was started there.
        ensure!(
            run_id == self::run_id(&mut there)?,
            "another service answers"
        );
        moves.expect_events(&[
            "source replay failed",
            "destination discard done",
            "source end done",
        ])?;
        expect_ended(fixture, &agent)
    });
}

/// What Redis calls itself since it was started.
fn run_id(client: &mut Client) -> Result<String> {
    let info = client.ask("INFO server")?.concat();
    let line = info.lines().find_map(|line| line.strip_prefix("run_id:"));
    Ok(line.unwrap_or_default().trim().to_owned())
}

/// Nothing is left of the service that was started for the replay.
fn expect_ended(fixture: &Fixture<'_>, agent: &Agent) -> Result<()> {
    wait::until("the end of what was started there", GENEROUS, || {
        Ok(fixture
            .expect_nothing_there(agent, "lags")
            .is_ok()
            .then_some(()))
    })
}
