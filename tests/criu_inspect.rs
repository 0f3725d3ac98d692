//! `pageferry inspect`, `verify` and `copy-lazy` on good images of every origin, made by real CRIUs.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::debian::Suite;
use testbed::dumped_load::compressed_round;
use testbed::for_each_criu;
use testbed::gate;
use testbed::images::page_size;
use testbed::kinds::{KINDS, Kind, Kinds};
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::rounds::{Rounds, pages_file_bytes, pages_files, pages_room_bytes};
use testbed::schema;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

for_each_criu!(plain_images_are_counted_right);

const DOCUMENT: &str = "docs/reference/commands.md";

const MIB: u32 = 8;

fn pageferry(words: &[&str], dir: &Path) -> Result<Command> {
    let mut command = Command::new(workspace::binary("pageferry")?);
    command.args(words).arg(dir);
    Ok(command)
}

fn json(command: &mut Command) -> Result<(Option<i32>, Value)> {
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let value = serde_json::from_str(&text).with_context(|| format!("{text}{stderr}"))?;
    Ok((output.status.code(), value))
}

/// What `inspect` says, with all that is documented.
fn inspect(dir: &Path) -> Result<Value> {
    let (code, report) = json(&mut pageferry(&["inspect", "--json"], dir)?)?;
    ensure!(code == Some(0), "{code:?}: {report}");
    schema::expect("inspect", &report)?;
    Ok(report)
}

/// The codes of what `verify` finds, faults and remarks; whether that is good.
fn verify(dir: &Path, extra: &[&str]) -> Result<(bool, HashSet<String>)> {
    let words = [&["verify", "--json"], extra].concat();
    let (code, report) = json(&mut pageferry(&words, dir)?)?;
    schema::expect("verify", &report)?;
    let good = report["good"] == true;
    ensure!(code == Some(i32::from(!good)), "{code:?}: {report}");
    let findings = report["findings"].as_array().context("no findings")?;
    let codes = findings.iter().filter_map(|one| one["code"].as_str());
    let codes: HashSet<String> = codes.map(str::to_owned).collect();
    let document = fs::read_to_string(workspace::root().join(DOCUMENT))?;
    for code in &codes {
        ensure!(
            document.contains(&format!("`{code}`")),
            "{code} is not documented"
        );
    }
    Ok((good, codes))
}

fn expect_good(dir: &Path, extra: &[&str]) -> Result<()> {
    let (good, codes) = verify(dir, extra)?;
    ensure!(good, "{}: {codes:?}", dir.display());
    Ok(())
}

fn expect_fault(dir: &Path, extra: &[&str], code: &str) -> Result<()> {
    let (good, codes) = verify(dir, extra)?;
    ensure!(
        !good && codes.contains(code),
        "{}: {codes:?}",
        dir.display()
    );
    Ok(())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(u64::MAX)
}

fn plain_images_are_counted_right(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
    let images = test_dir.path("images");
    Dump::new(criu, load.pid(), &images).run()?;
    load.wait_until_gone()?;
    expect_good(&images, &["--criu", &criu.path.to_string_lossy()])?;
    let report = inspect(&images)?;
    let page_bytes = page_size()?.as_usize();
    let (mut pages, mut zero, mut again, mut seen) = (0, 0, 0, HashSet::new());
    for file in pages_files(&images)? {
        for page in fs::read(file)?.chunks(page_bytes) {
            pages += 1;
            if page.iter().all(|byte| *byte == 0) {
                zero += 1;
            } else if !seen.insert(page.to_vec()) {
                again += 1;
            }
        }
    }
    let totals = &report["totals"];
    let counted =
        ["pages", "zero_pages", "duplicate_pages", "lost_pages"].map(|name| number(&totals[name]));
    ensure!(
        counted == [pages, zero, again, 0],
        "{pages} {zero} {again}: {totals}"
    );
    ensure!(zero > 0 && again > 0, "{totals}");
    let bytes = (
        number(&totals["stored_bytes"]),
        number(&totals["room_bytes"]),
    );
    ensure!(
        bytes == (pages_file_bytes(&images)?, pages_room_bytes(&images)?),
        "{totals}"
    );
    let layout = if criu.speaks_v1()? { "v1" } else { "v2" };
    let maps = report["directories"][0]["pagemaps"]
        .as_array()
        .context("no pagemaps")?;
    ensure!(maps.iter().all(|map| map["layout"] == layout), "{maps:?}");
    // Two processes and two pieces of shared memory.
    ensure!(maps.len() == 4, "{maps:?}");
    ensure!(
        report["memory"][0]["name"] == "testload",
        "{}",
        report["memory"]
    );
    // As CRIU up to 4.1.1 reads them.
    match criu.speaks_v1()? {
        true => expect_good(&images, &["--criu", "3.17"]),
        false => expect_fault(&images, &["--criu", "4.1.1"], "count-unread"),
    }
}

