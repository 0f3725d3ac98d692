//! Pre-copy, then post-copy, with real CRIUs: an earlier round of the processes is there already, and
//! of the lazy dump only what has changed since travels.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::images::page_size;
use testbed::load::Load;
use testbed::load::scenarios::{reading, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Step};
use testbed::migration::Dump;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Link};
use testbed::rounds::pages_files;
use testbed::suite::with_criu;
use testbed::summary::{number, of_session, whole};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    only_what_has_changed_travels,
    reads_at_random_meanwhile,
    hashes_of_the_pre_copy_need_not_be_asked_for,
);

const MIB: u32 = 64;
/// Every so-manieth page changes behind the earlier round.
const CHANGED_EVERY: u32 = 50;

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

/// A load of which an earlier round was dumped, and which has changed a little since.
struct Changed<'a> {
    criu: &'a Criu,
    load: Load,
    /// The earlier round's images.
    earlier: PathBuf,
    /// The file with its hashes.
    hashes: String,
    /// What the lazy-client and the forwarder tell.
    told: [PathBuf; 2],
}

impl<'a> Changed<'a> {
    fn start(test_dir: &TestDir, criu: &'a Criu, spec: LoadSpec) -> Result<Changed<'a>> {
        let processes = spec.processes;
        let load = Load::start(spec, None)?;
        let earlier = test_dir.path("earlier");
        let (hashes, near) = (test_dir.path("hashes"), test_dir.path("near"));
        let server = PageServer::receiving(Make::Ours, &Options::new(&earlier))?;
        let far_end = server.address().to_string();
        let hashes = hashes.to_string_lossy().into_owned();
        let options = ["--forward", &far_end, "--save-hashes", &hashes];
        let forwarder = PageServer::receiving(Make::Ours, &Options::new(near).with(&options))?;
        Dump::new(criu, load.pid(), &earlier)
            .to(forwarder.address())
            .leave_running()
            .run()?;
        forwarder.finish(GENEROUS)?;
        server.finish(GENEROUS)?;
        let (every, order) = (CHANGED_EVERY, Order::Random);
        for process in 0..processes {
            load.run(process, &[Step::Write { every, order }])?;
        }
        Ok(Changed {
            criu,
            load,
            earlier,
            hashes,
            told: ["client.json", "forward.json"].map(|name| test_dir.path(name)),
        })
    }

    /// A post-copy through a forwarder to a client that has the earlier round.
    fn plan(&self) -> Plan<'a> {
        let earlier = self.earlier.to_string_lossy().into_owned();
        let mut plan = self.plan_from_nothing();
        plan.client_options
            .extend(["--prev-images-dir".to_owned(), earlier]);
        plan
    }

    /// The same to a client that has nothing.
    fn plan_from_nothing(&self) -> Plan<'a> {
        let tell = |told: &Path| {
            let told = told.to_string_lossy().into_owned();
            vec!["--summary-json".to_owned(), told]
        };
        let plan = Plan::new(self.criu, Source::Forwarder, Make::Ours).over(slow_link());
        Plan {
            client_options: [vec!["--ferry".to_owned()], tell(&self.told[0])].concat(),
            source_options: tell(&self.told[1]),
            ..plan
        }
    }
}

/// What a client with the earlier round did, which no thread disturbed: `local` pages of `all`.
#[derive(Clone, Copy)]
struct LocalPages {
    local: u64,
    all: u64,
}

impl LocalPages {
    fn read(summary: &Path) -> Result<LocalPages> {
        let summary = whole(summary)?;
        ensure!(number(&summary, "/missing_pages")? == 0, "{summary}");
        Ok(LocalPages {
            local: number(&summary, "/pages/local")?,
            all: number(&summary, "/total_pages")?,
        })
    }
}

fn only_what_has_changed_travels(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let changed = Changed::start(test_dir, criu, spec(test_dir))?;
    let (plan, [client, forwarder]) = (changed.plan(), changed.told.clone());
    let mut moved = PostCopy::of(test_dir, &plan, changed.load, &[])?;
    moved.finish()?;
    moved.expect_all_right()?;
    let LocalPages { local, all } = LocalPages::read(&client)?;
    ensure!(local < all && local > all / 10 * 9, "{local} of {all}");
    let sent = of_session(&forwarder, 0)?;
    let same = number(&sent, "/sent/same/pages")?;
    ensure!(same >= local, "{local} pages were local: {sent}");
    let learned = number(&sent, "/hashes_learned")?;
    ensure!(learned > all / 10 * 9, "{learned} hashes for {all} pages");
    let (came, bytes) = (moved.received(), all * page_size()?.bytes());
    ensure!(came < bytes / 10, "{came} bytes for {bytes}");
    let went = moved.carried(Direction::ToServer);
    // 16 bytes a page, and acknowledgements.
    ensure!((16 * learned..48 * all).contains(&went), "{went} bytes");
    Ok(())
}

