//! The last pages of pre-copy: those that differ from the last round are found here and sent, the others go by name.
//!
//! ```text
//! criu dump --lazy-pages ── stops, traces, maps ──> processes ── process_vm_readv ──> threads here: hash, compare
//!   └── pagemaps, and pages that are not lazy ───────────────┐                             │ in order
//!                                                            v                             v
//!                                            page-server --forward <── pages that differ, names of the others
//! ```
//!
//! CRIU itself would send all pages over loopback, one process after another, for the forwarder to compare. What is
//! compared with are the hashes that the forwarder has kept of the last round. The destination compares the same hashes with
//! what it has.
//!
//! Invariant: what is sent was read while the processes stood still. They do as long as the dump traces them, and one that
//! has let them go does not take them again.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use pageferry::criu::header::{Target, Wire};
use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::hash::{PageHash, PageHasher};
use pageferry::ferry::known_hashes::KnownHashes;
use pageferry::image::chain::{Chain, Missing, Place};
use pageferry::image::dir::ImageDir;
use pageferry::limits::HASHES_FILE_BYTES_MAX;
use pageferry::units::{PageRange, PageSize};

use super::shared::send_extent;
use crate::rounds::{PageSink, Sender, Tree, read_memory};

/// Pages that are read and compared at once: they fit into a processor's cache, and into a batch of the forwarder.
const PIECE_PAGES: u64 = 64;

/// Pieces that each thread may be ahead.
const PIECES_AHEAD: usize = 8;

/// More threads than this are of no use to one memory.
const THREADS_MAX: usize = 4;

/// Reads the hashes of what the rounds have left at the destination.
pub(super) fn known_hashes(path: &Path, page: PageSize) -> Result<KnownHashes> {
    let failed = |error| Error::file("read", path, error);
    if fs::metadata(path).map_err(failed)?.len() > HASHES_FILE_BYTES_MAX {
        let text = format!("{} is longer than any dump's hashes", path.display());
        return Err(Error::new(Kind::Usage, text));
    }
    let file = fs::read(path).map_err(failed)?;
    KnownHashes::read(&file, page).map_err(|error| {
        let text = format!("{} is not whole", path.display());
        Error::wrap(Kind::Usage, text, error)
    })
}

/// The memory of a process or of a segment, as a lazy dump has left it.
struct Memory {
    target: Target,
    chain: Chain,
    /// Whose memory it is, if it is a process's.
    pid: Option<i32>,
}

/// What a lazy dump has left of memory, and where it is. See the module's text.
pub(super) struct LastPages {
    page: PageSize,
    memories: Vec<Memory>,
    /// The processes that are read, and who traces each.
    stopped: BTreeMap<i32, i32>,
}

impl LastPages {
    /// Finds what the dump that wrote `dir` has left in the processes of `tree`, which it has stopped.
    pub(super) fn find(dir: &Path, tree: &Tree, page: PageSize) -> Result<LastPages> {
        let images = ImageDir::open(dir, page)?;
        let mut memories = Vec::new();
        let mut stopped = BTreeMap::new();
        for target in images.targets()? {
            let chain = Chain::open(&images, target, Missing::Leave)?;
            let pid = match target {
                Target::Process(inner) => Some(process_of(tree, inner)?),
                Target::Shmem(_) => None,
            };
            if let Some(pid) = pid {
                stopped.insert(pid, tracer_of(pid)?);
            }
            memories.push(Memory { target, chain, pid });
        }
        Ok(LastPages {
            page,
            memories,
            stopped,
        })
    }

    /// The image files that need not travel, since their pages are sent.
    pub(super) fn files(&self) -> BTreeSet<OsString> {
        let mut files = BTreeSet::new();
        for memory in &self.memories {
            files.insert(memory.target.pagemap_name().into());
            let of_extents = memory.chain.extents().iter();
            let names = of_extents.filter_map(|extent| {
                let (file, _, _) = memory.chain.span(extent)?;
                memory.chain.file(file).path().file_name()
            });
            files.extend(names.map(OsString::from));
        }
        files
    }