#[test]
fn chains_of_rounds_are_good_and_what_was_punched_shows() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
        let mut rounds = Rounds::start(test_dir, criu, spec)?.known_to_dumps();
        rounds.dump(Make::Ours, &[])?;
        rounds.dump(Make::Ours, &["--dedup-content"])?;
        rounds.dump(Make::Ours, &["--auto-dedup"])?;
        for round in 1..=3 {
            expect_good(&rounds.images(round), &[])?;
        }
        let second = inspect(&rounds.images(2))?;
        let process = &second["memory"][0]["pages_by_directory"];
        ensure!(
            number(&process[1]) > 1000 && number(&process[0]) < 500,
            "{process}"
        );
        let third = inspect(&rounds.images(3))?;
        ensure!(
            third["directories"]
                .as_array()
                .is_some_and(|dirs| dirs.len() == 3),
            "{third}"
        );
        // The third round has all pages itself, and took them out of the first.
        let first = &third["directories"][2]["pages_files"][0];
        ensure!(
            number(&first["room_bytes"]) < number(&first["bytes"]) / 4,
            "{first}"
        );
        Ok(())
    });
}

#[test]
fn compressed_blocks_are_judged_as_criu_s_own_tool_does() {
    let Some(crit) = gate::crit() else {
        return;
    };
    with_criu(Suite::Experimental, |test_dir, criu| {
        let (rounds, images) = compressed_round(test_dir, criu, MIB)?;
        let (good, codes) = verify(&images, &[])?;
        ensure!(good && codes.contains("compressed"), "{codes:?}");
        expect_fault(&images, &["--criu", "4.2.1"], "compressed")?;
        expect_fault(&images, &["--without-lz4"], "compressed")?;
        let report = inspect(&images)?;
        let compressed = number(&report["directories"][0]["pagemaps"][0]["compressed_pages"]);
        ensure!(compressed > 500, "{report}");
        // Compressed by CRIU's tool.
        let theirs = test_dir.path("theirs");
        Dump::new(criu, rounds.load.pid(), &theirs)
            .leave_running()
            .run()?;
        crit.compress(&theirs)?;
        expect_good(&theirs, &["--criu", "4.3"])?;
        expect_fault(&theirs, &["--criu", "4.2.1"], "images-version")?;
        // A block with other bytes: the tool that reads it fails, or makes other memory of it.
        let file = pages_files(&images)?
            .into_iter()
            .max_by_key(|file| fs::metadata(file).map_or(0, |meta| meta.len()));
        let file = file.context("no pages file")?;
        let whole = fs::read(&file)?;
        let noise = vec![0xff; whole.len() / 2];
        fs::write(
            &file,
            [
                &whole[..whole.len() / 4],
                &noise,
                &whole[whole.len() / 4 * 3..],
            ]
            .concat(),
        )?;
        expect_fault(&images, &[], "block-damaged")?;
        ensure!(crit.decompress(&images).is_err(), "crit decompresses noise");
        Ok(())
    });
}

