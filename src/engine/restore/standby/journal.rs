//! What the service manager keeps for this service's next start: the userfaultfds, the connections to the source, and
//! what has happened to them, written down in the messages that a standby would receive.
//!
//! ```text
//! pageferry-state           a memfd: RestoreState, which both see
//! pageferry-journal-NUMBER  a memfd: MessageBytes, one after the other; the last NUMBER counts
//! pageferry-memory-ID       the userfaultfd of SpaceId ID
//! pageferry-source-0, -1    the connections for the stream and for faults
//! pageferry-listener        the listening socket, until a restore has come
//! pageferry-restore-NUMBER  a connection to it; the restore, if nobody listens any more
//! ```
//!
//! Nothing is written of the sockets: their names say all.
//!
//! Invariants: a descriptor is with the manager before the message about it is written, so that one without a
//! message is one whose event was not handled yet. A message is written whole or not at all: it lies within a page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use bytemuck::Zeroable;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::messages::MessageBytes;
use super::{Standby, StandbyMessage, Successor};
use crate::engine::restore::intake::SocketChange;
use crate::engine::restore::{Restore, RestoreConfig};
use crate::engine::service_manager::ServiceManager;
use crate::error::{Error, Kind, Result};
use crate::ferry::hash::{HashKey, PageHasher};
use crate::image::dir::ImageDir;
use crate::lazy::planner::SpaceId;
use crate::sys::process::page_size;
use crate::sys::shared::{RestoreState, Shared};

/// What all names begin with.
pub(super) const PREFIX: &str = "pageferry-";
pub(super) const STATE: &str = "pageferry-state";
pub(super) const JOURNAL: &str = "pageferry-journal-";
pub(super) const MEMORY: &str = "pageferry-memory-";
pub(super) const SOURCE: &str = "pageferry-source-";
pub(super) const LISTENER: &str = "pageferry-listener";
pub(super) const CONNECTION: &str = "pageferry-restore-";

/// The length of one message.
const MESSAGE_BYTES: u64 = size_of::<MessageBytes>() as u64;

/// Room for [`RestoreState`], whole pages.
const STATE_BYTES: u64 = 64 << 10;

const _: () = assert!(size_of::<RestoreState>() as u64 <= STATE_BYTES);

/// A journal is not shortened before it has this length.
const SHORTENED_BYTES_MIN: u64 = 1 << 20;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Journal {
    manager: ServiceManager,
    /// All that the manager keeps.
    names: BTreeSet<String>,
    /// So many at most, if it tells: from systemd 254 on.
    most: Option<usize>,
    /// That was logged.
    is_full: bool,
    /// Which `pageferry-journal-` this is.
    number: u32,
    messages: File,
    end: u64,
    /// At this length what is of no use any more leaves.
    shortened_at: u64,
}

impl Journal {
    fn begin(manager: ServiceManager) -> io::Result<Journal> {
        let messages = memory(0)?;
        let mut journal = Journal {
            manager,
            names: BTreeSet::new(),
            most: most(),
            is_full: false,
            number: 0,
            messages: messages.try_clone()?,
            end: 0,
            shortened_at: SHORTENED_BYTES_MIN,
        };
        journal.keep(format!("{JOURNAL}0"), messages.as_fd())?;
        Ok(journal)
    }

    /// Goes on with one that was kept, in which there are `count` messages.
    pub(super) fn go_on(
        manager: ServiceManager,
        names: BTreeSet<String>,
        number: u32,
        messages: File,
        count: usize,
    ) -> Journal {
        let end = count as u64 * MESSAGE_BYTES;
        Journal {
            manager,
            names,
            most: most(),
            is_full: false,
            number,
            messages,
            end,
            shortened_at: SHORTENED_BYTES_MIN.max(2 * end),
        }
    }

