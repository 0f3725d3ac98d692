//! `cargo xtask exchange`: programs of another build and of this one work together, in both directions.
//!
//! ```text
//! images         page-server of one stores      lazy-client, page-server of the other read
//! serve          page-server --lazy-pages       lazy-client
//! forward        page-server --forward          page-server
//! forward-lazy   page-server --forward-lazy     lazy-client [--ferry]
//! ```
//!
//! A real CRIU dumps and restores in each case, and each process compares all its memory. Build the other
//! version first (`git worktree add DIR REVISION`, `cargo build -p page-server -p lazy-client` in it) and name the
//! directory of its programs.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use testbed::criu::{self, Criu};
use testbed::daemons::{Make, Options, PageServer};
use testbed::dumped_load::restore_and_check;
use testbed::load::Load;
use testbed::load::scenarios::{reading, reshaping, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Step};
use testbed::migration::Dump;
use testbed::net::free_port;
use testbed::pki::{Authority, Host};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Impairment, ImpairmentKind};
use testbed::rounds::{Rounds, pages_files};
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace::use_binaries;

use crate::setup;

/// Whose programs, and with which CRIU.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory of the other build's page-server and lazy-client.
    other: PathBuf,

    /// Only the cases whose name contains this.
    #[arg(long)]
    case: Option<String>,

    /// A CRIU version (4.2.1) or Debian suite (trixie, sid, experimental).
    #[arg(long, default_value = "sid")]
    criu: String,
}

/// Memory of each process, MiB.
const MIB: u32 = 64;

/// Every so-manieth page changes between two rounds.
const CHANGED_EVERY: u32 = 50;

/// Who plays which part: the end that has the memory or wrote the images, and the end that gets it.
#[derive(Clone, Copy)]
struct Ends<'a> {
    criu: &'a Criu,
    from: Make<'a>,
    to: Make<'a>,
}

type Case = fn(&TestDir, Ends<'_>) -> Result<()>;

const CASES: [(&str, Case); 12] = [
    ("images are restored lazily", images_are_restored),
    ("images are served", images_are_served),
    ("rounds build on images", rounds_build_on_images),
    ("serve", serve),
    ("forward, two rounds", forward),
    ("forward over TLS, three streams", forward_over_tls),
    (
        "forward to a receiver that was there first",
        forward_looks_first,
    ),
    ("forward-lazy, CRIU's protocol", forward_lazy),
    ("forward-lazy, ferry", forward_lazy_ferry),
    ("forward-lazy, ferry, cut half way", forward_lazy_cut),
    ("forward-lazy, ferry, on demand", forward_lazy_on_demand),
    ("forward-lazy, ferry, earlier round", forward_lazy_earlier),
];

/// Runs all cases in both directions and prints a table. Fails if one of them fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    use_binaries(setup::debug_binaries()?);
    let criu = criu::of_version(&args.criu)?;
    let (ours, other) = (Make::Ours, Make::Build(&args.other));
    let wanted = |name: &str| args.case.as_ref().is_none_or(|part| name.contains(part));
    let mut failed = 0;
    println!(
        "CRIU {}\n\n| case | other -> this | this -> other |\n|---|---|---|",
        criu.version
    );
    for (name, case) in CASES.iter().filter(|(name, _)| wanted(name)) {
        let mut cells = Vec::new();
        for (from, to) in [(other, ours), (ours, other)] {
            let test_dir = TestDir::new()?;
            let criu = &criu;
            let ended = case(&test_dir, Ends { criu, from, to });
            if let Err(error) = &ended {
                failed += 1;
                eprintln!("{name}: {error:#}");
                test_dir.show_logs();
            }
            cells.push(ended.map_or("FAIL", |()| "pass"));
        }
        println!("| {name} | {} |", cells.join(" | "));
    }
    ensure!(failed == 0, "{failed} failed");
    Ok(())
}

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB)
}

/// Runs a post-copy whose processes carry out `steps`, and compares everything at the end.
fn restore_lazily(mut moved: PostCopy) -> Result<()> {
    moved.reports()?;
    moved.finish()?;
    moved.expect_all_right()
}

