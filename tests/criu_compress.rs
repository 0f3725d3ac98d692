//! `--compress` with a real CRIU: who may send, who restores from the images, and what one that
//! cannot says of them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use testbed::bed::Bed;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::images::{copy_without_lazy_pages, page_size};
use testbed::load::Load;
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::rounds::{Rounds, pages_file_bytes, pages_files};
use testbed::stats;
use testbed::suite::with_criu;
use testbed::wait::GENEROUS;

const MIB: u32 = 64;

/// Whether this CRIU is built with LZ4.
fn reads_lz4(criu: &Criu) -> Result<bool> {
    let mut check = Command::new(&criu.path);
    check.args(["check", "--feature", "compress"]);
    check.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(check.status()?.success())
}

/// Fails unless the files take well below what the dump sent: of [`LoadSpec::mixed`] a third is
/// zero or compresses well.
fn expect_compressed(images: &Path) -> Result<()> {
    let sent = stats::of_dump(images)?.pages_written * page_size()?.bytes();
    let stored = pages_file_bytes(images)?;
    ensure!(stored < sent / 10 * 8, "{stored} bytes stored of {sent}");
    Ok(())
}

#[test]
fn a_criu_that_cannot_read_them_may_not_send() {
    with_criu(Suite::Trixie, |bed, criu| {
        let mut rounds = Rounds::start(bed, criu, LoadSpec::mixed(bed.path("load"), MIB))?;
        let (mut server, dump) = rounds.begin(Make::Ours, &["--compress"])?;
        dump.to(server.address()).start()?.fail(GENEROUS)?;
        server.process().fail(GENEROUS)?;
        let log = server.process().log_tail();
        ensure!(log.contains("--compress: CRIU up to 4.1.1"), "{log}");
        ensure!(pages_files(&rounds.images(1))?.is_empty(), "files are left");
        rounds.expect_running()
    });
}

#[test]
fn a_criu_with_lz4_restores_and_one_without_says_so() {
    with_criu(Suite::Experimental, |bed, criu| {
        let mut rounds = Rounds::start(bed, criu, LoadSpec::mixed(bed.path("load"), MIB))?;
        rounds.dump(Make::Ours, &["--compress"])?;
        let images = rounds.images(1);
        expect_compressed(&images)?;
        if reads_lz4(criu)? {
            return rounds.expect_restored(1).map(drop);
        }
        ensure!(
            Restore::new(criu, &images).run().is_err(),
            "CRIU {} restored what it cannot read",
            criu.version
        );
        let log = fs::read_to_string(images.join("restore.log"))?;
        ensure!(
            log.contains(
                "Pagemap contains compressed pages but CRIU was built without LZ4 support"
            ),
            "{log}"
        );
        Ok(())
    });
}

/// Dumps into compressed images, and restores by post-copy from a page server that serves them to
/// CRIU's own daemon.
fn post_copy_from_compressed_images(bed: &Bed, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(bed.path("load"), MIB), None)?;
    let before = load.run_everywhere(&[Step::Status])?;
    let (dumped, here) = (bed.path("dumped"), bed.path("here"));
    let options = Options::new(&dumped).with(&["--compress"]);
    let server = PageServer::receiving(Make::Ours, &options)?;
    let dump = Dump::new(criu, load.pid(), &dumped);
    dump.to(server.address()).run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    expect_compressed(&dumped)?;
    copy_without_lazy_pages(&dumped, &here)?;
    let options = Options::new(&dumped).log_to("serve.log");
    let server = PageServer::serving(Make::Ours, &options)?;
    let plan = Plan::new(criu, Source::PageServer(Make::Ours), Make::Criu(criu));
    let mut moved = PostCopy::from_images(&plan, load, before, here, Some(server), &reading())?;
    moved.reports()?;
    moved.finish()
}

#[test]
fn criu_4_2_restores_lazily_what_is_served_from_them() {
    with_criu(Suite::Sid, post_copy_from_compressed_images);
}

#[test]
fn criu_4_3_restores_lazily_what_is_served_from_them() {
    with_criu(Suite::Experimental, post_copy_from_compressed_images);
}
