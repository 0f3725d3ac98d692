//! Routes of a service that moves with its memory: clients are led to the destination when it has the service, and back
//! if the migration is given up after that.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::net_three::{DEVICE, EchoClient, ThreeHosts, has_address};
use testbed::process::Spawned;
use testbed::routes::NftRoute;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// The port of the service, on either host.
const PORT: u16 = 7000;

/// Both hosts, and the service at the source on all addresses.
fn serve(hosts: &ThreeHosts) -> Result<Spawned> {
    let mut command = hosts.source.net.command("setsid");
    command
        .arg(binary("echo")?)
        .args(["--listen", &format!("0.0.0.0:{PORT}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let service = Spawned::start_ungrouped("echo", &mut command, None)?;
    let filter = format!("sport = :{PORT}");
    wait::until("the service to listen", GENEROUS, || {
        let mut listed = hosts.source.net.command("ss");
        let shown = testbed::process::run(listed.args(["-tlnH", &filter]))?;
        Ok((!shown.stdout.is_empty()).then_some(()))
    })?;
    Ok(service)
}

/// Moves the service with `options`; the report tells what came of it.
fn start(
    test_dir: &TestDir,
    criu: &Criu,
    (hosts, service, agent): (&ThreeHosts, &Spawned, &Agent),
    id: &'static str,
    options: &[&str],
) -> Result<(Spawned, Value)> {
    let serve_on = hosts.source.address.to_string();
    let moves = Move::new(criu, test_dir.path("source"), id)
        .in_net(&hosts.source.net)
        .with(&["--serve-on", &serve_on])
        .with(options);
    let pid = service.pid().to_string();
    let mut command = moves.start_subject(&["--pid", &pid], agent)?;
    command.wait(GENEROUS)?;
    let report = moves.report().with_context(|| command.log_tail())?;
    Ok((command, report))
}

/// A connection from the client over the route, and some answers.
fn talk(hosts: &ThreeHosts, route: &NftRoute<'_>) -> Result<()> {
    let mut talk = EchoClient::start(&hosts.client, route.front()?)?;
    talk.expect_answers()?;
    talk.finish()
}

#[test]
fn clients_are_led_to_the_destination() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        for mode in ["cold", "hybrid"] {
            let hosts = ThreeHosts::new()?;
            let service = serve(&hosts)?;
            let route = NftRoute::new(&hosts, PORT)?;
            talk(&hosts, &route)?;
            let dir = test_dir.path(&format!("agent-{mode}"));
            let insecure = ["--insecure".to_owned()];
            let agent = Agent::start(&criu.path, &dir, Some(&hosts.destination), &insecure)?;
            let steps = test_dir.path(&format!("steps-{mode}"));
            let noted = format!(
                "exec:echo $PAGEFERRY_ROUTE $PAGEFERRY_MODE $PAGEFERRY_PID >> {}",
                steps.display()
            );
            let option = route.option();
            let options = [
                &["--mode", mode, "--probe", "tcp:7000", "--tcp", "close"][..],
                &["--route", &option, "--route", &noted],
            ]
            .concat();
            let place = (&hosts, &service, &agent);
            let (_, report) = start(test_dir, criu, place, mode, &options)?;
            ensure!(report["result"] == "moved", "{report}");
            route.expect_there()?;
            talk(&hosts, &route)?;
            let wanted = format!("switch {mode} {}\n", service.pid());
            ensure!(fs::read_to_string(&steps)? == wanted);
            let at = |name: &str| report[name].as_f64().context(name.to_owned());
            ensure!(at("preparation_ms")? <= at("switch_ms")?, "{report}");
            ensure!(at("switch_ms")? <= at("answer_ms")?, "{report}");
            ensure!(report["phases_ms"]["route"].is_number(), "{report}");
        }
        Ok(())
    });
}

