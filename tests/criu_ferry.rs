//! A real CRIU dumps through ferry: its memory goes from one page-server to another, and is
//! restored from there; or the dump fails and the source lives on, and never anything else.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::dumped_load::restore_and_check;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::pki::{Authority, Host};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Link, Proxy};
use testbed::summary::{number, of_session};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    one_process_with_mixed_pages,
    a_tree_with_shared_memory,
    over_tls,
    full_dumps_make_incremental_images,
    broken_links_are_resumed,
    links_that_never_work_fail_the_dump,
    a_far_end_that_is_gone_fails_the_dump,
);

/// Every so-manieth page changes between two rounds.
const CHANGED_EVERY: u32 = 50;

/// A forwarder to `far_end`, logging in `dir`.
fn forwarder(dir: PathBuf, far_end: SocketAddr, extra: &[&str]) -> Result<PageServer> {
    let far_end = far_end.to_string();
    let options = Options::new(dir).with(&["--forward", &far_end]).with(extra);
    PageServer::receiving(Make::Ours, &options)
}

/// Dumps a load over two page servers, which have options of `both` and the first one of `near`, and
/// restores it.
fn dump_and_restore(
    test_dir: &TestDir,
    criu: &Criu,
    spec: LoadSpec,
    both: &[&str],
    near: &[&str],
) -> Result<()> {
    let mut load = Load::start(spec, None)?;
    let images = test_dir.path("images");
    let options = Options::new(&images).log_to("far.log").with(both);
    let far_end = PageServer::receiving(Make::Ours, &options)?;
    let near_options = [both, near].concat();
    let near_end = forwarder(test_dir.path("near"), far_end.address(), &near_options)?;
    Dump::new(criu, load.pid(), &images)
        .to(near_end.address())
        .run()?;
    near_end.finish(GENEROUS)?;
    far_end.finish(GENEROUS)?;
    restore_and_check(criu, &images, &mut load)
}

fn one_process_with_mixed_pages(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    dump_and_restore(
        test_dir,
        criu,
        LoadSpec::mixed(test_dir.path("load"), 64),
        &[],
        &[],
    )
}

fn a_tree_with_shared_memory(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    dump_and_restore(
        test_dir,
        criu,
        LoadSpec::tree(test_dir.path("load"), 48, 4),
        &[],
        &["--streams", "3"],
    )
}

fn over_tls(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let dir = test_dir.path("pki");
    fs::create_dir_all(&dir)?;
    let tls = Authority::new(&dir, "ca")?
        .issue(&Host::LOOPBACK)?
        .options();
    let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
    let spec = LoadSpec::mixed(test_dir.path("load"), 32);
    dump_and_restore(test_dir, criu, spec, &tls, &["--streams", "2"])
}

/// Four rounds, the last of which ends the process; before the third the forwarder is started anew.
fn full_dumps_make_incremental_images(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 64), None)?;
    let verify = Step::Verify(Pass::full(Order::Ascending));
    let far_address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port()?);
    let images = |round: u32| test_dir.path(&format!("round-{round}"));
    let (mut first_bytes, mut digest) = (0, None);
    for (from, to, name) in [(1, 2, "near"), (3, 4, "near-again")] {
        let path = test_dir.path(&format!("{name}.json"));
        let extra = ["--keep", "--summary-json", &path.to_string_lossy()];
        let mut near_end = forwarder(test_dir.path(name), far_address, &extra)?;
        for round in from..=to {
            let options = Options::new(images(round)).log_to("far.log");
            let mut options = options.at_port(far_address.port());
            if round > 1 {
                options = options.on_parent(Path::new(&format!("../round-{}", round - 1)));
                let write = Step::Write {
                    every: CHANGED_EVERY,
                    order: Order::Random,
                };
                load.run(0, &[write])?;
            }
            let far_end = PageServer::receiving(Make::Ours, &options)?;
            let mut dump = Dump::new(criu, load.pid(), images(round)).to(near_end.address());
            if round < 4 {
                dump = dump.leave_running();
            } else {
                let before = load.run(0, &[verify])?;
                before.expect_right()?;
                digest = before.steps[0].digest;
            }
            dump.run()?;
            far_end.finish(GENEROUS)?;
            let sent = of_session(&path, usize::try_from(round - from)?)?;
            ensure!(sent["forwarded"] == true, "{sent}");
            let frames = number(&sent, "/frame_bytes")?;
            let pages = number(&sent, "/received_bytes")? / number(&sent, "/page_bytes")?;
            let same = number(&sent, "/sent/same/pages")?;
            if round == 1 {
                first_bytes = frames;
                for kind in ["zero", "zstd", "raw"] {
                    let sent_so = number(&sent, &format!("/sent/{kind}/pages"))?;
                    ensure!(sent_so > 0, "no {kind} pages: {sent}");
                }
                ensure!(same == 0, "{sent}");
            } else {
                ensure!(same > pages / 10 * 9, "{same} of {pages} the same: {sent}");
                ensure!(frames < first_bytes / 10, "{frames} of {first_bytes}");
                // Another far end, with another key: what it has is asked for, whoever asks.
                let learned = number(&sent, "/hashes_learned")?;
                ensure!(learned > pages / 10 * 9, "{learned} hashes: {sent}");
            }
        }
        near_end.process().kill()?;
    }
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, images(4)).run()?;
    let verify = Step::Verify(Pass::full(Order::Random));
    let after = load.run(0, &[verify])?;
    after.expect_right()?;
    ensure!(
        digest.is_some() && after.steps[0].digest == digest,
        "another memory came back"
    );
    Ok(())
}