    fn keep(&mut self, name: String, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.most.is_some_and(|most| self.names.len() >= most) && !self.names.contains(&name) {
            if !std::mem::replace(&mut self.is_full, true) {
                tracing::warn!(
                    "the service manager keeps no more than {} descriptors (FileDescriptorStoreMax=): processes forked \
                     since read zeros if this one is killed, and are killed when it is started again",
                    self.names.len()
                );
            }
            return Ok(());
        }
        self.manager.keep(&name, fd)?;
        self.names.insert(name);
        Ok(())
    }

    pub(super) fn release(&mut self, name: &str) -> io::Result<()> {
        match self.names.remove(name) {
            true => self.manager.release(name),
            false => Ok(()),
        }
    }

    /// Writes `told`, as `record`, down.
    pub(super) fn note(
        &mut self,
        entry: StandbyMessage,
        record: MessageBytes,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        match (entry, fd) {
            (StandbyMessage::Source { faults }, Some(fd)) => {
                let name = format!("{SOURCE}{}", u32::from(faults));
                self.release(&name)?;
                return self.keep(name, fd);
            }
            (StandbyMessage::Process { id, .. } | StandbyMessage::Fork { id, .. }, Some(fd)) => {
                self.keep(format!("{MEMORY}{}", id.0), fd)?;
            }
            (StandbyMessage::Socket(change), fd) => return self.note_socket(change, fd),
            _ => {}
        }
        self.append(record)?;
        if let StandbyMessage::Exited { id } = entry {
            self.release(&format!("{MEMORY}{}", id.0))?;
            if self.end >= self.shortened_at {
                self.shorten()?;
            }
        }
        Ok(())
    }

    fn note_socket(&mut self, change: SocketChange, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let stays = match (change, fd) {
            (SocketChange::Listening { .. }, Some(fd)) => {
                return self.keep(LISTENER.to_owned(), fd);
            }
            (SocketChange::Accepted { number }, Some(fd)) => {
                return self.keep(format!("{CONNECTION}{number}"), fd);
            }
            (SocketChange::Dropped { number }, _) => {
                return self.release(&format!("{CONNECTION}{number}"));
            }
            (SocketChange::Chosen { number }, _) => Some(format!("{CONNECTION}{number}")),
            _ => None,
        };
        let is_socket = |name: &&String| *name == LISTENER || name.starts_with(CONNECTION);
        let sockets = self.names.iter().filter(is_socket);
        let leave: Vec<String> = sockets
            .filter(|name| Some(*name) != stays.as_ref())
            .cloned()
            .collect();
        // The listening socket last: without it what is left is the restore.
        leave.iter().rev().try_for_each(|name| self.release(name))
    }

    fn append(&mut self, record: MessageBytes) -> io::Result<()> {
        self.messages
            .write_all_at(bytemuck::bytes_of(&record), self.end)?;
        self.end += MESSAGE_BYTES;
        Ok(())
    }

    /// Goes on in a new file, without what is of no use any more.
    fn shorten(&mut self) -> io::Result<()> {
        let messages = memory(0)?;
        let useful = useful(&read(&self.messages)?);
        messages.write_all_at(bytemuck::cast_slice(&useful), 0)?;
        let before = format!("{JOURNAL}{}", self.number);
        self.number += 1;
        self.keep(format!("{JOURNAL}{}", self.number), messages.as_fd())?;
        self.messages = messages;
        self.end = useful.len() as u64 * MESSAGE_BYTES;
        self.shortened_at = SHORTENED_BYTES_MIN.max(2 * self.end);
        self.release(&before)
    }

    /// Nobody needs to go on: has the manager close all, and waits a moment until it has. A process may wait for a page
    /// that nobody brings as long as a copy of its userfaultfd is open.
    pub(super) fn end(&mut self) {
        let names = std::mem::take(&mut self.names);
        let released = names.iter().try_for_each(|name| self.manager.release(name));
        match released.and_then(|()| self.manager.settle()) {
            Ok(true) => {}
            Ok(false) => tracing::warn!("the service manager takes long to close descriptors"),
            Err(error) => tracing::warn!("cannot reach the service manager any more: {error}"),
        }
    }
}

