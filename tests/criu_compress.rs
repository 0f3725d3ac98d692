//! `--compress` with a real CRIU: who may send, who restores from the images, and what one that
//! cannot says of them.
//!
//! No CRIU of Debian's is built with LZ4. CRIU's image tool stands in for one: it decompresses what we
//! compress, so that CRIU restores it, and compresses what we then have to serve.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::dumped_load::compressed_round;
use testbed::gate;
use testbed::images::{copy_without_lazy_pages, page_size, spoil_compressed_pages};
use testbed::load::Load;
use testbed::load::report::Report;
use testbed::load::scenarios::{reading, verifying};
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::load::steps::Step;
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::rounds::{Rounds, pages_file_bytes, pages_files};
use testbed::stats;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
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
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut rounds =
            Rounds::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), MIB))?;
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
    with_criu(Suite::Experimental, |test_dir, criu| {
        let (rounds, images) = compressed_round(test_dir, criu, MIB)?;
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

#[test]
fn criu_4_3_restores_what_its_own_tool_decompresses() {
    let Some(crit) = gate::crit() else {
        return;
    };
    with_criu(Suite::Experimental, |test_dir, criu| {
        let (rounds, images) = compressed_round(test_dir, criu, MIB)?;
        expect_compressed(&images)?;
        let sent = stats::of_dump(&images)?.pages_written * page_size()?.bytes();
        crit.decompress(&images)?;
        let stored = pages_file_bytes(&images)?;
        ensure!(stored > sent / 10 * 8, "{stored} bytes stored of {sent}");
        rounds.expect_restored(1).map(drop)
    });
}

/// A process that is gone, and what is left of it.
struct DumpedLoad {
    load: Load,
    before: Vec<Report>,
    /// Compressed images.
    dumped: PathBuf,
    /// The same without the pages that come later.
    here: PathBuf,
}

impl DumpedLoad {
    /// Lets `dump` dump a process into a directory, which `compress` compresses after a copy was made
    /// for CRIU to restore from.
    fn by(
        test_dir: &TestDir,
        dump: impl FnOnce(&Load, &Path) -> Result<()>,
        compress: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<DumpedLoad> {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
        DumpedLoad::of(test_dir, spec, dump, compress)
    }

    /// The same with another process.
    fn of(
        test_dir: &TestDir,
        spec: LoadSpec,
        dump: impl FnOnce(&Load, &Path) -> Result<()>,
        compress: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<DumpedLoad> {
        let mut load = Load::start(spec, None)?;
        let before = load.run_everywhere(&[Step::Status])?;
        let (dumped, here) = (test_dir.path("dumped"), test_dir.path("here"));
        dump(&load, &dumped)?;
        load.wait_until_gone()?;
        copy_without_lazy_pages(&dumped, &here)?;
        compress(&dumped)?;
        expect_compressed(&dumped)?;
        Ok(DumpedLoad {
            load,
            before,
            dumped,
            here,
        })
    }

    /// Restores it by post-copy, through `client`, from a page server of ours.
    fn come_back(self, criu: &Criu, client: Make<'_>) -> Result<()> {
        let options = Options::new(&self.dumped).log_to("serve.log");
        let server = PageServer::serving(Make::Ours, &options)?;
        let plan = Plan::new(criu, Source::PageServer(Make::Ours), client);
        let DumpedLoad {
            load, before, here, ..
        } = self;
        let mut moved = PostCopy::from_images(&plan, load, before, here, Some(server), &reading())?;
        moved.reports()?;
        moved.finish()
    }
}

/// Dumps to a page server that compresses.
fn dump_compressed(criu: &Criu, load: &Load, images: &Path) -> Result<()> {
    let options = Options::new(images).with(&["--compress"]);
    let server = PageServer::receiving(Make::Ours, &options)?;
    let dump = Dump::new(criu, load.pid(), images);
    dump.to(server.address()).run()?;
    server.finish(GENEROUS).map(drop)
}

fn post_copy_from_our_images(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let to_a_server = |load: &Load, images: &Path| dump_compressed(criu, load, images);
    let gone = DumpedLoad::by(test_dir, to_a_server, |_| Ok(()))?;
    gone.come_back(criu, Make::Criu(criu))
}

/// Restores from images of which some pages do not decode, which are here or served.
fn with_spoiled_pages(test_dir: &TestDir, criu: &Criu, served: bool) -> Result<()> {
    let spec = LoadSpec {
        on_lost_page: OnLostPage::Count,
        pin_own_memory: true,
        ..LoadSpec::mixed(test_dir.path("load"), MIB / 4)
    };
    let to_a_server = |load: &Load, images: &Path| dump_compressed(criu, load, images);
    let DumpedLoad {
        load, dumped, here, ..
    } = DumpedLoad::of(test_dir, spec, to_a_server, |_| Ok(()))?;
    let spoiled = spoil_compressed_pages(&dumped, 5)? as u64;
    let time_limit = ["--local-timeout", "1"];
    let serve = Options::new(&dumped).with(&time_limit).log_to("serve.log");
    let server = match served {
        true => Some(PageServer::serving(Make::Ours, &serve)?),
        false => None,
    };
    let images = if served { &here } else { &dumped };
    let options = Options::new(images).with(&time_limit).log_to("lazy.log");
    let options = options.with(&["-W", &here.to_string_lossy()]);
    let address = server.as_ref().map(PageServer::address);
    let mut daemon = LazyDaemon::start(Make::Ours, &options, address)?;
    let restored = Restore::new(criu, &here).lazily().run()?;
    load.steer(restored.init()?)?;
    let report = load.run(0, &verifying())?;
    ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
    let lost = report.poisoned();
    ensure!((1..=spoiled).contains(&lost), "{lost} of {spoiled} lost");
    daemon.process().fail(GENEROUS)?;
    let log = fs::read_to_string(here.join("lazy.log"))?;
    ensure!(log.contains("memory is lost"), "{log}");
    let reader = if served {
        dumped.join("serve.log")
    } else {
        here.join("lazy.log")
    };
    let log = fs::read_to_string(reader)?;
    ensure!(log.contains("cannot be decompressed"), "{log}");
    Ok(())
}

#[test]
fn pages_that_do_not_decode_here_are_lost_alone() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_spoiled_pages(test_dir, criu, false)
    });
}

#[test]
fn pages_that_do_not_decode_at_the_server_are_lost_alone() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_spoiled_pages(test_dir, criu, true)
    });
}

#[test]
fn criu_4_2_restores_lazily_what_is_served_from_them() {
    with_criu(Suite::Sid, post_copy_from_our_images);
}

#[test]
fn criu_4_3_restores_lazily_what_is_served_from_them() {
    with_criu(Suite::Experimental, post_copy_from_our_images);
}

#[test]
fn what_criu_s_own_tool_compresses_is_served() {
    let Some(crit) = gate::crit() else {
        return;
    };
    with_criu(Suite::Experimental, |test_dir, criu| {
        for client in [Make::Criu(criu), Make::Ours] {
            let test_dir = TestDir::new_in(test_dir.dir())?;
            let to_files =
                |load: &Load, images: &Path| Dump::new(criu, load.pid(), images).run().map(drop);
            let gone = DumpedLoad::by(&test_dir, to_files, |images| crit.compress(images))?;
            gone.come_back(criu, client)?;
        }
        Ok(())
    });
}
