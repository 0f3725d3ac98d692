//! Refuses dumps, made on this host, of processes whose pages a lazy-client is still bringing.
//!
//! To CRIU a page that has not come yet is one that was never touched: the dump would succeed without it. The
//! dump's tree is frozen when its first message arrives, so everything about it can be looked up in /proc: a
//! process of the pid that is named, traced, with memory under a userfaultfd, while a lazy-client of
//! this host holds one. A refusal makes the dump fail, and the tree goes on.
//!
//! Another container's process of the same pid may be stopped as well, by a restore. Who traces the dump's processes has
//! the other end of the connection, which tells them apart. Where that cannot be told, as behind a relay, the dump is
//! refused.

mod cork_watch;
mod corked;
mod dump_connection;
mod proc_reader;

use std::collections::BTreeSet;
use std::fs;

use super::smaps::{self, MISSING};
use crate::criu::header::Target;
use crate::error::{Error, Kind, Result};
use crate::stream::Stream;

pub(super) use cork_watch::CorkWatch;
use dump_connection::DumpConnection;
pub use proc_reader::{ProcReader, ReaderEnds};

/// What lazy-client's processes are called.
const HANDLERS: [&str; 2] = ["lazy-client", "lazy-standby"];

/// Where the link of a userfaultfd in /proc/PID/fd leads to.
pub(super) const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// What was found on this host when a session first asked.
#[derive(Default, Debug)]
pub(super) struct PendingTrees {
    seen: Option<Seen>,
    /// Another process has looked for this session.
    asked: bool,
}

#[derive(Default, Debug)]
struct Seen {
    /// The lazy-client that holds userfaultfds.
    handler: Option<i32>,
    traced: Vec<TracedProcess>,
}

/// A process of this host that is traced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TracedProcess {
    /// Its pid in the innermost namespace, by which images call it.
    pub(super) inner_pid: u32,
    /// Its pid on this host.
    pub(super) pid: i32,
    /// Who traces it, by its pid on this host.
    pub(super) tracer: i32,
}

impl TracedProcess {
    /// The process of `status`, the text of /proc/PID/status, if it is traced.
    fn of(pid: i32, status: &str) -> Option<TracedProcess> {
        let tracer = smaps::tracer(status).filter(|tracer| *tracer != 0)?;
        let inner_pid = smaps::inner_pid(status)?;
        Some(TracedProcess {
            inner_pid,
            pid,
            tracer,
        })
    }
}

/// A process that is dumped while its pages are missing. Pids of this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct IncompleteProcess {
    process: i32,
    /// The lazy-client.
    handler: i32,
}

