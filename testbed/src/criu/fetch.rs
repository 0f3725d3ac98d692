//! Fetches CRIU packages of other suites than the machine's own and unpacks them beside the system.
//!
//! apt runs with private lists, state and cache, so nothing of the machine changes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::{Criu, Suite, sources};
use crate::wait::retried;
use crate::workspace::target_dir;

/// Starts the unpacked CRIU with the unpacked loader and libraries, wherever they stand.
const WRAPPER: &str = r#"#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/root/usr
for loader in "$here"/lib64/ld-linux-x86-64.so.2 "$here"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 \
    "$here"/lib/ld-linux-aarch64.so.1 "$here"/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1; do
    [ -e "$loader" ] && break
done
for libraries in "$here"/lib/x86_64-linux-gnu "$here"/lib/aarch64-linux-gnu; do
    [ -d "$libraries" ] && break
done
exec "$loader" --library-path "$libraries" "$here"/sbin/criu "$@"
"#;

fn criu_dir() -> PathBuf {
    target_dir().join("criu")
}

/// Holds off other processes that fetch into the same directory.
fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(criu_dir())?;
    let path = criu_dir().join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
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
    let _lock = lock()?;
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

fn fetch(suite: Suite) -> Result<Criu> {
    let work = criu_dir().join(format!("fetching-{}", suite.name()));
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let apt = PrivateApt::new(&work.join("apt"), suite)?;
    apt.run(&["update", "-qq"])?;
    let release: &[&str] = if suite == Suite::Experimental {
        &["-t", "experimental"]
    } else {
        &[]
    };
    let install = ["-y", "-qq", "--download-only", "install", "criu"];
    apt.run(&[release, &install].concat())?;

    let unpacked = work.join("whole");
    apt.unpack(&unpacked.join("root"))?;
    let script = unpacked.join("criu");
    fs::write(&script, WRAPPER)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let version = Criu::at(&script)?.version;
    let home = criu_dir().join(&version);
    if !home.exists() {
        fs::rename(&unpacked, &home)?;
    }
    fs::remove_dir_all(&work)?;
    Criu::at(&wrapper(&version))
}

/// An apt with lists, state and cache of its own.
struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    fn new(dir: &Path, suite: Suite) -> Result<PrivateApt> {
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(part))?;
        }
        fs::write(dir.join("status"), "")?;
        let archive = sources::of_machine()?;
        let line = |suite: &str| {
            format!(
                "deb [signed-by={}] {} {suite} main\n",
                archive.keyring.display(),
                archive.uri
            )
        };
        let mut list = line(suite.name());
        if suite == Suite::Experimental {
            // experimental is not complete: what it lacks comes from sid.
            list.push_str(&line(Suite::Sid.name()));
        }
        fs::write(dir.join("sources.list"), list)?;
        Ok(PrivateApt {
            dir: dir.to_owned(),
        })
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        let option = |name: &str, file: &str| format!("-o{name}={}", self.dir.join(file).display());
        let options = [
            option("Dir::Etc::SourceList", "sources.list"),
            option("Dir::State::Lists", "lists"),
            option("Dir::State::status", "status"),
            option("Dir::Cache", "cache"),
            "-oDir::Etc::SourceParts=/dev/null".to_owned(),
            "-oAPT::Install-Recommends=false".to_owned(),
            // The unprivileged download user cannot reach a target directory below /root.
            "-oAPT::Sandbox::User=root".to_owned(),
        ];
        retried("apt-get", || {
            let output = Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(&options)
                .args(args)
                .stdin(Stdio::null())
                .output()
                .context("running apt-get: only Debian machines can fetch CRIU packages")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "apt-get {}: {}\n{said}",
                args.join(" "),
                output.status
            );
            Ok(())
        })
    }

    fn unpack(&self, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        for entry in fs::read_dir(self.dir.join("cache/archives"))? {
            let package = entry?.path();
            if package
                .extension()
                .is_some_and(|extension| extension == "deb")
            {
                let status = Command::new("dpkg")
                    .arg("-x")
                    .arg(&package)
                    .arg(root)
                    .status()?;
                ensure!(status.success(), "dpkg -x {}: {status}", package.display());
            }
        }
        Ok(())
    }
}
