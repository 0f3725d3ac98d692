//! The source's side of one tree: scans at it again and again, and sends what the destination lacks.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use nix::fcntl::OFlag;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::FILE_INDEX_BYTES_MAX;
use pageferry::migration::messages::Seal;
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::hash::BlockHasher;
use super::index::{BLOCK_BYTES, Index, Kind as FileKind, shown};
use super::mapped;
use super::operation::Operation;
use super::planner::{Step, plan};
use super::scan::{Scanner, read_at};
use super::stream;
use super::table;
use super::tree_dir::TreeDir;
use crate::client::AgentClient;

/// Buffered between the reading of files and the connection, bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// How long a lost agent is looked for again.
const RECONNECT_LIMIT: Duration = Duration::from_secs(60);

/// How long to wait before it is looked for again.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);

/// So many rounds in which files change while they are sent are enough, once nothing may change.
const SEAL_ROUNDS: usize = 5;

/// One look at a tree, and what was sent of it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FileRound {
    /// How many files, directories and names differed.
    pub(crate) files: u64,
    /// Bytes on the wire.
    pub(crate) bytes: u64,
    /// How long it took, ms.
    pub(crate) ms: f64,
}

impl FileRound {
    /// Both together.
    pub(crate) fn and(self, other: FileRound) -> FileRound {
        FileRound {
            files: self.files + other.files,
            bytes: self.bytes + other.bytes,
            ms: self.ms + other.ms,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct SentTree {
    dir: PathBuf,
    /// Where the agent takes it.
    path: String,
    known: Known,
    /// Names where something else is mounted.
    mounts: Vec<String>,
}

/// What is known of both sides.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) scanner: Option<Scanner>,
    /// What the destination has; `None` if it must be asked.
    pub(super) have: Option<Index>,
    /// What the source had at the last scan.
    before: Option<Index>,
}

/// How a round ended.
pub(super) struct Sent {
    round: FileRound,
    mounts: Vec<String>,
    /// Whether the destination has what the scan found.
    is_same: bool,
}

impl SentTree {
    /// The tree in `dir`, which the agent takes at `path`.
    pub(crate) fn new(dir: PathBuf, path: String) -> SentTree {
        SentTree {
            dir,
            path,
            known: Known::default(),
            mounts: Vec::new(),
        }
    }

    /// Directories and files where something else is mounted; they travel without it.
    pub(crate) fn mounts(&self) -> &[String] {
        &self.mounts
    }

    /// Sends what has changed while `pids` run.
    pub(crate) async fn round(&mut self, client: &AgentClient, pids: &[i32]) -> Result<FileRound> {
        Ok(self.send(client, pids).await?.round)
    }

    /// Sends the last difference. Nothing changes the tree any more: it is whole at the destination, and on its disk,
    /// when this returns.
    pub(crate) async fn seal(&mut self, client: &AgentClient, pids: &[i32]) -> Result<FileRound> {
        let mut all = FileRound::default();
        for _ in 0..SEAL_ROUNDS {
            let sent = self.send(client, pids).await?;
            all = all.and(sent.round);
            let Some(have) = self.known.have.as_ref().filter(|_| sent.is_same) else {
                continue;
            };
            let start = Instant::now();
            let digest = table::digest(have);
            let path = format!("{}/seal", self.path);
            let sealed = client.post::<IgnoredAny>(&path, &Seal { digest }).await;
            all.ms += start.elapsed().as_secs_f64() * 1e3;
            match sealed {
                Ok(_) => return Ok(all),
                Err(error) => {
                    // What it has is found out again.
                    tracing::warn!("{error}");
                    self.known.have = None;
                }
            }
        }
        let text = format!(
            "files in {} change although the processes stand still: end what writes there",
            self.dir.display()
        );
        Err(Error::new(Kind::Io, text))
    }

    async fn send(&mut self, client: &AgentClient, pids: &[i32]) -> Result<Sent> {
        let start = Instant::now();
        loop {
            let error = match self.try_to_send(client, pids).await {
                Ok(mut sent) => {
                    sent.round.ms = start.elapsed().as_secs_f64() * 1e3;
                    self.mounts.clone_from(&sent.mounts);
                    return Ok(sent);
                }
                Err(error) => error,
            };
            if error.kind() != Kind::PeerLost || start.elapsed() > RECONNECT_LIMIT {
                return Err(error);
            }
            tracing::warn!("files are sent again from where they stand: {error}");
            sleep(RECONNECT_AFTER).await;
        }
    }

    async fn try_to_send(&mut self, client: &AgentClient, pids: &[i32]) -> Result<Sent> {
        if self.known.have.is_none() {
            self.ask(client).await?;
        }
        let (near, far) = tokio::io::duplex(BUFFER_BYTES);
        let pids = pids.to_vec();
        let mut known = std::mem::take(&mut self.known);
        let work = tokio::task::spawn_blocking(move || {
            let sent = known.send(&pids, SyncIoBridge::new(near));
            (known, sent)
        });
        let body = Body::from_stream(ReaderStream::new(far));
        let stored = client.put::<IgnoredAny>(&self.path, body).await;
        let (known, sent) = work.await.map_err(|error| {
            let error = io::Error::other(error);
            Error::wrap(Kind::Io, "sending files was ended", error)
        })?;
        self.known = known;
        // An agent that refuses them says why; here only the connection is seen to end.
        let sent = stored.and(sent);
        if sent.is_err() {
            // How much has arrived is not known.
            self.known.have = None;
        }
        sent
    }

    /// Asks what the destination has.
    async fn ask(&mut self, client: &AgentClient) -> Result<()> {
        let limit = usize::try_from(FILE_INDEX_BYTES_MAX).unwrap_or(usize::MAX);
        let bytes = client.get_bytes(&self.path, limit).await?;
        let (key, have) = unpack_index(&bytes)?;
        let scanner = self.known.scanner.take();
        // Hashes under another key tell nothing.
        let scanner = match scanner.filter(|scanner| scanner.hasher().key() == key) {
            Some(scanner) => scanner,
            None => {
                let root = TreeDir::open(&self.dir)
                    .map_err(|error| Error::file("open", &self.dir, error))?;
                Scanner::new(root, BlockHasher::new(key))
            }
        };
        self.known.scanner = Some(scanner);
        self.known.have = Some(have);
        Ok(())
    }
}

/// An index and the key of its hashes, as the agent tells it: the key, the bytes' length as u64, the bytes by zstd.
pub(super) fn pack_index(index: &Index, hasher: &BlockHasher) -> io::Result<Vec<u8>> {
    let mut table = Vec::new();
    table::encode(index, &mut |part| table.extend(part));
    let length = (table.len() as u64).to_le_bytes();
    let packed = zstd::bulk::compress(&table, 1)?;
    Ok([&hasher.key()[..], &length, &packed].concat())
}

pub(super) fn unpack_index(bytes: &[u8]) -> Result<([u8; 16], Index)> {
    let bad = || Error::new(Kind::Protocol, "the agent's index of files is damaged");
    let (key, rest) = bytes.split_first_chunk::<16>().ok_or_else(bad)?;
    let (length, packed) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
    let length = u64::from_le_bytes(*length);
    if length > FILE_INDEX_BYTES_MAX {
        return Err(bad());
    }
    let length = usize::try_from(length).map_err(|_| bad())?;
    let table = zstd::bulk::decompress(packed, length).map_err(|_| bad())?;
    let index = table::decode(&table)
        .map_err(|error| Error::wrap(Kind::Protocol, "the agent's index of files", error))?;
    Ok((*key, index))
}

impl Known {
    /// Looks, and sends what is missing.
    pub(super) fn send(&mut self, pids: &[i32], to: impl io::Write) -> Result<Sent> {
        let (Some(scanner), Some(have)) = (&mut self.scanner, &mut self.have) else {
            let text = "what the destination has of the files is not known";
            return Err(Error::new(Kind::Io, text));
        };
        let (want, mounts) = scan(scanner, pids)?;
        let steps = plan(have, &want, self.before.as_ref());
        let steps = steps.map_err(|error| {
            Error::wrap(Kind::Protocol, "the destination's index of files", error)
        })?;
        let mut stream = stream::Sender::new(to)?;
        let mut files = HashSet::new();
        for step in &steps {
            let operation = match step {
                Step::Do(operation) => operation.clone(),
                Step::Send {
                    path,
                    first,
                    blocks,
                } => read(scanner, have, path, (*first, *blocks))?,
            };
            if !files.contains(operation.path()) {
                files.insert(operation.path().to_vec());
            }
            let hasher = scanner.hasher();
            have.apply(&operation, &|block| hasher.hash(block))
                .map_err(|error| Error::wrap(Kind::Protocol, "an operation on files", error))?;
            stream.add(&operation)?;
        }
        let bytes = stream.finish()?;
        have.forget_nameless();
        let is_same = have.is_same(&want);
        self.before = Some(want);
        let round = FileRound {
            files: files.len() as u64,
            bytes,
            ms: 0.0,
        };
        Ok(Sent {
            round,
            mounts,
            is_same,
        })
    }
}

/// Looks at the tree, and finds the names where something else is mounted.
fn scan(scanner: &mut Scanner, pids: &[i32]) -> Result<(Index, Vec<String>)> {
    let mut mapped = mapped::names(pids);
    let mut result = scanner.scan(&mapped)?;
    let after = mapped::names(pids);
    if !after.is_subset(&mapped) {
        // What was mapped meanwhile may have been read before it was written.
        mapped.extend(after);
        result = scanner.scan(&mapped)?;
    }
    Ok((result.index, result.mounts))
}

/// Reads blocks of a file. What is not there any more is zeros: the next scan finds what has become of it.
fn read(
    scanner: &Scanner,
    have: &Index,
    path: &[u8],
    (first, blocks): (u64, u64),
) -> Result<Operation> {
    let size = match have.at(path).map(|node| &node.kind) {
        Some(FileKind::File(size, _)) => *size,
        _ => 0,
    };
    let start = first * BLOCK_BYTES;
    let end = (start + blocks * BLOCK_BYTES).min(size);
    let length = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
    let mut data = vec![0; length];
    match scanner.root().file(path, OFlag::O_RDONLY) {
        Ok(file) => {
            let read = read_at(&file, &mut data, start);
            read.map_err(|error| Error::file("read", &scanner.root().shown(path), error))?;
        }
        Err(errno) => tracing::debug!("{} is gone: {errno}", shown(path)),
    }
    Ok(Operation::Data {
        path: path.to_vec(),
        first,
        data,
    })
}
