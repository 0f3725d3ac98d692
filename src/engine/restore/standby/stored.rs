//! A service that was killed as a whole and is started again: takes up what the service manager has kept.
//!
//! The processes have waited meanwhile: as long as a copy of its userfaultfd is open somewhere, nobody reads zeros. The
//! messages of the journal are applied as by a standby, with its numbers, so that the journal goes on.
//!
//! Invariants: nothing that was kept is used before its type was looked at; a journal is followed with the images
//! alone that it was begun with. If it cannot be followed, the processes are killed (or held, as [`OnLoss`] says) while
//! the descriptors are still there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use socket2::{Domain, SockRef, Type};

use super::StandbyMessage;
use super::journal::{
    self, CONNECTION, JOURNAL, Journal, LISTENER, MEMORY, PREFIX, SOURCE, STATE, images_hash,
};
use super::messages::MessageBytes;
use super::source_sockets::SourceSockets;
use super::takeover::{Followed, keep_unread};
use crate::engine::pending::USERFAULTFD;
use crate::engine::restore::candidates::SearchScope;
use crate::engine::restore::host_process;
use crate::engine::restore::intake::{Intake, IntakeCopies, SocketChange};
use crate::engine::restore::owner_search::OwnerSearch;
use crate::engine::restore::signals::Signals;
use crate::engine::restore::unopened::Unopened;
use crate::engine::restore::{OnLoss, Process, Restore, RestoreConfig, prepared, process};
use crate::engine::service_manager::{Passed, ServiceManager, passed};
use crate::engine::start_wait::StartWait;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Chain;
use crate::image::dir::ImageDir;
use crate::lazy::planner::SpaceId;
use crate::lazy::space::Space;
use crate::sys::shared::{RestoreState, Shared};
use crate::sys::uffd::Uffd;

/// Between two attempts to take up what is held.
const HELD_PAUSE: Duration = Duration::from_millis(500);

/// What the service manager has passed.
#[derive(Debug)]
pub enum Received {
    /// Nothing to go on with.
    Nothing(ServiceManager),
    /// A restore that was under way.
    StoredRestore(Box<StoredRestore>),
}

/// See [`Received::StoredRestore`].
#[derive(Debug)]
pub struct StoredRestore {
    manager: ServiceManager,
    names: BTreeSet<String>,
    shared: Shared<RestoreState>,
    number: u32,
    journal: File,
    records: Vec<MessageBytes>,
    memory: BTreeMap<SpaceId, Uffd>,
    source: SourceSockets,
    sockets: IntakeCopies,
}

impl StoredRestore {
    /// Takes over what `manager` has passed to this process.
    ///
    /// # Errors
    ///
    /// It is not what a lazy-client has it keep.
    pub fn receive(manager: ServiceManager) -> Result<Received> {
        let parts = passed(PREFIX)?;
        let mut names: BTreeSet<String> = parts.iter().map(|part| part.name.clone()).collect();
        let mut parts = Parts::sort(parts)?;
        let (Some(state), Some((number, journal_file))) = (parts.state, parts.journal) else {
            return Ok(StoredRestore::nothing(manager, &names));
        };
        let unfit = |what: &str, error| {
            let text = format!("what the service manager kept as {what} is not what it should be");
            Error::wrap(Kind::Io, text, error)
        };
        let shared = Shared::in_file(&state).map_err(|error| unfit(STATE, error))?;
        let records = journal::read(&journal_file).map_err(|error| unfit(JOURNAL, error))?;
        let is_set = |flag: &AtomicU32| flag.load(Ordering::SeqCst) != 0;
        let unread = !is_set(&shared.finished) && !parts.sockets.is_over();
        let something = !parts.memory.is_empty()
            || unread && has_restore(&mut parts.sockets, &manager, &mut names)?;
        if is_set(&shared.dismissed) || !something {
            drop(parts.sockets);
            return Ok(StoredRestore::nothing(manager, &names));
        }
        let file = shared.socket_file.each_ref();
        parts.sockets.file = Some(file.map(|part| part.load(Ordering::SeqCst)).into());
        Ok(Received::StoredRestore(Box::new(StoredRestore {
            manager,
            names,
            shared,
            number,
            journal: journal_file,
            records,
            memory: parts.memory,
            source: parts.source,
            sockets: parts.sockets,
        })))
    }

