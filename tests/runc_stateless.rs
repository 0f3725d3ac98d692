//! Containers without state are started anew at the destination, while clients count answers: live loses none, by
//! nftables or by HAProxy; cold brings the files as they were at the end; and whatever fails before the switch leaves
//! the container where it was.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::agent::Move;
use testbed::criu::{Criu, Suite};
use testbed::routes::{Haproxy, NftRoute};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::web::{PORT, Web, WebClients};
use testbed::{gate, runc};

/// Asked at the destination, in the container's network.
const READY: [&str; 2] = ["--ready", "http://127.0.0.1:8080/ready"];

/// A place with the service, unless there is no runc.
fn with_web(test: impl FnOnce(&TestDir, &Web) -> Result<()>) {
    with_web_of("runc", false, test);
}

/// The same by another runtime, and with a root that is an overlay if it is `layered`.
fn with_web_of(
    runtime: &'static str,
    layered: bool,
    test: impl FnOnce(&TestDir, &Web) -> Result<()>,
) {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let found = runc::find().and_then(|()| {
            let mut version = Command::new(runtime);
            testbed::process::run(version.arg("--version")).map(drop)
        });
        let Some(()) = gate::need(runtime, found) else {
            return Ok(());
        };
        let web = Web::start_on(test_dir, criu, runtime, layered)?;
        test(test_dir, &web)
    });
}

/// A route by nftables, and clients that come over it.
fn route_with_clients(web: &Web) -> Result<(NftRoute<'_>, WebClients)> {
    let route = NftRoute::new(&web.three, PORT)?;
    let here = web.three.source.address;
    let clients = WebClients::start(&web.three.client, route.front()?, here)?;
    Ok((route, clients))
}

/// Carries a move out.
fn succeed(web: &Web, moves: &Move<'_>) -> Result<()> {
    let moved = web.start_move(moves)?.succeed(GENEROUS);
    moved.map(drop).with_context(|| web.agent.log())
}

/// A report's figure, ms.
fn ms(report: &Value, name: &str) -> Result<f64> {
    report[name]
        .as_f64()
        .with_context(|| format!("{name} in {report}"))
}

#[test]
fn live_loses_no_answer_by_nftables() {
    with_web(|_, web| {
        let (route, clients) = route_with_clients(web)?;
        let moves = web.moves("live", &["--mode", "live", "--probe", "tcp:8080"]);
        let moves = moves.with(&READY).with(&["--route", &route.option()]);
        succeed(web, &moves)?;
        clients.expect_answers()?;
        expect_all_there(&clients)?;
        web.expect_moved()?;
        route.expect_there()?;
        expect_live_report(&moves.report()?)?;
        moves.expect_events(&[
            "source preflight done",
            "source files done",
            "destination files done",
            "destination start done",
            "destination commit done",
            "source route done",
            "source stop done",
            "source end done",
        ])?;
        // The image came whole.
        let rootfs = web.bundle_there("live").join("rootfs");
        ensure!(
            fs::read(rootfs.join("bin/answers"))? == fs::read(web.rootfs().join("bin/answers"))?
        );
        Ok(())
    });
}

/// Both containers have answered, and from now on the second one alone does.
fn expect_all_there(clients: &WebClients) -> Result<()> {
    ensure!(clients.here() > 0 && clients.there() > 0, "{clients:?}");
    let here = clients.here();
    clients.expect_answers()?;
    ensure!(clients.here() == here, "the first one still answers");
    ensure!(clients.failed() == 0, "{clients:?}");
    Ok(())
}

fn expect_live_report(report: &Value) -> Result<()> {
    ensure!(
        report["result"] == "moved" && report["mode"] == "live-stateless",
        "{report}"
    );
    ensure!(report["warnings"] == json!([]), "{report}");
    let at = |name| ms(report, name);
    ensure!(at("downtime_ms")? == 0.0, "{report}");
    ensure!(at("preparation_ms")? <= at("switch_ms")?, "{report}");
    ensure!(at("switch_ms")? <= at("answer_ms")?, "{report}");
    ensure!(at("resume_ms")? <= at("total_ms")?, "{report}");
    ensure!(report["wire_bytes"].as_u64() > Some(0), "{report}");
    Ok(())
}

#[test]
fn live_loses_no_answer_by_haproxy() {
    with_web(|test_dir, web| {
        let settings = "weight 7 check inter 50ms";
        let haproxy = Haproxy::start(test_dir, &web.three, PORT, settings)?;
        let before = haproxy.servers()?;
        let here = web.three.source.address;
        let clients = WebClients::start(&web.three.client, haproxy.front(), here)?;
        let live = ["--mode", "live", "--route", &haproxy.option()];
        // What comes behind it fails first: HAProxy goes back to where it was.
        let fails = web.moves("fails", &live).with(&READY);
        let fails = fails.with(&["--route", "exec:[ $PAGEFERRY_ROUTE = back ]"]);
        web.start_move(&fails)?.fail(GENEROUS)?;
        ensure!(haproxy.servers()? == before, "{:?}", haproxy.servers()?);
        web.expect_here("fails")?;
        clients.expect_answers()?;
        let moves = web.moves("live", &live).with(&READY);
        succeed(web, &moves)?;
        clients.expect_answers()?;
        expect_all_there(&clients)?;
        web.expect_moved()
    });
}

