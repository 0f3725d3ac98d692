//! A process is dumped again while a lazy-client still brings its pages: to CRIU they would be pages that were never
//! touched. Whoever receives the dump on this host refuses it, and the process goes on.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::load::scenarios::verifying;
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::load::steps::Step;
use testbed::net::free_port;
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::process::Spawned;
use testbed::proxy::Link;
use testbed::suite::with_criu;
use testbed::wait::GENEROUS;

const MIB: u32 = 64;
/// So slow that pages are missing for as long as this test takes.
const SLOW: Link = Link {
    round_trip: std::time::Duration::from_millis(1),
    bytes_per_s: Some(1 << 20),
    hides_resets: false,
};

/// Dumps the restored process once more, from within its PID namespace, as CRIU demands.
fn dump_again(criu: &Criu, moving: &PostCopy, images: &Path, to: &[&str]) -> Result<Spawned> {
    fs::create_dir_all(images)?;
    let init = moving.restored.init()?.to_string();
    let pid = moving.load.pid().to_string();
    let mut command = Command::new("nsenter");
    command.args(["--target", &init, "--pid", "--mount", "--"]);
    command.arg(&criu.path).args(["dump", "-t", &pid, "-D"]);
    command.arg(images).args(["-o", "dump.log", "-v4"]);
    command.arg("--leave-running").args(to);
    command.stdout(Stdio::null());
    Spawned::start("criu dump", &mut command, Some(images.join("dump.log")))
}

fn expect_refusal(server: &mut PageServer, mut dump: Spawned) -> Result<()> {
    dump.fail(GENEROUS)?;
    server.process().fail(GENEROUS)?;
    let log = fs::read_to_string(server.process().log().context("a log")?)?;
    ensure!(log.contains("its pages are still missing"), "{log}");
    Ok(())
}

#[test]
fn whoever_receives_it_refuses_it() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec {
            on_lost_page: OnLostPage::Count,
            pin_own_memory: true,
            ..LoadSpec::mixed(test_dir.path("load"), MIB)
        };
        let plan = Plan::new(criu, Source::Dump, Make::Ours).over(SLOW);
        let mut moving = PostCopy::start(test_dir, &plan, spec, &[])?;

        let (images, again) = (test_dir.path("received"), test_dir.path("again-received"));
        let mut server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
        let (ip, port) = (server.address().ip(), server.address().port());
        let (ip, port) = (ip.to_string(), port.to_string());
        let to = ["--page-server", "--address", &ip, "--port", &port];
        let dump = dump_again(criu, &moving, &again, &to)?;
        expect_refusal(&mut server, dump)?;
        moving.load.run(0, &[Step::Status])?;

        let far = PageServer::receiving(Make::Ours, &Options::new(test_dir.path("far")))?;
        let (images, again) = (test_dir.path("near"), test_dir.path("again-near"));
        let forward = Options::new(&images).with(&["--forward", &far.address().to_string()]);
        let mut server = PageServer::receiving(Make::Ours, &forward)?;
        let port = server.address().port().to_string();
        let to = ["--page-server", "--address", &ip, "--port", &port];
        let dump = dump_again(criu, &moving, &again, &to)?;
        expect_refusal(&mut server, dump)?;
        moving.load.run(0, &[Step::Status])?;

        let again = test_dir.path("again-lazily");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let port = address.port().to_string();
        let to = ["--lazy-pages", "--address", &ip, "--port", &port];
        let mut dump = dump_again(criu, &moving, &again, &to)?;
        // It waits for the dump to listen.
        let options = Options::new(&again).with(&["--forward-lazy", &address.to_string()]);
        let Err(refused) = PageServer::receiving(Make::Ours, &options) else {
            anyhow::bail!("the forwarder took the dump");
        };
        let message = format!("{refused:#}");
        ensure!(message.contains("its pages are still missing"), "{message}");
        dump.fail(GENEROUS)?;
        moving.load.run(0, &[Step::Status])?;

        // The first dump is given up, and its process has everything.
        moving.daemon.process().signal(Signal::SIGTERM)?;
        moving.daemon.process().fail(GENEROUS)?;
        moving.source().context("the dump")?.fail(GENEROUS)?;
        moving.restored.kill();
        moving.load.expect_running()?;
        moving.load.run(0, &verifying())?.expect_right()
    });
}
