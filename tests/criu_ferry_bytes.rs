//! What a post-copy over ferry moves: hardly more than there is, however its processes fault. Counted are the
//! bytes that the link carries to the client, over all connections.

use anyhow::{Context, Result, ensure};
use testbed::bed::Bed;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::load::content::Content;
use testbed::load::report::expect_faults;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::ImpairmentKind;
use testbed::suite::with_criu;
use testbed::wait::{self, GENEROUS};

/// Pages of each process.
const PAGES: u32 = 6144;
const PAGE_BYTES: u64 = 4096;

fn load(bed: &Bed, processes: u32) -> LoadSpec {
    let area = AreaSpec::new(Mapping::Private, PAGES, Content::Random);
    LoadSpec {
        processes,
        pin_own_memory: true,
        ..LoadSpec::new(bed.path("load"), vec![area])
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
    let there = u64::from(processes * PAGES) * PAGE_BYTES;
    let came = moved.received();
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
    with_criu(suite, |bed, criu| {
        let moved = PostCopy::start(bed, &plan(criu, options), load(bed, processes), steps)?;
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
    with_criu(Suite::Sid, |bed, criu| {
        let step = Step::Verify(Pass::quick(Order::Ascending));
        let mut moving = PostCopy::start(bed, &plan(criu, &[]), load(bed, 2), &[step])?;
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