    /// Sends all of it to the page-server at `forwarder`; what has a hash that is `known` goes by name.
    pub(super) fn send(
        &self,
        forwarder: SocketAddr,
        wire: Wire,
        known: &KnownHashes,
    ) -> Result<()> {
        let mut sender = Sender::connect(forwarder, self.page, wire, None)?;
        let comparer = Comparer::new(self, known);
        let pieces = self.pieces();
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(THREADS_MAX);
        thread::scope(|scope| {
            let results: Vec<Receiver<Result<Vec<Part>>>> = (0..threads)
                .map(|first| {
                    let (results, received) = sync_channel(PIECES_AHEAD);
                    let own = pieces.iter().skip(first).step_by(threads);
                    let comparer = &comparer;
                    scope.spawn(move || comparer.run(own, &results));
                    received
                })
                .collect();
            let mut number = 0;
            let mut next = || {
                let result = results[number % threads].recv();
                number += 1;
                let ended = |_| Error::new(Kind::Io, "a thread that compares pages has ended");
                result.map_err(ended)?
            };
            for memory in &self.memories {
                self.send_memory(memory, &mut sender, &mut next)?;
            }
            sender.close()
        })?;
        self.expect_stopped()
    }

    /// Sends one memory in the order of its addresses; `next` gives what became of the next piece of all.
    fn send_memory(
        &self,
        memory: &Memory,
        sender: &mut Sender,
        next: &mut impl FnMut() -> Result<Vec<Part>>,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        sender.open(memory.target)?;
        for extent in memory.chain.extents() {
            sender.lazily(extent.lazy);
            match extent.place {
                Place::Absent { .. } if extent.lazy && memory.pid.is_some() => {
                    for _ in pieces_of(extent.range, self.page) {
                        for part in next()? {
                            match part {
                                Part::Kept(range) => {
                                    let pages = range.pages(self.page).get();
                                    sender.kept_at(range.start(), pages)?;
                                }
                                Part::Changed(range, bytes) => {
                                    sender.pages_at(range.start(), &bytes)?;
                                }
                            }
                        }
                    }
                }
                Place::Absent { .. } => return Err(memory.chain.absence(extent)),
                _ => send_extent(&memory.chain, extent.range, self.page, &mut buffer, sender)?,
            }
        }
        Ok(())
    }

    /// What is to be read in the processes, in the order in which it is sent.
    fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for memory in &self.memories {
            let Some(pid) = memory.pid else {
                continue;
            };
            let lazy = memory.chain.extents().iter();
            let lazy =
                lazy.filter(|extent| extent.lazy && matches!(extent.place, Place::Absent { .. }));
            let ranges = lazy.flat_map(|extent| pieces_of(extent.range, self.page));
            pieces.extend(ranges.map(|range| Piece {
                target: memory.target,
                pid,
                range,
            }));
        }
        pieces
    }

    /// Fails if the dump has let one of the processes go: what was read of it is worth nothing.
    pub(super) fn expect_stopped(&self) -> Result<()> {
        for (pid, tracer) in &self.stopped {
            if tracer_of(*pid)? != *tracer {
                return Err(let_go(*pid));
            }
        }
        Ok(())
    }
}

/// The process that images call `inner`.
fn process_of(tree: &Tree, inner: u32) -> Result<i32> {
    let mut named = tree
        .members()
        .iter()
        .filter(|member| member.inner_pid == inner);
    match (named.next(), named.next()) {
        (Some(member), None) => Ok(member.pid),
        _ => {
            let text = format!("the images name a process {inner}, which is not one of the tree's");
            Err(Error::new(Kind::Image, text))
        }
    }
}

/// Who has stopped the process.
fn tracer_of(pid: i32) -> Result<i32> {
    let path = format!("/proc/{pid}/status");
    let status =
        fs::read_to_string(&path).map_err(|error| Error::file("read", Path::new(&path), error))?;
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    match tracer.and_then(|tracer| tracer.trim().parse().ok()) {
        Some(0) | None => Err(let_go(pid)),
        Some(tracer) => Ok(tracer),
    }
}

fn let_go(pid: i32) -> Error {
    let text = format!("the dump has let pid {pid} go before all of its memory was read");
    Error::new(Kind::PeerLost, text)
}

