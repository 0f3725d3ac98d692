//! What the two sides of a migration say to each other: JSON bodies of the agent's HTTP interface.
//!
//! Times are milliseconds or, where a name says so, microseconds since 1970 by the speaker's clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::agent::AgentState;
use super::convergence::Mode;
use crate::criu::header::Wire;
use crate::limits::{MIGRATION_ID_BYTES_MAX, MIGRATION_PIDS_MAX};

/// Names one migration on both sides. It is also the name of a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(String);

/// A name that cannot be a migration's.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "{0:?} is no name of a migration: 1 to {MIGRATION_ID_BYTES_MAX} letters a to z, digits and '-', \
     beginning with a letter or digit"
)]
pub struct BadMigrationId(String);

impl FromStr for MigrationId {
    type Err = BadMigrationId;

    fn from_str(text: &str) -> Result<MigrationId, BadMigrationId> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = (1..=MIGRATION_ID_BYTES_MAX).contains(&text.len());
        let good = fits && text.starts_with(plain) && text.chars().all(|c| plain(c) || c == '-');
        match good {
            true => Ok(MigrationId(text.to_owned())),
            // An endless name is not repeated.
            false => Err(BadMigrationId(text.chars().take(100).collect())),
        }
    }
}

impl TryFrom<String> for MigrationId {
    type Error = BadMigrationId;

    fn try_from(text: String) -> Result<MigrationId, BadMigrationId> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> String {
        id.0
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A version of CRIU, as `criu --version` prints it: 4.2.1 is `[4, 2, 1]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct CriuVersion(pub [u16; 3]);

impl CriuVersion {
    /// Finds it in what `criu --version` prints.
    pub fn parse(text: &str) -> Option<CriuVersion> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))?;
        let mut parts = line.trim().split('.');
        let mut version = [0; 3];
        for (at, number) in version.iter_mut().enumerate() {
            let digits: String = match parts.next() {
                Some(part) => part.chars().take_while(char::is_ascii_digit).collect(),
                None if at > 0 => break,
                None => return None,
            };
            *number = digits.parse().ok()?;
        }
        Some(CriuVersion(version))
    }
}

impl CriuVersion {
    /// The layout of this CRIU's frames, which is also the form of the images that it reads.
    pub fn wire(self) -> Wire {
        match self < CriuVersion([4, 2, 0]) {
            true => Wire::V1,
            false => Wire::V2,
        }
    }
}

impl fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        match patch {
            0 => write!(f, "{major}.{minor}"),
            _ => write!(f, "{major}.{minor}.{patch}"),
        }
    }
}

/// What a host has that a migration depends on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HostFacts {
    /// The version of pageferry.
    pub pageferry: String,
    /// The version of CRIU; `None` if there is none.
    pub criu: Option<CriuVersion>,
    /// What `criu check` says against restores there; empty if it looks good.
    pub criu_problems: String,
    /// The kernel's release.
    pub kernel: String,
    /// The machine: x86_64, aarch64.
    pub machine: String,
    /// Features of its processor, as /proc/cpuinfo lists them.
    pub cpu_flags: Vec<String>,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Memory that is free for new processes, bytes.
    pub available_bytes: u64,
    /// Room in the agent's directory, bytes.
    pub disk_bytes: u64,
    /// Whether userfaultfd can be used there.
    pub userfaultfd: bool,
    /// Its clock, µs since 1970.
    pub clock_us: u64,
}

/// Begins a migration.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Its name.
    pub id: MigrationId,
    /// How memory is carried.
    pub mode: Mode,
    /// The pids of the tree, the root first, as the tree's own namespace numbers them.
    pub pids: Vec<u32>,
    /// Memory of the tree, bytes.
    pub memory_bytes: u64,
    /// The connection of the source's clients: kept over the move, closed, or refused.
    pub tcp: TcpConnections,
    /// After so many seconds without a word from the source the agent aborts, unless it has decided.
    pub timeout_s: u64,
}

/// What becomes of established TCP connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcpConnections {
    /// A tree that has one is not moved.
    #[default]
    Refuse,
    /// They go on, if the address moves too.
    Established,
    /// They are closed at the destination.
    Close,
}

/// Something in [`Begin`] that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BadBegin {
    /// No process, or more than a migration takes.
    #[error("a tree of {0} processes: 1 to {MIGRATION_PIDS_MAX} can be moved")]
    Pids(usize),
    /// A pid that no process has.
    #[error("0 is no pid")]
    PidZero,
}

impl Begin {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadBegin> {
        if self.pids.is_empty() || self.pids.len() > MIGRATION_PIDS_MAX {
            return Err(BadBegin::Pids(self.pids.len()));
        }
        match self.pids.contains(&0) {
            true => Err(BadBegin::PidZero),
            false => Ok(()),
        }
    }
}

/// Where pages are received.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Receiver {
    /// The TCP port, at the agent's address.
    pub port: u16,
}

/// Asks for the restore.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Where the source serves the memory that is not in the images: a port at the address that the request
    /// comes from. `None`: the images have everything.
    pub memory_port: Option<u16>,
}

/// Where a migration stands.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Which migration.
    pub id: MigrationId,
    /// How memory is carried.
    pub mode: Mode,
    /// Where the agent stands.
    pub state: AgentState,
    /// Why it was aborted, or what is wrong.
    pub problem: Option<String>,
    /// Rounds that are stored.
    pub rounds: u32,
    /// When the processes ran again, µs since 1970 by the agent's clock.
    pub resumed_us: Option<u64>,
    /// When the last page was there, µs since 1970 by the agent's clock.
    pub complete_us: Option<u64>,
    /// The summary of lazy-client, once it has ended.
    pub lazy_summary: Option<serde_json::Value>,
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// In words.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_a_directory() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            "A",
            "a b",
            "a\0",
            &"a".repeat(65),
        ] {
            assert!(bad.parse::<MigrationId>().is_err(), "{bad:?}");
            let json = serde_json::to_string(bad).unwrap();
            assert!(
                serde_json::from_str::<MigrationId>(&json).is_err(),
                "{bad:?}"
            );
        }
        for good in ["a", "0", "web-20261129", &"a".repeat(64)] {
            assert_eq!(good.parse::<MigrationId>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn versions_are_compared_by_number() {
        let of = |text: &str| CriuVersion::parse(&format!("Version: {text}\nGitID: v1\n")).unwrap();
        assert_eq!(of("4.2.1"), CriuVersion([4, 2, 1]));
        assert_eq!(of("4.3"), CriuVersion([4, 3, 0]));
        assert_eq!(of("4.10-rc1"), CriuVersion([4, 10, 0]));
        assert!(of("4.3") > of("4.2.1") && of("4.10") > of("4.9.9"));
        assert_eq!((of("4.1.1").wire(), of("4.2").wire()), (Wire::V1, Wire::V2));
        assert_eq!(of("4.3").to_string(), "4.3");
        assert_eq!(CriuVersion::parse("criu 4"), None);
        assert_eq!(CriuVersion::parse("Version: x"), None);
    }
}