    /// What was kept is of no use.
    fn nothing(manager: ServiceManager, names: &BTreeSet<String>) -> Received {
        for name in names {
            if let Err(error) = manager.release(name) {
                tracing::warn!("the service manager does not let {name} go: {error}");
            }
        }
        // As long as a copy of the listening socket is open somewhere, its name seems to be in use.
        if !names.is_empty() && !manager.settle().unwrap_or(false) {
            tracing::warn!("the service manager takes long to close descriptors");
        }
        Received::Nothing(manager)
    }

    /// Fails unless `images` are those that the journal is about.
    fn check(&self, images: &ImageDir) -> Result<()> {
        let magic = self.shared.magic.load(Ordering::SeqCst);
        if magic != RestoreState::MAGIC {
            let text = "the service manager kept a restore of another version of lazy-client";
            return Err(Error::new(Kind::Unsupported, text));
        }
        let kept = self.shared.images.each_ref();
        if kept.map(|half| half.load(Ordering::SeqCst)) != images_hash(images)? {
            let text = format!(
                "the service manager kept a restore of other images than those in {} (-D)",
                images.path().display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(())
    }

    fn messages(&self) -> Result<Vec<StandbyMessage>> {
        let failed = |error| Error::wrap(Kind::Io, "cannot understand the journal", error);
        let messages = self
            .records
            .iter()
            .map(|record| StandbyMessage::decode(*record));
        messages.map(|message| message.map_err(failed)).collect()
    }

    /// Kills the processes that were restored, and the children that they forked, as far as they lack memory.
    fn kill_processes(&mut self) {
        let mut unread = Unopened::default();
        keep_unread(&mut unread, std::mem::take(&mut self.sockets));
        unread.end_processes();
        let roots = self.messages().unwrap_or_default().into_iter();
        let roots = roots.filter_map(|message| match message {
            StandbyMessage::Process { host, started, .. } => Some((host, started)),
            _ => None,
        });
        host_process::kill_families(roots);
    }

    /// The restore cannot be gone on with because of `why`, and the descriptors will be gone with this process. Returns
    /// if it is to be tried again.
    fn apply_policy(&mut self, policy: OnLoss, signals: &Signals, why: Error) -> Result<()> {
        if policy == OnLoss::Hold {
            match self.hold(signals, &why) {
                Ok(()) => return Ok(()),
                Err(error) => tracing::error!("{error}"),
            }
        }
        self.kill_processes();
        let text = "the restored processes were killed, for they would have read zeros";
        Err(Error::wrap(Kind::MemoryLost, text, why))
    }

    /// Waits until an operator has the restore tried again; an error is an order to kill the processes.
    fn hold(&self, signals: &Signals, why: &Error) -> Result<()> {
        tracing::error!(
            "{why}: holding the processes; send SIGUSR1 to try again, SIGTERM or SIGUSR2 to kill them"
        );
        // Whoever has it started may wait for that message, and kill this process if it does not come.
        let _ = self
            .manager
            .notify("READY=1\nSTATUS=holding processes that lack memory");
        loop {
            match signals.next() {
                Some(signal) if signal.is(Signal::SIGUSR1) => return Ok(()),
                Some(signal) => {
                    return Err(Error::new(
                        Kind::Interrupted,
                        format!("stopped by {signal}"),
                    ));
                }
                None => std::thread::sleep(HELD_PAUSE),
            }
        }
    }
}

/// What was passed, by its names.
#[derive(Default)]
struct Parts {
    state: Option<File>,
    journal: Option<(u32, File)>,
    memory: BTreeMap<SpaceId, Uffd>,
    source: SourceSockets,
    sockets: IntakeCopies,
}

impl Parts {
    fn sort(passed: Vec<Passed>) -> Result<Parts> {
        let mut parts = Parts::default();
        for Passed { name, fd } in passed {
            let unfit = || {
                let text = format!("the service manager kept something else as {name}");
                Error::new(Kind::Io, text)
            };
            let number = |prefix| name.strip_prefix(prefix)?.parse::<u32>().ok();
            if name == STATE {
                parts.state = Some(File::from(fd));
            } else if let Some(number) = number(JOURNAL) {
                // The one before is kept for a moment longer than the next one is not.
                if parts
                    .journal
                    .as_ref()
                    .is_none_or(|(before, _)| *before < number)
                {
                    parts.journal = Some((number, File::from(fd)));
                }
            } else if let Some(id) = number(MEMORY) {
                if !is_userfaultfd(&fd) {
                    return Err(unfit());
                }
                parts.memory.insert(SpaceId(id), Uffd::from(fd));
            } else if let Some(which) = number(SOURCE) {
                SockRef::from(&fd).r#type().map_err(|_| unfit())?;
                parts.source.replace(which != 0, Some(fd));
            } else if name == LISTENER {
                check_unix_stream(&fd).map_err(|_| unfit())?;
                parts.sockets.listener = Some(fd);
            } else if let Some(number) = number(CONNECTION) {
                check_unix_stream(&fd).map_err(|_| unfit())?;
                parts.sockets.connections.insert(number, fd);
            }
        }
        // Once one is the restore, the others are closed first, then what listens.
        if parts.sockets.listener.is_none() {
            parts.sockets.restore = parts.sockets.connections.keys().next().copied();
        }
        Ok(parts)
    }
}

fn check_unix_stream(fd: &OwnedFd) -> io::Result<()> {
    let socket = SockRef::from(fd);
    match (socket.domain()?, socket.r#type()?) {
        (Domain::UNIX, Type::STREAM) => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Whether a restore has connected to `sockets`. What is accepted to find that out is kept there, and by `manager`, by
/// `names`.
fn has_restore(
    sockets: &mut IntakeCopies,
    manager: &ServiceManager,
    names: &mut BTreeSet<String>,
) -> Result<bool> {
    let failed = |error| Error::wrap(Kind::Io, "cannot look who has connected", error);
    let dir = Path::new(".");
    let mut intake = Intake::go_on(dir, sockets.copy().map_err(failed)?)?;
    intake.has_come(&mut |change, fd| {
        let SocketChange::Accepted { number } = change else {
            return;
        };
        let name = format!("{CONNECTION}{number}");
        let kept = fd.map(|fd| manager.keep(&name, fd));
        if let Some(Err(error)) = kept {
            tracing::warn!("the service manager does not keep {name}: {error}");
        }
        names.insert(name);
        sockets.apply(change, fd.and_then(|fd| fd.try_clone_to_owned().ok()));
    })
}

fn is_userfaultfd(fd: &OwnedFd) -> bool {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str() == USERFAULTFD)
}

impl Restore {
    /// Goes on with a restore that a service of this name had under way when it was killed, as `config` says. A
    /// restore to [`Restore::run`].
    ///
    /// # Errors
    ///
    /// That is impossible. The restored processes are killed then, before anybody reads zeros.
    pub fn take_up(config: RestoreConfig, mut kept: StoredRestore) -> Result<Restore> {
        // A trace begins with its process, and so does a recording.
        let config = RestoreConfig {
            trace: None,
            record_working_set: None,
            ..config
        };
        let signals = Signals::new()?;
        loop {
            let prepared = StartWait::new(config.wait)
                .and_then(|mut wait| wait.until(|| prepared::look_at_images(&config)))
                .and_then(|_| Restore::assemble(config.clone(), None))
                .and_then(|restore| kept.check(&restore.images).map(|()| restore));
            match prepared {
                Ok(restore) => return restore.follow_kept(kept),
                Err(error) => kept.apply_policy(config.on_loss, &signals, error)?,
            }
        }
    }

    fn follow_kept(mut self, mut kept: StoredRestore) -> Result<Restore> {
        let lost = match self.replay(&mut kept) {
            Ok(lost) => lost,
            Err(error) => {
                kept.kill_processes();
                return Err(
                    error.within("the restored processes were killed: what was kept is damaged")
                );
            }
        };
        let events = kept.records.last().map_or(0, |record| record.events);
        let ids = self
            .processes
            .ids()
            .into_iter()
            .map(|id| (id, id))
            .collect();
        let reported_last = kept
            .messages()?
            .into_iter()
            .rev()
            .find_map(|told| match told {
                StandbyMessage::Process { pid, .. } => Some(pid),
                _ => None,
            });
        let mut followed = Followed {
            ids,
            events,
            source: kept.source,
            sockets: kept.sockets,
            reported_last,
            unsent_children: kept.memory,
        };
        let count = kept.records.len();
        let mut journal =
            Journal::go_on(kept.manager, kept.names, kept.number, kept.journal, count);
        followed.source.give_up();
        for which in 0..=1 {
            if let Err(error) = journal.release(&format!("{SOURCE}{which}")) {
                tracing::warn!("the service manager keeps a connection to the source: {error}");
            }
        }
        self.standby = Some(super::Standby::restarted(journal, kept.shared, events));
        self.kill_lost(&lost);
        self.look_for_ended();
        tracing::warn!(
            "the lazy-client before was killed: goes on with {} processes that the service manager has kept; {} \
             pages may be missing",
            self.processes.len(),
            self.planner.missing_pages()
        );
        let killed = Error::new(Kind::PeerLost, "the lazy-client before was killed");
        if let Err(error) = self.take_handover_over(&kept.shared, &mut followed) {
            tracing::error!("{error}");
        }
        self.go_on_in_place(&kept.shared, &mut followed, killed);
        followed.source.reset();
        Ok(self)
    }

    /// Does what the process before has told of, with its numbers. Returns what lives and has no userfaultfd.
    fn replay(&mut self, kept: &mut StoredRestore) -> Result<Vec<SpaceId>> {
        let messages = kept.messages()?;
        let mut chains: BTreeMap<u32, Option<Arc<Chain>>> = BTreeMap::new();
        let mut lost = BTreeSet::new();
        for message in messages {
            match message {
                StandbyMessage::Process {
                    id,
                    pid,
                    host,
                    started,
                } => {
                    self.planner.number_from(id);
                    match kept.memory.remove(&id) {
                        Some(uffd) => {
                            self.add_process(pid, uffd, host, started)?;
                            let process = self.processes.get(id);
                            let chain = process.and_then(|process| process.chain.clone());
                            chains.insert(pid, chain);
                        }
                        None => {
                            let has_source = self.config.source.is_some();
                            let opened =
                                process::open(&self.images, pid, has_source, &self.huge_pages)?;
                            self.planner.add(opened.space);
                            chains.insert(pid, opened.chain.map(Arc::new));
                            lost.insert(id);
                        }
                    }
                }
                StandbyMessage::Fork { id, parent } => {
                    self.planner.number_from(id);
                    let Some(child) = self.planner.handle_fork(parent) else {
                        continue;
                    };
                    let pid = self.planner.space(child).map_or(0, Space::pid);
                    match kept.memory.remove(&id) {
                        Some(uffd) => {
                            let chain = chains.get(&pid).cloned().flatten();
                            let scope = self.children_scope_of(pid);
                            let process = Process {
                                search: scope.map(OwnerSearch::new),
                                ..Process::new(pid, uffd, chain)
                            };
                            self.processes.adopt(child, process)?;
                        }
                        None => drop(lost.insert(child)),
                    }
                }
                StandbyMessage::Remap { id, from, to } => self.handle_remap(id, from, to),
                StandbyMessage::Gone { id, range } => {
                    self.handle_gone(id, range);
                }
                StandbyMessage::Exited { id } => {
                    lost.remove(&id);
                    self.forget(id);
                }
                StandbyMessage::Source { .. } | StandbyMessage::Socket(_) => {}
            }
        }
        Ok(lost.into_iter().collect())
    }

    /// Where children of the process that the images call `pid` are searched for.
    fn children_scope_of(&self, pid: u32) -> Option<SearchScope> {
        let mut family = self.processes.iter().filter(|(_, one)| one.pid == pid);
        family.find_map(|(_, one)| one.children_scope())
    }

    /// The userfaultfds of these were not kept: the manager had no room for them, or was told too late.
    fn kill_lost(&mut self, lost: &[SpaceId]) {
        for &id in lost {
            let Some(space) = self.planner.space(id) else {
                continue;
            };
            let pid = space.pid();
            if let Some(missing) = space.first_missing() {
                tracing::error!(
                    "the service manager has not kept the userfaultfd of a child of pid {pid}, which lacks memory \
                     at {} (FileDescriptorStoreMax=): killing this process and its forks",
                    missing.at.start()
                );
                self.kill_processes(|space| (space.pid() == pid).then(|| space.first_missing())?);
            }
            self.forget(id);
        }
    }
}