#[test]
fn split_and_lazy_images_are_good_for_lazy_restores() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
        let (images, lazy) = (test_dir.path("images"), test_dir.path("lazy"));
        Dump::new(criu, load.pid(), &images).leave_running().run()?;
        let mut split = pageferry(&["split", "-o", &lazy.to_string_lossy()], &images)?;
        ensure!(split.status()?.success(), "split");
        expect_good(&images, &["--lazy"])?;
        expect_fault(&images, &[], "with-source")?;
        expect_good(&lazy, &["--memory-only"])?;
        expect_fault(&lazy, &[], "inventory-missing")?;
        let report = inspect(&images)?;
        ensure!(
            number(&report["totals"]["with_source_pages"]) > 500,
            "{report}"
        );
        ensure!(number(&report["totals"]["lost_pages"]) == 0, "{report}");
        inspect(&lazy).map(drop)
    });
}

/// Kinds of mappings that this CRIU cannot dump beside others.
const REFUSED: [&str; 8] = [
    "guard",
    "hugetlb-private",
    "hugetlb-shared",
    "hugetlb-memfd",
    "hugetlb-sysv",
    "droppable",
    "aio",
    "dev-zero",
];

#[test]
fn every_kind_of_mapping_is_good() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let kinds: Vec<Kind> = KINDS
            .iter()
            .filter(|kind| !REFUSED.contains(&kind.name))
            .copied()
            .collect();
        let kinds = Kinds::start(&test_dir.path("kinds"), &kinds)?;
        let images = test_dir.path("images");
        Dump::new(criu, kinds.pid(), &images)
            .leave_running()
            .run()?;
        expect_good(&images, &["--criu", &criu.path.to_string_lossy()])?;
        inspect(&images).map(drop)
    });
}

/// A remote shell without a network: runs the command in a directory of its own.
fn remote_shell(test_dir: &TestDir) -> Result<String> {
    let (far, script) = (test_dir.path("far"), test_dir.path("rsh"));
    fs::create_dir(&far)?;
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = far-host ] || exit 9\ncd {} && exec sh -c \"$2\"\n",
        far.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script.to_string_lossy().into_owned())
}

#[test]
fn what_was_copied_of_a_lazy_dump_is_restored_lazily() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
        let (images, copy) = (test_dir.path("images"), test_dir.path("copy"));
        fs::create_dir(&images)?;
        // It begins before the dump does.
        let binary = workspace::binary("pageferry")?;
        let mut begun = Command::new(&binary);
        begun
            .args(["copy-lazy", "--wait", "60"])
            .arg(&images)
            .arg(&copy);
        let mut begun = begun.stdin(Stdio::null()).spawn()?;
        let address = format!("127.0.0.1:{}", free_port()?).parse()?;
        let mut dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
        let ended = begun.wait()?;
        ensure!(ended.success(), "copy-lazy: {ended}");
        expect_good(&copy, &["--lazy"])?;

        let rsh = remote_shell(test_dir)?;
        let far = |dir: &str| -> Result<bool> {
            let mut command = Command::new(&binary);
            command
                .args(["copy-lazy", "--rsh", &rsh])
                .arg(&images)
                .arg(format!("far-host:{dir}"));
            Ok(command.status()?.success())
        };
        ensure!(far("it's new/images")?, "copy to a remote directory");
        let there = test_dir.path("far/it's new/images");
        for entry in fs::read_dir(&copy)? {
            let name = entry?.file_name();
            let same = fs::read(copy.join(&name))? == fs::read(there.join(&name))?;
            ensure!(same, "{name:?} differs");
        }
        ensure!(
            !far("it's new/images")?,
            "a directory in use was overwritten"
        );
        let left: Vec<_> = fs::read_dir(test_dir.path("far/it's new"))?.collect();
        ensure!(left.len() == 1, "{left:?}");

        let options = Options::new(&there).log_to("lazy.log");
        let daemon = LazyDaemon::start(Make::Ours, &options, Some(address))?;
        let restored = Restore::new(criu, &there).lazily().run()?;
        load.expect_first_memory()?;
        daemon.finish(GENEROUS)?;
        dump.succeed(GENEROUS)?;
        drop(restored);
        load.wait_until_gone()
    });
}

