//! A service's address moves along: a client at a third host goes on over its connection, whether the
//! migration succeeds or is given up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::for_each_criu;
use testbed::net::NetNs;
use testbed::net_three::{DEVICE, EchoClient, ThreeHosts, expect_open, has_address};
use testbed::process::Spawned;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

for_each_criu!(
    a_connection_survives_the_move,
    a_connection_survives_a_move_that_fails,
);

/// Whether this CRIU dumps TCP sockets: 4.1.1 asks them for options that newer kernels (seen with 6.18) have for
/// local sockets alone, and fails.
fn dumps_tcp(criu: &Criu) -> Result<bool> {
    let can = criu.release()? >= (4, 2);
    if !can {
        eprintln!(
            "skipped: CRIU {} dumps no TCP socket on this kernel",
            criu.version
        );
    }
    Ok(can)
}

/// The service, at the source.
fn serve(hosts: &ThreeHosts) -> Result<Spawned> {
    let address = hosts.service()?;
    let mut command: Command = hosts.source.net.command("setsid");
    command
        .arg(binary("echo")?)
        .args(["--listen", &address.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let service = Spawned::start_ungrouped("echo", &mut command, None)?;
    wait::until("the service to listen", GENEROUS, || {
        Ok(listens(&hosts.source.net, "7000")?.then_some(()))
    })?;
    Ok(service)
}

fn listens(net: &NetNs, port: &str) -> Result<bool> {
    let filter = format!("sport = :{port}");
    let shown = testbed::process::run(net.command("ss").args(["-tlnH", &filter]))?;
    Ok(!shown.stdout.is_empty())
}

/// The options of a move with the address, in `mode`.
fn moving(hosts: &ThreeHosts, mode: &str) -> Vec<String> {
    let address = format!("{}@{DEVICE}", ThreeHosts::SERVICE);
    let serve_on = hosts.source.address.to_string();
    [
        "--mode",
        mode,
        "--tcp",
        "established",
        "--address",
        &address,
        "--serve-on",
        &serve_on,
    ]
    .map(str::to_owned)
    .into()
}

fn a_connection_survives_the_move(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    if !dumps_tcp(criu)? {
        return Ok(());
    }
    for mode in ["cold", "hybrid"] {
        let hosts = ThreeHosts::new()?;
        let service = serve(&hosts)?;
        let mut client = EchoClient::start(&hosts.client, hosts.service()?)?;
        let dir = test_dir.path(&format!("agent-{mode}"));
        let insecure = ["--insecure".to_owned()];
        let agent = Agent::start(&criu.path, &dir, Some(&hosts.destination), &insecure)?;
        let options = moving(&hosts, mode);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let moves = Move::new(criu, test_dir.path("source"), mode)
            .in_net(&hosts.source.net)
            .with(&options);
        let pid = service.pid().to_string();
        let moved = moves
            .start_subject(&["--pid", &pid], &agent)?
            .succeed(GENEROUS);
        moved.with_context(|| format!("{mode}: {}", agent.log()))?;
        client.expect_answers()?;
        client.finish()?;
        ensure!(
            !has_address(&hosts.source.net, ThreeHosts::SERVICE)?,
            "{mode}: still here"
        );
        ensure!(
            has_address(&hosts.destination.net, ThreeHosts::SERVICE)?,
            "{mode}: not there"
        );
        expect_open(&hosts.source.net)?;
        expect_open(&hosts.destination.net)?;
    }
    Ok(())
}

fn a_connection_survives_a_move_that_fails(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    if !dumps_tcp(criu)? {
        return Ok(());
    }
    let fails = test_dir.path("failing-criu");
    let real = criu.path.display();
    let text = format!("#!/bin/sh\n[ \"$1\" = restore ] && exit 1\nexec '{real}' \"$@\"\n");
    fs::write(&fails, text)?;
    fs::set_permissions(&fails, fs::Permissions::from_mode(0o755))?;
    let hosts = ThreeHosts::new()?;
    let mut service = serve(&hosts)?;
    let mut client = EchoClient::start(&hosts.client, hosts.service()?)?;
    let insecure = ["--insecure".to_owned()];
    let agent = Agent::start(
        &fails,
        &test_dir.path("agent"),
        Some(&hosts.destination),
        &insecure,
    )?;
    for mode in ["cold", "hybrid", "post-copy"] {
        let options = moving(&hosts, mode);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let moves = Move::new(criu, test_dir.path("source"), mode)
            .in_net(&hosts.source.net)
            .with(&options);
        let pid = service.pid().to_string();
        moves
            .start_subject(&["--pid", &pid], &agent)?
            .fail(GENEROUS)?;
        client.expect_answers().with_context(|| mode)?;
        ensure!(service.ended()?.is_none(), "{mode}: the service has ended");
        ensure!(
            has_address(&hosts.source.net, ThreeHosts::SERVICE)?,
            "{mode}: not here"
        );
        ensure!(
            !has_address(&hosts.destination.net, ThreeHosts::SERVICE)?,
            "{mode}: there"
        );
        expect_open(&hosts.source.net)?;
        expect_open(&hosts.destination.net)?;
    }
    client.finish()
}
