//! What the two sides of a migration say to each other: JSON bodies of the agent's HTTP interface.
//!
//! Times are milliseconds or, where a name says so, microseconds since 1970 by the speaker's clock.

mod files;
mod names;
mod output;
mod replayed;
mod stateless;

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::agent::AgentState;
use super::convergence::Mode;
use crate::criu::header::Wire;
use crate::limits::{
    FILE_TREES_MAX, INTERFACE_BYTES_MAX, MIGRATION_ADDRESSES_MAX, MIGRATION_PIDS_MAX,
    OCI_LAYERS_MAX, OUTPUTS_MAX, TIMEOUT_S_MAX,
};

pub use files::{FileTree, OverlayRoot, RootFiles, Seal, TreeSpace, WantedFiles};
pub use names::{BadContainerId, BadMigrationId, ContainerId, MigrationId};
use output::outputs_are_possible;
pub use output::{Output, OutputSeal, OutputStatus};
pub use replayed::{
    BadReplay, ReplayAddresses, ReplayBegin, ReplayFinish, ReplayStart, ReplayStatus,
};
pub use stateless::{
    BadDigest, BadReady, ContainerAddresses, ContainerBegin, ContainerCreate, ContainerStart,
    ContainerStatus, Digest, Ready,
};

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
    /// Space in the agent's directory, bytes.
    pub disk_bytes: u64,
    /// Whether userfaultfd can be used there.
    pub userfaultfd: bool,
    /// Its clock, µs since 1970.
    pub clock_us: u64,
    /// How long it copies a GiB into memory that is new to the process, µs; 0: not measured, as of older versions.
    #[serde(default)]
    pub copy_us_per_gib: u64,
}

/// A container runtime, by the name of its program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuntimeKind {
    /// runc
    Runc,
    /// crun
    Crun,
}

impl RuntimeKind {
    /// The name of its program.
    pub fn name(self) -> &'static str {
        match self {
            RuntimeKind::Runc => "runc",
            RuntimeKind::Crun => "crun",
        }
    }
}

/// The container that a tree is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Container {
    /// Its name on both hosts.
    pub id: ContainerId,
    /// The runtime on both hosts.
    pub runtime: RuntimeKind,
    /// Directory of its bundle at the destination, unless the agent knows a better one (`--bundles`).
    pub bundle: String,
    /// Whether the user named that directory for the destination.
    pub bundle_is_given: bool,
    /// The config.json of its bundle at the source.
    pub config: serde_json::Value,
    /// Limits of its control groups in the form of the OCI's `linux.resources`, to be set again.
    pub resources: Option<serde_json::Value>,
}

/// An address that moves with the processes, on a device of the host that is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The device.
    pub device: String,
}

impl ServiceAddress {
    /// As `ip` writes it: 10.0.0.5/24.
    pub fn cidr(&self) -> String {
        format!("{}/{}", self.address, self.prefix)
    }

    /// Whether an interface can have it: a peer may have said anything.
    pub fn is_possible(&self) -> bool {
        let bits = if self.address.is_ipv4() { 32 } else { 128 };
        let plain = |c: char| c.is_ascii_graphic() && c != '/';
        let name = &self.device;
        let fits = (1..=INTERFACE_BYTES_MAX).contains(&name.len());
        // A name that begins with a dash could be taken for an option.
        self.prefix <= bits
            && fits
            && name.chars().all(plain)
            && !name.starts_with(['-', '.'])
            && !self.address.is_unspecified()
            && !self.address.is_multicast()
    }
}

/// What is to come to the destination, to be looked at before anything is frozen.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// The container, if it is one.
    pub container: Option<Container>,
    /// Addresses that come along.
    pub addresses: Vec<ServiceAddress>,
    /// Files that come along.
    #[serde(default)]
    pub files: WantedFiles,
}

