//! Post-copy: answers the page faults of restored processes and streams the rest in behind them.
//!
//! ```text
//! lazy-pages.socket -> intake ----> planner (who lacks what)
//! userfaultfds ------> faults ----> planner -> links -> source        a fault goes out at once
//! source ------------> links -----> install -> UFFDIO_COPY            from the receive buffer
//! local images ------> install ---> UFFDIO_COPY                       from the mapped file
//! all that happens to memory -----> standby                           takes over if this process is killed
//! ```
//!
//! One thread does all of it, in steps of at most 64 KiB while lone faults come, and looks for faults between any two
//! steps. So a fault waits for one step at most (about 25 µs). To wake another thread costs more (48-75 µs where
//! measured). Nothing in the loop waits for a disk, a log or a terminal.
//!
//! The state of the loop is in parts. Each has private fields, and its documentation names their invariants:
//!
//! | part | what changes it |
//! |---|---|
//! | `handover` | what the restore says: processes, its end |
//! | `lazy::planner`, `processes` | what memory does: faults, forks, moves, ends |
//! | `waking`, `install`, `guards`, `deferred`, `unreadable` | filling pages: sequences to be woken, guards, processes that are paused, images that fail |
//! | `owner_search`, `candidates` | fills of processes that nobody has named |
//! | `links` | connections to the source: answers, breaks, new attempts |
//! | `background`, `second_dump` | the rate, and whoever traces a process |
//! | `loss` | pages that cannot come, and what an operator says about them |
//! | `unopened` | processes whose images cannot be opened |
//! | `working_set` | pages that come first, or the recording of which they are |
//! | `huge_pages` | regions that have all their pages and are not huge pages again |
//! | `standby` | what the other process is told |
//!
//! Invariants:
//!
//! - A page is filled where the planner says it is *now*. After a refused fill the kernel's events of its process are
//!   read before the fill is tried again.
//! - A link is reset unless everything has come.
//! - This process does not end while a page that may still be read is neither filled nor poisoned.

mod auto_dedup;
mod background;
mod candidates;
mod config;
mod deferred;
mod faults;
mod forks;
mod given_up;
mod guards;
mod handover;
mod host_process;
mod huge_pages;
mod idle;
mod install;
pub mod intake;
mod links;
mod locked_growth;
mod loss;
mod owner_processes;
mod owner_search;
mod poison;
pub(in crate::engine) mod postcopy_client;
mod prepared;
mod process;
mod processes;
mod report;
mod reserve;
mod second_dump;
mod signals;
pub mod standby;
mod unawaited;
mod unmapped;
mod unopened;
mod unreadable;
mod waking;
mod working_set;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::engine::start_wait::StartWait;
use crate::error::{Error, Kind, Result};
use crate::image::consume::refuse_consumed;
use crate::image::dir::ImageDir;
use crate::lazy::batched_wakeup::BatchedWakeup;
use crate::lazy::planner::Planner;
use crate::sys::process::page_size;
use crate::sys::uffd::MessageBuffer;
use auto_dedup::AutoDedup;
use background::Background;
use candidates::Family;
pub use config::{OnLoss, RestoreConfig};
use deferred::Deferred;
use guards::GuardScans;
use handover::Handover;
use huge_pages::HugePageRestorer;
use install::Filling;
use intake::Intake;
use links::Links;
use loss::Losses;
use owner_search::LastLook;
pub(super) use process::wire_of;
use processes::{Process, Processes};
use report::Observer;
pub use report::{Progress, Summary};
use second_dump::SecondDump;
use signals::Signals;
pub use signals::block as block_signals;
pub(in crate::engine) use standby::SourceSockets;
use standby::Standby;
use unopened::Unopened;
use unreadable::Unreadable;
pub use working_set::WorkingSetSummary;
use working_set::WorkingSetUse;

/// How often the loop looks up when nothing happens: for ended processes, progress and waiting.
const TICK: Duration = Duration::from_millis(250);

/// What the loop waits on besides the userfaultfds, as numbers in epoll's data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
enum Token {
    Faults = 0,
    Intake = 1,
    Signals = 2,
    StreamLink = 3,
    FaultLink = 4,
    Reconnected = 5,
}

impl Token {
    fn from_data(data: u64) -> Option<Token> {
        [
            Token::Faults,
            Token::Intake,
            Token::Signals,
            Token::StreamLink,
            Token::FaultLink,
            Token::Reconnected,
        ]
        .into_iter()
        .find(|token| *token as u64 == data)
    }
}

