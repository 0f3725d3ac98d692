//! A mapping of more than 2 GiB, which counts of 32 bits with a sign do not hold, with a real CRIU.

use anyhow::{Result, ensure};
use testbed::bed::Bed;
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
use testbed::wait::GENEROUS;

for_each_criu!(is_received_and_restored, is_restored_by_post_copy);

/// 2.4 GiB with 20 MiB of pages in it, a part of which reads as zero.
fn large(bed: &Bed) -> LoadSpec {
    let area = AreaSpec::new(Mapping::Private, 5000, Content::Mixed);
    let area = area.untouched_every(5).scattered_over(128);
    LoadSpec::new(bed.path("load"), vec![area])
}

fn is_received_and_restored(bed: &Bed, criu: &Criu) -> Result<()> {
    let mut load = Load::start(large(bed), None)?;
    let images = bed.path("images");
    let server = PageServer::receiving(make(criu), &Options::new(&images))?;
    let dump = Dump::new(criu, load.pid(), &images);
    dump.to(server.address()).run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, &images).run()?;
    load.expect_first_memory().map(drop)
}

fn is_restored_by_post_copy(bed: &Bed, criu: &Criu) -> Result<()> {
    for source in [Source::Dump, Source::PageServer(Make::Ours)] {
        let bed = Bed::new_in(bed.dir())?;
        let plan = Plan::new(criu, source, make(criu));
        let mut moved = PostCopy::start(&bed, &plan, large(&bed), &reading())?;
        let reports = moved.reports()?;
        ensure!(reports[0].checked() > 5000, "{reports:?}");
        moved.finish()?;
    }
    Ok(())
}
