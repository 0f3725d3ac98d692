//! The restored processes and the children that they have forked since: their userfaultfds, and the faults that must be
//! looked at again.
//!
//! Invariants: the userfaultfd of each process is polled, unless it was told to wait ([`Processes::unwatch`]); a process
//! that was removed has no fault left.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};

use super::candidates::SearchScope;
use super::host_process::HostProcess;
use super::install::READAHEAD_BYTES;
use super::owner_search::OwnerSearch;
use super::{new_poll, watch};
use crate::error::{Error, Kind, Result};
use crate::image::chain::Chain;
use crate::image::readahead::ReadAhead;
use crate::lazy::planner::SpaceId;
use crate::sys::uffd::Uffd;
use crate::units::Vaddr;

/// Most descriptors looked at in one round.
const EVENTS_MAX: usize = 64;

/// A restored process, or a child that it forked since.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) uffd: Uffd,
    pub(super) chain: Option<Arc<Chain>>,
    /// Unknown as long as it is searched for.
    pub(super) host: Option<HostProcess>,
    pub(super) search: Option<OwnerSearch>,
    /// How far the chain's files are read ahead.
    pub(super) ahead: ReadAhead,
}

impl Process {
    pub(super) fn new(pid: u32, uffd: Uffd, chain: Option<Arc<Chain>>) -> Process {
        let ahead = ReadAhead::new(READAHEAD_BYTES);
        Process {
            pid,
            uffd,
            chain,
            ahead,
            host: None,
            search: None,
        }
    }

    /// Where the children of this process are to be searched for.
    pub(super) fn children_scope(&self) -> Option<SearchScope> {
        let known = self.host.as_ref().map(HostProcess::pid);
        let search = self.search.as_ref().map(OwnerSearch::scope);
        known.map(SearchScope::Descendants).or(search)
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Processes {
    members: BTreeMap<SpaceId, Process>,
    /// The userfaultfds alone, to look for faults between two steps of other work.
    poll: Epoll,
    /// Faults that could not be answered because an event was in the way.
    retries: VecDeque<(SpaceId, Vaddr)>,
    /// Which process was last looked at for its end.
    looked_at: SpaceId,
}

impl Processes {
    pub(super) fn new() -> Result<Processes> {
        Ok(Processes {
            members: BTreeMap::new(),
            poll: new_poll()?,
            retries: VecDeque::new(),
            looked_at: SpaceId(0),
        })
    }

    /// Takes care of `process` from now on.
    ///
    /// # Errors
    ///
    /// Its faults cannot be polled. It is a member all the same: if its userfaultfd were closed, it would read zeros.
    pub(super) fn adopt(&mut self, id: SpaceId, process: Process) -> Result<()> {
        let watched = watch_memory(&self.poll, id, &process);
        self.members.insert(id, process);
        watched
    }

    /// Closes the userfaultfd of `id`, which takes it out of the poll. Says whether it was there.
    pub(super) fn remove(&mut self, id: SpaceId) -> bool {
        self.retries.retain(|(other, _)| *other != id);
        self.members.remove(&id).is_some()
    }

    pub(super) fn get(&self, id: SpaceId) -> Option<&Process> {
        self.members.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: SpaceId) -> Option<&mut Process> {
        self.members.get_mut(&id)
    }

    /// The pid in the images.
    pub(super) fn pid(&self, id: SpaceId) -> Option<u32> {
        self.get(id).map(|process| process.pid)
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SpaceId, &Process)> {
        self.members.iter().map(|(id, process)| (*id, process))
    }

    pub(super) fn ids(&self) -> Vec<SpaceId> {
        self.members.keys().copied().collect()
    }

    /// The pids on this host of those that are known there.
    pub(super) fn host_pids(&self) -> BTreeSet<i32> {
        let hosts = self.members.values();
        let hosts = hosts.filter_map(|process| process.host.as_ref());
        hosts.map(HostProcess::pid).collect()
    }

    /// The next `count` behind those that this was last asked for; none once around.
    pub(super) fn next_to_look_at(&mut self, count: usize) -> Vec<SpaceId> {
        let next = (Bound::Excluded(self.looked_at), Bound::Unbounded);
        let some = self.members.range(next).take(count);
        let some: Vec<SpaceId> = some.map(|(id, _)| *id).collect();
        self.looked_at = some.last().copied().unwrap_or(SpaceId(0));
        some
    }

    /// The next one behind `after`, and then the first one again, that is known on this host.
    pub(super) fn next_on_host(&self, after: SpaceId) -> Option<SpaceId> {
        let known = |(_, process): &(&SpaceId, &Process)| process.host.is_some();
        let next = (Bound::Excluded(after), Bound::Unbounded);
        let behind = self.members.range(next).find(known);
        let found = behind.or_else(|| self.members.iter().find(known));
        found.map(|(id, _)| *id)
    }

    /// Readable when the memory of one of them has something to tell.
    pub(super) fn ready(&self) -> BorrowedFd<'_> {
        self.poll.0.as_fd()
    }

    /// Those whose memory has something to tell now.
    pub(super) fn with_messages(&self) -> Result<impl Iterator<Item = SpaceId> + use<>> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = match self.poll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(Error::wrap(Kind::Io, "cannot wait for faults", errno)),
        };
        let ids = events.into_iter().take(count);
        Ok(ids.filter_map(|event| u32::try_from(event.data()).ok().map(SpaceId)))
    }

    /// Nobody is told of the messages of `id` for a while; they stay to be read.
    pub(super) fn unwatch(&self, id: SpaceId) {
        if let Some(process) = self.get(id) {
            // It is watched, or was told to wait before.
            let _ = self.poll.delete(&process.uffd);
        }
    }

    /// Takes [`Processes::unwatch`] back.
    pub(super) fn watch_again(&self, id: SpaceId) {
        if let Some(process) = self.get(id) {
            // It is watched already if it could not be taken out.
            let _ = watch_memory(&self.poll, id, process);
        }
    }

    /// The fault of `id` at `addr` cannot be answered now.
    pub(super) fn retry_later(&mut self, id: SpaceId, addr: Vaddr) {
        self.retries.push_back((id, addr));
    }

    /// Faults that are to be looked at again.
    pub(super) fn retries(&self) -> &VecDeque<(SpaceId, Vaddr)> {
        &self.retries
    }

    /// The oldest of them.
    pub(super) fn next_retry(&mut self) -> Option<(SpaceId, Vaddr)> {
        self.retries.pop_front()
    }
}

fn watch_memory(poll: &Epoll, id: SpaceId, process: &Process) -> Result<()> {
    watch(poll, &process.uffd, EpollFlags::EPOLLIN, u64::from(id.0))
}
