//! What `criu restore` hands over: processes with their userfaultfds, then the message that it has finished.
//!
//! CRIU waits for no answer: it may have finished while all of that is still unread. So a message stays in its socket until
//! whoever stands by has been told of it, and nothing is closed before it was read ([`Restore::end_handover`]).
//!
//! Invariants: once [`Handover::is_over`], no connection is accepted; after a restore has finished, only the end of its
//! connection is read.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use super::candidates::SearchScope;
use super::host_process::HostProcess;
use super::intake::{Intake, IntakeCopies, IntakeEvent, OnSocketChange, SocketChange};
use super::owner_search::OwnerSearch;
use super::processes::Process;
use super::standby::{Standby, StandbyMessage, notify};
use super::{Restore, Token, host_process, process, rewatch, watch};
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::SpaceId;
use crate::sys::owned_process::ProcessName;
use crate::sys::uffd::{Uffd, check_permitted};

/// How often a restore that does not come is logged.
const WAITING_LINE: Duration = Duration::from_secs(10);

/// `criu restore` still has to let its processes go when it says that it has finished. To fill memory meanwhile took CPU
/// time from it that they wait for: up to 0.4 s where two CPUs did all. So the background stream begins when a process
/// meets a missing page, or after so long.
const HEAD_START: Duration = Duration::from_millis(200);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Handover {
    intake: Intake,
    /// When the last message of the restore came.
    last_message: Instant,
    /// When its absence was last logged.
    logged: Instant,
    /// It has reported that every process runs.
    finished: bool,
    /// When the background stream may begin, once the restore is finished: a process has met a missing page, or as long
    /// as that may take is over.
    fills_from: Option<Instant>,
    /// Nobody listens to it any more.
    over: bool,
    /// Another process served before, so that more is there than is known.
    was_taken_over: bool,
    /// The process of which the one before had notified its standby last: its message may still be in the socket.
    reported_last: Option<u32>,
}

/// Notifies `standby` of what happens to the sockets.
fn notifying(standby: &mut Option<Standby>) -> impl FnMut(SocketChange, Option<BorrowedFd<'_>>) {
    move |change, fd| notify(standby, StandbyMessage::Socket(change), fd)
}

impl Handover {
    /// Of a restore that nobody listens to yet.
    pub(super) fn new() -> Handover {
        let now = Instant::now();
        Handover {
            intake: Intake::ended(),
            last_message: now,
            logged: now,
            finished: false,
            fills_from: None,
            over: false,
            was_taken_over: false,
            reported_last: None,
        }
    }

    /// Listens in the directory `dir`, and notifies `standby` of it.
    pub(super) fn listen(&mut self, dir: &Path, standby: &mut Option<Standby>) -> Result<()> {
        self.intake = Intake::listen(dir, &mut notifying(standby))?;
        Ok(())
    }

    /// Whether every process runs.
    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether the background stream may run: the restored processes do, so nobody who restores them needs the CPU.
    pub(super) fn may_fill(&self) -> bool {
        self.fills_in() == Some(Duration::ZERO)
    }

    /// How long until the background stream may run; none as long as the restore is not finished.
    pub(super) fn fills_in(&self) -> Option<Duration> {
        let from = self.fills_from?;
        Some(from.saturating_duration_since(Instant::now()))
    }

    /// A restored process has met a missing page.
    pub(super) fn note_fault(&mut self) {
        self.fills_from = self.fills_from.map(|from| from.min(Instant::now()));
    }

    /// Whether no process can come any more.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// What it sends from now on counts for nothing but its end.
    pub(super) fn end(&mut self) {
        self.over = true;
    }

    /// Lets the restore fail.
    fn hang_up(&mut self, on_change: &mut OnSocketChange<'_>) {
        self.intake.shut(on_change);
        self.intake.close(on_change);
        self.end();
    }

    /// Another process has served until now, and has received all of a restore, which `finished` or has failed.
    pub(super) fn take_over(&mut self, finished: bool) {
        (self.over, self.finished, self.was_taken_over) = (true, finished, true);
        self.fills_from = finished.then(Instant::now);
    }

    /// Another process has served until now, in the directory `dir`; of its sockets there are `copies`. The process that
    /// it has told of last is `reported_last`.
    pub(super) fn go_on(
        &mut self,
        dir: &Path,
        copies: IntakeCopies,
        reported_last: Option<u32>,
    ) -> Result<()> {
        self.was_taken_over = true;
        self.reported_last = reported_last;
        self.last_message = Instant::now();
        self.intake = Intake::go_on(dir, copies)?;
        Ok(())
    }

