//! runc checkpoints containers through our daemons, and restores them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Options, PageServer};
use testbed::load::report::{Report, expect_faults};
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::net::free_port;
use testbed::postcopy::slow_link;
use testbed::proxy::Proxy;
use testbed::runc::{self, LOAD_DIR, Runc};
use testbed::suite::make;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::{for_each_criu, gate};

for_each_criu!(checkpoint_to_a_page_server, checkpoint_with_lazy_pages);

const MIB: u32 = 48;

/// The container's name before it is checkpointed.
fn before_id() -> String {
    runc::unique("before")
}

fn spec() -> LoadSpec {
    LoadSpec::tree(LOAD_DIR, MIB, 3)
}

fn expect_same(before: &[Report], after: &[Report]) -> Result<()> {
    for (before, after) in before.iter().zip(after) {
        after.expect_right()?;
        ensure!(
            after.nonce == before.nonce,
            "not the process that was checkpointed"
        );
        ensure!(after.counter >= before.counter, "its counter went back");
    }
    Ok(())
}

/// A container that runs, what its processes say, and where its images go; nothing without runc.
fn start<'a>(
    test_dir: &TestDir,
    criu: &'a Criu,
) -> Result<Option<(Runc<'a>, Vec<Report>, PathBuf)>> {
    let Some(()) = gate::need("runc", runc::find()) else {
        return Ok(None);
    };
    let mut runc = Runc::new(test_dir, criu, spec())?;
    runc.start(&before_id())?;
    let before = runc.run_everywhere(&[Step::Status])?;
    Ok(Some((runc, before, test_dir.path("images"))))
}

fn checkpoint_to_a_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some((mut runc, before, images)) = start(test_dir, criu)? else {
        return Ok(());
    };
    let server = PageServer::receiving(make(criu), &Options::new(&images))?;
    runc.checkpoint_to(&before_id(), &images, server.address())?;
    server.finish(GENEROUS)?;
    runc.expect_gone(&before_id())?;
    runc.restore(&runc::unique("after"), &images, false)?;
    expect_same(&before, &runc.run_everywhere(&reading())?)
}

fn checkpoint_with_lazy_pages(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some((mut runc, before, images)) = start(test_dir, criu)? else {
        return Ok(());
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
    let mut source = runc.checkpoint_lazily(&before_id(), &images, address)?;
    let proxy = Proxy::start(address, slow_link(), None)?;
    let options = Options::new(&images).log_to("lazy.log");
    let daemon = LazyDaemon::start(make(criu), &options, Some(proxy.address()))?;
    runc.restore(&runc::unique("after"), &images, true)?;
    let after = runc.run_everywhere(&reading())?;
    expect_same(&before, &after)?;
    expect_faults(&after)?;
    daemon.finish(GENEROUS)?;
    source.succeed(GENEROUS)?;
    runc.expect_gone(&before_id())
}