#[test]
fn an_interrupted_copy_leaves_nothing_at_the_far_end() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
        let images = test_dir.path("images");
        let address = format!("127.0.0.1:{}", free_port()?).parse()?;
        let _dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
        let rsh = remote_shell(test_dir)?;
        // The link ends after so many bytes: within the first archive.
        let script = fs::read_to_string(&rsh)?.replace("exec sh -c", "head -c 200000 | sh -c");
        fs::write(&rsh, script)?;
        let mut cut = Command::new(workspace::binary("pageferry")?);
        cut.args(["copy-lazy", "--rsh", &rsh])
            .arg(&images)
            .arg("far-host:images");
        ensure!(
            cut.status()?.code() == Some(1),
            "a copy that was cut succeeded"
        );
        let left: Vec<_> = fs::read_dir(test_dir.path("far"))?.collect();
        ensure!(left.is_empty(), "{left:?}");
        // A file that cannot be read: the mark is not sent.
        let rsh = test_dir.path("whole").to_string_lossy().into_owned();
        fs::write(
            &rsh,
            format!(
                "#!/bin/sh\ncd {} && exec sh -c \"$2\"\n",
                test_dir.path("far").display()
            ),
        )?;
        fs::set_permissions(&rsh, fs::Permissions::from_mode(0o755))?;
        // tar takes PATH's first one, which fails after it has packed everything.
        let bin = test_dir.path("bin");
        fs::create_dir(&bin)?;
        fs::write(
            bin.join("tar"),
            "#!/bin/sh\ncase $1 in -c) /bin/tar \"$@\"; exit 2;; esac\nexec /bin/tar \"$@\"\n",
        )?;
        fs::set_permissions(bin.join("tar"), fs::Permissions::from_mode(0o755))?;
        let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
        let mut failing = Command::new(workspace::binary("pageferry")?);
        failing
            .env("PATH", path)
            .args(["copy-lazy", "--rsh", &rsh])
            .arg(&images)
            .arg("far-host:images");
        ensure!(
            failing.status()?.code() == Some(1),
            "a copy whose tar failed succeeded"
        );
        let left: Vec<_> = fs::read_dir(test_dir.path("far"))?.collect();
        ensure!(left.is_empty(), "{left:?}");
        ensure!(fs::metadata(&images)?.nlink() >= 2, "the source is gone");
        Ok(())
    });
}

#[test]
fn what_the_doctor_says_is_documented_and_true() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let doctor = |criu: &Path| -> Result<(Option<i32>, Value)> {
            let mut command = Command::new(workspace::binary("pageferry")?);
            command.args(["doctor", "--json", "--criu"]).arg(criu);
            let (code, report) = json(&mut command)?;
            schema::expect("doctor", &report)?;
            Ok((code, report))
        };
        let works = |report: &Value, job: &str| {
            let jobs = report["jobs"].as_array().into_iter().flatten();
            jobs.filter(|one| one["job"] == job)
                .all(|one| one["works"] == true)
        };
        let (code, report) = doctor(&criu.path)?;
        ensure!(code == Some(0), "{report:#}");
        let text = report.to_string();
        for named in [
            &criu.version,
            "UFFD_FEATURE_EVENT_FORK",
            "io_uring",
            "PAGEMAP_SCAN",
            "fs.pipe-max-size",
        ] {
            ensure!(text.contains(named), "{named} is not in {report:#}");
        }
        let (code, report) = doctor(&test_dir.path("no-criu"))?;
        ensure!(
            code == Some(1) && !works(&report, "dump-and-restore"),
            "{report:#}"
        );
        ensure!(works(&report, "lazy-restore"), "{report:#}");
        Ok(())
    });
}
