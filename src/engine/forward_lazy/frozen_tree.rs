//! The processes of a lazy dump, read where they stand still.
//!
//! ```text
//! criu dump ── traces, until CLOSE ──> processes ── /proc/PID/mem ──> here
//!     └── the dump's end of the connection, by which its death is noticed
//! ```
//!
//! `criu dump --lazy-pages` keeps its processes stopped as long as it serves their pages, so these can be read without
//! it: a third of the processor time, and no copy of the memory has to be kept. That needs the dump on this host, and
//! certainty about who is read: a process of the pid that the images name, whose tracer holds the other end of
//! the connection to the dump.
//!
//! Invariant: what is returned was read while the processes stood still. A tracer that ends closes its sockets before
//! the kernel lets its processes go on (do_exit() in Linux: exit_files() before exit_notify()). So if the connection
//! still stands after a read, they had not moved.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::{SockAddr, Socket};

use crate::engine::pending::{TracedProcess, is_local, traced_processes};
use crate::engine::smaps;
use crate::error::{Error, Kind, Result};
use crate::stream::Stream;
use crate::sys::netns::network_of;
use crate::sys::owned_process::ProcessName;
use crate::units::{PageRange, PageSize};

/// How long a dump may take to accept a connection, of which nothing tells. Then it is asked for the pages instead.
const ACCEPTED_WITHIN: Duration = Duration::from_millis(100);

/// See the module's text.
#[derive(Debug)]
pub(super) struct FrozenTree {
    /// This end of the connection to the dump.
    dump: Socket,
    /// The memory of each process, by its pid in the images.
    processes: BTreeMap<u32, File>,
    /// The dump was seen to be gone: nothing that is read now counts.
    gone: AtomicBool,
}

impl FrozenTree {
    /// The processes whose memory `runs` names, as the dump at the other end of `stream` has stopped them. None if they
    /// are not all found for sure, or cannot be read.
    pub(super) fn find(
        stream: &Stream,
        page: PageSize,
        runs: &[(u32, PageRange)],
    ) -> Option<FrozenTree> {
        if !is_local(stream) {
            return None;
        }
        let dump = stream.socket().try_clone().ok()?;
        let (first, _) = runs.first()?;
        let mut traced = traced_processes();
        traced.retain(|process| {
            runs.binary_search_by_key(&process.inner_pid, |run| run.0)
                .is_ok()
        });
        let tracers = traced.iter().filter(|process| process.inner_pid == *first);
        let tracers = BTreeSet::from_iter(tracers.map(|process| process.tracer));
        let tracer = find_dump(&tracers, &dump)?;
        let mut tree = FrozenTree {
            dump,
            processes: BTreeMap::new(),
            gone: AtomicBool::new(false),
        };
        for runs in runs.chunk_by(|one, next| one.0 == next.0) {
            let (pid, _) = runs[0];
            let memory = open_memory(&traced, tracer, pid)?;
            tree.processes.insert(pid, memory.file);
            let ranges = runs.iter().map(|(_, range)| *range);
            tree.try_reading(pid, page, &probes(ranges, &memory.unreadable))?;
        }
        Some(tree)
    }

    /// Reads a page at each of `addresses`.
    fn try_reading(&self, pid: u32, page: PageSize, addresses: &[u64]) -> Option<()> {
        let mut contents = vec![0; page.as_usize()];
        addresses.iter().try_for_each(|at| {
            let range = PageRange::new(*at, at + page.bytes());
            self.read(pid, range, &mut contents).ok()
        })
    }

    /// Fills `out` with the pages `range` of `pid`, of which it is as long.
    ///
    /// # Errors
    ///
    /// The dump has ended, and its processes may go on; or they cannot be read.
    pub(super) fn read(&self, pid: u32, range: PageRange, out: &mut [u8]) -> Result<()> {
        let memory = self.processes.get(&pid);
        let memory = memory.ok_or_else(|| {
            let text = format!("pid {pid} is none of the dump's processes");
            Error::new(Kind::Image, text)
        })?;
        let read = memory.read_exact_at(out, range.start().get());
        // Whatever the read says: without the dump it says nothing of the memory that was dumped.
        self.expect_dump()?;
        read.map_err(|error| {
            let text = format!("cannot read {range} of pid {pid}, which the dump has stopped");
            Error::wrap(Kind::Io, text, error)
        })
    }

    /// Fails if the dump has ended.
    fn expect_dump(&self) -> Result<()> {
        let mut word = [MaybeUninit::uninit()];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let stands = match self.dump.recv_with_flags(&mut word, flags) {
            Ok(bytes) => bytes > 0,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        };
        if !stands {
            self.gone.store(true, Ordering::Relaxed);
        }
        match self.gone.load(Ordering::Relaxed) {
            false => Ok(()),
            true => {
                let text = "the dump has ended, and its processes are no longer as it left them";
                Err(Error::new(Kind::PeerLost, text))
            }
        }
    }
}

/// The memory of one process.
struct OpenMemory {
    file: File,
    /// Its mappings that it may not read itself.
    unreadable: Vec<PageRange>,
}

/// Opens the memory of the one process that the images call `pid` and `tracer` traces.
fn open_memory(traced: &[TracedProcess], tracer: i32, pid: u32) -> Option<OpenMemory> {
    let mut named = traced
        .iter()
        .filter(|process| process.inner_pid == pid && process.tracer == tracer);
    let (process, None) = (named.next()?, named.next()) else {
        return None;
    };
    let file = File::open(format!("/proc/{}/mem", process.pid)).ok()?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid)).ok()?;
    // The pid may have been given to another process before the file was opened.
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).ok()?;
    let same = smaps::tracer(&status) == Some(tracer) && smaps::inner_pid(&status) == Some(pid);
    same.then(|| OpenMemory {
        file,
        unreadable: smaps::unreadable(&maps),
    })
}