impl Restore {
    /// Has the service manager, which must keep descriptors, stand by for a restore as `config` says, whose images are
    /// there.
    pub fn kept_by(manager: ServiceManager, config: &RestoreConfig) -> Result<Standby> {
        let page = page_size()
            .map_err(|error| Error::wrap(Kind::Unsupported, "cannot work here", error))?;
        let dir = ImageDir::open(&config.images_dir, page)?;
        let failed = |error| {
            let text = "cannot have the service manager keep descriptors";
            Error::wrap(Kind::Io, text, error)
        };
        let hash = images_hash(&dir)?;
        let mut journal = Journal::begin(manager).map_err(failed)?;
        let state = memory(STATE_BYTES).map_err(failed)?;
        let shared = Shared::in_file(&state).map_err(failed)?;
        shared.magic.store(RestoreState::MAGIC, Ordering::SeqCst);
        for (half, of_hash) in shared.images.iter().zip(hash) {
            half.store(of_hash, Ordering::SeqCst);
        }
        journal
            .keep(STATE.to_owned(), state.as_fd())
            .map_err(failed)?;
        Ok(Standby::restarted(journal, shared, 0))
    }
}

impl Standby {
    /// The service manager, which has kept `journal` and `shared` and stands by again.
    pub(super) fn restarted(
        journal: Journal,
        shared: Shared<RestoreState>,
        events: u64,
    ) -> Standby {
        Standby {
            successor: Successor::Restarted(journal),
            shared,
            events,
        }
    }
}

fn most() -> Option<usize> {
    std::env::var("FDSTORE").ok()?.parse().ok()
}

/// A memfd of `length` zeros that never shrinks.
fn memory(length: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"pageferry", flags)?);
    file.set_len(length)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

/// All messages of a journal. One that is cut is left out.
pub(super) fn read(messages: &File) -> io::Result<Vec<MessageBytes>> {
    let length = messages.metadata()?.len() / MESSAGE_BYTES;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let mut read = vec![MessageBytes::zeroed(); length];
    messages.read_exact_at(bytemuck::cast_slice_mut(&mut read), 0)?;
    Ok(read)
}

/// The messages without those of processes that have ended and whose children have as well. The last one stays: it tells
/// how many events there were.
fn useful(messages: &[MessageBytes]) -> Vec<MessageBytes> {
    let decoded = |message: &MessageBytes| StandbyMessage::decode(*message).ok();
    let mut parents: BTreeMap<SpaceId, Option<SpaceId>> = BTreeMap::new();
    let mut needed = BTreeSet::new();
    for message in messages {
        match decoded(message) {
            Some(StandbyMessage::Process { id, .. }) => {
                parents.insert(id, None);
                needed.insert(id);
            }
            Some(StandbyMessage::Fork { id, parent }) => {
                parents.insert(id, Some(parent));
                needed.insert(id);
            }
            Some(StandbyMessage::Exited { id }) => {
                needed.remove(&id);
            }
            _ => {}
        }
    }
    for mut id in needed.clone() {
        while let Some(Some(parent)) = parents.get(&id) {
            needed.insert(*parent);
            id = *parent;
        }
    }
    let last = messages.len().saturating_sub(1);
    let numbered = messages.iter().enumerate();
    let kept = numbered.filter(|(at, message)| {
        let id = decoded(message).and_then(StandbyMessage::id);
        *at == last || id.is_some_and(|id| needed.contains(&id))
    });
    kept.map(|(_, message)| *message).collect()
}