/// A page-server of one build stores a dump. Returns the images, and what the processes were.
fn stored(
    test_dir: &TestDir,
    ends: Ends<'_>,
) -> Result<(PathBuf, Load, Vec<testbed::load::report::Report>)> {
    let mut load = Load::start(spec(test_dir), None)?;
    let before = load.run_everywhere(&[Step::Status])?;
    let images = test_dir.path("stored");
    let server = PageServer::receiving(ends.from, &Options::new(&images))?;
    Dump::new(ends.criu, load.pid(), &images)
        .to(server.address())
        .run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    Ok((images, load, before))
}

fn images_are_restored(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let (images, load, before) = stored(test_dir, ends)?;
    let plan = Plan::new(ends.criu, Source::Local, ends.to);
    let moved = PostCopy::from_images(&plan, load, before, images, None, &reading())?;
    restore_lazily(moved)
}

fn images_are_served(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let (images, load, before) = stored(test_dir, ends)?;
    let here = test_dir.path("restored");
    testbed::images::copy_without_lazy_pages(&images, &here)?;
    let server = PageServer::serving(ends.to, &Options::new(&images).log_to("serve.log"))?;
    let plan = Plan::new(ends.criu, Source::PageServer(ends.to), ends.to);
    let moved = PostCopy::from_images(&plan, load, before, here, Some(server), &reading())?;
    restore_lazily(moved)
}

fn rounds_build_on_images(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let mut rounds = Rounds::start(test_dir, ends.criu, spec(test_dir))?;
    let write = Step::Write {
        every: CHANGED_EVERY,
        order: Order::Random,
    };
    rounds.dump(ends.from, &[])?;
    rounds.load.run(0, &[write])?;
    rounds.dump(ends.to, &["--dedup-content"])?;
    rounds.load.run(0, &[write])?;
    rounds.dump(ends.from, &["--dedup-content"])?;
    rounds.expect_restored(3).map(drop)
}

fn serve(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let plan = Plan::new(ends.criu, Source::PageServer(ends.from), ends.to).over(slow_link());
    restore_lazily(PostCopy::start(
        test_dir,
        &plan,
        spec(test_dir),
        &reading(),
    )?)
}

/// A forwarder to `far_end`.
fn forwarder(
    make: Make<'_>,
    dir: PathBuf,
    far_end: SocketAddr,
    extra: &[&str],
) -> Result<PageServer> {
    let far_end = far_end.to_string();
    let options = Options::new(dir).with(&["--forward", &far_end]).with(extra);
    PageServer::receiving(make, &options)
}

/// Two rounds of full dumps, the second on top of the first.
fn forward(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let load = Load::start(spec(test_dir), None)?;
    let far_end = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port()?);
    let mut near_end = forwarder(ends.from, test_dir.path("near"), far_end, &["--keep"])?;
    for round in [1, 2] {
        let images = test_dir.path(&format!("round-{round}"));
        let mut options = Options::new(&images)
            .log_to("far.log")
            .at_port(far_end.port());
        let mut dump = Dump::new(ends.criu, load.pid(), &images).to(near_end.address());
        match round {
            1 => dump = dump.leave_running(),
            _ => options = options.on_parent(Path::new("../round-1")),
        }
        let far_end = PageServer::receiving(ends.to, &options)?;
        dump.run()?;
        far_end.finish(GENEROUS)?;
        let files = pages_files(&images)?;
        let lengths = files.iter().map(|file| Ok(fs::metadata(file)?.len()));
        let stored: u64 = lengths.sum::<Result<u64>>()?;
        let most = u64::from(MIB) << if round == 1 { 20 } else { 17 };
        ensure!(stored < most, "{stored} bytes were stored in round {round}");
    }
    near_end.process().kill()?;
    let mut load = load;
    restore_and_check(ends.criu, &test_dir.path("round-2"), &mut load)
}

fn forward_over_tls(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let dir = test_dir.path("pki");
    fs::create_dir_all(&dir)?;
    let tls = Authority::new(&dir, "ca")?
        .issue(&Host::LOOPBACK)?
        .options();
    let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
    let far_end = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port()?);
    let extra = [&tls[..], &["--streams", "3"]].concat();
    let near_end = forwarder(ends.from, test_dir.path("near"), far_end, &extra)?;
    forward_a_tree(test_dir, ends, near_end, far_end.port(), &tls)
}

