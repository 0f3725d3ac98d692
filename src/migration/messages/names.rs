//! Names of migrations and containers. Both become parts of paths and command lines, so what is neither is refused.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::limits::{CONTAINER_ID_BYTES_MAX, MIGRATION_ID_BYTES_MAX};

/// Names one migration on both sides. It is also the name of a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(String);

/// A name that cannot be a migration's.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "{0:?} is not a name of a migration: 1 to {MIGRATION_ID_BYTES_MAX} letters a to z, digits and '-', \
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

/// Names a container, as runtimes allow.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// A name that no container has.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "{0:?} is not a name of a container: 1 to {CONTAINER_ID_BYTES_MAX} letters, digits, '_', '+', '-' and '.', \
     beginning with a letter or digit"
)]
pub struct BadContainerId(String);

impl ContainerId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = BadContainerId;

    fn from_str(text: &str) -> Result<ContainerId, BadContainerId> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        let fits = (1..=CONTAINER_ID_BYTES_MAX).contains(&text.len());
        // One that begins otherwise could be taken for an option, or for a directory above.
        let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        match fits && begins && text.chars().all(allowed) {
            true => Ok(ContainerId(text.to_owned())),
            false => Err(BadContainerId(text.chars().take(100).collect())),
        }
    }
}

impl TryFrom<String> for ContainerId {
    type Error = BadContainerId;

    fn try_from(text: String) -> Result<ContainerId, BadContainerId> {
        text.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
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
    fn names_of_containers_are_neither_options_nor_directories() {
        for bad in ["", ".", "..", "a/b", "-f", ".a", "a b", &"a".repeat(1025)] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad:?}");
        }
        for good in ["web", "A_b.c+d-e", "0"] {
            assert_eq!(good.parse::<ContainerId>().unwrap().as_str(), good);
        }
    }
}