/// What the destination says of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// The first line of the runtime's `--version`, for a container.
    pub runtime: Option<String>,
    /// What is in the way.
    pub problems: Vec<String>,
    /// Whether the container's root file system is to be sent.
    #[serde(default)]
    pub sends_root: bool,
    /// Which layers of the root are missing there; `None` if there is none, or no overlay can be mounted there.
    #[serde(default)]
    pub missing_layers: Option<Vec<Digest>>,
    /// Space in the agent's directory, for the container's root file system if that is sent, and for each volume.
    #[serde(default)]
    pub rooms: Vec<TreeSpace>,
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
    /// After so many seconds without a request from the source the agent aborts, unless it has decided.
    pub timeout_s: u64,
    /// The container that the tree is, if it is one.
    #[serde(default)]
    pub container: Option<Container>,
    /// Addresses that come along, on the destination's devices.
    #[serde(default)]
    pub addresses: Vec<ServiceAddress>,
    /// Trees of files that come along.
    #[serde(default)]
    pub files: Vec<FileTree>,
    /// Whether files that have arrived stay for another migration, if this one is given up.
    #[serde(default)]
    pub keeps_files: bool,
    /// Where the container writes what it prints, and where that goes on.
    #[serde(default)]
    pub outputs: Vec<Output>,
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
    #[error("0 is not a pid")]
    PidZero,
    /// More addresses than a migration takes.
    #[error("{0} addresses: at most {MIGRATION_ADDRESSES_MAX} can be moved")]
    Addresses(usize),
    /// An address that no interface has.
    #[error("{0:?} on {1:?} is not an address of an interface")]
    Address(String, String),
    /// More trees of files than a migration takes.
    #[error("{0} trees of files: at most {FILE_TREES_MAX} can be moved")]
    Trees(usize),
    /// A place that no tree of files can have, or a root file system without a container.
    #[error(
        "{0:?} is not a place for files, or its layers cannot be mounted: an absolute path without .. is one"
    )]
    Tree(String),
    /// Layers that no overlay has.
    #[error("{0} layers, or one of them twice: 1 to {OCI_LAYERS_MAX} can be mounted")]
    Layers(usize),
    /// A pipe or file that no container writes to, more than two of them, or one without a container.
    #[error("{0} outputs, or one that cannot be: a container has at most {OUTPUTS_MAX}")]
    Outputs(usize),
    /// A time that no clock reaches.
    #[error("a timeout of {0} s: at most {TIMEOUT_S_MAX} s are waited for")]
    Timeout(u64),
}

impl Begin {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadBegin> {
        if self.pids.is_empty() || self.pids.len() > MIGRATION_PIDS_MAX {
            return Err(BadBegin::Pids(self.pids.len()));
        }
        if self.addresses.len() > MIGRATION_ADDRESSES_MAX {
            return Err(BadBegin::Addresses(self.addresses.len()));
        }
        if let Some(bad) = self.addresses.iter().find(|service| !service.is_possible()) {
            return Err(BadBegin::Address(bad.cidr(), bad.device.clone()));
        }
        if self.files.len() > FILE_TREES_MAX {
            return Err(BadBegin::Trees(self.files.len()));
        }
        let fits = |tree: &FileTree| {
            tree.is_possible() && (tree.path.is_some() || self.container.is_some())
        };
        if let Some(bad) = self.files.iter().find(|tree| !fits(tree)) {
            return Err(BadBegin::Tree(bad.path.clone().unwrap_or_default()));
        }
        if !outputs_are_possible(&self.outputs)
            || (self.container.is_none() && !self.outputs.is_empty())
        {
            return Err(BadBegin::Outputs(self.outputs.len()));
        }
        if self.timeout_s > TIMEOUT_S_MAX {
            return Err(BadBegin::Timeout(self.timeout_s));
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
    /// When faults were, once lazy-client has ended.
    #[serde(default)]
    pub faults: Option<FaultTimes>,
}

/// Faults at the destination over the time, from the moment at which the processes ran.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FaultTimes {
    /// Waiting of all threads, summed, µs.
    pub blocked_us: u64,
    /// Length of each part, µs.
    pub part_us: u64,
    /// The parts, in order.
    pub parts: Vec<FaultPart>,
}

/// Faults in one part of the time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FaultPart {
    /// How many began in it.
    pub count: u64,
    /// Their waiting, summed, µs.
    pub waited_us: u64,
}

/// Most parts of a [`FaultTimes`].
const FAULT_PARTS_MAX: u64 = 200;

impl FaultTimes {
    /// Sorts faults, each with its time and its waiting in µs, into parts of equal length.
    pub fn of(faults: &[(u64, u64)]) -> FaultTimes {
        let Some(last) = faults.iter().map(|(time, _)| *time).max() else {
            return FaultTimes::default();
        };
        let part_us = last / FAULT_PARTS_MAX + 1;
        let count = usize::try_from(last / part_us + 1).unwrap_or(0);
        let mut times = FaultTimes {
            blocked_us: 0,
            part_us,
            parts: vec![FaultPart::default(); count],
        };
        for (time, waited) in faults {
            times.blocked_us = times.blocked_us.saturating_add(*waited);
            let index = usize::try_from(time / part_us).unwrap_or(usize::MAX);
            if let Some(part) = times.parts.get_mut(index) {
                part.count += 1;
                part.waited_us = part.waited_us.saturating_add(*waited);
            }
        }
        times
    }
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// In words.
    pub error: String,
}

#[cfg(test)]
mod tests;