#[test]
fn a_migration_that_is_given_up_gives_its_routes_back() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let hosts = ThreeHosts::new()?;
        let mut service = serve(&hosts)?;
        let route = NftRoute::new(&hosts, PORT)?;
        let insecure = ["--insecure".to_owned()];
        let start_agent = |criu: &std::path::Path, name: &str| {
            Agent::start(
                criu,
                &test_dir.path(name),
                Some(&hosts.destination),
                &insecure,
            )
        };
        let agent = start_agent(&criu.path, "agent")?;
        let option = route.option();
        let steps = test_dir.path("steps");
        let notes = format!("echo $PAGEFERRY_ROUTE >> {}", steps.display());
        let noted = format!("exec:{notes}");
        let fails = format!("exec:{notes}; [ $PAGEFERRY_ROUTE = back ]");
        let killed = format!("exec:{notes}; [ $PAGEFERRY_ROUTE = back ] || kill -KILL $PPID");
        let route_and = |last| ["--tcp", "close", "--route", &option, "--route", last];
        for mode in ["cold", "post-copy"] {
            let place = (&hosts, &service, &agent);
            let options = [&["--mode", mode][..], &route_and(&fails)].concat();
            let (_, report) = start(test_dir, criu, place, mode, &options)?;
            ensure!(report["result"] == "rolled back", "{report}");
            route.expect_here().with_context(|| mode)?;
            talk(&hosts, &route)?;
        }
        ensure!(fs::read_to_string(&steps)? == "switch\nback\nswitch\nback\n");
        // One that could not be restored has led nobody away.
        let refuses = test_dir.path("refuses");
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = restore ] && exit 1\nexec '{}' \"$@\"\n",
            criu.path.display()
        );
        fs::write(&refuses, text)?;
        fs::set_permissions(&refuses, fs::Permissions::from_mode(0o755))?;
        let refusing = start_agent(&refuses, "refusing")?;
        let place = (&hosts, &service, &refusing);
        let (_, report) = start(test_dir, criu, place, "refused", &route_and(&noted))?;
        ensure!(
            report["result"] == "rolled back" && report["switch_ms"].is_null(),
            "{report}"
        );
        ensure!(fs::read_to_string(&steps)? == "switch\nback\nswitch\nback\n");
        // A command that dies between the two is followed by its guard.
        let moves = Move::new(criu, test_dir.path("source"), "killed")
            .in_net(&hosts.source.net)
            .with(&["--mode", "cold"])
            .with(&route_and(&killed));
        let pid = service.pid().to_string();
        moves
            .start_subject(&["--pid", &pid], &agent)?
            .wait(GENEROUS)?;
        wait::until("the guard to lead clients back", GENEROUS, || {
            Ok((fs::read_to_string(&steps)?.lines().count() == 6).then_some(()))
        })?;
        wait::until("the guard's last record", GENEROUS, || {
            let record = fs::read_to_string(moves.dir().join("record.json")).unwrap_or_default();
            Ok(record.contains("rolled-back").then_some(()))
        })?;
        route.expect_here()?;
        talk(&hosts, &route)?;
        ensure!(service.ended()?.is_none(), "the service has ended");
        Ok(())
    });
}

/// What leads elsewhere than it says is told before anything is touched; an address is a route, too.
#[test]
fn a_route_is_looked_at_first() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let hosts = ThreeHosts::new()?;
        let service = serve(&hosts)?;
        let route = NftRoute::new(&hosts, PORT)?;
        let insecure = ["--insecure".to_owned()];
        let agent = Agent::start(
            &criu.path,
            &test_dir.path("agent"),
            Some(&hosts.destination),
            &insecure,
        )?;
        let pid = service.pid().to_string();
        let there = hosts.destination.at(PORT);
        let cases = [
            (
                format!("nft:ip/front/services/81=10.213.8.1:7000->{there}"),
                "leads to nothing",
            ),
            (
                format!("nft:ip/front/services/80=10.213.8.9:7000->{there}"),
                "10.213.8.1 . 7000",
            ),
            (
                format!("nft:ip/front/none/80=10.213.8.1:7000->{there}"),
                "nft:ip/front/none",
            ),
            (
                format!(
                    "haproxy:{}/web/here->there",
                    test_dir.path("no.sock").display()
                ),
                "no.sock",
            ),
            (
                format!("address:10.213.8.99/24@{DEVICE}"),
                "10.213.8.99/24 is not on",
            ),
        ];
        for (option, said) in &cases {
            let moves = Move::new(criu, test_dir.path("source"), "looked")
                .in_net(&hosts.source.net)
                .with(&["--mode", "cold", "--route", option]);
            let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
            command.fail(GENEROUS)?;
            ensure!(
                command.log_tail().contains(said),
                "{option}: {}",
                command.log_tail()
            );
            ensure!(!moves.dir().exists(), "{option}");
        }
        let address = format!("address:{}@{DEVICE}", ThreeHosts::SERVICE);
        let options = ["--mode", "cold", "--tcp", "close", "--route", &address];
        let (_, report) = start(
            test_dir,
            criu,
            (&hosts, &service, &agent),
            "moved",
            &options,
        )?;
        ensure!(
            report["result"] == "moved" && report["switch_ms"].is_number(),
            "{report}"
        );
        ensure!(!has_address(&hosts.source.net, ThreeHosts::SERVICE)?);
        ensure!(has_address(&hosts.destination.net, ThreeHosts::SERVICE)?);
        route.expect_here()
    });
}