/// Pages that are read together.
#[derive(Clone, Copy, Debug)]
struct Piece {
    target: Target,
    pid: i32,
    range: PageRange,
}

fn pieces_of(range: PageRange, page: PageSize) -> impl Iterator<Item = PageRange> {
    let bytes = PIECE_PAGES << page.shift();
    let (start, end) = (range.start().get(), range.end().get());
    let step = usize::try_from(bytes).expect("a piece is small");
    (start..end)
        .step_by(step)
        .map(move |at| PageRange::new(at, end.min(at + bytes)))
}

/// What became of pages of a piece.
#[derive(PartialEq, Eq, Debug)]
enum Part {
    /// They are as the destination has them.
    Kept(PageRange),
    /// Others, and what they are.
    Changed(PageRange, Vec<u8>),
}

/// Compares pieces with what the destination has.
struct Comparer<'k> {
    page: PageSize,
    hasher: PageHasher,
    /// Known hashes of each memory, by address.
    known: BTreeMap<Target, Vec<(PageRange, &'k [PageHash])>>,
    /// The memory of each process, for what its own rights do not let be read.
    files: BTreeMap<i32, File>,
}

impl<'k> Comparer<'k> {
    fn new(pages: &LastPages, known: &'k KnownHashes) -> Comparer<'k> {
        let mut by_target: BTreeMap<Target, Vec<_>> = BTreeMap::new();
        for (target, range, hashes) in known.runs(pages.page) {
            by_target.entry(target).or_default().push((range, hashes));
        }
        let files = pages.stopped.keys().filter_map(|pid| {
            let file = File::open(format!("/proc/{pid}/mem")).ok()?;
            Some((*pid, file))
        });
        Comparer {
            page: pages.page,
            hasher: PageHasher::new(known.key(), pages.page),
            known: by_target,
            files: files.collect(),
        }
    }

    /// Compares `pieces`, and sends what became of each.
    fn run<'p>(
        &self,
        pieces: impl Iterator<Item = &'p Piece>,
        results: &SyncSender<Result<Vec<Part>>>,
    ) {
        let mut buffer = vec![0; usize::try_from(PIECE_PAGES).unwrap_or(0) << self.page.shift()];
        for piece in pieces {
            let bytes = usize::try_from(piece.range.bytes()).expect("a piece is small");
            let buffer = &mut buffer[..bytes];
            let compared = self
                .read(piece, buffer)
                .map(|()| self.compare(piece, buffer));
            let failed = compared.is_err();
            // Whoever has failed does not receive any more.
            if results.send(compared).is_err() || failed {
                return;
            }
        }
    }

    fn read(&self, piece: &Piece, bytes: &mut [u8]) -> Result<()> {
        let start = piece.range.start().get();
        let read = read_memory(piece.pid, start, bytes);
        if read == bytes.len() {
            return Ok(());
        }
        // Memory that the process may not read itself: the file knows no rights.
        let failed = |error| {
            let text = format!(
                "cannot read {} of pid {}, which the dump has stopped (--mode cold and hybrid read it in other ways)",
                piece.range, piece.pid
            );
            Error::wrap(Kind::Io, text, error)
        };
        match self.files.get(&piece.pid) {
            Some(file) => file
                .read_exact_at(&mut bytes[read..], start + read as u64)
                .map_err(failed),
            None => Err(failed(std::io::ErrorKind::PermissionDenied.into())),
        }
    }

    fn compare(&self, piece: &Piece, bytes: &[u8]) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut known = self.known_from(piece);
        let addresses = (piece.range.start().get()..).step_by(self.page.as_usize());
        for (at, contents) in addresses.zip(bytes.chunks_exact(self.page.as_usize())) {
            let kept = known.hash_at(at, self.page) == Some(self.hasher.hash(contents));
            let range = PageRange::new(at, at + self.page.bytes());
            let joined =
                |before: PageRange| PageRange::new(before.start().get(), range.end().get());
            match parts.last_mut() {
                Some(Part::Kept(before)) if kept => *before = joined(*before),
                Some(Part::Changed(before, all)) if !kept => {
                    *before = joined(*before);
                    all.extend_from_slice(contents);
                }
                _ if kept => parts.push(Part::Kept(range)),
                _ => parts.push(Part::Changed(range, contents.to_vec())),
            }
        }
        parts
    }

    fn known_from(&self, piece: &Piece) -> KnownFrom<'_, 'k> {
        let runs = self.known.get(&piece.target).map_or(&[][..], Vec::as_slice);
        let first = runs.partition_point(|(range, _)| range.end() <= piece.range.start());
        KnownFrom(&runs[first..])
    }
}