/// The hashes that the pre-copy's forwarder has saved stand for those of the client.
fn hashes_of_the_pre_copy_need_not_be_asked_for(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let changed = Changed::start(test_dir, criu, spec(test_dir))?;
    let (mut plan, [client, forwarder]) = (changed.plan(), changed.told.clone());
    let known = ["--known-hashes".to_owned(), changed.hashes];
    plan.source_options.extend(known);
    let mut moved = PostCopy::of(test_dir, &plan, changed.load, &[])?;
    moved.finish()?;
    moved.expect_all_right()?;
    let LocalPages { local, all } = LocalPages::read(&client)?;
    ensure!(local < all && local > all / 10 * 9, "{local} of {all}");
    let sent = of_session(&forwarder, 0)?;
    ensure!(number(&sent, "/hashes_learned")? == 0, "{sent}");
    let went = moved.carried(Direction::ToServer);
    ensure!(went < 8 * all, "{went} bytes for {all} pages");
    Ok(())
}

/// The client has images of another moment than the hashes are of.
#[test]
fn hashes_of_other_images_make_no_page_wrong() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let changed = Changed::start(test_dir, criu, spec(test_dir))?;
        let (mut plan, [client, _]) = (changed.plan(), changed.told.clone());
        let known = ["--known-hashes".to_owned(), changed.hashes];
        plan.source_options.extend(known);
        damage(&changed.earlier, 4)?;
        let mut moved = PostCopy::of(test_dir, &plan, changed.load, &verifying())?;
        moved.reports()?;
        moved.finish()?;
        moved.expect_all_right()?;
        let LocalPages { local, all } = LocalPages::read(&client)?;
        ensure!(local < all / 2, "{local} of {all} were believed");
        Ok(())
    });
}

/// What is no file of hashes is not used, and said to be none.
#[test]
fn a_file_of_hashes_that_is_cut_off_is_not_used() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let changed = Changed::start(test_dir, criu, spec(test_dir))?;
        let (mut plan, [client, forwarder]) = (changed.plan(), changed.told.clone());
        let file = File::options().write(true).open(&changed.hashes)?;
        let bytes = file.metadata()?.len();
        file.set_len(bytes / 2)?;
        let known = ["--known-hashes".to_owned(), changed.hashes];
        plan.source_options.extend(known);
        let mut moved = PostCopy::of(test_dir, &plan, changed.load, &[])?;
        moved.finish()?;
        moved.expect_all_right()?;
        let LocalPages { local, all } = LocalPages::read(&client)?;
        ensure!(local > all / 10 * 9, "{local} of {all}");
        let sent = of_session(&forwarder, 0)?;
        ensure!(number(&sent, "/hashes_learned")? > 0, "{sent}");
        Ok(())
    });
}

fn reads_at_random_meanwhile(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let changed = Changed::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), MIB))?;
    let (plan, [client, _]) = (changed.plan(), changed.told.clone());
    let mut moved = PostCopy::of(test_dir, &plan, changed.load, &reading())?;
    moved.reports()?;
    moved.finish()?;
    moved.expect_all_right()?;
    let LocalPages { local, all } = LocalPages::read(&client)?;
    ensure!(local > all / 2, "{local} of {all}");
    Ok(())
}

#[test]
fn faults_on_demand_are_answered_from_the_earlier_round() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // A fault each for most of the pages.
        let small = LoadSpec::mixed(test_dir.path("load"), 8);
        let changed = Changed::start(test_dir, criu, small)?;
        let (mut plan, [client, forwarder]) = (changed.plan(), changed.told.clone());
        plan.client_options.push("--on-demand".to_owned());
        let mut moved = PostCopy::of(test_dir, &plan, changed.load, &verifying())?;
        moved.reports()?;
        // There are pages that it never looks at.
        moved.restored.kill();
        moved.finish()?;
        let told = whole(&client)?;
        ensure!(number(&told, "/pages/stream")? == 0, "{told}");
        let LocalPages { local, all } = LocalPages::read(&client)?;
        // Faults that come before the hashes are answered in full.
        ensure!(local > all / 2, "{local} of {all}");
        let sent = of_session(&forwarder, 0)?;
        ensure!(number(&sent, "/sent/same/pages")? == 0, "{sent}");
        Ok(())
    });
}

#[test]
fn a_tree_builds_on_the_parent_of_its_images() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec::tree(test_dir.path("load"), 48, 3);
        let changed = Changed::start(test_dir, criu, spec)?;
        let (mut plan, [client, _]) = (changed.plan_from_nothing(), changed.told.clone());
        // The link is made where the images are put for the restore.
        plan.parent_of_restored = Some(changed.earlier.clone());
        let mut moved = PostCopy::of(test_dir, &plan, changed.load, &[])?;
        moved.finish()?;
        moved.expect_all_right()?;
        let LocalPages { local, all } = LocalPages::read(&client)?;
        ensure!(local > all / 10 * 8, "{local} of {all}");
        Ok(())
    });
}

