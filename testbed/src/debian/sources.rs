//! The machine's own Debian archive, read from its apt sources in either form.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Suites by which Debian's main archive is recognised among other sources.
const DEBIAN_SUITES: [&str; 12] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "experimental",
];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where Debian's packages come from on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Archive {
    /// The mirror.
    pub(crate) uri: String,
    /// The keys that sign it.
    pub(crate) keyring: PathBuf,
}

/// Finds the main archive among the machine's sources.
pub(crate) fn of_machine() -> Result<Archive> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    files.iter().find_map(|path| of_file(path)).context(
        "no source of Debian's main archive in /etc/apt: CRIU packages cannot be fetched here",
    )
}

fn of_file(path: &Path) -> Option<Archive> {
    let text = fs::read_to_string(path).ok()?;
    match path.extension()?.to_str()? {
        "sources" => of_deb822(&text),
        "list" => text.lines().find_map(of_line),
        _ => None,
    }
}

/// A stanza per source, `Field: values`, continued by lines that begin with a space.
fn of_deb822(text: &str) -> Option<Archive> {
    text.split("\n\n").find_map(|stanza| {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines().filter(|line| !line.starts_with('#')) {
            match (
                line.starts_with([' ', '\t']),
                fields.last_mut(),
                line.split_once(':'),
            ) {
                (true, Some((_, value)), _) => {
                    value.push(' ');
                    value.push_str(line.trim());
                }
                (false, _, Some((name, value))) => {
                    fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
                _ => {}
            }
        }
        let field = |name: &str| {
            fields
                .iter()
                .find(|(have, _)| have == name)
                .map_or("", |(_, value)| value.as_str())
        };
        let enabled = field("enabled") != "no";
        let binary = field("types").split_whitespace().any(|kind| kind == "deb");
        let main = field("suites").split_whitespace().any(is_main_suite);
        let uri = field("uris").split_whitespace().next()?;
        (enabled && binary && main).then(|| archive(uri, field("signed-by")))
    })
}

/// `deb [option=value ...] URI suite component ...`
fn of_line(line: &str) -> Option<Archive> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let key = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="));
    is_main_suite(suite).then(|| archive(uri, key.unwrap_or("")))
}

fn is_main_suite(suite: &str) -> bool {
    DEBIAN_SUITES.contains(&suite)
}

fn archive(uri: &str, signed_by: &str) -> Archive {
    // A key may also stand in the source itself; then the distribution's own keyring serves.
    let keyring = if signed_by.starts_with('/') {
        signed_by
    } else {
        KEYRING
    };
    Archive {
        uri: uri.to_owned(),
        keyring: keyring.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_deb822() {
        let text = "Types: deb\nURIs: http://other/apt\nSuites: nodistro\nComponents: main\n\n\
            # main\nTypes: deb deb-src\nURIs: http://mirror/debian\nSuites:\n bookworm\n bookworm-updates\n\
            Components: main\nSigned-By: /keys/a.gpg\n";
        let keyring = PathBuf::from("/keys/a.gpg");
        assert_eq!(
            of_deb822(text),
            Some(Archive {
                uri: "http://mirror/debian".into(),
                keyring
            })
        );
        assert_eq!(
            of_deb822(&format!("Enabled: no\n{}", text.replace("\n\n", "\n"))),
            None
        );
    }

    #[test]
    fn reads_one_line() {
        let archive = of_line("deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian sid main");
        let keyring = PathBuf::from("/k.gpg");
        assert_eq!(
            archive,
            Some(Archive {
                uri: "http://mirror/debian".into(),
                keyring
            })
        );
        assert_eq!(
            of_line("deb http://mirror/debian trixie main")
                .unwrap()
                .keyring,
            Path::new(KEYRING)
        );
    }

    #[test]
    fn passes_over_other_archives() {
        assert_eq!(of_line("deb https://other/apt tool-bookworm main"), None);
        assert_eq!(
            of_line("deb http://mirror/debian-security bookworm-security main"),
            None
        );
        assert_eq!(of_line("deb-src http://mirror/debian sid main"), None);
        assert_eq!(of_line("# deb http://mirror/debian sid main"), None);
    }
}