/// A restore that is ready to begin: its socket listens, its images are there, its source answers.
pub struct Restore {
    config: RestoreConfig,
    images: ImageDir,
    /// What the restore hands over.
    handover: Handover,
    planner: Planner,
    processes: Processes,
    /// Sequences whose pages are there and that are woken later.
    batched_wakeup: BatchedWakeup,
    links: Links,
    background: Background,
    second_dump: SecondDump,
    losses: Losses,
    /// What cannot take pages now.
    deferred: Deferred,
    /// What local images cannot give now.
    unreadable: Unreadable,
    poll: Epoll,
    signals: Signals,
    clock: Clock,
    observer: Observer,
    /// Who takes over if this process is killed.
    standby: Option<Standby>,
    /// For the messages of userfaultfds, where nobody stands by.
    room: MessageBuffer,
    filling: Filling,
    guard_scans: GuardScans,
    last_look: LastLook,
    /// Who may be the process that is filled next, if it is unknown.
    family: Family,
    /// Takes out of the local images what nobody needs any more.
    auto_dedup: Option<AutoDedup>,
    /// What is to become huge pages again.
    huge_pages: HugePageRestorer,
    /// What comes first.
    working_set: WorkingSetUse,
    /// Those whose images could not be opened.
    unopened: Unopened,
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Time since the start, µs.
#[derive(Clone, Copy, Debug)]
struct Clock(Instant);

impl Clock {
    fn now_us(self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Restore {
    /// Waits for the images as long as `config` says, checks them, and makes them whole for a restore. What is left of the
    /// wait is for the source. [`block_signals`] must have been called. To be called before there is a second process, which
    /// reads the images too.
    pub fn await_images(config: &RestoreConfig) -> Result<StartWait> {
        Intake::check_free(Path::new("."))?;
        let mut wait = StartWait::new(config.wait)?;
        wait.until(|| prepared::look_at_images(config))?;
        prepared::finish_images(config)?;
        Ok(wait)
    }

    /// Opens the images, connects to the source and listens for the restore in the current
    /// directory. [`block_signals`] must have been called before any thread was started. `standby` takes over
    /// if this process is killed.
    pub fn prepare(
        config: RestoreConfig,
        standby: Option<Standby>,
        mut wait: StartWait,
    ) -> Result<Restore> {
        let mut restore = Restore::assemble(config, standby)?;
        refuse_consumed(&restore.images)?;
        let here = Path::new(".");
        restore.handover.listen(here, &mut restore.standby)?;
        restore.links.connect(&restore.config, &mut wait)?;
        if restore.links.is_ours() {
            restore.note_ours();
        }
        restore.watch_intake()?;
        restore.watch_links()?;
        Ok(restore)
    }

    /// Opens the images; nobody is listened to or connected to yet.
    fn assemble(config: RestoreConfig, standby: Option<Standby>) -> Result<Restore> {
        let page = page_size()
            .map_err(|error| Error::wrap(Kind::Unsupported, "cannot work here", error))?;
        let images = ImageDir::open(&config.images_dir, page)?;
        let processes = images.processes()?;
        tracing::info!(
            "images of {} processes in {}",
            processes.len(),
            config.images_dir.display()
        );
        let wire = match config.wire {
            Some(wire) => wire,
            None => process::wire_of(&images)?,
        };
        let earlier_images = match config.ferry {
            true => process::earlier_round(&images, config.prev_images_dir.as_deref())?,
            false => None,
        };
        let links = Links::new(&config, wire, page, earlier_images)?;
        let observer = Observer::new(config.trace.as_deref(), page)?;
        let working_set = WorkingSetUse::open(&config, &images, &processes)?;
        let mut restore = Restore {
            unopened: Unopened::default(),
            working_set,
            background: Background::new(&config),
            auto_dedup: config.auto_dedup.then(AutoDedup::default),
            huge_pages: HugePageRestorer::new(config.huge_pages),
            losses: Losses::new(&config)?,
            second_dump: SecondDump::new(),
            planner: Planner::with_policy(page, config.policy),
            config,
            images,
            handover: Handover::new(),
            processes: Processes::new()?,
            batched_wakeup: BatchedWakeup::default(),
            links,
            deferred: Deferred::default(),
            unreadable: Unreadable::default(),
            poll: new_poll()?,
            signals: Signals::new()?,
            clock: Clock(Instant::now()),
            observer,
            filling: Filling::default(),
            guard_scans: GuardScans::default(),
            last_look: LastLook::default(),
            family: Family::default(),
            standby,
            room: MessageBuffer::zeroed(),
        };
        restore.watch_all()?;
        restore.begin_recording();
        Ok(restore)
    }

    fn watch_all(&mut self) -> Result<()> {
        let readable = EpollFlags::EPOLLIN;
        watch(
            &self.poll,
            &self.processes.ready(),
            readable,
            Token::Faults as u64,
        )?;
        watch(
            &self.poll,
            &self.links.reconnected(),
            readable,
            Token::Reconnected as u64,
        )
    }

    /// Serves until every page of every process is installed or gone. Returns what was done; an
    /// error says which process lacks how many pages.
    pub fn run(mut self) -> (Summary, Result<()>) {
        let result = self.serve();
        self.end_auto_dedup(&result);
        let result = result.and_then(|()| self.close_links());
        if result.is_ok() {
            self.collapse_rest();
        }
        let written = [self.observer.finish_trace(), self.finish_recording()];
        // What became of the memory says more than what became of a file.
        let result = written.into_iter().fold(result, Result::and);
        (self.summary(), result)
    }

    /// What shows how far it is, for a display in another thread.
    pub fn progress(&self) -> Arc<Progress> {
        self.observer.progress()
    }

    fn serve(&mut self) -> Result<()> {
        // Not before: signals that come after a fork wake only a poll that begins after it.
        let readable = EpollFlags::EPOLLIN;
        if let Err(error) = watch(&self.poll, &self.signals, readable, Token::Signals as u64) {
            self.lose(error);
        }
        let mut ticked = Instant::now();
        let mut failed_rounds = 0;
        while !self.is_done() {
            match self.round() {
                Ok(()) => failed_rounds = 0,
                Err(error) => {
                    failed_rounds += 1;
                    // What fails on this host and can pass was dealt with: the source is gone, or all is over.
                    self.lose(error);
                    if failed_rounds > 1 {
                        self.tolerate_failures(failed_rounds)?;
                    }
                }
            }
            self.look_for_second_dump();
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.tick();
            }
            self.expect_restore();
        }
        self.wake_held_threads();
        self.losses.conclude()
    }

    fn is_done(&self) -> bool {
        let nothing_to_come = self.handover.is_over() && self.planner.is_complete();
        // An operator decides about held processes, as long as there are any.
        nothing_to_come && (self.handover.is_finished() || self.losses.is_source_lost())
    }

    /// One round: waits for something to happen, or does a step of background work.
    fn round(&mut self) -> Result<()> {
        self.huge_pages
            .hold(self.links.is_faulting(self.clock.now_us()));
        self.release_due();
        self.resume_due()?;
        self.retry_unreadable()?;
        let background = self.background_step()?;
        self.send_requests()?;
        if !background && !self.links.has_buffered() && !self.owes_hashes() {
            self.wait()?;
        }
        let mut events = [EpollEvent::empty(); 8];
        let count = match self.poll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(Error::wrap(Kind::Io, "cannot wait for events", errno)),
        };
        self.serve_faults()?;
        self.free_unneeded();
        for event in &events[..count] {
            match Token::from_data(event.data()) {
                Some(Token::Intake) => self.take_in()?,
                Some(Token::Signals) => self.handle_signals()?,
                Some(Token::Reconnected) => self.take_reconnected()?,
                // The faults were served above, the links are next.
                Some(Token::Faults | Token::StreamLink | Token::FaultLink) | None => {}
            }
        }
        self.pump_links()
    }