    /// Whether the process `pid` is one that this process was told of by the one before, which had not handled the message
    /// to its end. Only the first message can be.
    fn was_reported(&mut self, pid: u32) -> bool {
        self.reported_last.take() == Some(pid)
    }

    /// Whether another process served before, so that more pages may be there than is known.
    pub(super) fn was_taken_over(&self) -> bool {
        self.was_taken_over
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.intake.socket()
    }

    /// The next event of it, the same again until it is [`Handover::handled`].
    fn next(&mut self, on_change: &mut OnSocketChange<'_>) -> Result<Option<IntakeEvent>> {
        let Some(event) = self.intake.next(on_change)? else {
            return Ok(None);
        };
        self.last_message = Instant::now();
        match event {
            IntakeEvent::Finished => {
                self.finished = true;
                self.fills_from = Some(self.last_message + HEAD_START);
            }
            IntakeEvent::End => self.over = true,
            IntakeEvent::Process(..) | IntakeEvent::Zombie(_) => {}
        }
        Ok(Some(event))
    }

    /// Whoever stands by has been notified of the last event.
    fn handled(&mut self, on_change: &mut OnSocketChange<'_>) -> Result<()> {
        self.reported_last = None;
        self.intake.handled(on_change)
    }

    /// Says now and then that no restore has come.
    fn log_waiting(&mut self) {
        if !self.intake.is_listening() || self.logged.elapsed() < WAITING_LINE {
            return;
        }
        self.logged = Instant::now();
        let path = std::path::absolute(self.intake.path()).unwrap_or_default();
        tracing::warn!(
            "no restore has connected yet: start criu restore --lazy-pages with the work directory (-W, else -D) of {}",
            path.display()
        );
    }

    /// Why it is to be given up, if it has said nothing for `most`.
    fn give_up_after(&self, most: Duration) -> Option<Error> {
        if self.over || self.last_message.elapsed() < most {
            return None;
        }
        let what = match self.intake.is_listening() {
            true => "no restore has connected",
            false => "the restore has said nothing",
        };
        let text = format!(
            "{what} for {} s (--restore-timeout): the source is told that the restore is abandoned",
            most.as_secs()
        );
        Some(Error::new(Kind::PeerLost, text))
    }
}

impl Restore {
    pub(super) fn watch_intake(&self) -> Result<()> {
        match self.handover.socket() {
            Some(socket) => watch(
                &self.poll,
                &socket,
                EpollFlags::EPOLLIN,
                Token::Intake as u64,
            ),
            None => Ok(()),
        }
    }

    /// Gives the source up if the restore that it waits for does not come, or not on.
    pub(super) fn expect_restore(&mut self) {
        self.handover.log_waiting();
        let most = self.config.restore_timeout;
        let most = most.filter(|_| self.config.source.is_some());
        if let Some(error) = most.and_then(|most| self.handover.give_up_after(most)) {
            self.end_handover();
            self.lose(error);
        }
    }

    /// Nothing more is to come of the restore, which fails if it has not finished. It may have: what it has said is read
    /// before anything is closed, for the kernel fills with zeros what is missing under a userfaultfd that nobody holds.
    pub(super) fn end_handover(&mut self) {
        if self.handover.is_finished() || self.handover.socket().is_none() {
            return;
        }
        self.handover.intake.shut(&mut notifying(&mut self.standby));
        if let Err(error) = self.take_in() {
            tracing::warn!("{error}");
        }
        self.handover.hang_up(&mut notifying(&mut self.standby));
    }

    /// Whether a restore is there, which may have ended by now and left all that it had to say.
    pub(super) fn has_restore(&mut self) -> Result<bool> {
        let on_change = &mut notifying(&mut self.standby);
        self.handover.intake.has_come(on_change)
    }

    fn next_message(&mut self) -> Result<Option<IntakeEvent>> {
        self.handover.next(&mut notifying(&mut self.standby))
    }

    /// The last message is done, and whoever stands by has been told of it.
    fn message_handled(&mut self) -> Result<()> {
        self.handover.handled(&mut notifying(&mut self.standby))
    }

