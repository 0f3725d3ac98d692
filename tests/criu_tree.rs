//! `--dedup-tree` with a real CRIU: a parent and its forks are stored as often as one of them, and restored with all
//! their memory, shared as before.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::agent::Agent;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::forks::{Forks, ForksSpec, pss_bytes};
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Step};
use testbed::migration::{Dump, Restore};
use testbed::process::run;
use testbed::proxy::Link;
use testbed::rounds::Rounds;
use testbed::suite::with_criu;
use testbed::summary::{number, of_session};
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

for_each_criu!(
    a_tree_is_stored_once_and_shares_its_memory_again,
    a_tree_of_all_sorts_is_restored,
);

#[test]
fn a_forwarded_tree_is_stored_once() {
    with_criu(Suite::Trixie, forwarded);
}

#[test]
fn rounds_of_a_tree_hold_what_changed() {
    with_criu(Suite::Experimental, rounds);
}

const DEDUP: &str = "--dedup-tree";

/// As in the case that this is for: each fork has changed one page of a hundred.
const CHANGED: ForksSpec = ForksSpec {
    children: 4,
    mib: 64,
    every: 100,
    mixed: false,
};

/// Pages of a process that are its own: heap, stack, data of libraries, bytes.
const OWN_BYTES_MAX: u64 = 640 << 10;

/// What shared memory may differ by between two looks, bytes.
const PSS_BYTES_MAX: u64 = 6 << 20;

/// Sends the dump of a tree to a page server that stores it once, directly or through a forwarder. The tree is gone
/// then.
fn dump(test_dir: &TestDir, criu: &Criu, tree: &mut Forks, forwarded: bool) -> Result<PathBuf> {
    let images = test_dir.path("images");
    let options = Options::new(&images).with(&[DEDUP]);
    let server = PageServer::receiving(Make::Ours, &options)?;
    let dump = Dump::new(criu, tree.pid(), &images);
    if forwarded {
        let to = server.address().to_string();
        let path = test_dir.path("source.json");
        let options = ["--forward", &to, "--summary-json", &path.to_string_lossy()];
        let options = Options::new(test_dir.path("source")).with(&options);
        let source = PageServer::receiving(Make::Ours, &options)?;
        dump.to(source.address()).run()?;
        source.finish(GENEROUS)?;
        server.finish(GENEROUS)?;
    } else {
        dump.received_by(server)?;
    }
    tree.wait_until_gone()?;
    Ok(images)
}

/// Length of all pages files in `dir` and below it, bytes.
fn pages_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            bytes += pages_bytes(&entry.path())?;
        } else if entry.file_name().to_string_lossy().starts_with("pages-") {
            bytes += entry.metadata()?.size();
        }
    }
    Ok(bytes)
}

/// Fails unless `images` have one process's memory, what each fork has changed, and what is each process's own.
fn expect_once(images: &Path, spec: ForksSpec) -> Result<()> {
    let (one, most) = (u64::from(spec.mib) << 20, once_bytes(spec));
    let bytes = pages_bytes(images)?;
    ensure!(
        (one..=most).contains(&bytes),
        "{bytes} bytes, of a process with {one}, at most {most}"
    );
    Ok(())
}

/// One process's memory, what each fork has changed, and what is each process's own.
fn once_bytes(spec: ForksSpec) -> u64 {
    let one = u64::from(spec.mib) << 20;
    let changed = match spec.every {
        0 => 0,
        every => one / u64::from(every) * u64::from(spec.children),
    };
    one + changed + u64::from(spec.children + 1) * OWN_BYTES_MAX
}

/// Lets `pageferry` say something of the images.
fn pageferry(words: &[&str], images: &Path) -> Result<String> {
    let mut command = Command::new(workspace::binary("pageferry")?);
    let output = command.args(words).arg(images).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "pageferry {words:?}: {stdout}{errors}"
    );
    Ok(stdout)
}

fn a_tree_is_stored_once_and_shares_its_memory_again(
    test_dir: &TestDir,
    criu: &Criu,
) -> Result<()> {
    let mut tree = Forks::start(&test_dir.path("forks"), CHANGED)?;
    tree.expect_right()?;
    let before = pss_bytes(&tree.pids())?;
    let images = dump(test_dir, criu, &mut tree, false)?;
    expect_once(&images, CHANGED)?;
    let output = pageferry(&["verify", "--no-read"], &images)?;
    ensure!(output.starts_with("good"), "{output}");
    let output = pageferry(&["inspect", "--no-read"], &images)?;
    ensure!(output.contains("shared by"), "{output}");

    let restored = Restore::new(criu, &images).run()?;
    tree.expect_right()?;
    let after: Vec<_> = restored.pids().into_iter().skip(1).collect();
    let after = pss_bytes(&after)?;
    ensure!(
        after.abs_diff(before) < PSS_BYTES_MAX,
        "{before} bytes before, {after} after"
    );
    Ok(())
}

