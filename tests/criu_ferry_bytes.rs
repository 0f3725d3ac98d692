//! What a post-copy over ferry moves: hardly more than there is, however its processes fault. Counted are the
//! bytes that the link carries to the client, over all connections; once by an interface too, with all headers.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::report::expect_faults;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::net::TwoHosts;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::process::run;
use testbed::proxy::ImpairmentKind;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

/// Pages of each process.
const PAGES: u32 = 6144;
const PAGE_BYTES: u64 = 4096;

/// Of the link with an interface, bits a second: slow enough for faults to come first.
const LINK_BITS: u64 = 256_000_000;

/// Of that link: headers take a hundredth.
const LINK_MTU: &str = "9000";

/// Each host has its ports to itself.
const DUMP_PORT: u16 = 27_001;
const FORWARDER_PORT: u16 = 27_002;

fn load(test_dir: &TestDir, processes: u32) -> LoadSpec {
    let area = AreaSpec::new(Mapping::Private, PAGES, Content::Random);
    LoadSpec {
        processes,
        pin_own_memory: true,
        ..LoadSpec::new(test_dir.path("load"), vec![area])
    }
}

fn plan<'a>(criu: &'a Criu, options: &[&str]) -> Plan<'a> {
    let options = ["--ferry"].iter().chain(options);
    Plan {
        client_options: options.map(ToString::to_string).collect(),
        ..Plan::new(criu, Source::Forwarder, Make::Ours).over(slow_link())
    }
}

fn finish(mut moved: PostCopy, processes: u32, more: u64) -> Result<()> {
    expect_faults(&moved.reports()?)?;
    moved.finish()?;
    expect_once(moved.received(), processes, more)
}

/// `came` bytes are the pages of all processes, once, a twentieth and `more`.
fn expect_once(came: u64, processes: u32, more: u64) -> Result<()> {
    let there = u64::from(processes * PAGES) * PAGE_BYTES;
    eprintln!("{came} bytes came, {there} were there");
    ensure!(came >= there, "contents at random cannot be compressed");
    ensure!(
        came <= there / 100 * 105 + more,
        "{came} bytes came where {there} are"
    );
    Ok(())
}

/// All processes of a tree touch everything at once.
fn moved_once(suite: Suite, processes: u32, steps: &[Step], options: &[&str]) {
    with_criu(suite, |test_dir, criu| {
        let moved = PostCopy::start(
            test_dir,
            &plan(criu, options),
            load(test_dir, processes),
            steps,
        )?;
        finish(moved, processes, 0)
    });
}

#[test]
fn processes_that_read_in_order_get_each_page_once() {
    let step = Step::Verify(Pass::quick(Order::Ascending));
    moved_once(Suite::Sid, 2, &[step], &[]);
}

#[test]
fn processes_that_read_at_random_get_each_page_once() {
    let step = Step::Verify(Pass::quick(Order::Random));
    moved_once(Suite::Experimental, 2, &[step], &[]);
}

#[test]
fn processes_that_read_with_several_threads_get_each_page_once() {
    let step = Step::Verify(Pass::quick(Order::Random).threads(4));
    moved_once(Suite::Trixie, 2, &[step], &[]);
}

#[test]
fn a_child_forked_meanwhile_costs_nothing() {
    let fork = |order| Step::Fork {
        depth: 2,
        pass: Pass::quick(order),
    };
    moved_once(Suite::Sid, 1, &[fork(Order::Ascending)], &[]);
}

#[test]
fn a_child_forked_meanwhile_costs_nothing_on_demand() {
    let fork = Step::Fork {
        depth: 1,
        pass: Pass::quick(Order::Ascending),
    };
    let all = Step::Verify(Pass::quick(Order::Random));
    moved_once(Suite::Sid, 1, &[fork, all], &["--on-demand"]);
}

#[test]
fn a_connection_that_breaks_costs_what_was_on_its_way() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let step = Step::Verify(Pass::quick(Order::Ascending));
        let mut moving = PostCopy::start(test_dir, &plan(criu, &[]), load(test_dir, 2), &[step])?;
        wait::until("half of the memory", GENEROUS, || {
            let over = moving.daemon.process().ended()?.is_some();
            ensure!(!over, "{}", moving.daemon.process().log_tail());
            Ok((moving.received() > u64::from(PAGES) * PAGE_BYTES).then_some(()))
        })?;
        let proxy = moving.proxy.as_ref().context("a link")?;
        proxy.cut(ImpairmentKind::Reset);
        finish(moving, 2, 4 << 20)
    });
}

/// Between two hosts, of which the one that restores has the memory over its interface alone.
#[test]
fn an_interface_carries_hardly_more_than_there_is() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let processes = 2;
        let hosts = TwoHosts::new(Some(LINK_BITS))?;
        let (source, destination) = (&hosts.source, &hosts.destination);
        for host in [source, destination] {
            let set = ["link", "set", "ferry0", "mtu", LINK_MTU];
            run(host.net.command("ip").args(set))?;
        }
        let mut load = Load::start(load(test_dir, processes), Some(&source.net))?;
        let images = test_dir.path("images");
        let dump_address = SocketAddr::from((Ipv4Addr::LOCALHOST, DUMP_PORT));
        let dump = Dump::new(criu, load.pid(), &images).in_net(&source.net);
        let mut dump = dump.serve_lazily(dump_address)?;
        let options = Options::new(&images)
            .at(&source.net, source.address)
            .at_port(FORWARDER_PORT)
            .with(&["--forward-lazy", &dump_address.to_string()]);
        let mut forwarder = PageServer::receiving(Make::Ours, &options.log_to("forward.log"))?;
        let before = hosts.bytes_to_destination()?;
        let options = Options::new(&images)
            .at(&destination.net, destination.address)
            .with(&["--ferry"]);
        let options = options.log_to("lazy.log");
        let mut client = LazyDaemon::start(Make::Ours, &options, Some(forwarder.address()))?;
        let step = Step::Verify(Pass::quick(Order::Random));
        let send = |process| Ok((process, load.send(process, &[step])?));
        let sent: Vec<(u32, u64)> = (0..processes).map(send).collect::<Result<_>>()?;
        let restore = Restore::new(criu, &images).in_net(&destination.net);
        let restored = restore.lazily().run();
        let restored = restored.with_context(|| client.process().log_tail())?;
        load.steer(restored.init()?)?;
        let mut reports = Vec::new();
        for (process, seq) in sent {
            let report = load.receive(process, seq, GENEROUS)?;
            report.expect_right()?;
            reports.push(report);
        }
        expect_faults(&reports)?;
        client.process().succeed(GENEROUS)?;
        dump.succeed(GENEROUS)?;
        forwarder.process().succeed(GENEROUS)?;
        load.wait_until_gone()?;
        expect_once(hosts.bytes_to_destination()? - before, processes, 0)
    });
}