/// Where it is tried whether pages can be read: the first of all `runs`, and one in each of the `unreadable` mappings
/// with pages: the kernel may be set to refuse these (proc_mem.force_override).
fn probes(runs: impl Iterator<Item = PageRange> + Clone, unreadable: &[PageRange]) -> Vec<u64> {
    let first = runs.clone().next().map(|run| run.start().get());
    let mut unreadable = unreadable.iter().copied().peekable();
    let mut probes = Vec::from_iter(first);
    for run in runs {
        // Both are in the order of addresses.
        while let Some(mapping) = unreadable.next_if(|mapping| mapping.start() < run.end()) {
            probes.extend(mapping.intersect(run).map(|both| both.start().get()));
            if mapping.end() > run.end() {
                break;
            }
        }
    }
    probes
}

/// Which of `tracers` has the other end of the connection of `socket`. The dump has it as soon as it has accepted
/// it, for which it waits.
fn find_dump(tracers: &BTreeSet<i32>, socket: &Socket) -> Option<i32> {
    let given_up = Instant::now() + ACCEPTED_WITHIN;
    loop {
        let found = tracers
            .iter()
            .find(|tracer| holds_other_end(**tracer, socket));
        if found.is_some() || tracers.is_empty() || Instant::now() >= given_up {
            return found.copied();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether process `pid` has the other end of the connection of `socket`.
fn holds_other_end(pid: i32, socket: &Socket) -> bool {
    let Ok(process) = ProcessName::of(pid) else {
        return false;
    };
    let fds = fs::read_dir(format!("/proc/{pid}/fd"));
    let sockets = fds.into_iter().flatten().flatten().filter(|fd| {
        fs::read_link(fd.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    });
    let mut numbers = sockets.filter_map(|fd| fd.file_name().to_str()?.parse().ok());
    numbers.any(|number| {
        let other = process.descriptor(number).map(Socket::from);
        other.is_ok_and(|other| are_ends_of_one(socket, &other).unwrap_or(false))
    })
}

/// Whether two sockets are both ends of one TCP connection.
fn are_ends_of_one(one: &Socket, other: &Socket) -> io::Result<bool> {
    let internet = |address: io::Result<SockAddr>| -> io::Result<_> {
        let address = address?.as_socket();
        let address = address.ok_or(io::ErrorKind::Unsupported)?;
        Ok((address.ip().to_canonical(), address.port()))
    };
    let ends = |socket: &Socket| -> io::Result<_> {
        Ok((
            internet(socket.local_addr())?,
            internet(socket.peer_addr())?,
        ))
    };
    let ((here, there), (other_here, other_there)) = (ends(one)?, ends(other)?);
    let networks = (network_of(one.as_fd())?, network_of(other.as_fd())?);
    Ok((here, there) == (other_there, other_here) && networks.0 == networks.1)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start << 12, end << 12)
    }

    fn connection() -> (Socket, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (client.into(), server.into())
    }

    /// This process, as pid 7 of a dump at the other end of a connection.
    fn own_memory() -> (FrozenTree, Socket) {
        let (dump, other) = connection();
        let memory = File::open("/proc/self/mem").unwrap();
        let tree = FrozenTree {
            dump,
            processes: BTreeMap::from([(7, memory)]),
            gone: AtomicBool::new(false),
        };
        (tree, other)
    }

    #[test]
    fn nothing_counts_that_is_read_when_the_dump_has_ended() {
        let (tree, other) = own_memory();
        let contents = vec![7_u8; 3 << 12];
        let at = (contents.as_ptr().addr() as u64).next_multiple_of(1 << 12);
        let page = PageRange::new(at, at + (1 << 12));
        let mut out = vec![0; 1 << 12];
        tree.read(7, page, &mut out).unwrap();
        assert_eq!(out, [7; 1 << 12]);
        assert_eq!(
            tree.read(8, page, &mut out).unwrap_err().kind(),
            Kind::Image
        );
        drop(other);
        let error = tree.read(7, page, &mut out).unwrap_err();
        assert_eq!(error.kind(), Kind::PeerLost, "{error}");
    }

    #[test]
    fn what_cannot_be_read_is_an_error_that_names_it() {
        let (tree, _other) = own_memory();
        let mut out = vec![0; 1 << 12];
        let error = tree.read(7, range(0, 1), &mut out).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("pid 7"), "{error}");
    }

    #[test]
    fn both_ends_of_a_connection_belong_together() {
        let (one, other) = connection();
        let (unrelated, _) = connection();
        match are_ends_of_one(&one, &other) {
            Ok(belong) => assert!(belong),
            // Only root may ask for a socket's network.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
        assert!(!are_ends_of_one(&one, &unrelated).unwrap_or(false));
        assert!(!are_ends_of_one(&one, &one).unwrap_or(false));
    }

    #[test]
    fn every_mapping_that_may_be_refused_is_tried() {
        let runs = [range(1, 4), range(6, 9), range(20, 30)];
        let unreadable = [
            range(0, 1),
            range(2, 7),
            range(8, 9),
            range(25, 40),
            range(50, 60),
        ];
        let tried = probes(runs.into_iter(), &unreadable);
        assert_eq!(tried, [1, 2, 8, 25].map(|page: u64| page << 12));
        assert!(probes([].into_iter(), &unreadable).is_empty());
    }

    #[test]
    fn a_dump_that_stops_nobody_is_not_read() {
        let (own, _other) = connection();
        let stream = Stream::plain(TcpStream::from(own));
        let found = FrozenTree::find(&stream, PageSize::KIB_4, &[(1, range(1, 2))]);
        assert!(found.is_none());
    }
}