#[test]
fn cold_brings_the_files_as_they_were_at_the_end() {
    with_web(|_, web| {
        let route = NftRoute::new(&web.three, PORT)?;
        // The image has been sent by then: the file travels all the same.
        let mark = web.rootfs().join("mark");
        let marks = format!("echo late > {}", mark.display());
        let cold = [
            "--mode",
            "cold",
            "--pre-freeze",
            &marks,
            "--probe",
            "tcp:8080",
        ];
        let moves = web.moves("cold", &cold).with(&["--ready", "tcp:8080"]);
        let moves = moves.with(&["--route", &route.option()]);
        succeed(web, &moves)?;
        web.expect_moved()?;
        route.expect_there()?;
        let there = web.bundle_there("cold").join("rootfs/mark");
        ensure!(fs::read_to_string(there)? == "late\n");
        let clients =
            WebClients::start(&web.three.client, route.front()?, web.three.source.address)?;
        ensure!(clients.here() == 0 && clients.failed() == 0, "{clients:?}");
        let report = moves.report()?;
        ensure!(report["mode"] == "cold-stateless", "{report}");
        let phases: f64 = ["stop", "image", "start", "route"]
            .iter()
            .map(|name| ms(&report["phases_ms"], name))
            .sum::<Result<f64>>()?;
        let downtime = ms(&report, "downtime_ms")?;
        ensure!(phases > 0.0 && phases <= downtime, "{report}");
        ensure!(
            ms(&report, "switch_ms")? > ms(&report, "preparation_ms")?,
            "{report}"
        );
        Ok(())
    });
}

/// A first move fails when its layer is there; the second one sends no more than the writable layer.
fn layers_travel_once(web: &Web) -> Result<()> {
    let cold = ["--mode", "cold", "--probe", "tcp:8080", "--timeout", "20s"];
    let fails = web
        .moves("fails", &cold)
        .with(&["--ready", "tcp:8080", "--pre-freeze", "false"]);
    web.start_move(&fails)?.fail(GENEROUS)?;
    web.expect_here("fails")?;
    let moves = web.moves("moves", &cold).with(&["--ready", "tcp:8080"]);
    succeed(web, &moves)?;
    web.expect_moved()?;
    let bytes = |moves: &Move<'_>| -> Result<u64> {
        let report = moves.report()?;
        let layers = &report["files"]["layers"];
        ensure!(layers[1].is_null(), "{report}");
        layers[0]["bytes"]
            .as_u64()
            .with_context(|| report.to_string())
    };
    ensure!(bytes(&fails)? > 1 << 18, "{}", fails.report()?);
    ensure!(bytes(&moves)? == 0, "{}", moves.report()?);
    let wire = moves.report()?["wire_bytes"].as_u64();
    ensure!(wire.is_some_and(|bytes| bytes < 1 << 16), "{wire:?}");
    // The layer's file is deleted there, too, and the service is the layer's.
    let look =
        "cd \"$1\"/rootfs; [ $(stat -f -c %T .) = overlayfs ]; [ ! -e gone ]; [ -e bin/answers ]";
    let mut command = web.there_shell(look)?;
    testbed::process::run(command.arg(web.bundle_there("moves"))).map(drop)
}

#[test]
fn layers_of_a_stateless_container_travel_once() {
    with_web_of("runc", true, |_, web| layers_travel_once(web));
}

