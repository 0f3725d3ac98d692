//! The command blocks of the project's documents, and two hosts to run them on.
//!
//! A block of commands is fenced as `sh`. It is run on one of two hosts: on the source, until a comment `# on the
//! destination` (or `# on the source`) says otherwise. Each section (heading) begins with fresh hosts. Blocks that are
//! fenced as `sh setup` are run at the beginning of every other section of their document. `scp` between the hosts is
//! played by a small script.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::container_host::ContainerHost;
use crate::criu::Criu;
use crate::net::TwoHosts;
use crate::test_dir::TestDir;
use crate::workspace::root;

/// Copies what is named before the last word, HOST:PATH, to the home directory of the other host.
const SCP: &str = r#"#!/bin/sh -e
for last; do :; done
case ${last%%:*} in
    "$DESTINATION") home=/shared/destination ;;
    "$SOURCE") home=/shared/source ;;
    *) echo "scp: unknown host in $last" >&2; exit 1 ;;
esac
while [ $# -gt 1 ]; do
    case $1 in -*) ;; *) cp -a "$1" "$home/${last#*:}" ;; esac
    shift
done
"#;

/// A fenced block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Where it is, for messages.
    pub place: String,
    /// The number of its section in the document.
    pub section: usize,
    /// The words behind the fence.
    pub language: String,
    /// What stands in it.
    pub text: String,
}

/// README.md and all documents below docs/.
///
/// # Errors
/// They cannot be listed.
pub fn documents() -> Result<Vec<PathBuf>> {
    let mut found = vec![root().join("README.md")];
    let mut dirs = vec![root().join("docs")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The blocks of a document, in order.
///
/// # Errors
/// It cannot be read.
pub fn blocks(document: &Path) -> Result<Vec<Block>> {
    let text = fs::read_to_string(document)?;
    let name = document.strip_prefix(root()).unwrap_or(document).display();
    let (mut blocks, mut open, mut section) = (Vec::new(), None::<Block>, 0);
    for (line, number) in text.lines().zip(1..) {
        match (&mut open, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => {
                open = Some(Block {
                    place: format!("{name}:{number}"),
                    section,
                    language: language.trim().to_owned(),
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => section += usize::from(line.starts_with('#')),
        }
    }
    Ok(blocks)
}

/// The two hosts of a section.
#[derive(Debug)]
pub struct HostPair {
    /// Source and destination. Ended before their networks go.
    pub machines: [ContainerHost; 2],
    tools: PathBuf,
    _hosts: TwoHosts,
}

impl HostPair {
    /// Fresh hosts whose root is `system`, with a CRIU in PATH, `$SOURCE` and `$DESTINATION`.
    ///
    /// # Errors
    /// As [`ContainerHost::start`].
    pub fn new(test_dir: &TestDir, system: &Path, criu: &Criu, name: &str) -> Result<HostPair> {
        let hosts = TwoHosts::new(None)?;
        let dir = test_dir.path(name);
        let scp = dir.join("tools/scp");
        fs::create_dir_all(scp.parent().context("the tools' directory")?)?;
        fs::write(&scp, SCP)?;
        fs::set_permissions(&scp, fs::Permissions::from_mode(0o755))?;
        let start = |host, side| -> Result<ContainerHost> {
            let mut machine = ContainerHost::start(host, system, &dir, side, criu)?;
            machine.set("SOURCE", &hosts.source.address.to_string());
            machine.set("DESTINATION", &hosts.destination.address.to_string());
            Ok(machine)
        };
        let machines = [
            start(&hosts.source, "source")?,
            start(&hosts.destination, "destination")?,
        ];
        Ok(HostPair {
            machines,
            tools: dir.join("tools"),
            _hosts: hosts,
        })
    }

    /// A directory that is in PATH on both hosts.
    pub fn tools(&self) -> &Path {
        &self.tools
    }

    /// Sets a variable on both hosts.
    pub fn set(&mut self, name: &str, value: &str) {
        for machine in &mut self.machines {
            machine.set(name, value);
        }
    }

    /// Runs a block; the first command that fails is an error.
    ///
    /// # Errors
    /// A command fails; the error tells place, commands and logs.
    pub fn run(&self, block: &Block) -> Result<()> {
        let (mut at, mut script) = (0, String::new());
        for line in block.text.lines() {
            let next = match line.trim() {
                comment if comment.starts_with("# on the source") => 0,
                comment if comment.starts_with("# on the destination") => 1,
                _ => at,
            };
            if next != at {
                self.script(at, &std::mem::take(&mut script))?;
                at = next;
            }
            script.push_str(line);
            script.push('\n');
        }
        let place = || block.place.clone();
        self.script(at, &script).with_context(place)
    }

    fn script(&self, at: usize, script: &str) -> Result<()> {
        match script.trim().is_empty() {
            true => Ok(()),
            false => self.machines[at].script(script),
        }
    }
}
