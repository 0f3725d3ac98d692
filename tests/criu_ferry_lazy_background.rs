//! What a real post-copy over ferry brings besides the pages that threads wait for: nothing on demand, and
//! no more than the rate where one is given.

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::suite::with_criu;
use testbed::summary::{number, of_session, whole};
use testbed::test_dir::TestDir;

for_each_criu!(on_demand_untouched_pages_stay_with_the_source);

const PAGES: u32 = 4096;
const PAGE_BYTES: u64 = 4096;

/// A process with [`PAGES`] pages that cannot be compressed, the rest of its memory in no fault's way.
fn spec(test_dir: &TestDir) -> LoadSpec {
    let area = AreaSpec::new(Mapping::Private, PAGES, Content::Random);
    LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::new(test_dir.path("load"), vec![area])
    }
}

fn verify() -> [Step; 1] {
    [Step::Verify(Pass::full(Order::Random))]
}

/// A plan over ferry whose two ends write summaries.
fn plan<'a>(test_dir: &TestDir, criu: &'a Criu, options: &[&str]) -> Plan<'a> {
    let summary_json = |who: &str| {
        let path = test_dir.path(who).to_string_lossy().into_owned();
        vec!["--summary-json".to_owned(), path]
    };
    let options = options.iter().map(ToString::to_string).collect();
    let plan = Plan::new(criu, Source::Forwarder, Make::Ours).over(slow_link());
    Plan {
        client_options: [
            vec!["--ferry".to_owned()],
            options,
            summary_json("client.json"),
        ]
        .concat(),
        source_options: summary_json("forward.json"),
        ..plan
    }
}

/// The summaries of the lazy-client and the forwarder.
fn summaries(test_dir: &TestDir) -> Result<(Value, Value)> {
    let client = whole(&test_dir.path("client.json"))?;
    Ok((client, of_session(&test_dir.path("forward.json"), 0)?))
}

fn on_demand_untouched_pages_stay_with_the_source(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (every, order) = (50, Order::Random);
    let plan = plan(test_dir, criu, &["--on-demand"]);
    let mut moved = PostCopy::start(
        test_dir,
        &plan,
        spec(test_dir),
        &[Step::Write { every, order }],
    )?;
    moved.reports()?;
    let ended = moved.daemon.process().ended()?;
    ensure!(ended.is_none(), "the processes live on: {ended:?}");
    moved.restored.kill();
    moved.finish()?;
    let came = moved.received();
    ensure!(
        came >= u64::from(PAGES / every) * PAGE_BYTES,
        "{came} bytes"
    );
    ensure!(came < u64::from(PAGES) * PAGE_BYTES / 4, "{came} bytes");
    let (client, forwarder) = summaries(test_dir)?;
    ensure!(number(&client, "/pages/stream")? == 0, "{client}");
    ensure!(
        number(&client, "/pages/gone")? > u64::from(PAGES) / 2,
        "{client}"
    );
    for kind in ["zero", "same", "shared", "delta", "zstd", "raw"] {
        let pushed = number(&forwarder, &format!("/sent/{kind}/pages"))?;
        ensure!(pushed == 0, "{forwarder}");
    }
    Ok(())
}

#[test]
fn faults_are_not_held_to_the_rate_of_the_background() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // A batch in four seconds: an eighth of the memory takes longer than a test may last.
        let plan = plan(test_dir, criu, &["--max-bandwidth", "16K"]);
        let mut moved = PostCopy::start(test_dir, &plan, spec(test_dir), &verify())?;
        moved.reports()?;
        moved.finish()?;
        let (client, _) = summaries(test_dir)?;
        let streamed = number(&client, "/pages/stream")?;
        ensure!(streamed < u64::from(PAGES) / 8, "{client}");
        let asked = number(&client, "/pages/fault")? + number(&client, "/pages/around")?;
        ensure!(asked > u64::from(PAGES) / 2, "{client}");
        Ok(())
    });
}

#[test]
fn a_background_that_is_held_to_a_rate_brings_everything() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = plan(test_dir, criu, &["--max-bandwidth", "8M"]);
        let mut moved = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        moved.finish()?;
        for report in moved.load.run_everywhere(&verify())? {
            report.expect_right()?;
        }
        let (client, _) = summaries(test_dir)?;
        ensure!(
            number(&client, "/pages/stream")? >= u64::from(PAGES) / 2,
            "{client}"
        );
        Ok(())
    });
}