/// Known hashes from some address on, asked for in the order of addresses.
struct KnownFrom<'c, 'k>(&'c [(PageRange, &'k [PageHash])]);

impl KnownFrom<'_, '_> {
    /// The hash of the page at `address`, if it is known.
    fn hash_at(&mut self, address: u64, page: PageSize) -> Option<PageHash> {
        while let Some(((range, hashes), behind)) = self.0.split_first() {
            if range.end().get() <= address {
                self.0 = behind;
                continue;
            }
            let into = address.checked_sub(range.start().get())?;
            return hashes
                .get(usize::try_from(into >> page.shift()).ok()?)
                .copied();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use pageferry::ferry::hash::HashKey;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;
    const TARGET: Target = Target::Process(7);

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(first << 12, (first + pages) << 12)
    }

    fn page_of(byte: u8) -> Vec<u8> {
        vec![byte; 4096]
    }

    fn comparer<'k>(known: Vec<(PageRange, &'k [PageHash])>) -> Comparer<'k> {
        Comparer {
            page: PAGE,
            hasher: PageHasher::new(HashKey([3; 16]), PAGE),
            known: BTreeMap::from([(TARGET, known)]),
            files: BTreeMap::new(),
        }
    }

    #[test]
    fn only_pages_with_the_known_hash_are_kept() {
        let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
        let hash = |byte: u8| hasher.hash(&page_of(byte));
        // Pages 10 to 12 and 14 are known; of 13 nothing is, and page 12 is another one by now.
        let (front, behind) = ([hash(1), hash(2), hash(3)], [hash(5)]);
        let known = vec![(range(10, 3), &front[..]), (range(14, 1), &behind[..])];
        let comparer = comparer(known);
        let bytes: Vec<u8> = [9, 2, 9, 4, 5, 6].into_iter().flat_map(page_of).collect();
        let compared = |first: u64, bytes: &[u8]| {
            let piece = Piece {
                target: TARGET,
                pid: 1,
                range: range(first, (bytes.len() >> 12) as u64),
            };
            comparer.compare(&piece, bytes)
        };
        let changed = |first: u64, all: &[u8]| {
            let bytes = all.iter().copied().flat_map(page_of).collect();
            Part::Changed(range(first, all.len() as u64), bytes)
        };
        let expected = [
            changed(10, &[9]),
            Part::Kept(range(11, 1)),
            changed(12, &[9, 4]),
            Part::Kept(range(14, 1)),
            changed(15, &[6]),
        ];
        assert_eq!(compared(10, &bytes), expected);
        assert_eq!(compared(14, &page_of(5)), [Part::Kept(range(14, 1))]);
        assert_eq!(compared(9, &page_of(1)), [changed(9, &[1])]);
    }

    #[test]
    fn pieces_end_where_their_memory_does() {
        let pieces: Vec<PageRange> = pieces_of(range(5, 130), PAGE).collect();
        assert_eq!(pieces, [range(5, 64), range(69, 64), range(133, 2)]);
    }

    #[test]
    fn a_process_that_nobody_traces_is_not_read() {
        let own = i32::try_from(std::process::id()).unwrap();
        let error = tracer_of(own).unwrap_err();
        assert_eq!(error.kind(), Kind::PeerLost);
        assert!(error.to_string().contains(&own.to_string()), "{error}");
    }

    #[test]
    fn memory_that_cannot_be_read_is_named() {
        let piece = Piece {
            target: TARGET,
            pid: i32::try_from(std::process::id()).unwrap(),
            range: range(1, 1),
        };
        let error = comparer(Vec::new())
            .read(&piece, &mut page_of(0))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("--mode cold"), "{error}");
    }
}