impl PendingTrees {
    /// Fails if `target` is a process of this host that lacks pages, and the peer of `stream` its dump.
    pub(super) fn refuse(&mut self, stream: &Stream, target: Target) -> Result<()> {
        let Target::Process(pid) = target else {
            return Ok(());
        };
        if !is_local(stream) {
            return Ok(());
        }
        match self.find(pid, DumpConnection::of(stream)) {
            None => Ok(()),
            Some(IncompleteProcess { process, handler }) => {
                let text = format!(
                    "process {process} is being dumped as pid {pid} while its pages are still missing: the dump would \
                     lack them (wait until lazy-client, process {handler}, has ended, and dump again; the \
                     process goes on)"
                );
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    fn find(&mut self, pid: u32, dump: Option<DumpConnection>) -> Option<IncompleteProcess> {
        match proc_reader::of_this_process() {
            Some(reader) => {
                let first = !std::mem::replace(&mut self.asked, true);
                reader.find(pid, dump, first).unwrap_or_else(|error| {
                    tracing::warn!(
                        "the process that reads /proc for this one is lost ({error}): whether pages of process {pid} \
                         are still missing is not known"
                    );
                    None
                })
            }
            None => self.seen.get_or_insert_with(Seen::look).find(pid, dump),
        }
    }
}

/// Whether both ends of a connection are on this host, as far as it can be told.
pub(super) fn is_local(stream: &Stream) -> bool {
    let socket = stream.socket();
    let ip = |address: std::io::Result<socket2::SockAddr>| {
        let address = address.ok()?.as_socket()?;
        Some(address.ip().to_canonical())
    };
    match (ip(socket.local_addr()), ip(socket.peer_addr())) {
        (Some(own), Some(peer)) => own == peer || peer.is_loopback(),
        // A socket without an internet address.
        _ => true,
    }
}

impl Seen {
    fn look() -> Seen {
        let mut seen = Seen::default();
        for (pid, status) in statuses() {
            let name = smaps::field(&status, "Name:").unwrap_or_default().trim();
            if HANDLERS.contains(&name) && holds_userfaultfd(pid) {
                seen.handler = Some(pid);
            }
            seen.traced.extend(TracedProcess::of(pid, &status));
        }
        seen
    }

    /// Who traces a process: a dump is among them.
    fn tracers(&self) -> BTreeSet<i32> {
        self.traced.iter().map(|process| process.tracer).collect()
    }

    /// The process that is being dumped as `pid` over the connection `dump`, if it lacks pages.
    fn find(&self, pid: u32, dump: Option<DumpConnection>) -> Option<IncompleteProcess> {
        let handler = self.handler?;
        let named = self.traced.iter().copied();
        let named: Vec<_> = named.filter(|process| process.inner_pid == pid).collect();
        let holder = |tracers: &BTreeSet<i32>| dump?.holder(tracers);
        let process = incomplete(&named, lacks_pages, holder)?.pid;
        Some(IncompleteProcess { process, handler })
    }
}

/// Which of the processes `named`, one of which is being dumped, may be that one and lacks pages. `holder` says which of
/// the tracers the dump is, if that is known: it is asked only if it matters, since it looks through all connections.
fn incomplete(
    named: &[TracedProcess],
    lacks_pages: impl Fn(i32) -> bool,
    holder: impl FnOnce(&BTreeSet<i32>) -> Option<i32>,
) -> Option<TracedProcess> {
    let lacking = named.iter().filter(|process| lacks_pages(process.pid));
    let mut lacking: Vec<_> = lacking.collect();
    if !lacking.is_empty() {
        let tracer = holder(&named.iter().map(|process| process.tracer).collect());
        lacking.retain(|process| tracer.is_none_or(|tracer| process.tracer == tracer));
    }
    lacking.first().copied().copied()
}

/// All processes of this host that are traced.
pub(super) fn traced_processes() -> Vec<TracedProcess> {
    let traced = |(pid, status): (i32, String)| TracedProcess::of(pid, &status);
    statuses().filter_map(traced).collect()
}

/// The processes of this host with the texts of their /proc/PID/status.
fn statuses() -> impl Iterator<Item = (i32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // It may be gone by now.
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        Some((pid, status))
    })
}

fn holds_userfaultfd(pid: i32) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|link| link.as_os_str() == USERFAULTFD)
}

fn lacks_pages(pid: i32) -> bool {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    !smaps::mappings_with(MISSING, &smaps).is_empty()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn peers_of_this_host_are_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(is_local(&Stream::plain(peer)));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(is_local(&Stream::plain(one)));
    }

    #[test]
    fn another_containers_process_of_the_same_pid_is_no_reason() {
        let traced = |pid, tracer| TracedProcess {
            inner_pid: 1,
            pid,
            tracer,
        };
        // 20 lacks pages and is traced by 2, as a restore does; 10 is dumped by 1.
        let both = [traced(10, 1), traced(20, 2)];
        let lacks_pages = |pid| pid == 20;
        let found = |named: &[TracedProcess], dump| {
            let found = incomplete(named, lacks_pages, |tracers| {
                assert_eq!(tracers.len(), named.len());
                dump
            });
            found.map(|process| process.pid)
        };
        assert_eq!(found(&both, Some(1)), None);
        assert_eq!(found(&both, Some(2)), Some(20));
        assert_eq!(found(&both, None), Some(20));
        assert_eq!(found(&both[..1], Some(1)), None);
        assert_eq!(found(&both[1..], None), Some(20));
    }

    #[test]
    fn processes_that_nobody_restores_lazily_are_taken() {
        let (one, _other) = UnixStream::pair().unwrap();
        let stream = Stream::plain(one);
        let own = Target::Process(std::process::id());
        let mut trees = PendingTrees::default();
        assert!(trees.refuse(&stream, own).is_ok());
        assert!(trees.refuse(&stream, Target::Shmem(1)).is_ok());
        assert!(!lacks_pages(std::process::id().cast_signed()));
        assert!(!holds_userfaultfd(std::process::id().cast_signed()));
    }
}