    /// What happens four times a second: progress, and looking for processes that ended.
    fn tick(&mut self) {
        self.observer
            .tick(&self.planner, self.links.bytes_received());
        self.look_for_ended();
        self.end_recording();
        if self.handover.is_finished() {
            self.close_unneeded();
            self.collapse_some();
        }
    }
}

fn new_poll() -> Result<Epoll> {
    Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
        .map_err(|errno| Error::wrap(Kind::Io, "cannot make an epoll descriptor", errno))
}

fn watch(poll: &Epoll, fd: &impl AsFd, flags: EpollFlags, data: u64) -> Result<()> {
    poll.add(fd, EpollEvent::new(flags, data))
        .map_err(|errno| Error::wrap(Kind::Io, "cannot wait for a descriptor", errno))
}

/// For a socket that the standby has a copy of: to close this process's does not take it out of the poll, which the
/// other end's hanging up would then end at once for ever.
fn unwatch(poll: &Epoll, fd: &impl AsFd) {
    let _ = poll.delete(fd);
}

/// Watches a descriptor that may be watched already.
fn rewatch(poll: &Epoll, fd: &BorrowedFd<'_>, flags: EpollFlags, data: u64) -> Result<()> {
    match watch(poll, fd, flags, data) {
        Err(_) => poll
            .modify(fd, &mut EpollEvent::new(flags, data))
            .map_err(|errno| Error::wrap(Kind::Io, "cannot wait for a descriptor", errno)),
        added => added,
    }
}
