//! A recorded working set: a later restore takes fewer faults on the pages that the process touches first.
//!
//! The process writes every eighth page as soon as it runs. Counts are compared, never times: how many of these pages a
//! thread had to wait for, without a working set and with one, over a link on which all memory takes a second.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::debian::Suite;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::proxy::Link;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{for_each_criu, summary, workspace};

for_each_criu!(a_recording_reaches_every_client_of_a_page_server);

/// Pages of the process: 8 MiB.
const PAGES: u32 = 2048;

/// Of which it touches one of so many.
const EVERY: u32 = 8;

/// Pages that it touches.
const TOUCHED: u64 = (PAGES / EVERY) as u64;

/// The same rate for what is local, in bytes a second.
const RATE: u64 = 8 << 20;

/// A link on which the memory takes a second.
fn link() -> Link {
    Link {
        round_trip: Duration::from_millis(1),
        bytes_per_s: Some(RATE),
        hides_resets: false,
    }
}

fn spec(test_dir: &TestDir, name: &str, mapping: Mapping) -> LoadSpec {
    LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::new(
            test_dir.path(name),
            vec![AreaSpec::new(mapping, PAGES, Content::Random)],
        )
    }
}

/// What the process does as soon as it runs.
const STEPS: [Step; 1] = [Step::Write {
    every: EVERY,
    order: Order::Random,
}];

/// What a client is told beside its place: with `--summary-json`, and the file of that.
struct Client {
    options: Vec<String>,
    summary: PathBuf,
}

impl Client {
    fn new(test_dir: &TestDir, options: &[&str]) -> Client {
        let summary = test_dir.path("summary.json");
        let own = ["--summary-json".to_owned(), summary.display().to_string()];
        let options = options.iter().map(|word| (*word).to_owned());
        Client {
            options: own.into_iter().chain(options).collect(),
            summary,
        }
    }

    fn plan<'a>(&self, criu: &'a Criu, source: Source<'a>) -> Plan<'a> {
        Plan {
            client_options: self.options.clone(),
            ..Plan::new(criu, source, Make::Ours)
        }
    }

    /// Waits for the end of a restore by this client. Returns its summary.
    fn finish(&self, moved: &mut PostCopy) -> Result<Value> {
        moved.reports()?;
        moved
            .daemon
            .process()
            .succeed(testbed::wait::GENEROUS)
            .context("the client")?;
        moved.expect_all_right()?;
        summary::whole(&self.summary)
    }
}

fn recording<'a>(test_dir: &TestDir, file: &'a Path) -> Result<(Client, &'a str)> {
    let file = file.to_str().context("a path")?;
    let client = Client::new(
        test_dir,
        &["--record-working-set", file, "--record-seconds", "1"],
    );
    Ok((client, file))
}

fn number(summary: &Value, name: &str) -> Result<u64> {
    summary::number(summary, &format!("/working_set/{name}"))
}

/// That what was recorded is what was touched.
fn expect_recorded(summary: &Value) -> Result<()> {
    let recorded = number(summary, "recorded_pages")?;
    let right = TOUCHED..TOUCHED + 16;
    ensure!(right.contains(&recorded), "{recorded} pages: {summary}");
    Ok(())
}

/// The client has the set, whose pages are those that the process touches: it waits for hardly any other. How many
/// faults a set spares depends on what a process does between two touches. This one does nothing.
fn expect_used(summary: &Value) -> Result<()> {
    let named = number(summary, "pages")?;
    ensure!(
        (TOUCHED..TOUCHED + 16).contains(&named),
        "{named} named: {summary}"
    );
    let elsewhere = number(summary, "faults_elsewhere")?;
    ensure!(
        elsewhere * 8 < TOUCHED,
        "{elsewhere} faults elsewhere: {summary}"
    );
    Ok(())
}

fn a_recording_reaches_every_client_of_a_page_server(
    test_dir: &TestDir,
    criu: &Criu,
) -> Result<()> {
    let source = Source::PageServer(Make::Ours);
    let file = test_dir.path("recorded");
    let (client, _) = recording(test_dir, &file)?;
    let plan = Plan {
        source_options: vec!["--keep".into()],
        ..client.plan(criu, source)
    };
    let load = spec(test_dir, "load", Mapping::Private);
    let mut moved = PostCopy::start(test_dir, &plan, load, &STEPS)?;
    expect_recorded(&client.finish(&mut moved)?)?;
    let client = Client::new(test_dir, &[]);
    let plan = client.plan(criu, source).over(link());
    let mut moved = moved.again(&plan, &STEPS)?;
    let summary = client.finish(&mut moved)?;
    ensure!(number(&summary, "pages")? == 0, "{summary}");
    // Beside the images it needs no option.
    fs::copy(&file, test_dir.path("restored/working-set.img"))?;
    let mut moved = moved.again(&plan, &STEPS)?;
    expect_used(&client.finish(&mut moved)?)
}