/// Both ends with a proxy between them, and a process to dump.
struct Between {
    load: Load,
    images: PathBuf,
    far_end: PageServer,
    proxy: Proxy,
    near_end: PageServer,
}

impl Between {
    fn start(
        test_dir: &TestDir,
        name: &str,
        impairment: Option<Impairment>,
        link: Link,
        extra: &[&str],
    ) -> Result<Between> {
        let dir = test_dir.path(name);
        let images = dir.join("images");
        let time_limit = ["--reconnect-timeout", "3"];
        let options = Options::new(&images).log_to("far.log").with(&time_limit);
        let far_end = PageServer::receiving(Make::Ours, &options)?;
        let proxy = Proxy::start(far_end.address(), link, impairment)?;
        let extra = [&time_limit[..], extra].concat();
        Ok(Between {
            load: Load::start(LoadSpec::mixed(dir.join("load"), 48), None)?,
            near_end: forwarder(dir.join("near"), proxy.address(), &extra)?,
            images,
            far_end,
            proxy,
        })
    }

    fn dump<'c>(&self, criu: &'c Criu) -> Dump<'c> {
        Dump::new(criu, self.load.pid(), &self.images).to(self.near_end.address())
    }

    /// Whatever the far end still waits for does not come: the dump must have failed, and the source
    /// must live. No image may have its name.
    fn expect_untouched(mut self) -> Result<()> {
        self.load.expect_running()?;
        self.near_end.process().fail(GENEROUS)?;
        if self.far_end.process().ended()?.is_none() {
            self.far_end.process().kill()?;
        }
        for entry in fs::read_dir(&self.images)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let is_image = name.starts_with("pagemap-") || name.starts_with("pages-");
            let in_pieces = name.starts_with("pages-1.") || !name.ends_with(".img");
            ensure!(!is_image || in_pieces, "{name} is there");
        }
        Ok(())
    }
}

fn broken_links_are_resumed(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for (number, (direction, after_bytes, kind, streams)) in [
        (Direction::ToServer, 3_000_000, ImpairmentKind::Reset, "1"),
        (Direction::ToServer, 2_345_678, ImpairmentKind::FlipBit, "1"),
        (Direction::ToServer, 4_000_001, ImpairmentKind::End, "3"),
        (Direction::ToClient, 1_500, ImpairmentKind::FlipBit, "2"),
    ]
    .into_iter()
    .enumerate()
    {
        let impairment = Impairment {
            direction,
            after_bytes,
            kind,
        };
        let name = format!("impairment-{number}");
        let extra = ["--streams", streams];
        let link = Link::default();
        let mut between = Between::start(test_dir, &name, Some(impairment), link, &extra)?;
        between.dump(criu).run().with_context(|| name.clone())?;
        between.near_end.finish(GENEROUS)?;
        between.far_end.finish(GENEROUS)?;
        restore_and_check(criu, &between.images, &mut between.load).context(name)?;
    }
    Ok(())
}

fn links_that_never_work_fail_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let impairment = |after_bytes| Impairment {
        direction: Direction::ToServer,
        after_bytes,
        kind: ImpairmentKind::FlipBit,
    };
    // Where not even a greeting arrives the forwarder does not start.
    let deaf = Between::start(
        test_dir,
        "no-greeting",
        Some(impairment(50)),
        Link::default(),
        &[],
    );
    let error = deaf
        .err()
        .context("a forwarder has started that reaches nobody")?;
    let text = format!("{error:#}");
    ensure!(
        text.contains("no page-server that receives dumps"),
        "{text}"
    );
    let name = "no-batch";
    let between = Between::start(
        test_dir,
        name,
        Some(impairment(60_000)),
        Link::default(),
        &[],
    )?;
    between.dump(criu).start()?.fail(GENEROUS)?;
    between.expect_untouched().context(name)
}

fn a_far_end_that_is_gone_fails_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let link = Link {
        bytes_per_s: Some(20 << 20),
        ..Link::default()
    };
    let mut between = Between::start(test_dir, "gone", None, link, &[])?;
    let mut dump = between.dump(criu).start()?;
    wait::until("a part of the dump", GENEROUS, || {
        Ok((between.proxy.carried(Direction::ToServer) > 2 << 20).then_some(()))
    })?;
    between.far_end.process().kill()?;
    dump.fail(GENEROUS)?;
    between.expect_untouched()
}