#[test]
fn clients_with_and_without_an_earlier_round_get_the_same() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let changed = Changed::start(test_dir, criu, spec(test_dir))?;
        let client = changed.told[0].clone();
        let mut plans = [changed.plan(), changed.plan_from_nothing(), changed.plan()];
        for plan in &mut plans {
            plan.source_options.push("--keep".to_owned());
        }
        let mut moved = PostCopy::of(test_dir, &plans[0], changed.load, &[])?;
        for (n, next) in plans.iter().enumerate().skip(1) {
            moved.daemon.process().succeed(GENEROUS)?;
            moved.expect_all_right()?;
            let local = LocalPages::read(&client)?.local;
            ensure!((local > 0) == (n == 1), "client {n}: {local} local pages");
            moved = moved.again(next, &[])?;
        }
        moved.daemon.process().succeed(GENEROUS)?;
        moved.expect_all_right()?;
        ensure!(LocalPages::read(&client)?.local > 0, "the last client");
        let forwarder = moved.forwarder().context("the forwarder")?;
        forwarder.signal(Signal::SIGTERM)?;
        forwarder.succeed(GENEROUS)?;
        Ok(())
    });
}

/// An impairment on the way of the hashes, or of the pages.
fn with_impairment(
    test_dir: &TestDir,
    criu: &Criu,
    direction: Direction,
    kind: ImpairmentKind,
) -> Result<()> {
    let changed = Changed::start(test_dir, criu, spec(test_dir))?;
    // A quarter of the hashes; as many bytes of what is answered to them.
    let after_bytes = 64 << 10;
    let impairment = Impairment {
        direction,
        after_bytes,
        kind,
    };
    let plan = changed.plan().with_impairment(slow_link(), impairment);
    let client = changed.told[0].clone();
    let mut moving = PostCopy::of(test_dir, &plan, changed.load, &verifying())?;
    moving.reports()?;
    moving.finish()?;
    let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
    ensure!(log.contains("the source is back"), "nothing was impaired");
    let LocalPages { local, all } = LocalPages::read(&client)?;
    ensure!(local > all / 2, "{local} of {all}");
    Ok(())
}

#[test]
fn a_link_that_is_cut_among_the_hashes_is_made_again() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_impairment(test_dir, criu, Direction::ToServer, ImpairmentKind::Reset)
    });
}

#[test]
fn a_link_that_ends_among_the_pages_is_made_again() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        with_impairment(test_dir, criu, Direction::ToClient, ImpairmentKind::End)
    });
}

#[test]
fn a_bit_that_flips_among_the_hashes_is_found() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_impairment(test_dir, criu, Direction::ToServer, ImpairmentKind::FlipBit)
    });
}

/// Flips a bit in every `every`th page of the images in `dir`.
fn damage(dir: &Path, every: u64) -> Result<u64> {
    let (page, mut damaged) = (page_size()?.bytes(), 0);
    for path in pages_files(dir)? {
        let file = File::options().read(true).write(true).open(path)?;
        let pages = file.metadata()?.len() / page;
        for offset in (0..pages).step_by(every.try_into()?).map(|n| n * page + 77) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset)?;
            file.write_all_at(&[byte[0] ^ 4], offset)?;
            damaged += 1;
        }
    }
    Ok(damaged)
}

#[test]
fn pages_that_were_changed_behind_our_back_travel() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let changed = Changed::start(test_dir, criu, spec(test_dir))?;
        let damaged = damage(&changed.earlier, 10)?;
        let (plan, client) = (changed.plan(), changed.told[0].clone());
        let mut moved = PostCopy::of(test_dir, &plan, changed.load, &[])?;
        moved.finish()?;
        moved.expect_all_right()?;
        let LocalPages { local, all } = LocalPages::read(&client)?;
        ensure!(local > all / 2, "{local} of {all}");
        // Some of the damaged pages are not lazy.
        ensure!(
            all - local > damaged / 2,
            "{local} of {all}, {damaged} damaged"
        );
        Ok(())
    });
}

/// A post-copy on an earlier round to whose images something `befalls` between the hashes and the answers.
fn with_accident(
    test_dir: &TestDir,
    criu: &Criu,
    befalls: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let spec = LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::mixed(test_dir.path("load"), 16)
    };
    let changed = Changed::start(test_dir, criu, spec)?;
    // Time enough for that.
    let link = Link {
        round_trip: Duration::from_millis(400),
        bytes_per_s: None,
        hides_resets: false,
    };
    let plan = changed.plan().over(link);
    let earlier = changed.earlier.clone();
    let mut moving = PostCopy::of(test_dir, &plan, changed.load, &[])?;
    wait::until("hashes", GENEROUS, || {
        let told = moving.carried(Direction::ToServer) > 12 << 10;
        Ok(told.then_some(()))
    })?;
    befalls(&earlier)?;
    moving.finish()?;
    moving.expect_all_right()?;
    let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
    ensure!(
        log.contains("the earlier round of"),
        "every page was what it had been: nothing was tested"
    );
    Ok(())
}

#[test]
fn pages_that_change_behind_their_hashes_travel() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_accident(test_dir, criu, |earlier| damage(earlier, 2).map(drop))
    });
}

#[test]
fn pages_that_cannot_be_read_behind_their_hashes_travel() {
    with_criu(Suite::Sid, |test_dir, criu| {
        with_accident(test_dir, criu, |earlier| {
            for path in pages_files(earlier)? {
                File::options().write(true).open(path)?.set_len(0)?;
            }
            Ok(())
        })
    });
}
