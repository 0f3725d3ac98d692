//! Programs of Debian suites other than the machine's own, unpacked beside the system.
//!
//! apt runs with private lists, state and cache, so nothing of the machine changes.

mod sources;
mod system;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

pub use system::{runtimes, system, versions};

use crate::wait::retried;
use crate::workspace::target_dir;

/// A suite of Debian's that has a CRIU of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suite {
    /// CRIU 4.1.1: the last with 24-byte frame headers.
    Trixie,
    /// CRIU 4.2.1 when this was written.
    Sid,
    /// CRIU 4.3 when this was written.
    Experimental,
}

impl Suite {
    /// All of them, oldest CRIU first.
    pub const ALL: [Suite; 3] = [Suite::Trixie, Suite::Sid, Suite::Experimental];

    /// The suite's name.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
            Suite::Experimental => "experimental",
        }
    }
}

/// Starts an unpacked program with the unpacked loader and libraries, wherever they stand.
const WRAPPER: &str = r#"#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/root/usr
for loader in "$here"/lib64/ld-linux-x86-64.so.2 "$here"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 \
    "$here"/lib/ld-linux-aarch64.so.1 "$here"/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1; do
    [ -e "$loader" ] && break
done
for libraries in "$here"/lib/x86_64-linux-gnu "$here"/lib/aarch64-linux-gnu; do
    [ -d "$libraries" ] && break
done
exec "$loader" --library-path "$libraries" "$here"/PROGRAM "$@"
"#;

/// Holds off other processes that fetch into the same directory.
pub(crate) fn lock(dir: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(dir)?;
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
}

/// Writes a script that starts `program`, relative to `/usr` of the packages unpacked in `root` beside
/// it.
pub(crate) fn write_wrapper(script: &Path, program: &str) -> Result<()> {
    let wanted = WRAPPER.replace("PROGRAM", program);
    // Another test may be starting it: the kernel refuses to run a file that is open for writing.
    if fs::read_to_string(script).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    fs::write(script, wanted)?;
    Ok(fs::set_permissions(
        script,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// What starts `program` (relative to `/usr`) of a package of `suite`, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or no such package.
pub fn program(suite: Suite, package: &str, program: &str) -> Result<PathBuf> {
    let name = format!("{package}-{}", suite.name());
    wrapped(&name, program, |work, root| {
        let apt = PrivateApt::new(&work.join("apt"), suite)?;
        apt.download(&[package])
            .with_context(|| format!("fetching {package} from {}", suite.name()))?;
        apt.unpack(root)
    })
}

/// The directory of a package of `suite` and all that it needs, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or no such package.
pub fn unpacked(suite: Suite, package: &str) -> Result<PathBuf> {
    let name = format!("{package}-{}", suite.name());
    let home = here(&name, |work, root| {
        let apt = PrivateApt::new(&work.join("apt"), suite)?;
        apt.download(&[package])
            .with_context(|| format!("fetching {package} from {}", suite.name()))?;
        apt.unpack(root)
    })?;
    Ok(home.join("root"))
}

/// Makes `root` a system of `suite` with these packages, anew.
///
/// # Errors
/// No Debian archive, no network, no debootstrap, or no such package.
pub fn bootstrap(suite: Suite, packages: &[&str], root: &Path) -> Result<()> {
    let archive = sources::of_machine()?;
    retried("debootstrap", || {
        if root.exists() {
            fs::remove_dir_all(root).with_context(|| root.display().to_string())?;
        }
        let output = Command::new("debootstrap")
            .arg("--variant=minbase")
            .arg(format!("--include={}", packages.join(",")))
            .arg(format!("--keyring={}", archive.keyring.display()))
            .arg(suite.name())
            .arg(root)
            .arg(&archive.uri)
            .stdin(Stdio::null())
            .output()
            .context("debootstrap")?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let last = stdout.lines().last().unwrap_or_default();
        ensure!(output.status.success(), "debootstrap: {last}");
        Ok(())
    })
}

/// What starts `program` (relative to `/usr`) of the packages that are here as `name`. Unless they are,
/// `fetch` unpacks them: it is given a directory to work in, and one for what it unpacks.
pub(crate) fn wrapped(
    name: &str,
    program: &str,
    fetch: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let home = here(name, fetch)?;
    let script = Path::new(program).file_name();
    let script = home.join(script.context("a program has a name")?);
    let _lock = lock(&target_dir().join("debian"))?;
    write_wrapper(&script, program)?;
    Ok(script)
}

/// The directory of the packages that are here as `name`, fetched by `fetch` unless they are.
fn here(name: &str, fetch: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
    let dir = target_dir().join("debian");
    let _lock = lock(&dir)?;
    let home = dir.join(name);
    if !home.exists() {
        let work = dir.join(format!("fetching-{name}"));
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        let unpacked = work.join("whole");
        fetch(&work, &unpacked.join("root"))?;
        fs::rename(&unpacked, &home)?;
        fs::remove_dir_all(&work)?;
    }
    Ok(home)
}

/// An apt with lists, state and cache of its own.
pub(crate) struct PrivateApt {
    dir: PathBuf,
    suite: Suite,
}

impl PrivateApt {
    /// One that works in `dir`, with the packages of `suite`.
    pub(crate) fn new(dir: &Path, suite: Suite) -> Result<PrivateApt> {
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
            suite,
        })
    }

    /// Downloads packages and all that they need.
    pub(crate) fn download(&self, packages: &[&str]) -> Result<()> {
        self.run(&["update", "-qq"])?;
        let install = ["-y", "-qq", "--download-only", "install"];
        self.run(&[self.release(), &install, packages].concat())
    }

    /// Downloads the sources of a package as their authors released them, and returns the archive.
    pub(crate) fn download_source(&self, package: &str) -> Result<PathBuf> {
        let list = self.dir.join("sources.list");
        let with_sources = fs::read_to_string(&list)?;
        let sources = with_sources.replace("deb [", "deb-src [");
        fs::write(&list, format!("{with_sources}{sources}"))?;
        self.run(&["update", "-qq"])?;
        // Mirrors may lack the packaging, which is not needed.
        let downloaded = self.run(&["-qq", "--download-only", "--tar-only", "source", package]);
        for entry in fs::read_dir(self.archives())? {
            let path = entry?.path();
            if path.to_string_lossy().contains(".orig.tar.") {
                return Ok(path);
            }
        }
        downloaded?;
        bail!("{package} has no released sources")
    }

    /// Downloads a package without what it needs.
    pub(crate) fn download_alone(&self, package: &str) -> Result<()> {
        self.run(&["update", "-qq"])?;
        self.run(&[self.release(), &["-qq", "download", package]].concat())
    }

    /// What makes apt prefer the suite's packages.
    fn release(&self) -> &'static [&'static str] {
        match self.suite {
            Suite::Experimental => &["-t", "experimental"],
            Suite::Trixie | Suite::Sid => &[],
        }
    }

    fn archives(&self) -> PathBuf {
        self.dir.join("cache/archives")
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
                // Where packages that come alone are put.
                .current_dir(self.archives())
                .stdin(Stdio::null())
                .output()
                .context("running apt-get: only Debian machines can fetch CRIU packages")?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "apt-get {}: {}\n{stderr}",
                args.join(" "),
                output.status
            );
            Ok(())
        })
    }

    /// Unpacks everything downloaded into `root`.
    pub(crate) fn unpack(&self, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        for entry in fs::read_dir(self.archives())? {
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