/// By what the images in `dir` are known again, whatever has become of their pages.
pub(super) fn images_hash(dir: &ImageDir) -> Result<[u64; 2]> {
    let hasher = PageHasher::new(HashKey::default(), dir.page());
    let mut names = vec!["inventory.img".to_owned(), "pstree.img".to_owned()];
    let pids = dir.processes()?;
    names.extend(pids.iter().map(|pid| format!("mm-{pid}.img")));
    let mut bytes = Vec::new();
    for name in names {
        let path = dir.path().join(&name);
        match std::fs::read(&path) {
            Ok(read) => bytes.extend(hasher.hash(&read).0),
            // Zombies have no memory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => bytes.push(0),
            Err(error) => return Err(Error::file("read", &path, error)),
        }
    }
    Ok(bytemuck::cast(hasher.hash(&bytes).0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageRange;

    #[test]
    fn messages_of_ended_processes_leave() {
        let (root, child, grandchild, other) = (SpaceId(1), SpaceId(2), SpaceId(3), SpaceId(4));
        let fork = |id, parent| StandbyMessage::Fork { id, parent };
        let gone = |id| StandbyMessage::Gone {
            id,
            range: PageRange::new(0x1000, 0x2000),
        };
        let exited = |id| StandbyMessage::Exited { id };
        let process = StandbyMessage::Process {
            id: root,
            pid: 7,
            host: 0,
            started: 0,
        };
        let messages = [
            process,
            fork(child, root),
            fork(other, root),
            gone(other),
            gone(child),
            fork(grandchild, child),
            exited(child),
            exited(other),
        ];
        let messages: Vec<_> = (0..)
            .zip(messages)
            .map(|(at, message)| message.encode(at))
            .collect();
        let left: Vec<u64> = useful(&messages)
            .iter()
            .map(|message| message.events)
            .collect();
        assert_eq!(left, [0, 1, 4, 5, 6, 7]);
    }

    #[test]
    fn a_journal_is_shortened_and_read_again() {
        let (manager, theirs) = ServiceManager::pair();
        let ignored = std::thread::spawn(move || {
            let mut message = [0; 4096];
            let mut told = 0;
            while theirs.recv(&mut message).unwrap() > 0 {
                told += 1;
            }
            told
        });
        let mut journal = Journal::begin(manager).unwrap();
        let fork = |id| StandbyMessage::Fork {
            id: SpaceId(id),
            parent: SpaceId(0),
        };
        let fd = File::open("/dev/null").unwrap();
        let count = 20_000;
        for id in 1..=count {
            let exited = StandbyMessage::Exited {
                id: SpaceId(id - 1),
            };
            journal
                .note(fork(id), fork(id).encode(0), Some(fd.as_fd()))
                .unwrap();
            journal
                .note(exited, exited.encode(u64::from(id)), None)
                .unwrap();
        }
        assert!(journal.number > 0 && journal.end < 2 * SHORTENED_BYTES_MIN);
        let messages = read(&journal.messages).unwrap();
        assert_eq!(messages.last().unwrap().events, u64::from(count));
        let left: Vec<_> = journal.names.iter().map(String::as_str).collect();
        let number = journal.number;
        assert_eq!(
            left,
            [format!("{JOURNAL}{number}"), format!("{MEMORY}{count}")]
        );
        let sockets = |journal: &Journal| {
            let sockets = journal.names.iter().filter(|name| {
                let name = name.as_str();
                name == LISTENER || name.starts_with(CONNECTION)
            });
            sockets.cloned().collect::<Vec<_>>()
        };
        let changes = [
            SocketChange::Listening {
                device: 1,
                inode: 2,
            },
            SocketChange::Accepted { number: 0 },
            SocketChange::Accepted { number: 1 },
            SocketChange::Accepted { number: 2 },
            SocketChange::Dropped { number: 0 },
        ];
        for change in changes {
            let message = StandbyMessage::Socket(change);
            let record = message.encode(0);
            journal.note(message, record, Some(fd.as_fd())).unwrap();
        }
        let names = [LISTENER, "pageferry-restore-1", "pageferry-restore-2"];
        assert_eq!(sockets(&journal), names);
        let chosen = StandbyMessage::Socket(SocketChange::Chosen { number: 2 });
        journal.note(chosen, chosen.encode(0), None).unwrap();
        assert_eq!(sockets(&journal), names[2..]);
        let over = StandbyMessage::Socket(SocketChange::Over);
        journal.note(over, over.encode(0), None).unwrap();
        assert!(sockets(&journal).is_empty());
        assert_eq!(read(&journal.messages).unwrap().len(), messages.len());
        journal.manager.notify("").unwrap();
        assert!(ignored.join().unwrap() > count);
    }
}
