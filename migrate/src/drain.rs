//! Waits until nobody is connected to a container that is about to end.

use std::collections::BTreeSet;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::sys::owned_process::ProcessName;
use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::{FDTarget, Process};
use tokio::time::{Instant, sleep};

use crate::rounds::Tree;

/// How often connections are counted.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// So many times in a row there must be none: a connection that was led here before the switch may still be on its way.
const QUIET_LOOKS: u32 = 5;

/// Waits until the container under `root` has no connection of a client's, and tells how many there are when `limit` is
/// over.
pub(crate) async fn wait(root: ProcessName, limit: Duration) -> Result<usize> {
    let start = Instant::now();
    let mut quiet = 0;
    while root.is_alive() {
        let looked = tokio::task::spawn_blocking(move || open_connections(root.pid)).await;
        let open = looked.map_err(|error| {
            Error::wrap(
                Kind::Io,
                "the look at connections was ended",
                std::io::Error::other(error),
            )
        })??;
        quiet = match open {
            0 => quiet + 1,
            _ => 0,
        };
        if quiet >= QUIET_LOOKS {
            return Ok(0);
        }
        if start.elapsed() >= limit {
            return Ok(open);
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(0)
}

/// Connections that clients have to a port on which the container listens, those included that it has not accepted yet.
fn open_connections(root: i32) -> Result<usize> {
    let failed = |error| {
        Error::wrap(
            Kind::Io,
            format!("cannot see the connections of {root}"),
            error,
        )
    };
    let tree = Tree::of(root)?;
    let own: BTreeSet<u64> = tree
        .members()
        .iter()
        .flat_map(|member| sockets(member.pid))
        .collect();
    let process = Process::new(root).map_err(failed)?;
    let mut all = process.tcp().map_err(failed)?;
    // A kernel without IPv6 has no such file.
    all.extend(process.tcp6().unwrap_or_default());
    Ok(count(&all, &own))
}

/// The sockets of a process, by inode.
fn sockets(pid: i32) -> Vec<u64> {
    let Ok(descriptors) = Process::new(pid).and_then(|process| process.fd()) else {
        // It has ended since.
        return Vec::new();
    };
    let targets = descriptors.flatten().map(|descriptor| descriptor.target);
    targets
        .filter_map(|target| match target {
            FDTarget::Socket(inode) => Some(inode),
            _ => None,
        })
        .collect()
}

fn count(all: &[TcpNetEntry], own: &BTreeSet<u64>) -> usize {
    let ports: BTreeSet<u16> = all
        .iter()
        .filter(|entry| entry.state == TcpState::Listen && own.contains(&entry.inode))
        .map(|entry| entry.local_address.port())
        .collect();
    // In the states that are not named here nothing is on its way to a client any more.
    let is_open = |entry: &&TcpNetEntry| {
        matches!(
            entry.state,
            TcpState::Established
                | TcpState::SynRecv
                | TcpState::NewSynRecv
                | TcpState::FinWait1
                | TcpState::CloseWait
                | TcpState::LastAck
                | TcpState::Closing
        )
    };
    let to_it = |entry: &&TcpNetEntry| ports.contains(&entry.local_address.port());
    all.iter().filter(is_open).filter(to_it).count()
}