fn forwarded(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = ForksSpec { mib: 32, ..CHANGED };
    let mut tree = Forks::start(&test_dir.path("forks"), spec)?;
    let images = dump(test_dir, criu, &mut tree, true)?;
    expect_once(&images, spec)?;
    let sent = of_session(&test_dir.path("source.json"), 0)?;
    let (wire, shared) = (
        number(&sent, "/frame_bytes")?,
        number(&sent, "/sent/shared/pages")?,
    );
    let most = once_bytes(spec) / 100 * 105;
    eprintln!("{wire} bytes on the wire, at most {most}; {shared} pages were named");
    ensure!(wire <= most, "{wire} bytes on the wire, at most {most}");
    let all = u64::from(spec.children * spec.mib) << 8;
    ensure!(
        shared > all / 100 * 95,
        "{shared} of {all} pages were named"
    );
    let _restored = Restore::new(criu, &images).run()?;
    tree.expect_right()
}

/// Processes that drop, lock and replace memory, and one that runs another program: restored by CRIU, lazily from the
/// images, and lazily from a page server that serves them.
fn a_tree_of_all_sorts_is_restored(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = ForksSpec {
        mib: 32,
        mixed: true,
        ..CHANGED
    };
    let mut tree = Forks::start(&test_dir.path("forks"), spec)?;
    tree.expect_right()?;
    let images = dump(test_dir, criu, &mut tree, false)?;
    let output = pageferry(&["verify"], &images)?;
    ensure!(output.starts_with("good"), "{output}");
    drop(Restore::new(criu, &images).run().and_then(|restored| {
        tree.expect_right().context("a plain restore")?;
        Ok(restored)
    })?);
    for served in [false, true] {
        let server = match served {
            true => Some(PageServer::serving(Make::Ours, &Options::new(&images))?),
            false => None,
        };
        let options = Options::new(&images).log_to("lazy.log");
        let address = server.as_ref().map(PageServer::address);
        let daemon = LazyDaemon::start(Make::Ours, &options, address)?;
        let _restored = Restore::new(criu, &images).lazily().run()?;
        tree.expect_right().context("a lazy restore")?;
        daemon.finish(GENEROUS)?;
        server.map(|server| server.finish(GENEROUS)).transpose()?;
    }
    Ok(())
}

fn rounds(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let area = AreaSpec::new;
    let spec = LoadSpec {
        processes: 4,
        ..LoadSpec::new(
            test_dir.path("load"),
            vec![
                area(Mapping::Private, 3_000, Content::Random),
                area(Mapping::SharedAnon, 1_000, Content::Mixed),
                area(Mapping::Memfd, 1_000, Content::Text),
                area(Mapping::SysV, 500, Content::Text),
                area(Mapping::Locked, 200, Content::Random),
            ],
        )
    };
    let mut rounds = Rounds::start(test_dir, criu, spec)?;
    rounds.dump(Make::Ours, &[DEDUP])?;
    let whole = pages_bytes(&rounds.images(1))?;
    for round in [2, 3] {
        let (every, order) = (20, Order::Ascending);
        for report in rounds
            .load
            .run_everywhere(&[Step::Write { every, order }])?
        {
            report.expect_right()?;
        }
        rounds.dump(Make::Ours, &[DEDUP, "--dedup-content"])?;
        let part = pages_bytes(&rounds.images(round))?;
        ensure!(part < whole / 2, "{part} of {whole} bytes in round {round}");
    }
    drop(rounds.expect_restored(3)?);
    drop(rounds.expect_restored(2)?);
    rounds.expect_restored(1).map(drop)
}

#[test]
fn a_killed_dump_leaves_nothing() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let tree = Forks::start(&test_dir.path("forks"), CHANGED)?;
        let images = test_dir.path("images");
        let server = PageServer::receiving(Make::Ours, &Options::new(&images).with(&[DEDUP]))?;
        // The second process's pages are on their way.
        let bytes = 80 << 20;
        Dump::new(criu, tree.pid(), test_dir.path("dump")).kill_half_way(
            server.address(),
            Link::default(),
            bytes,
        )?;
        let mut server = server;
        server.process().fail(GENEROUS)?;
        let left: Vec<String> = fs::read_dir(&images)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        let half_made = |name: &&String| {
            ["pages", "pagemap", "tree", ".tree", "parent", ".p"]
                .iter()
                .any(|part| name.starts_with(part))
        };
        ensure!(
            left.iter()
                .filter(half_made)
                .all(|name| name == "page-server.port"),
            "{left:?}"
        );
        Ok(())
    });
}

