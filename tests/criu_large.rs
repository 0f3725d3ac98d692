//! A mapping of more than 2 GiB, which counts of 32 bits with a sign do not hold, with a real CRIU.

use anyhow::{Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::scenarios::reading;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::suite::make;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(is_received_and_restored, is_restored_by_post_copy);

/// 2.4 GiB with 20 MiB of pages in it, a part of which reads as zero.
fn large(test_dir: &TestDir) -> LoadSpec {
    let area = AreaSpec::new(Mapping::Private, 5000, Content::Mixed);
    let area = area.untouched_every(5).scattered_over(128);
    LoadSpec::new(test_dir.path("load"), vec![area])
}

fn is_received_and_restored(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(large(test_dir), None)?;
    let images = test_dir.path("images");
    let server = PageServer::receiving(make(criu), &Options::new(&images))?;
    let dump = Dump::new(criu, load.pid(), &images);
    dump.to(server.address()).run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, &images).run()?;
    load.expect_first_memory().map(drop)
}

fn is_restored_by_post_copy(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for source in [Source::Dump, Source::PageServer(Make::Ours)] {
        let test_dir = TestDir::new_in(test_dir.dir())?;
        let plan = Plan::new(criu, source, make(criu));
        let mut moved = PostCopy::start(&test_dir, &plan, large(&test_dir), &reading())?;
        let reports = moved.reports()?;
        ensure!(reports[0].checked() > 5000, "{reports:?}");
        moved.finish()?;
    }
    Ok(())
}
