//! Where this workspace keeps what it builds and fetches.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};

/// Names the directory of the binaries under test; without it they are built and taken from the
/// profile directory of the running test.
pub const BIN_DIR_VARIABLE: &str = "PAGEFERRY_BIN_DIR";

/// What cargo is told to build, so that tests find their programs. Examples make cargo choose the features that
/// tests have, too: with others the library and most crates beneath it would be built once more.
pub const BUILT_BESIDE_TESTS: [&str; 3] = ["--workspace", "--bins", "--examples"];

/// The root of the workspace.
pub fn root() -> &'static Path {
    let testbed = Path::new(env!("CARGO_MANIFEST_DIR"));
    testbed.parent().unwrap_or(testbed)
}

/// The directory of everything that is built or fetched.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

static BINARIES: OnceLock<PathBuf> = OnceLock::new();

/// Lets [`binary`] look in `dir`, if it has not looked elsewhere before.
pub fn use_binaries(dir: PathBuf) {
    BINARIES.get_or_init(|| dir);
}

/// Where daemons are taken from, if not from where all binaries are.
static DAEMONS: Mutex<Option<PathBuf>> = Mutex::new(None);

/// From now on daemons are those in `dir`, another build's, or this one's again.
pub fn use_daemons(dir: Option<&Path>) {
    // A path is whole whoever panicked.
    let mut daemons = DAEMONS.lock().unwrap_or_else(PoisonError::into_inner);
    *daemons = dir.map(Path::to_owned);
}

/// Path of one of the daemons.
///
/// # Errors
/// It is not there and could not be built.
pub fn daemon(name: &str) -> Result<PathBuf> {
    let daemons = DAEMONS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(dir) = daemons.as_deref() else {
        return binary(name);
    };
    let path = dir.join(name);
    ensure!(path.is_file(), "{} is missing", path.display());
    Ok(path)
}

/// Path of one of the workspace's binaries.
///
/// # Errors
/// It is not there and could not be built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let dir = match BINARIES.get() {
        Some(dir) => dir,
        None => {
            let found = match env::var_os(BIN_DIR_VARIABLE) {
                Some(dir) => PathBuf::from(dir),
                None => build()?,
            };
            BINARIES.get_or_init(|| found)
        }
    };
    let path = dir.join(name);
    ensure!(
        path.is_file(),
        "{} is missing: cargo build --workspace makes it",
        path.display()
    );
    Ok(path)
}

/// Path of one of the examples of the library, brought up to date in the profile of the running program.
///
/// # Errors
/// It cannot be built.
pub fn example(name: &str) -> Result<PathBuf> {
    let dir = profile_dir()?;
    cargo_build(&dir, &["--workspace", "--example", name])?;
    Ok(dir.join("examples").join(name))
}

/// Brings the workspace's binaries up to date in the profile of the running program, and tells
/// their directory. A test run by hand would otherwise judge binaries of an older state.
fn build() -> Result<PathBuf> {
    let dir = profile_dir()?;
    cargo_build(&dir, &BUILT_BESIDE_TESTS)?;
    Ok(dir)
}

/// Where cargo puts the binaries of the running program's profile.
fn profile_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("path of the running program")?;
    let is_profile = |dir: &&Path| {
        dir.file_name()
            .is_some_and(|name| name == "debug" || name == "release")
    };
    let Some(dir) = exe.ancestors().find(is_profile) else {
        bail!(
            "{} is not in a cargo target directory: set {BIN_DIR_VARIABLE}",
            exe.display()
        );
    };
    Ok(dir.to_owned())
}

/// Builds `what` into the profile directory `dir`.
fn cargo_build(dir: &Path, what: &[&str]) -> Result<()> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(root())
        .args(["build", "--quiet"])
        .args(what);
    if dir.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().context("cargo build")?;
    ensure!(status.success(), "cargo build {}: {status}", what.join(" "));
    Ok(())
}
