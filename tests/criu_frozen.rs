//! Whoever has a dump wait for it does so for a limited time: then the dump fails, and its processes go
//! on.

use std::path::Path;

use anyhow::{Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::debian::Suite;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::Dump;
use testbed::net::free_port;
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

/// A lazy dump of a running process, and where it listens.
fn lazy_dump(
    test_dir: &TestDir,
    criu: &Criu,
    images: &Path,
) -> Result<(Load, Spawned, std::net::SocketAddr)> {
    let load = Load::start(LoadSpec::mixed(test_dir.path("load"), 8), None)?;
    let address = (std::net::Ipv4Addr::LOCALHOST, free_port()?).into();
    let dump = Dump::new(criu, load.pid(), images).serve_lazily(address)?;
    Ok((load, dump, address))
}

fn expect_failure(name: &str, process: &mut Spawned, word: &str) -> Result<()> {
    let ended = process.wait(GENEROUS)?;
    ensure!(!ended.status.success(), "{name}: {}", ended.status);
    let log = process.log_tail();
    ensure!(log.contains(word), "{name} does not name {word}: {log}");
    Ok(())
}

#[test]
fn a_restore_that_does_not_come_thaws_the_source() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let images = test_dir.path("images");
        let (mut load, mut dump, address) = lazy_dump(test_dir, criu, &images)?;
        let options = Options::new(&images)
            .with(&["--restore-timeout", "1"])
            .log_to("lazy.log");
        let mut daemon = LazyDaemon::start(Make::Ours, &options, Some(address))?;
        expect_failure("lazy-client", daemon.process(), "--restore-timeout")?;
        ensure!(!dump.wait(GENEROUS)?.status.success(), "the dump succeeded");
        load.expect_running()
    });
}

#[test]
fn a_client_that_does_not_come_thaws_the_source() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let images = test_dir.path("images");
        let (mut load, mut dump, address) = lazy_dump(test_dir, criu, &images)?;
        let address = address.to_string();
        let options = ["--forward-lazy", &address, "--keep", "--idle-timeout", "1"];
        let options = Options::new(&images).with(&options).log_to("forward.log");
        let mut forward = PageServer::receiving(Make::Ours, &options)?;
        expect_failure("page-server", forward.process(), "--idle-timeout")?;
        ensure!(!dump.wait(GENEROUS)?.status.success(), "the dump succeeded");
        load.expect_running()
    });
}