/// Records a restore of one process, and restores another one of the same program, whose pid and addresses are others.
fn another_process(
    test_dir: &TestDir,
    criu: &Criu,
    source: Source<'_>,
    options: &[&str],
) -> Result<()> {
    let file = test_dir.path("recorded");
    let (client, name) = recording(test_dir, &file)?;
    let with = |mut client: Client| {
        let options = options.iter().map(|word| (*word).to_owned());
        client.options.extend(options);
        client
    };
    let forks = Step::Fork {
        depth: 1,
        pass: Pass::quick(Order::Random).within(Duration::from_millis(20)),
    };
    let client = with(client);
    let plan = client.plan(criu, source);
    let first = spec(test_dir, "first", Mapping::Private);
    let mut moved = PostCopy::start(test_dir, &plan, first, &STEPS)?;
    expect_recorded(&client.finish(&mut moved)?)?;
    moved.finish()?;
    drop(moved);
    fs::rename(test_dir.path("dumped"), test_dir.path("dumped-first"))?;
    let client = with(Client::new(test_dir, &["--working-set", name]));
    let plan = client.plan(criu, source).over(link());
    let second = spec(test_dir, "second", Mapping::Private);
    let mut moved = PostCopy::start(test_dir, &plan, second, &[STEPS[0], forks])?;
    let summary = client.finish(&mut moved)?;
    moved.finish()?;
    expect_used(&summary)
}

#[test]
fn a_recording_holds_for_another_dump_that_serves_itself() {
    with_criu(Suite::Sid, |test_dir, criu| {
        another_process(test_dir, criu, Source::Dump, &[])
    });
}

#[test]
fn a_recording_holds_beside_a_push() {
    with_criu(Suite::Sid, |test_dir, criu| {
        another_process(test_dir, criu, Source::Forwarder, &["--ferry"])
    });
}

#[test]
fn local_images_come_in_the_order_of_a_recording_and_a_bad_one_does_no_harm() {
    with_criu(Suite::Sid, local_images);
}

fn local_images(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let file = test_dir.path("recorded");
    let (client, name) = recording(test_dir, &file)?;
    let load = spec(test_dir, "load", Mapping::Private);
    let mut moved = PostCopy::start(test_dir, &client.plan(criu, Source::Local), load, &STEPS)?;
    expect_recorded(&client.finish(&mut moved)?)?;
    let rate = RATE.to_string();
    let limited = ["--max-bandwidth", rate.as_str()];
    let with = Client::new(test_dir, &[&limited[..], &["--working-set", name]].concat());
    let mut moved = moved.again(&with.plan(criu, Source::Local), &STEPS)?;
    expect_used(&with.finish(&mut moved)?)?;
    // What is recorded once more is added.
    let before = fs::read(&file)?.len();
    let (again, _) = recording(test_dir, &file)?;
    let mut moved = moved.again(&again.plan(criu, Source::Local), &STEPS)?;
    expect_recorded(&again.finish(&mut moved)?)?;
    let mut command = Command::new(workspace::binary("pageferry")?);
    command.args(["working-set", "--json"]).arg(&file);
    let named = serde_json::from_slice(&testbed::process::run(&mut command)?.stdout)?;
    testbed::schema::expect("working-set", &named)?;
    let after = fs::read(&file)?.len();
    ensure!(after <= 2 * before, "{before} bytes became {after}");
    // A damaged one beside the images: a warning.
    let images = test_dir.path("dumped");
    let beside = images.join("working-set.img");
    let mut bytes = fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&beside, &bytes)?;
    let client = Client::new(test_dir, &[]);
    let mut moved = moved.again(&client.plan(criu, Source::Local), &STEPS)?;
    let summary = client.finish(&mut moved)?;
    ensure!(number(&summary, "pages")? == 0, "{summary}");
    let log = moved.daemon.process().log().context("a log")?.to_owned();
    let log = fs::read_to_string(log)?;
    ensure!(log.contains("checksum does not fit"), "{log}");
    drop(moved);
    // The same where it is asked for: an error, before anything is recorded or restored.
    for option in ["--working-set", "--record-working-set"] {
        let beside = beside.to_str().context("a path")?;
        let options = Options::new(&images).with(&[option, beside]);
        let started = LazyDaemon::start(Make::Ours, &options.log_to("refused.log"), None);
        let error = started.err().context("a damaged working set is used")?;
        let error = format!("{error:#}");
        ensure!(error.contains("checksum does not fit"), "{error}");
    }
    ensure!(fs::read(&beside)? == bytes, "nothing is written over it");
    another_program(test_dir, criu, name)
}

/// A recording of another program names nothing here, and all memory comes.
fn another_program(test_dir: &TestDir, criu: &Criu, name: &str) -> Result<()> {
    fs::rename(test_dir.path("dumped"), test_dir.path("dumped-first"))?;
    let client = Client::new(test_dir, &["--working-set", name]);
    let load = spec(test_dir, "other", Mapping::PrivateFile);
    let mut moved = PostCopy::start(test_dir, &client.plan(criu, Source::Local), load, &STEPS)?;
    let summary = client.finish(&mut moved)?;
    ensure!(number(&summary, "pages")? <= 16, "{summary}");
    Ok(())
}