#[test]
fn what_fails_before_the_switch_changes_nothing() {
    with_web(|test_dir, web| {
        let (route, clients) = route_with_clients(web)?;
        let pid = web.state_here()?.context("a state")?["pid"].clone();
        let steps = test_dir.path("steps");
        let noted = format!(
            "exec:echo $PAGEFERRY_ROUTE $PAGEFERRY_ID >> {}",
            steps.display()
        );
        let live = [
            "--mode",
            "live",
            "--route",
            &route.option(),
            "--route",
            &noted,
        ];
        let cases: [(&'static str, &[&str], &str); 4] = [
            (
                "never-ready",
                &["--ready", "exec:false", "--timeout", "12s"],
                "not ready",
            ),
            (
                "hook",
                &["--ready", "tcp:8080", "--pre-freeze", "false"],
                "--pre-freeze",
            ),
            (
                "route",
                &[
                    "--ready",
                    "tcp:8080",
                    "--route",
                    "exec:[ $PAGEFERRY_ROUTE = back ]",
                ],
                "exec:",
            ),
            (
                "stopped",
                &[
                    "--ready",
                    "tcp:8080",
                    "--pre-freeze",
                    "kill -TERM $PPID; sleep 10",
                ],
                "SIGTERM",
            ),
        ];
        for (id, options, problem) in cases {
            let moves = web.moves(id, &live).with(options);
            web.start_move(&moves)?.fail(GENEROUS).with_context(|| id)?;
            let report = moves.report()?;
            ensure!(report["result"] == "rolled back", "{id}: {report}");
            let text = report["problem"].as_str().unwrap_or_default();
            ensure!(text.contains(problem), "{id}: {report}");
            ensure!(report["failure"]["step"].is_string(), "{id}: {report}");
            moves.expect_events(&["destination discard done", "source end failed"])?;
            web.expect_here(id).with_context(|| id)?;
            route.expect_here().with_context(|| id)?;
            ensure!(
                web.state_here()?.context("a state")?["pid"] == pid,
                "{id}: it is another one"
            );
        }
        // The route that was switched before the one that failed was told to go back, and no other one.
        ensure!(fs::read_to_string(&steps)? == "switch route\nback route\n");
        // Who was led away for a moment was answered as well.
        clients.expect_answers()
    });
}

#[test]
fn a_cold_move_that_fails_starts_the_container_here_again() {
    with_web(|_, web| {
        let route = NftRoute::new(&web.three, PORT)?;
        let pid = web.state_here()?.context("a state")?["pid"].clone();
        let cold = [
            "--mode",
            "cold",
            "--route",
            &route.option(),
            "--timeout",
            "8s",
        ];
        let moves = web.moves("cold", &cold).with(&["--ready", "exec:false"]);
        web.start_move(&moves)?.fail(GENEROUS)?;
        web.expect_here("cold")?;
        route.expect_here()?;
        ensure!(web.state_here()?.context("a state")?["pid"] != pid);
        WebClients::start(&web.three.client, route.front()?, web.three.source.address)?;
        Ok(())
    });
}

#[test]
fn a_command_that_is_killed_while_it_switches_is_undone_by_the_guard() {
    with_web(|_, web| {
        let (route, clients) = route_with_clients(web)?;
        let kills = "exec:[ $PAGEFERRY_ROUTE = back ] || kill -KILL $PPID";
        let live = [
            "--mode",
            "live",
            "--route",
            &route.option(),
            "--route",
            kills,
        ];
        let moves = web.moves("killed", &live).with(&READY);
        web.start_move(&moves)?.wait(GENEROUS)?;
        let record = moves.dir().join("record.json");
        wait::until("the guard's last record", GENEROUS, || {
            let text = fs::read_to_string(&record)?;
            Ok(text.contains("rolled-back").then_some(()))
        })?;
        web.expect_here("killed")?;
        route.expect_here()?;
        clients.expect_answers()?;
        // And by hand it is found finished.
        moves.resume(&web.agent)?.succeed(GENEROUS)?;
        web.expect_here("killed")
    });
}

/// The middle of some figures.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Of how many moves the median is taken.
const MOVES: usize = 5;

#[test]
#[ignore = "measures: cargo nextest run --release --test runc_stateless --run-ignored only --no-capture"]
fn bars() {
    let (mut downtimes, mut runs, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..MOVES {
        with_web(|_, web| {
            // Beside it, a second container of the same bundle, which finds its port taken and ends.
            let began = std::time::Instant::now();
            let mut run = web.here(&["run", "--detach", "--bundle"]);
            run.arg(web.bundle()).arg("alone");
            run.stdout(Stdio::null()).stderr(Stdio::null());
            ensure!(run.status()?.success());
            runs.push(began.elapsed().as_secs_f64() * 1e3);
            testbed::process::run(&mut web.here(&["delete", "--force", "alone"]))?;
            let route = NftRoute::new(&web.three, PORT)?;
            let moves = web.moves("cold", &["--mode", "cold", "--route", &route.option()]);
            web.start_move(&moves)?.succeed(GENEROUS)?;
            downtimes.push(ms(&moves.report()?, "downtime_ms")?);
            Ok(())
        });
        with_web(|_, web| {
            let (route, clients) = route_with_clients(web)?;
            let (began, before) = (std::time::Instant::now(), clients.here());
            let moves = web.moves("live", &["--mode", "live", "--route", &route.option()]);
            web.start_move(&moves.with(&READY))?.succeed(GENEROUS)?;
            let asked = clients.here() + clients.there() - before;
            println!(
                "{number}: {:.0} requests a second",
                asked as f64 / began.elapsed().as_secs_f64()
            );
            failed.push(clients.failed() as f64);
            Ok(())
        });
    }
    let (down, run) = (median(downtimes), median(runs));
    println!(
        "cold: downtime {down:.1} ms, runc run alone {run:.1} ms: {:.2} times",
        down / run
    );
    println!("live: {} failed requests", median(failed));
}