/// What a lazy restore would cost is told before.
#[test]
fn a_plan_tells_what_forks_share() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = ForksSpec {
            children: 3,
            mib: 32,
            every: 0,
            mixed: false,
        };
        let tree = Forks::start(&test_dir.path("forks"), spec)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let mut command = Command::new(workspace::binary("pageferry")?);
        command
            .args(["plan", "--json", "--pid", &tree.pid().to_string()])
            .args(["--to", &agent.address().to_string(), "--state-dir"])
            .arg(test_dir.path("source"))
            .arg("--criu")
            .arg(&criu.path);
        let plan: Value = serde_json::from_slice(&run(&mut command)?.stdout)?;
        testbed::schema::expect("plan", &plan)?;
        let number = |value: &Value| value.as_u64().context("a number");
        let copied = number(&plan["copied_bytes"])?;
        let expected = u64::from(spec.children * spec.mib) << 20;
        ensure!(
            copied.abs_diff(expected) < PSS_BYTES_MAX,
            "{copied} bytes: {plan}"
        );
        let takes = |name: &str| {
            let modes = plan["modes"].as_array().context("modes")?;
            let mode = modes.iter().find(|mode| mode["mode"] == name);
            number(&mode.context("no such mode")?["memory_bytes"])
        };
        ensure!(takes("hybrid")? == takes("cold")? + copied, "{plan}");
        ensure!(takes("pre-copy")? == takes("cold")?, "{plan}");
        Ok(())
    });
}

/// Forwards the dump of a tree, checks its restore, and tells the bytes of the frames.
fn wire_bytes(test_dir: &TestDir, place: &Path, criu: &Criu, spec: ForksSpec) -> Result<u64> {
    let mut tree = Forks::start(place, spec)?;
    let (images, summary) = (place.join("images"), place.join("source.json"));
    fs::create_dir_all(&images)?;
    let server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
    let options = [
        "--forward",
        &server.address().to_string(),
        "--summary-json",
        &summary.to_string_lossy(),
    ];
    let source = test_dir.path("source");
    let source = PageServer::receiving(Make::Ours, &Options::new(source).with(&options))?;
    Dump::new(criu, tree.pid(), &images)
        .to(source.address())
        .run()?;
    source.finish(GENEROUS)?;
    server.finish(GENEROUS)?;
    tree.wait_until_gone()?;
    drop(Restore::new(criu, &images).run().and_then(|restored| {
        tree.expect_right()?;
        Ok(restored)
    })?);
    let bytes = number(&of_session(&summary, 0)?, "/frame_bytes")?;
    // The next tree needs the room.
    fs::remove_dir_all(place)?;
    Ok(bytes)
}

/// The bars of ferry: bytes on the wire beside those of one process.
#[test]
#[ignore = "5 GB of memory through two page servers: cargo nextest run --test criu_tree --run-ignored only"]
fn eight_forks_of_256_mib_on_the_wire() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let forks = |children, every| ForksSpec {
            children,
            mib: 256,
            every,
            mixed: false,
        };
        let one = wire_bytes(test_dir, &test_dir.path("one"), criu, forks(0, 0))?;
        for (every, most) in [(0, 1.05), (100, 1.15)] {
            let place = test_dir.path(&format!("every-{every}"));
            let all = wire_bytes(test_dir, &place, criu, forks(8, every))?;
            let ratio = all as f64 / one as f64;
            eprintln!("each {every}th page written: {all} bytes, {ratio:.3} times one process");
            ensure!(ratio <= most, "{ratio}");
        }
        Ok(())
    });
}

/// The bars of this feature: image bytes beside those of one process.
#[test]
#[ignore = "2.3 GB of memory through a page server: cargo nextest run --test criu_tree --run-ignored only"]
fn eight_forks_of_256_mib() {
    with_criu(Suite::Sid, |test_dir, criu| {
        for (every, most) in [(0, 1.05), (100, 1.15)] {
            let spec = ForksSpec {
                children: 8,
                mib: 256,
                every,
                mixed: false,
            };
            let place = test_dir.path(&format!("every-{every}"));
            let mut tree = Forks::start(&place, spec)?;
            let images = place.join("images");
            let server = PageServer::receiving(Make::Ours, &Options::new(&images).with(&[DEDUP]))?;
            Dump::new(criu, tree.pid(), &images)
                .to(server.address())
                .run()?;
            server.finish(GENEROUS)?;
            tree.wait_until_gone()?;
            let ratio = pages_bytes(&images)? as f64 / f64::from(256 << 20);
            eprintln!("each {every}th page written: {ratio:.3} times one process");
            ensure!(ratio <= most, "{ratio}");
            let _restored = Restore::new(criu, &images).run()?;
            tree.expect_right()?;
        }
        Ok(())
    });
}
