//! A real CRIU dumps through ferry: its memory goes from one page-server to another, and is
//! restored from there.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use testbed::bed::Bed;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::wait::GENEROUS;

for_each_criu!(one_process_with_mixed_pages, a_tree_with_shared_memory);

/// A forwarder to `far_end`, logging in `dir`.
fn forwarder(dir: PathBuf, far_end: SocketAddr, extra: &[&str]) -> Result<PageServer> {
    let far_end = far_end.to_string();
    let options = Options::new(dir).with(&["--forward", &far_end]).with(extra);
    PageServer::receiving(Make::Ours, &options)
}

/// Restores `images` and lets every process check its memory against what `load` was.
fn restore_and_check(criu: &Criu, images: &Path, load: &mut Load) -> Result<()> {
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, images).run()?;
    let verify = Step::Verify(Pass::full(Order::Random));
    for after in load.run_everywhere(&[verify])? {
        after.expect_right()?;
        let digest = load.spec().initial_digest(after.process);
        ensure!(
            after.steps[0].digest == Some(digest),
            "the memory is not what was asked for"
        );
    }
    Ok(())
}

fn dump_and_restore(bed: &Bed, criu: &Criu, spec: LoadSpec, extra: &[&str]) -> Result<()> {
    let mut load = Load::start(spec, None)?;
    let images = bed.path("images");
    let far_end = PageServer::receiving(Make::Ours, &Options::new(&images).log_to("far.log"))?;
    let near_end = forwarder(bed.path("near"), far_end.address(), extra)?;
    Dump::new(criu, load.pid(), &images)
        .to(near_end.address())
        .run()?;
    near_end.finish(GENEROUS)?;
    far_end.finish(GENEROUS)?;
    restore_and_check(criu, &images, &mut load)
}

fn one_process_with_mixed_pages(bed: &Bed, criu: &Criu) -> Result<()> {
    dump_and_restore(bed, criu, LoadSpec::mixed(bed.path("load"), 64), &[])
}

fn a_tree_with_shared_memory(bed: &Bed, criu: &Criu) -> Result<()> {
    dump_and_restore(
        bed,
        criu,
        LoadSpec::tree(bed.path("load"), 48, 4),
        &["--streams", "3"],
    )
}
