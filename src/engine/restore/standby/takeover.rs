//! Who stands by: follows the one that serves, and goes on in its place when that is killed.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use tracing::subscriber::{NoSubscriber, with_default};

use super::messages::StandbyMessage;
use super::source_sockets::SourceSockets;
use super::{Watch, unsent_events};
use crate::engine::restore::host_process;
use crate::engine::restore::intake::{Intake, IntakeCopies, IntakeEvent, SocketChange};
use crate::engine::restore::unopened::Unopened;
use crate::engine::restore::{Restore, RestoreConfig};
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::SpaceId;
use crate::lazy::space::Space;
use crate::sys::owned_process::ProcessName;
use crate::sys::shared::RestoreState;
use crate::sys::uffd::{Message, Uffd};

/// How far one has followed the other.
#[derive(Debug, Default)]
pub(super) struct Followed {
    /// Its own number of each process that was told of.
    pub(super) ids: BTreeMap<SpaceId, SpaceId>,
    /// Events that were told of.
    pub(super) events: u64,
    pub(super) source: SourceSockets,
    /// What the restore speaks to.
    pub(super) sockets: IntakeCopies,
    /// The pid, in the images, of the restored process that was told of last.
    pub(super) reported_last: Option<u32>,
    /// By its number, each child whose userfaultfd was handed over before its event was told.
    pub(super) unsent_children: BTreeMap<SpaceId, Uffd>,
}

impl Restore {
    /// Stands by for a process that serves as `config` says. Returns when that has ended: `None` if it did so
    /// in order, else a restore to [`Restore::run`] in its place. It uses the signals that it was started
    /// with, and is silent until it takes over.
    ///
    /// # Errors
    ///
    /// Nothing was being restored when the other process was killed; or it could not follow that, and the restored
    /// processes were ended.
    pub fn stand_by(config: RestoreConfig, watch: &Watch) -> Result<Option<Restore>> {
        // The trace and the recording are the other process's.
        let config = RestoreConfig {
            trace: None,
            record_working_set: None,
            ..config
        };
        let silently = NoSubscriber::default;
        let assembled = with_default(silently(), || Restore::assemble(config, None));
        let mut restore = match assembled {
            Ok(restore) => restore,
            // If the other process cannot begin either, it says so and ends.
            Err(error) => return guard(None, watch, error).map(|()| None),
        };
        let mut followed = Followed::default();
        let following = with_default(silently(), || restore.follow(watch, &mut followed));
        if let Err(error) = following {
            let followed = Some((restore, followed.sockets));
            return guard(followed, watch, error).map(|()| None);
        }
        if watch.shared.dismissed.load(Ordering::SeqCst) != 0 {
            return Ok(None);
        }
        followed.source.give_up();
        let taken_over = restore.take_over(&watch.shared, &mut followed);
        followed.source.reset();
        taken_over.map(|()| Some(restore))
    }

    /// Does with the planner what the other process does with its own, until that ends.
    fn follow(&mut self, watch: &Watch, followed: &mut Followed) -> Result<()> {
        let lost = |error| {
            Error::wrap(
                Kind::Io,
                "cannot receive from the process that serves",
                error,
            )
        };
        loop {
            // A descriptor that comes with a message and finds no free number is lost.
            if std::fs::File::open("/dev/null").is_err() {
                self.losses.use_reserve();
            }
            let Some((message, events, fd)) = watch.next().map_err(lost)? else {
                break;
            };
            followed.events = events;
            match message {
                StandbyMessage::Source { faults } => followed.source.replace(faults, fd),
                StandbyMessage::Socket(change) => followed.sockets.apply(change, fd),
                _ => self.apply_message(&mut followed.ids, message, fd.map(Uffd::from))?,
            }
            if let StandbyMessage::Process { pid, .. } = message {
                followed.reported_last = Some(pid);
            }
        }
        Ok(())
    }