/// The forwarder looks at the receiver when it starts. A receiver of one session that does not know of that must
/// not take it for its session.
fn forward_looks_first(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let images = test_dir.path("images");
    let far_end = PageServer::receiving(ends.to, &Options::new(&images).log_to("far.log"))?;
    let near_end = forwarder(
        ends.from,
        test_dir.path("near"),
        far_end.address(),
        &["--reconnect-timeout", "3"],
    )?;
    let mut load = Load::start(spec(test_dir), None)?;
    Dump::new(ends.criu, load.pid(), &images)
        .to(near_end.address())
        .run()?;
    near_end.finish(GENEROUS)?;
    far_end.finish(GENEROUS)?;
    restore_and_check(ends.criu, &images, &mut load)
}

/// Dumps a tree through `near_end` to a receiver with further options, and restores it.
fn forward_a_tree(
    test_dir: &TestDir,
    ends: Ends<'_>,
    near_end: PageServer,
    port: u16,
    extra: &[&str],
) -> Result<()> {
    let images = test_dir.path("images");
    let options = Options::new(&images).log_to("far.log").at_port(port);
    let far_end = PageServer::receiving(ends.to, &options.with(extra))?;
    let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB / 4, 4), None)?;
    Dump::new(ends.criu, load.pid(), &images)
        .to(near_end.address())
        .run()?;
    near_end.finish(GENEROUS)?;
    far_end.finish(GENEROUS)?;
    restore_and_check(ends.criu, &images, &mut load)
}

/// A post-copy through a forwarder, over a link slow enough to find pages missing behind it.
fn through_forwarder<'a>(ends: Ends<'a>, client_options: &[&str]) -> Plan<'a> {
    Plan {
        forwarder: ends.from,
        client_options: client_options.iter().map(ToString::to_string).collect(),
        ..Plan::new(ends.criu, Source::Forwarder, ends.to).over(slow_link())
    }
}

fn forward_lazy(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let plan = through_forwarder(ends, &[]);
    restore_lazily(PostCopy::start(
        test_dir,
        &plan,
        spec(test_dir),
        &reading(),
    )?)
}

fn forward_lazy_ferry(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let plan = through_forwarder(ends, &["--ferry"]);
    restore_lazily(PostCopy::start(
        test_dir,
        &plan,
        spec(test_dir),
        &reshaping(),
    )?)
}

fn forward_lazy_cut(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let impairment = Impairment {
        direction: Direction::ToClient,
        after_bytes: u64::from(MIB) << 18,
        kind: ImpairmentKind::Reset,
    };
    let plan = Plan {
        impaired_connections: 2,
        ..through_forwarder(ends, &["--ferry"]).with_impairment(slow_link(), impairment)
    };
    restore_lazily(PostCopy::start(
        test_dir,
        &plan,
        spec(test_dir).careful(),
        &verifying(),
    )?)
}

fn forward_lazy_on_demand(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let plan = through_forwarder(ends, &["--ferry", "--on-demand"]);
    // A fault each for most of the pages.
    let small = LoadSpec::mixed(test_dir.path("load"), 8);
    let mut moved = PostCopy::start(test_dir, &plan, small, &verifying())?;
    moved.reports()?;
    moved.restored.kill();
    moved.finish()
}

fn forward_lazy_earlier(test_dir: &TestDir, ends: Ends<'_>) -> Result<()> {
    let load = Load::start(spec(test_dir).careful(), None)?;
    let earlier = test_dir.path("earlier");
    let server = PageServer::receiving(ends.to, &Options::new(&earlier))?;
    Dump::new(ends.criu, load.pid(), &earlier)
        .to(server.address())
        .leave_running()
        .run()?;
    server.finish(GENEROUS)?;
    let write = Step::Write {
        every: CHANGED_EVERY,
        order: Order::Random,
    };
    load.run(0, &[write])?;
    let dir = earlier.to_string_lossy();
    let plan = through_forwarder(ends, &["--ferry", "--prev-images-dir", &dir]);
    let mut moved = PostCopy::of(test_dir, &plan, load, &[])?;
    moved.finish()?;
    moved.expect_all_right()?;
    let came = moved.received();
    ensure!(came < u64::from(MIB) << 18, "{came} bytes came");
    Ok(())
}
