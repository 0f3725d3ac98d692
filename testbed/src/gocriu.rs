//! go-criu's own test of its migration (phaul): a client and a server of CRIU's remote procedure calls that
//! this project has no part in. Built offline from Debian's packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::criu::Suite;
use crate::debian::{PrivateApt, lock};
use crate::process::run;
use crate::workspace::target_dir;

/// The library, in Debian.
const SOURCE: &str = "golang-github-checkpoint-restore-go-criu";

/// A compiler and what the test is built of.
const PACKAGES: &[&str] = &[
    "golang-go",
    "golang-github-checkpoint-restore-go-criu-dev",
    "golang-golang-x-sys-dev",
];

/// The test, built.
#[derive(Debug)]
pub struct Phaul {
    /// Migrates the process whose pid is its argument, in the current directory, with the `criu` of PATH.
    pub program: PathBuf,
    /// Starts a process to migrate, which writes to its argument, and prints the pid.
    pub process: PathBuf,
}

impl Phaul {
    /// Fetches and builds it, unless it is here.
    ///
    /// # Errors
    /// No Debian archive, no network, or no C compiler.
    pub fn built() -> Result<Phaul> {
        let dir = target_dir().join("debian");
        let _lock = lock(&dir)?;
        let home = dir.join("phaul");
        if !home.exists() {
            let work = dir.join("fetching-phaul");
            if work.exists() {
                fs::remove_dir_all(&work)?;
            }
            build(&work)?;
            fs::rename(work.join("built"), &home)?;
            fs::remove_dir_all(&work)?;
        }
        Ok(Phaul {
            program: home.join("phaul"),
            process: home.join("piggie"),
        })
    }
}

fn build(work: &Path) -> Result<()> {
    let (root, sources, built) = (work.join("root"), work.join("sources"), work.join("built"));
    for dir in [&sources, &built] {
        fs::create_dir_all(dir)?;
    }
    let apt = PrivateApt::new(&work.join("apt"), Suite::Sid)?;
    apt.download(PACKAGES).context("fetching a Go compiler")?;
    apt.unpack(&root)?;
    let archive = apt.download_source(SOURCE).context("fetching go-criu")?;
    let mut unpack = Command::new("tar");
    run(unpack
        .arg("-xf")
        .arg(archive)
        .arg("-C")
        .arg(&sources)
        .arg("--strip-components=1"))?;
    let test = sources.join("test");
    let mut compile = Command::new("cc");
    run(compile
        .arg(test.join("piggie/piggie.c"))
        .arg("-o")
        .arg(built.join("piggie")))?;
    let go_root = fs::read_dir(root.join("usr/lib"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.join("bin/go").is_file())
        .context("no Go compiler in its package")?;
    let mut go = Command::new(go_root.join("bin/go"));
    go.args(["build", "-o"])
        .arg(built.join("phaul"))
        .arg(test.join("phaul/main.go"));
    go.env("GOROOT", &go_root)
        .env("GOPATH", root.join("usr/share/gocode"));
    go.env("GOCACHE", work.join("cache"))
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local");
    go.env("GOFLAGS", "").env("CGO_ENABLED", "0");
    run(&mut go).context("building phaul").map(drop)
}
