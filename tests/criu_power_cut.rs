//! A power cut while a real dump is stored with `--sync close`: from each state that the disk may be left in, a real
//! CRIU restores the processes with all their memory, or none of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::forks::{Forks, ForksSpec};
use testbed::gate;
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::power_cut::{Disk, State};
use testbed::process::run;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

/// A parent and a fork of it, which has rewritten some of its pages.
const TREE: ForksSpec = ForksSpec {
    children: 1,
    mib: 2,
    every: 10,
    mixed: false,
};

/// States that CRIU is given at most: of more, some at even distances.
const RESTORES_MAX: usize = 24;

#[test]
fn images_are_restored_or_refused() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        cut(test_dir, criu, &[])
    });
}

#[test]
#[ignore = "takes minutes, for thousands of states are written out"]
fn images_with_a_tree_are_restored_or_refused() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        cut(test_dir, criu, &["--dedup-tree"])
    });
}

#[test]
#[ignore = "takes minutes, for thousands of states are written out"]
fn images_apart_are_restored_or_refused() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let lazy = test_dir.path("lazy");
        cut(test_dir, criu, &["--split-lazy", &lazy.to_string_lossy()])
    });
}

fn cut(test_dir: &TestDir, criu: &Criu, options: &[&str]) -> Result<()> {
    let mut tree = Forks::start(&test_dir.path("forks"), TREE)?;
    tree.expect_right()?;
    let root = test_dir.dir().canonicalize()?;
    let dirs = ["received", "lazy"].map(|name| root.join(name));
    for dir in &dirs {
        fs::create_dir(dir)?;
    }
    let mut disk = Disk::of(&[&dirs[0], &dirs[1]])?;
    let server = Options::new(&dirs[0])
        .with(&["--sync", "close", "--io", "epoll"])
        .with(options)
        .log_to("../server.log")
        .at_port(free_port()?);
    let server = PageServer::recorded(&server, &root, test_dir.dir());
    let Some((server, recording)) = gate::need("a C compiler", server) else {
        return Ok(());
    };
    let dumped = test_dir.path("dumped");
    Dump::new(criu, tree.pid(), &dumped).received_by(server)?;
    tree.wait_until_gone()?;

    let mut states = BTreeSet::new();
    let steps = recording.steps()?;
    for step in &steps {
        if disk.take(step) {
            disk.states(&mut states);
        }
    }
    disk.read_contents()
        .with_context(|| format!("{steps:#?}"))?;
    let mut last = BTreeSet::new();
    disk.states(&mut last);
    let cut = Cut {
        test_dir,
        criu,
        disk,
        dumped,
        pagemaps: pagemaps(&dirs[0])?,
        is_split: options.contains(&"--split-lazy"),
    };
    cut.try_each(&states, &tree)?;
    for state in &last {
        let restored = cut.is_restored("last", state, &tree)?;
        ensure!(restored, "it was told of success: {state:#?}");
    }
    Ok(())
}

/// Names of the pagemaps in a directory.
fn pagemaps(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name.starts_with("pagemap-"));
    Ok(names)
}

/// What a look at a directory shows to a program that knows of images: names, and how long the files are.
fn seen(dir: &Path, out: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type()?;
        out.push(format!("{name:?} {kind:?} {}", entry.metadata()?.len()));
        if kind.is_dir() {
            seen(&entry.path(), out)?;
            out.push("..".to_owned());
        }
    }
    Ok(())
}

/// What was there when the power was cut.
struct Cut<'a> {
    test_dir: &'a TestDir,
    criu: &'a Criu,
    disk: Disk,
    /// Everything of the dump that goes to no page server.
    dumped: PathBuf,
    /// Of a dump that is whole.
    pagemaps: BTreeSet<String>,
    is_split: bool,
}

impl Cut<'_> {
    /// Has CRIU restore from each state that looks different, or from some of them.
    fn try_each(&self, states: &BTreeSet<State>, tree: &Forks) -> Result<()> {
        let mut known = BTreeSet::new();
        let mut different = Vec::new();
        for state in states {
            let place = tempfile::tempdir()?;
            self.disk
                .write_out(state, &[place.path(), &place.path().join(".lazy")])?;
            let mut look = Vec::new();
            seen(place.path(), &mut look)?;
            seen(&place.path().join(".lazy"), &mut look)?;
            if known.insert(look) {
                different.push(state);
            }
        }
        let every = different.len().div_ceil(RESTORES_MAX);
        eprintln!(
            "{} states, {} look different, one of {every} is restored from",
            states.len(),
            different.len()
        );
        let mut restored = 0;
        for (number, state) in different.into_iter().enumerate().step_by(every) {
            let name = format!("cut-{number}");
            let is_restored = self.is_restored(&name, state, tree);
            restored += usize::from(is_restored.with_context(|| format!("{state:#?}"))?);
        }
        eprintln!("{restored} of them are whole");
        Ok(())
    }

    /// Rebuilds a state beside the rest of the dump. Returns whether it has all pagemaps: then the processes come back with
    /// their memory, and else none of them does.
    fn is_restored(&self, name: &str, state: &State, tree: &Forks) -> Result<bool> {
        let (images, lazy) = (
            self.test_dir.path(name),
            self.test_dir.path(&format!("{name}-lazy")),
        );
        run(Command::new("cp").arg("-a").arg(&self.dumped).arg(&images))?;
        self.disk.write_out(state, &[&images, &lazy])?;
        let whole = pagemaps(&images)? == self.pagemaps;
        match whole {
            true => self.expect_restored(&images, &lazy, tree)?,
            // Without --lazy-pages CRIU looks for ever for pages that are elsewhere.
            false if self.is_split => {}
            false => self.expect_refused(&images)?,
        }
        fs::remove_dir_all(&images)?;
        fs::remove_dir_all(&lazy)?;
        Ok(whole)
    }

    fn expect_restored(&self, images: &Path, lazy: &Path, tree: &Forks) -> Result<()> {
        if !self.is_split {
            let _restored = Restore::new(self.criu, images).run()?;
            return tree.expect_right();
        }
        let server = PageServer::serving(Make::Ours, &Options::new(lazy))?;
        let options = Options::new(images).log_to("lazy.log");
        let daemon = LazyDaemon::start(Make::Ours, &options, Some(server.address()))?;
        let _restored = Restore::new(self.criu, images).lazily().run()?;
        tree.expect_right()?;
        daemon.finish(GENEROUS)?;
        server.finish(GENEROUS).map(drop)
    }

    fn expect_refused(&self, images: &Path) -> Result<()> {
        let restored = Restore::new(self.criu, images).start()?;
        let outcome = wait::until("the end of the restore", GENEROUS, || {
            Ok(restored.how_ended("restore"))
        })?;
        if outcome == "exited 0" {
            bail!("it was restored without some of its memory");
        }
        Ok(())
    }
}
