//! What a container prints, on its way to the log that goes on at the destination.

use serde::{Deserialize, Serialize};

use super::files::is_plain_path;
use crate::limits::{OUTPUT_KEY_BYTES_MAX, OUTPUTS_MAX};

/// A pipe or a file of the host to which a container writes what it prints.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// As CRIU names it: `pipe:[4711]`, or `file[1f:4711]` by its mount and inode.
    pub key: String,
    /// Where its log goes on, an absolute path; `None`: in the agent's directory.
    pub path: Option<String>,
    /// Permissions of the log.
    pub mode: u32,
    /// Number of its owner.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
}

impl Output {
    /// Whether the container has the log itself open, and not a pipe that somebody reads.
    pub fn is_file(&self) -> bool {
        self.key.starts_with("file[")
    }

    /// Whether there can be such a one: a peer may have said anything.
    pub fn is_possible(&self) -> bool {
        let inside = |start: &str| self.key.strip_prefix(start)?.strip_suffix(']');
        let is_number =
            |text: &str, radix| !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
        let is_pipe = inside("pipe:[").is_some_and(|inode| is_number(inode, 10));
        let is_file = inside("file[")
            .and_then(|place| place.split_once(':'))
            .is_some_and(|(mount, inode)| is_number(mount, 16) && is_number(inode, 16));
        // The container needs its own log open before it runs: that has a place.
        let has_place = match &self.path {
            Some(path) => is_plain_path(path),
            None => !is_file,
        };
        self.key.len() <= OUTPUT_KEY_BYTES_MAX && (is_pipe || is_file) && has_place
    }
}

/// Whether a container can have these.
pub(super) fn outputs_are_possible(outputs: &[Output]) -> bool {
    let is_only = |output: &Output| {
        let same = |other: &&Output| {
            other.key == output.key || (other.path == output.path && output.path.is_some())
        };
        outputs.iter().filter(same).count() == 1
    };
    outputs.len() <= OUTPUTS_MAX
        && outputs
            .iter()
            .all(|output| output.is_possible() && is_only(output))
}

/// What has arrived of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OutputStatus {
    /// Its length, bytes.
    pub bytes: u64,
    /// Whether nothing more comes from the source.
    pub sealed: bool,
}

/// Nothing more of a log comes from the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OutputSeal {
    /// Its length, bytes.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_an_output_is_refused() {
        let of = |key: &str, path: Option<&str>| Output {
            key: key.to_owned(),
            path: path.map(str::to_owned),
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        let log = Some("/var/log/c.log");
        assert!(of("pipe:[4711]", None).is_possible() && of("pipe:[1]", log).is_possible());
        assert!(of("file[1f:a0]", log).is_possible() && of("file[1f:a0]", log).is_file());
        for (key, path) in [
            ("file[1f:a0]", None),
            ("file[1f]", log),
            ("file[1f:xx]", log),
            ("pipe:[]", log),
            ("pipe:[1", log),
            ("socket:[1]", log),
            ("pipe:[1]", Some("relative")),
            ("pipe:[1]", Some("/a/../b")),
            ("pipe:[1]", Some("")),
        ] {
            assert!(!of(key, path).is_possible(), "{key} {path:?}");
        }
        let two = |path| [of("pipe:[1]", Some("/a")), of("pipe:[2]", Some(path))];
        assert!(outputs_are_possible(&two("/b")) && !outputs_are_possible(&two("/a")));
        let long = format!("pipe:[{}]", "1".repeat(OUTPUT_KEY_BYTES_MAX));
        assert!(!of(&long, log).is_possible());
    }
}
