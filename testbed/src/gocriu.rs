//! Programs that use go-criu, built offline from Debian's packages. One is go-criu's own test of its migration (phaul):
//! a client and a server of CRIU's remote procedure calls that this project has no part in.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::criu::Suite;
use crate::debian::{PrivateApt, lock, runtimes};
use crate::process::run;
use crate::workspace::target_dir;

/// The library, in Debian.
const SOURCE: &str = "golang-github-checkpoint-restore-go-criu";

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
        let system = runtimes()?;
        let dir = target_dir().join("debian");
        let _lock = lock(&dir)?;
        let home = dir.join("phaul");
        if !home.exists() {
            let work = dir.join("fetching-phaul");
            if work.exists() {
                fs::remove_dir_all(&work)?;
            }
            build(&work, &system)?;
            fs::rename(work.join("built"), &home)?;
            fs::remove_dir_all(&work)?;
        }
        Ok(Phaul {
            program: home.join("phaul"),
            process: home.join("piggie"),
        })
    }
}

fn build(work: &Path, system: &Path) -> Result<()> {
    let (sources, built) = (work.join("sources"), work.join("built"));
    for dir in [&sources, &built] {
        fs::create_dir_all(dir)?;
    }
    let apt = PrivateApt::new(&work.join("apt"), Suite::Sid)?;
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
    go_build(system, &test.join("phaul/main.go"), &built.join("phaul"))
}

/// Builds a program of one file that uses go-criu, unless it is here.
///
/// # Errors
/// No Debian archive, no network, or Go refuses it.
pub fn program(source: &str) -> Result<PathBuf> {
    let system = runtimes()?;
    let dir = target_dir().join("debian");
    let _lock = lock(&dir)?;
    let mut hasher = DefaultHasher::new();
    source.hash(&mut hasher);
    let home = dir.join(format!("go-{:x}", hasher.finish()));
    let program = home.join("program");
    if !program.exists() {
        fs::create_dir_all(&home)?;
        let main = home.join("main.go");
        fs::write(&main, source)?;
        go_build(&system, &main, &home.join("unfinished"))?;
        fs::rename(home.join("unfinished"), &program)?;
    }
    Ok(program)
}

fn go_build(system: &Path, main: &Path, to: &Path) -> Result<()> {
    let go_root = fs::read_dir(system.join("usr/lib"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.join("bin/go").is_file())
        .context("no Go compiler in its package")?;
    let mut go = Command::new(go_root.join("bin/go"));
    go.args(["build", "-o"]).arg(to).arg(main);
    go.env("GOROOT", &go_root)
        .env("GOPATH", system.join("usr/share/gocode"))
        .env("GOCACHE", target_dir().join("debian/go-cache"))
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local")
        .env("GOFLAGS", "")
        .env("CGO_ENABLED", "0");
    run(&mut go)
        .with_context(|| format!("building {}", main.display()))
        .map(drop)
}