    fn apply_message(
        &mut self,
        ids: &mut BTreeMap<SpaceId, SpaceId>,
        message: StandbyMessage,
        uffd: Option<Uffd>,
    ) -> Result<()> {
        let own = |id: SpaceId| ids.get(&id).copied();
        match (message, uffd) {
            (
                StandbyMessage::Process {
                    id,
                    pid,
                    host,
                    started,
                },
                Some(uffd),
            ) => {
                ids.insert(id, self.add_process(pid, uffd, host, started)?);
            }
            (StandbyMessage::Fork { id, parent }, Some(uffd)) => {
                if let Some(parent) = own(parent)
                    && let Some(child) = self.handle_fork(parent, uffd)?
                {
                    ids.insert(id, child);
                }
            }
            (StandbyMessage::Process { .. } | StandbyMessage::Fork { .. }, None) => {
                let text = "a process was announced without its userfaultfd";
                return Err(Error::new(Kind::Io, text));
            }
            (StandbyMessage::Remap { id, from, to }, _) => {
                if let Some(id) = own(id) {
                    self.handle_remap(id, from, to);
                }
            }
            (StandbyMessage::Gone { id, range }, _) => {
                if let Some(id) = own(id) {
                    self.handle_gone(id, range);
                }
            }
            (StandbyMessage::Exited { id }, _) => {
                if let Some(id) = own(id) {
                    self.forget(id);
                }
            }
            (StandbyMessage::Source { .. } | StandbyMessage::Socket(_), _) => {}
        }
        Ok(())
    }

    /// Goes on in place of the one that was killed.
    fn take_over(&mut self, shared: &RestoreState, followed: &mut Followed) -> Result<()> {
        let killed = Error::new(Kind::PeerLost, "the lazy-client that served was killed");
        let has_restore = self.take_handover_over(shared, followed);
        let has_restore = has_restore.unwrap_or_else(|error| {
            tracing::error!("{error}");
            false
        });
        if self.processes.is_empty() && !has_restore {
            return Err(killed.within("nothing was being restored"));
        }
        tracing::error!(
            "{killed}: its standby, pid {}, takes over; {} pages may be missing",
            std::process::id(),
            self.planner.missing_pages()
        );
        self.go_on_in_place(shared, followed, killed);
        Ok(())
    }

    /// Reads on what the restore says, unless that was read to its end. Returns whether a restore is there that still
    /// has something to say.
    pub(super) fn take_handover_over(
        &mut self,
        shared: &RestoreState,
        followed: &mut Followed,
    ) -> Result<bool> {
        let dir = Path::new(".");
        let finished = shared.finished.load(Ordering::SeqCst) != 0;
        let sockets = std::mem::take(&mut followed.sockets);
        if finished || sockets.is_over() {
            Intake::clear_up(dir, sockets.file);
            self.handover.take_over(finished);
            return Ok(false);
        }
        self.handover.go_on(dir, sockets, followed.reported_last)?;
        self.has_restore()
    }

    /// Goes on where the one that was `killed` has ended, as far as that is possible.
    pub(super) fn go_on_in_place(
        &mut self,
        shared: &RestoreState,
        followed: &mut Followed,
        killed: Error,
    ) {
        if self.handover.is_finished() {
            self.observer.restored(self.clock.now_us());
        }
        if let Err(error) = self.go_on(shared, followed, killed) {
            self.lose(error);
        }
    }

    fn go_on(
        &mut self,
        shared: &RestoreState,
        followed: &mut Followed,
        killed: Error,
    ) -> Result<()> {
        for (_, process) in self.processes.iter() {
            process.uffd.wake_all(self.images.page()).map_err(|error| {
                let text = format!("cannot wake the threads of pid {}", process.pid);
                Error::wrap(Kind::Io, text, error)
            })?;
        }
        if self.handle_unsent_events(shared, followed)? {
            self.kill_processes(Space::first_missing);
            return Err(killed.within("a child that was just forked can get no memory any more"));
        }
        if self.handover.is_over() && !self.handover.is_finished() {
            return Err(killed.within("the restore had not finished"));
        }
        self.take_in()?;
        if self.config.source.is_none() {
            return Ok(());
        }
        self.links.begin_session(&self.config)?;
        if shared.ours.load(Ordering::SeqCst) != 0 {
            self.links.set_ours();
        }
        for (pid, missing) in self.planner.origins() {
            self.build_on_earlier(pid, &missing)?;
        }
        self.reach_unproven(killed)
    }

