//! Real CRIUs: fetched beside the system, or the machine's own.
//!
//! ```text
//!   target/criu/suites.json      suite -> version found there
//!   target/criu/VERSION/criu     wrapper: starts root/usr/sbin/criu with root's own loader
//!   target/criu/VERSION/root     the unpacked packages
//! ```
//!
//! Invariants: a VERSION directory is whole or absent; the wrapper finds its files relative to
//! itself, so that a copied target directory works.

mod crit;
mod fetch;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

pub use crate::debian::Suite;
pub use crit::Crit;
pub use fetch::{of_suite, of_version, released_sources};

/// A CRIU that can be run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Criu {
    /// As `criu --version` tells it.
    pub version: String,
    /// What to run.
    pub path: PathBuf,
}

impl Criu {
    fn at(path: &Path) -> Result<Criu> {
        let output = Command::new(path)
            .arg("--version")
            .output()
            .with_context(|| format!("running {}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().find_map(|line| line.strip_prefix("Version: "));
        let Some(version) = version else {
            bail!(
                "{} --version: {}, {text}{}",
                path.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        };
        Ok(Criu {
            version: version.trim().to_owned(),
            path: path.to_owned(),
        })
    }

    /// Asks CRIU whether it works on this kernel.
    ///
    /// # Errors
    /// It does not; the error tells what `criu check` says.
    pub fn check(&self) -> Result<()> {
        let output = Command::new(&self.path)
            .arg("check")
            .output()
            .context("criu check")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "criu {} check: {}{stderr}",
            self.version,
            output.status
        );
        Ok(())
    }

    /// Major and minor version.
    ///
    /// # Errors
    /// The version does not begin with two numbers.
    pub fn release(&self) -> Result<(u32, u32)> {
        let mut numbers = self.version.split('.').map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => bail!("criu says that its version is {:?}", self.version),
        }
    }

    /// Whether it speaks the 24-byte headers of CRIU before 4.2.
    ///
    /// # Errors
    /// The version is not a number.
    pub fn speaks_v1(&self) -> Result<bool> {
        Ok(self.release()? < (4, 2))
    }
}

/// The machine's own CRIU, if there is one that passes `criu check`.
pub fn of_machine() -> Option<Criu> {
    let path = env::var_os("PATH")?;
    let candidates = env::split_paths(&path).map(|dir| dir.join("criu"));
    let criu = candidates
        .filter(|path| path.is_file())
        .find_map(|path| Criu::at(&path).ok())?;
    criu.check().is_ok().then_some(criu)
}
