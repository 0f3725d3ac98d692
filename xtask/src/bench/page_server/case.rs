//! What a case is made of: who sends or asks for what, over what, and who competes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;

use super::super::TMPFS;
use super::super::rounds::Contend;

/// Where images go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Target {
    /// Memory.
    Tmpfs,
    /// A disk's file system.
    Disk,
}

impl Target {
    pub(super) const ALL: [Target; 2] = [Target::Tmpfs, Target::Disk];

    pub(super) fn name(self) -> &'static str {
        match self {
            Target::Tmpfs => "tmpfs",
            Target::Disk => "disk",
        }
    }

    /// The directory of the kind; `disk` is the one on a disk.
    ///
    /// # Errors
    /// It is of another kind.
    pub(super) fn dir(self, disk: &Path) -> Result<PathBuf> {
        let dir = match self {
            Target::Tmpfs => Path::new(TMPFS),
            Target::Disk => disk,
        };
        let found = statfs(dir).with_context(|| dir.display().to_string())?;
        let in_memory = found.filesystem_type() == TMPFS_MAGIC;
        ensure!(
            in_memory == (self == Target::Tmpfs),
            "{} is not on {}: see --disk-dir",
            dir.display(),
            self.name()
        );
        Ok(dir.to_owned())
    }
}

/// What is between the two ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Link {
    /// A TCP connection over loopback.
    Plain,
    /// The same under TLS.
    Tls,
}

impl Link {
    pub(super) const ALL: [Link; 2] = [Link::Plain, Link::Tls];

    pub(super) fn name(self) -> &'static str {
        match self {
            Link::Plain => "plain",
            Link::Tls => "TLS",
        }
    }
}

/// What is sent to a server that receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Feed {
    /// Frames of so many pages each.
    Frames(u32),
    /// What a real `criu dump --page-server` sent.
    Captured,
}

impl Feed {
    fn name(self) -> String {
        match self {
            Feed::Frames(1) => "frames of 1 page".to_owned(),
            Feed::Frames(pages) => format!("frames of {pages} pages"),
            Feed::Captured => "as captured from a dump".to_owned(),
        }
    }
}

/// How pages are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RequestPattern {
    /// Requests of so many pages, many at a time, by so many clients.
    Ahead { pages: u32, clients: u32 },
    /// Requests of one page by one client that waits for each answer.
    OneByOne,
}

impl RequestPattern {
    /// How many clients ask.
    pub(super) fn clients(self) -> u32 {
        match self {
            RequestPattern::Ahead { clients, .. } => clients,
            RequestPattern::OneByOne => 1,
        }
    }
}

/// One thing to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Case {
    /// A dump's stream is received.
    Receive {
        mib: u32,
        feed: Feed,
        target: Target,
        link: Link,
    },
    /// A warm image is served.
    Serve {
        image_mib: u32,
        pattern: RequestPattern,
        link: Link,
    },
    /// A process is dumped by CRIU.
    Dump {
        mib: u32,
        target: Target,
        link: Link,
    },
}

impl Case {
    pub(super) fn link(self) -> Link {
        match self {
            Case::Receive { link, .. } | Case::Serve { link, .. } | Case::Dump { link, .. } => link,
        }
    }

    pub(super) fn describe(self) -> String {
        let link = self.link().name();
        match self {
            Case::Receive {
                mib, feed, target, ..
            } => format!(
                "receiving {mib} MiB, {}, to {}, {link}",
                feed.name(),
                target.name()
            ),
            Case::Serve {
                image_mib, pattern, ..
            } => {
                let pattern = match pattern {
                    RequestPattern::OneByOne => "1 page at a time".to_owned(),
                    RequestPattern::Ahead { pages, clients } => {
                        format!("{pages} pages a request, {clients} clients asking ahead")
                    }
                };
                format!("serving from {image_mib} MiB, {pattern}, {link}")
            }
            Case::Dump { mib, target, .. } => {
                format!("criu dump of {mib} MiB to {}, {link}", target.name())
            }
        }
    }
}

/// Who receives or serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// page-server as it is.
    Pageferry,
    /// page-server with the driver for where io_uring is refused.
    Epoll,
    /// page-server that has everything on the disk when it answers CLOSE.
    SyncClose,
    /// CRIU's page-server.
    Criu,
    /// A process that writes what it receives.
    Sink,
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::Pageferry => "pageferry",
            Contender::Epoll => "pageferry --io epoll",
            Contender::SyncClose => "pageferry --sync close",
            Contender::Criu => "CRIU",
            Contender::Sink => "bare sink",
        }
    }
}

impl Contender {
    /// Options of page-server that make the difference.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Contender::Pageferry => &["--io", "uring"],
            Contender::Epoll => &["--io", "epoll"],
            Contender::SyncClose => &["--sync", "close"],
            Contender::Criu | Contender::Sink => &[],
        }
    }

    pub(super) fn is_ours(self) -> bool {
        !matches!(self, Contender::Criu | Contender::Sink)
    }
}
