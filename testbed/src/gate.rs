//! What a test cannot do without: it fails in CI where that is missing, elsewhere it says so and
//! is skipped.

use std::env;
use std::fmt::Display;

use anyhow::Result;
use nix::unistd::geteuid;

use crate::criu::{self, Crit, Criu, Suite};
use crate::systemd::Systemd;

/// `found`, or `None` after saying why the test is skipped.
///
/// # Panics
/// With `CI=true` in the environment, where nothing may be skipped.
pub fn need<T, E: Display>(what: &str, found: Result<T, E>) -> Option<T> {
    match found {
        Ok(value) => Some(value),
        Err(error) => {
            let ci = env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "{what} is missing, and CI skips no test: {error:#}");
            eprintln!("skipped: {what} is missing: {error:#}");
            None
        }
    }
}

/// Whether the test runs as root.
pub fn root() -> Option<()> {
    let found = if geteuid().is_root() {
        Ok(())
    } else {
        Err("run the tests as root")
    };
    need("root", found)
}

/// The CRIU of a suite, fetched if it is not here yet; root besides, which CRIU needs.
pub fn criu(suite: Suite) -> Option<Criu> {
    root()?;
    need(
        "a real CRIU",
        criu::of_suite(suite).map_err(|error| format!("{error:#}")),
    )
}

/// CRIU's image tool, fetched if it is not here yet.
pub fn crit() -> Option<Crit> {
    need(
        "crit of CRIU 4.3",
        Crit::fetched().map_err(|error| format!("{error:#}")),
    )
}

/// The directory `usr` of a systemd, fetched if it is not here yet.
pub fn systemd() -> Option<std::path::PathBuf> {
    need(
        "systemd",
        Systemd::fetched().map_err(|error| format!("{error:#}")),
    )
}
