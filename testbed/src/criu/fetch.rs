//! Fetches CRIU packages of other suites than the machine's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Criu, Suite};
use crate::debian::{PrivateApt, lock, write_wrapper};
use crate::workspace::target_dir;

fn criu_dir() -> PathBuf {
    target_dir().join("criu")
}

type Suites = BTreeMap<String, String>;

fn read_suites() -> Result<Suites> {
    match fs::read(criu_dir().join("suites.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes).context("target/criu/suites.json"),
        Err(_) => Ok(Suites::new()),
    }
}

fn write_suites(suites: &Suites) -> Result<()> {
    let unfinished = criu_dir().join("suites.json.new");
    fs::write(&unfinished, serde_json::to_vec_pretty(suites)?)?;
    Ok(fs::rename(unfinished, criu_dir().join("suites.json"))?)
}

fn wrapper(version: &str) -> PathBuf {
    criu_dir().join(version).join("criu")
}

/// The CRIU of `suite`, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or a package that does not start.
pub fn of_suite(suite: Suite) -> Result<Criu> {
    let _lock = lock(&criu_dir())?;
    let mut suites = read_suites()?;
    let known = suites
        .get(suite.name())
        .and_then(|version| Criu::at(&wrapper(version)).ok());
    if let Some(criu) = known {
        return Ok(criu);
    }
    let criu = fetch(suite).with_context(|| format!("fetching CRIU from {}", suite.name()))?;
    suites.insert(suite.name().to_owned(), criu.version.clone());
    write_suites(&suites)?;
    Ok(criu)
}

/// The CRIU of a version, whichever suite has it now.
///
/// # Errors
/// No suite has it; the error lists what there is.
pub fn of_version(version: &str) -> Result<Criu> {
    let mut found = Vec::new();
    for suite in Suite::ALL {
        let criu = of_suite(suite)?;
        if criu.version == version || suite.name() == version {
            return Ok(criu);
        }
        found.push(format!("{} in {}", criu.version, suite.name()));
    }
    bail!("no suite has CRIU {version}: there is {}", found.join(", "))
}

/// The archive of a CRIU's sources as its authors released them, from the suite that has this version, fetched
/// into `work`.
///
/// # Errors
/// No Debian archive, no network, or the mirror does not have the sources of this version.
pub fn released_sources(criu: &Criu, work: &Path) -> Result<PathBuf> {
    for suite in Suite::ALL {
        if of_suite(suite)?.version != criu.version {
            continue;
        }
        let apt = PrivateApt::new(&work.join("apt"), suite)?;
        return apt
            .download_source("criu")
            .with_context(|| format!("fetching the sources of CRIU {}", criu.version));
    }
    bail!("no suite has CRIU {}", criu.version)
}

fn fetch(suite: Suite) -> Result<Criu> {
    let work = criu_dir().join(format!("fetching-{}", suite.name()));
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let apt = PrivateApt::new(&work.join("apt"), suite)?;
    apt.download(&["criu"])?;
    let unpacked = work.join("whole");
    apt.unpack(&unpacked.join("root"))?;
    let script = unpacked.join("criu");
    write_wrapper(&script, "sbin/criu")?;
    let version = Criu::at(&script)?.version;
    let home = criu_dir().join(&version);
    if !home.exists() {
        fs::rename(&unpacked, &home)?;
    }
    fs::remove_dir_all(&work)?;
    Criu::at(&wrapper(&version))
}
