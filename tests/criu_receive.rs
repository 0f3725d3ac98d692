//! A real CRIU dumps into a page server, and restores from what it stored.

use std::fs;

use anyhow::{Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{Options, PageServer};
use testbed::for_each_criu;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::load::{Load, page_words};
use testbed::migration::{Dump, Restore};
use testbed::rounds::pages_file_bytes;
use testbed::stats;
use testbed::suite::make;
use testbed::sys::WORD_BYTES;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(one_process_with_mixed_pages, a_tree_with_shared_memory);

/// Dumps `spec` through a page server, restores it, and lets every process check its memory.
fn dump_and_restore(test_dir: &TestDir, criu: &Criu, spec: LoadSpec) -> Result<()> {
    let mut load = Load::start(spec, None)?;
    let before = load.run_everywhere(&[Step::Status])?;
    let images = test_dir.path("images");
    let server = PageServer::receiving(make(criu), &Options::new(&images))?;
    Dump::new(criu, load.pid(), &images)
        .to(server.address())
        .run()?;
    server.finish(GENEROUS)?;
    // Its last message would wait 200 ms in its corked socket.
    let log = fs::read_to_string(images.join("daemon.log"))?;
    ensure!(
        log.contains("is told to send what it holds back"),
        "nobody has told the dump to send its last message: {log}"
    );
    load.wait_until_gone()?;
    let stored = pages_file_bytes(&images)?;
    let stats = stats::of_dump(&images)?;
    let written = stats.pages_written + stats.shared_pages_written.unwrap_or(0);
    let page_bytes = (page_words() * WORD_BYTES) as u64;
    ensure!(
        stored == written * page_bytes,
        "{stored} bytes stored of {written} pages"
    );

    let _restored = Restore::new(criu, &images).run()?;
    for (before, after) in before.iter().zip(load.expect_first_memory()?) {
        ensure!(
            after.nonce == before.nonce,
            "not the process that was dumped"
        );
        ensure!(after.counter >= before.counter, "the counter went back");
    }
    Ok(())
}

fn one_process_with_mixed_pages(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    dump_and_restore(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), 64))
}

fn a_tree_with_shared_memory(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    dump_and_restore(test_dir, criu, LoadSpec::tree(test_dir.path("load"), 48, 4))
}