    /// Handles the events that the other has read and not sent. Returns whether a child was lost with one.
    fn handle_unsent_events(
        &mut self,
        shared: &RestoreState,
        followed: &mut Followed,
    ) -> Result<bool> {
        let of = SpaceId(shared.read_of.load(Ordering::SeqCst));
        let Some(id) = followed.ids.get(&of).copied() else {
            return Ok(false);
        };
        let failed = |error| Error::wrap(Kind::Io, "cannot understand an event", error);
        let mut lost = false;
        let events: Vec<_> = unsent_events(shared, followed.events).collect();
        for event in events {
            let event = event.map_err(failed)?;
            self.note_event();
            match event {
                Message::Fault(_) => {}
                Message::Fork(_) => lost |= !self.adopt_unsent_child(id, followed)?,
                Message::Remap { from, to } => {
                    self.notify_standby(StandbyMessage::Remap { id, from, to }, None);
                    self.handle_remap(id, from, to);
                }
                Message::Unmap(range) if self.is_still_mapped(id, range) => {}
                Message::Remove(range) | Message::Unmap(range) => {
                    self.notify_standby(StandbyMessage::Gone { id, range }, None);
                    self.handle_gone(id, range);
                }
            }
        }
        Ok(lost)
    }

    /// `parent` has forked, and this process was not notified. Returns whether the child's userfaultfd is there.
    fn adopt_unsent_child(&mut self, parent: SpaceId, followed: &mut Followed) -> Result<bool> {
        let Some((id, uffd)) = followed.unsent_children.pop_first() else {
            return Ok(false);
        };
        self.planner.number_from(id);
        let withheld = self.withheld_by_fork(parent);
        if let Some(child) = self.handle_fork(parent, uffd)? {
            self.withhold(child, &withheld);
        }
        Ok(true)
    }
}

/// Cannot stand by any longer because of `why`; what is in `followed` was told before. Until the one that serves ends in
/// order, all userfaultfds are kept: if it is killed, the processes that lack memory are ended before they are closed.
fn guard(followed: Option<(Restore, IntakeCopies)>, watch: &Watch, why: Error) -> Result<()> {
    let mut why = Some(why);
    let mut say = || {
        if let Some(why) = why.take() {
            tracing::error!(
                "{}: if the lazy-client that serves is killed, the processes that lack memory are ended",
                why.within("cannot stand by any longer")
            );
        }
    };
    // One that could not begin was told of nothing yet: neither may the other, which then says why itself.
    if followed.is_some() {
        say();
    }
    let (mut restore, mut sockets) = followed.unzip();
    let mut told_of = Unopened::default();
    while let Ok(Some((told, _, fd))) = watch.next() {
        let name = match told {
            StandbyMessage::Socket(change) => {
                sockets.get_or_insert_default().apply(change, fd);
                continue;
            }
            StandbyMessage::Process { host, started, .. } => ProcessName { pid: host, started },
            // Its family is killed as a whole.
            _ => ProcessName { pid: 0, started: 0 },
        };
        say();
        if let Some(fd) = fd
            && !matches!(told, StandbyMessage::Source { .. })
        {
            told_of.keep(name, Uffd::from(fd));
        }
    }
    if watch.shared.dismissed.load(Ordering::SeqCst) != 0 {
        return Ok(());
    }
    keep_unread(&mut told_of, sockets.unwrap_or_default());
    if let Some(restore) = &mut restore {
        restore.kill_processes(Space::first_missing);
        restore.unopened.end_processes();
    }
    told_of.end_processes();
    let text = "the lazy-client that served was killed, and nobody could take over: the restored processes that lack \
                memory were ended";
    Err(Error::new(Kind::MemoryLost, text))
}

/// Lets the restore that speaks to `sockets` fail, and has `kept` keep the userfaultfds that it had sent before.
pub(super) fn keep_unread(kept: &mut Unopened, sockets: IntakeCopies) {
    let mut nobody = |_: SocketChange, _: Option<BorrowedFd<'_>>| {};
    let intake = Intake::go_on(Path::new("."), sockets);
    let read = intake.and_then(|mut intake| {
        intake.shut(&mut nobody);
        while let Some(event) = intake.next(&mut nobody)? {
            match event {
                IntakeEvent::Process(_, uffd, pid) => {
                    let started = host_process::started(pid);
                    kept.keep(ProcessName { pid, started }, uffd);
                }
                IntakeEvent::End => break,
                IntakeEvent::Zombie(_) | IntakeEvent::Finished => {}
            }
            intake.handled(&mut nobody)?;
        }
        Ok(())
    });
    if let Err(error) = read {
        tracing::error!("{error}");
    }
}
