//! Lazy restores from images on the restoring host, alone and on top of a chain of parents.

use std::path::Path;

use anyhow::{Result, ensure};
use testbed::bed::Bed;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::images::{copy_without_lazy_pages, move_same_pages_to_parent};
use testbed::load::Load;
use testbed::load::report::Report;
use testbed::load::scenarios::{reading, reshaping};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::suite::make;

for_each_criu!(
    reads_from_local_images,
    reshapes_memory_from_local_images,
    reads_from_a_chain_of_parents,
    reads_a_chain_of_parents_from_our_page_server,
    a_chain_of_parents_is_what_criu_restores,
);

const MIB: u32 = 64;

fn restore_locally(bed: &Bed, criu: &Criu, steps: &[Step]) -> Result<()> {
    let plan = Plan::new(criu, Source::Local, make(criu));
    let mut moved = PostCopy::start(bed, &plan, LoadSpec::mixed(bed.path("load"), MIB), steps)?;
    moved.reports()?;
    moved.finish()
}

fn reads_from_local_images(bed: &Bed, criu: &Criu) -> Result<()> {
    restore_locally(bed, criu, &reading())
}

fn reshapes_memory_from_local_images(bed: &Bed, criu: &Criu) -> Result<()> {
    restore_locally(bed, criu, &reshaping())
}

/// Dumps a load three times, with writes between; it is gone after the last dump, which is in the
/// directory `newest`.
fn dump_three_times(bed: &Bed, criu: &Criu) -> Result<(Load, Vec<Report>)> {
    let mut load = Load::start(LoadSpec::mixed(bed.path("load"), MIB), None)?;
    let dump = |name: &str| Dump::new(criu, load.pid(), bed.path(name));
    dump("oldest").leave_running().run()?;
    load.run(
        0,
        &[Step::Write {
            every: 3,
            order: Order::Random,
        }],
    )?
    .expect_right()?;
    dump("older").leave_running().run()?;
    load.run(
        0,
        &[Step::Write {
            every: 5,
            order: Order::Ascending,
        }],
    )?
    .expect_right()?;
    let before = load.run_everywhere(&[Step::Status])?;
    dump("newest").run()?;
    load.wait_until_gone()?;
    Ok((load, before))
}

/// Makes a chain of the three dumps.
fn link_parents(dir: &Path) -> Result<()> {
    for (child, parent) in [("newest", "older"), ("older", "oldest")] {
        let moved = move_same_pages_to_parent(&dir.join(child), &dir.join(parent))?;
        ensure!(moved > 0, "{child} shares no page with {parent}");
    }
    Ok(())
}

fn reads_from_a_chain_of_parents(bed: &Bed, criu: &Criu) -> Result<()> {
    let (load, before) = dump_three_times(bed, criu)?;
    link_parents(bed.dir())?;
    let plan = Plan::new(criu, Source::Local, make(criu));
    let newest = bed.path("newest");
    let mut moved = PostCopy::from_images(&plan, load, before, newest, None, &reading())?;
    moved.reports()?;
    moved.finish()
}

fn reads_a_chain_of_parents_from_our_page_server(bed: &Bed, criu: &Criu) -> Result<()> {
    let (load, before) = dump_three_times(bed, criu)?;
    // The restoring host has none of it.
    let here = bed.path("here");
    copy_without_lazy_pages(&bed.path("newest"), &here)?;
    link_parents(bed.dir())?;
    let options = Options::new(bed.path("newest")).log_to("serve.log");
    let server = PageServer::serving(Make::Ours, &options)?;
    let plan = Plan::new(criu, Source::PageServer(Make::Ours), make(criu)).over(slow_link());
    let mut moved = PostCopy::from_images(&plan, load, before, here, Some(server), &reading())?;
    moved.reports()?;
    moved.finish()
}

/// The chains of these tests are what CRIU itself takes for chains.
fn a_chain_of_parents_is_what_criu_restores(bed: &Bed, criu: &Criu) -> Result<()> {
    let (load, _) = dump_three_times(bed, criu)?;
    link_parents(bed.dir())?;
    let _restored = Restore::new(criu, bed.path("newest")).run()?;
    load.run(0, &[Step::Verify(Pass::full(Order::Ascending))])?
        .expect_right()
}
