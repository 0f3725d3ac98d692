//! CRIUs of different versions on the two sides, and CRIU's own daemons against ours.

use anyhow::{Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::load::Load;
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::test_dir::{TestDir, with_test_dir};
use testbed::wait::GENEROUS;
use testbed::{for_each_criu, gate};

for_each_criu!(
    criu_reads_from_our_page_server,
    our_page_server_serves_one_restore_after_another
);

/// Memory dumped by the oldest CRIU into our page server is restored by a newer one.
fn dump_with_oldest_restore_with(newer: Suite) {
    let Some(oldest) = gate::criu(Suite::Trixie) else {
        return;
    };
    let Some(newer) = gate::criu(newer) else {
        return;
    };
    with_test_dir(|test_dir| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 48, 3), None)?;
        let images = test_dir.path("images");
        let server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
        Dump::new(&oldest, load.pid(), &images)
            .to(server.address())
            .run()?;
        server.finish(GENEROUS)?;
        load.wait_until_gone()?;
        let _restored = Restore::new(&newer, &images).run()?;
        load.expect_first_memory().map(drop)
    });
}

#[test]
fn trixie_into_our_page_server_is_restored_by_sid() {
    dump_with_oldest_restore_with(Suite::Sid);
}

#[test]
fn trixie_into_our_page_server_is_restored_by_experimental() {
    dump_with_oldest_restore_with(Suite::Experimental);
}

/// CRIU's lazy-pages daemon, v1 and v2, fetches from our page server.
fn criu_reads_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let source = Source::PageServer(Make::Ours);
    let plan = Plan::new(criu, source, Make::Criu(criu)).over(slow_link());
    let spec = LoadSpec::mixed(test_dir.path("load"), 32);
    let mut moved = PostCopy::start(test_dir, &plan, spec, &reading())?;
    moved.reports()?;
    moved.finish()
}

/// With `--keep` one set of images serves many restores.
fn our_page_server_serves_one_restore_after_another(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 32), None)?;
    let dumped = test_dir.path("dumped");
    Dump::new(criu, load.pid(), &dumped).run()?;
    load.wait_until_gone()?;
    let options = Options::new(&dumped).with(&["--keep"]).log_to("serve.log");
    let mut server = PageServer::serving(Make::Ours, &options)?;
    for (round, client) in [Make::Ours, Make::Criu(criu), Make::Ours]
        .into_iter()
        .enumerate()
    {
        let here = test_dir.path(&format!("restore-{round}"));
        testbed::images::copy_without_lazy_pages(&dumped, &here)?;
        let options = Options::new(&here).log_to("lazy.log");
        let daemon = testbed::daemons::LazyDaemon::start(client, &options, Some(server.address()))?;
        let _restored = Restore::new(criu, &here).lazily().run()?;
        load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
            .expect_right()?;
        daemon.finish(GENEROUS)?;
        ensure!(
            server.process().ended()?.is_none(),
            "the server has left after round {round}"
        );
    }
    Ok(())
}
