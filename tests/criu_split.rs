//! `pageferry split` and `page-server --split-lazy`: what a lazy restore can do without goes to another directory,
//! from where a page server serves it; the small rest is restored from lazily.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::debian::Suite;
use testbed::images::page_size;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::rounds::pages_file_bytes;
use testbed::stats;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

const MIB: u32 = 16;

#[test]
fn split_images_are_restored_lazily_from_their_rest() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 16, 2), None)?;
        let (images, lazy) = (test_dir.path("images"), test_dir.path("lazy"));
        Dump::new(criu, load.pid(), &images).run()?;
        load.wait_until_gone()?;
        let whole = pages_file_bytes(&images)?;
        let split = Command::new(workspace::binary("pageferry")?)
            .arg("split")
            .arg(&images)
            .arg("-o")
            .arg(&lazy)
            .status()?;
        ensure!(split.success(), "pageferry split: {split}");
        let (rest, moved) = (pages_file_bytes(&images)?, pages_file_bytes(&lazy)?);
        ensure!(rest + moved == whole, "{rest} and {moved} of {whole} bytes");
        ensure!(moved > 16 << 20, "only {moved} bytes have moved");

        restore_lazily(criu, &mut load, Make::Ours, &images, &lazy)
    });
}

/// Restores lazily from `images`, with the rest served from `lazy`.
fn restore_lazily(
    criu: &Criu,
    load: &mut Load,
    client: Make<'_>,
    images: &Path,
    lazy: &Path,
) -> Result<()> {
    let server = PageServer::serving(Make::Ours, &Options::new(lazy))?;
    let options = Options::new(images).log_to("lazy.log");
    let daemon = LazyDaemon::start(client, &options, Some(server.address()))?;
    let _restored = Restore::new(criu, images).lazily().run()?;
    load.expect_first_memory()?;
    daemon.finish(GENEROUS)?;
    server.finish(GENEROUS).map(drop)
}

/// Dumps to a page server that keeps lazy pages apart, and restores from what it has made. `forwarded`: the dump
/// goes through a page server at the source.
fn received_apart(test_dir: &TestDir, criu: &Criu, extra: &[&str], forwarded: bool) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let (images, lazy) = (test_dir.path("images"), test_dir.path("lazy"));
    let options = Options::new(&images).with(&["--split-lazy", &lazy.to_string_lossy()]);
    let server = PageServer::receiving(Make::Ours, &options.with(extra))?;
    let dump = Dump::new(criu, load.pid(), &images);
    match forwarded {
        true => dump.forwarded_to(server, &test_dir.path("source"))?,
        false => dump.received_by(server)?,
    }
    load.wait_until_gone()?;
    let sent = stats::of_dump(&images)?.pages_written * page_size()?.bytes();
    let (rest, moved) = (pages_file_bytes(&images)?, pages_file_bytes(&lazy)?);
    ensure!(rest < 4 << 20, "{rest} bytes stay of {sent}");
    match extra.contains(&"--compress") {
        false => ensure!(rest + moved == sent, "{rest} and {moved} bytes of {sent}"),
        // Of this memory a third is zero or compresses well.
        true => ensure!(rest + moved < sent / 10 * 8, "{rest} and {moved} of {sent}"),
    }
    let client = match forwarded {
        true => Make::Criu(criu),
        false => Make::Ours,
    };
    restore_lazily(criu, &mut load, client, &images, &lazy)
}

#[test]
fn lazy_pages_are_received_apart() {
    with_criu(Suite::Sid, |test_dir, criu| {
        received_apart(test_dir, criu, &[], false)
    });
}

#[test]
fn lazy_pages_are_received_apart_and_compressed() {
    let received =
        |test_dir: &TestDir, criu: &Criu| received_apart(test_dir, criu, &["--compress"], false);
    with_criu(Suite::Sid, received);
}

#[test]
fn criu_4_1_may_send_what_is_compressed_apart() {
    let received =
        |test_dir: &TestDir, criu: &Criu| received_apart(test_dir, criu, &["--compress"], false);
    with_criu(Suite::Trixie, received);
}

#[test]
fn lazy_pages_are_received_apart_from_another_page_server() {
    let received =
        |test_dir: &TestDir, criu: &Criu| received_apart(test_dir, criu, &["--compress"], true);
    with_criu(Suite::Sid, received);
}