    /// Everything that the restore has said.
    pub(super) fn take_in(&mut self) -> Result<()> {
        while let Some(event) = self.next_message()? {
            // The socket to poll changes when the restore connects; a closed one leaves by itself.
            match event {
                IntakeEvent::Process(pid, uffd, host) => {
                    if !self.handover.was_reported(pid) {
                        let started = host_process::started(host);
                        if let Err(error) = self.add_process(pid, uffd, host, started) {
                            return Err(self.refuse_process(pid, error));
                        }
                    }
                    self.message_handled()?;
                }
                IntakeEvent::Zombie(pid) => {
                    tracing::info!("pid {pid} is a zombie: it has no memory");
                    self.message_handled()?;
                }
                IntakeEvent::Finished => {
                    self.note_finished();
                    self.message_handled()?;
                    self.observer.restored(self.clock.now_us());
                    tracing::info!(
                        "the restore is finished, {} pages are missing",
                        self.planner.missing_pages()
                    );
                    self.fetch_unawaited()?;
                }
                IntakeEvent::End if self.handover.is_finished() => return Ok(()),
                IntakeEvent::End => return Err(self.restore_failed()),
            }
        }
        match self.handover.socket() {
            Some(socket) => rewatch(
                &self.poll,
                &socket,
                EpollFlags::EPOLLIN,
                Token::Intake as u64,
            ),
            None => Ok(()),
        }
    }

    /// `host` is the process's pid on this host, 0 if that is not known, and `started` its start, in clock ticks since
    /// that of the host.
    ///
    /// # Errors
    ///
    /// Its images cannot be opened: its userfaultfd is kept in [`Unopened`](super::unopened::Unopened). Or it cannot be polled, and is a member all
    /// the same.
    pub(super) fn add_process(
        &mut self,
        pid: u32,
        uffd: Uffd,
        host: i32,
        started: u64,
    ) -> Result<SpaceId> {
        let name = ProcessName { pid: host, started };
        let opened = match self.open_process(pid) {
            Ok(opened) => opened,
            Err(error) => {
                self.unopened.keep(name, uffd);
                return Err(error);
            }
        };
        let id = self.planner.add(opened.space);
        if let Some(regions) = opened.huge {
            self.huge_pages.add(id, name, regions);
        }
        let chain = opened.chain.map(Arc::new);
        if let (Some(auto_dedup), Some(chain)) = (&mut self.auto_dedup, &chain) {
            auto_dedup.add(pid, chain);
        }
        self.notify_standby(
            StandbyMessage::Process {
                id,
                pid,
                host,
                started,
            },
            Some(uffd.as_fd()),
        );
        let host = HostProcess::open(host, started);
        self.family.forget();
        let process = Process {
            search: host
                .is_none()
                .then(|| OwnerSearch::new(SearchScope::Named(pid))),
            host,
            ..Process::new(pid, uffd, chain)
        };
        self.processes.adopt(id, process)?;
        Ok(id)
    }

    /// What the images have of `pid`, and what is known of it besides.
    fn open_process(&mut self, pid: u32) -> Result<process::Opened> {
        let has_source = self.config.source.is_some();
        let mut opened = process::open(&self.images, pid, has_source, &self.huge_pages)?;
        if self.config.auto_dedup {
            opened.space = opened.space.accounting();
        }
        let space = &mut opened.space;
        tracing::info!(
            "pid {pid}: {} pages missing in {} runs, {} of them with the source",
            space.missing_bytes() >> self.images.page().shift(),
            space.runs(),
            space.remote_bytes() >> self.images.page().shift(),
        );
        let mappings = std::mem::take(&mut opened.mappings);
        self.working_set.apply(pid, space, mappings);
        self.build_on_earlier(pid, space.origins())?;
        Ok(opened)
    }

    /// The process `pid`, which does not run yet, cannot be restored because of `error`. It is ended, and the restore
    /// fails, which ends all: CRIU cannot say any more that it has finished, and takes that for a failure.
    fn refuse_process(&mut self, pid: u32, error: Error) -> Error {
        let ended = self.unopened.end_processes();
        self.handover.hang_up(&mut notifying(&mut self.standby));
        error.within(match ended {
            true => format!("pid {pid} cannot be restored, and was ended"),
            false => format!("pid {pid} cannot be restored: the connection to its restore is closed, so that it fails"),
        })
    }

    /// The restore has hung up too early. Where no process came and this one may not have a userfaultfd
    /// either, that is the likely reason.
    fn restore_failed(&self) -> Error {
        let text = "the restore failed before it was finished: its own log says why";
        match check_permitted() {
            Err(error) if self.planner.total_pages() == 0 => {
                let hint = "userfaultfd is refused here, which a lazy restore needs (CAP_SYS_PTRACE, a \
                            kernel with CONFIG_USERFAULTFD, a seccomp profile that allows it)";
                Error::wrap(Kind::PeerLost, format!("{text}; {hint}"), error)
            }
            _ => Error::new(Kind::PeerLost, text),
        }
    }
}
