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
//! One thread does all of it, in steps of at most 64 KiB while lone faults are about, and looks for
//! faults between any two steps: a fault then waits for one step at most (about 25 µs), which is less
//! than waking another thread costs (48-75 µs where measured). Nothing in the loop waits for a disk, a log or a terminal.
//!
//! Invariants: a page is filled where the planner says it is *now*, and the kernel's events of its
//! process are read before a refused fill is tried again; a link is reset unless everything has
//! come; this process does not end while a page that may still be read is neither filled nor
//! poisoned.

mod auto_dedup;
mod closing;
mod deferred;
mod fallback;
mod faults;
mod ferry;
mod given_up;
mod host_process;
mod idle;
mod install;
pub mod intake;
mod link;
mod links;
mod loss;
mod owner_processes;
mod poison;
pub(in crate::engine) mod postcopy_client;
mod prepared;
mod process;
mod reconnect;
mod report;
mod reserve;
mod second_dump;
mod signals;
mod source_dialer;
pub mod standby;
mod thread_ends;
mod unreadable;
mod waking;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::criu::header::Wire;
use crate::engine::io::transport::Peer;
use crate::engine::start_wait::StartWait;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Chain;
use crate::image::consume::refuse_consumed;
use crate::image::dir::ImageDir;
use crate::image::readahead::ReadAhead;
use crate::image::rewrite;
use crate::lazy::batched_wakeup::BatchedWakeup;
use crate::lazy::planner::{Planner, SpaceId};
use crate::lazy::window::RateLimit;
use crate::sys::process::page_size;
use crate::sys::uffd::{Room, Uffd, check_permitted};
use crate::tls::Tls;
use crate::units::Vaddr;
use auto_dedup::AutoDedup;
use deferred::{Complaints, Deferred};
use fallback::Fallback;
use given_up::GivenUp;
use host_process::HostProcess;
use install::READAHEAD_BYTES;
use intake::{Intake, IntakeEvent};
use links::Links;
use loss::Loss;
pub(super) use process::wire_of;
use report::Observer;
pub use report::{Progress, Summary};
use reserve::Reserve;
use second_dump::SecondDump;
use signals::Signals;
pub use signals::block as block_signals;
use standby::{Standby, StandbyMessage};
use unreadable::Unreadable;

/// Most descriptors looked at in one round.
const EVENTS_MAX: usize = 64;

/// How often the loop looks up when nothing happens: for ended processes, progress and waiting.
const TICK: Duration = Duration::from_millis(250);

/// How often a restore that does not come is mentioned.
const WAITING_LINE: Duration = Duration::from_secs(10);

/// What to do about processes whose pages are lost with the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnLoss {
    /// Reading a lost page raises SIGBUS.
    Poison,
    /// Readers wait until an operator decides.
    Hold,
    /// The processes are killed.
    Kill,
}

/// What a post-copy restore is to do.
#[derive(Clone, Debug)]
pub struct RestoreConfig {
    /// The image directory, with `pstree.img`, `mm-*.img` and `pagemap-*.img`.
    pub images_dir: PathBuf,
    /// Who has the pages that no local image has.
    pub source: Option<Peer>,
    /// What secures the connections to it.
    pub tls: Option<Tls>,
    /// The source is a page-server that forwards a lazy dump: it is spoken to over ferry.
    pub ferry: bool,
    /// The directory of an earlier round's images, whose pages need not travel over ferry: absolute, or
    /// relative to the image directory. `None` leaves it to that one's parent link.
    pub prev_images_dir: Option<PathBuf>,
    /// The source's header layout, if the images are not to tell.
    pub wire: Option<Wire>,
    /// Serve faults alone.
    pub on_demand: bool,
    /// The background's bytes a second at most.
    pub max_bandwidth: Option<u64>,
    /// What happens to the processes when the source is lost.
    pub on_loss: OnLoss,
    /// How long to try to reach a lost source again. `None` leaves it to what the source is: one
    /// that answers on several connections is tried for 30 s, CRIU's dump, which takes one connection in its life, is not.
    pub reconnect_timeout: Option<Duration>,
    /// How long what fails on this host (images that cannot be read, a full control group) is tried again before the pages
    /// concerned are given up.
    pub local_timeout: Duration,
    /// How long the restore may say nothing before it is finished, if there is a source: a dump's processes stand
    /// still meanwhile.
    pub restore_timeout: Option<Duration>,
    /// Where each fault is to be recorded.
    pub trace: Option<PathBuf>,
    /// How long to wait at the start for the images and the source.
    pub wait: Duration,
    /// What is installed everywhere leaves the local images.
    pub auto_dedup: bool,
}

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

/// A restored process, or a child that it forked since.
#[derive(Debug)]
struct Process {
    pid: u32,
    uffd: Uffd,
    chain: Option<Arc<Chain>>,
    /// Unknown where it is in another PID namespace, and of children that were forked since.
    host: Option<HostProcess>,
    /// How far the chain's files are read ahead.
    ahead: ReadAhead,
}

impl Process {
    fn new(pid: u32, uffd: Uffd, chain: Option<Arc<Chain>>) -> Process {
        let ahead = ReadAhead::new(READAHEAD_BYTES);
        Process {
            pid,
            uffd,
            chain,
            ahead,
            host: None,
        }
    }
}

/// A restore that is ready to begin: its socket listens, its images are there, its source answers.
pub struct Restore {
    config: RestoreConfig,
    images: ImageDir,
    /// Images of an earlier round, where they can be of use.
    earlier_images: Option<ImageDir>,
    intake: Intake,
    intake_done: bool,
    /// When the restore last said something.
    restore_heard: Instant,
    /// The restore said that every process runs.
    finished: bool,
    planner: Planner,
    processes: BTreeMap<SpaceId, Process>,
    /// Faults that could not be answered because an event was in the way.
    retries: VecDeque<(SpaceId, Vaddr)>,
    /// Sequences whose pages are there and that are woken later.
    batched_wakeup: BatchedWakeup,
    links: Links,
    limit: Option<RateLimit>,
    second_dump: SecondDump,
    loss: Option<Loss>,
    /// What cannot take pages now.
    deferred: Deferred,
    /// What local images cannot give now.
    unreadable: Unreadable,
    last_unreadable: Option<Error>,
    /// Asks the source for that.
    fallback: Option<Fallback>,
    given_up: GivenUp,
    reserve: Reserve,
    /// A signal has asked for the end: nothing is waited for any more.
    is_stopping: bool,
    complaints: Complaints,
    /// Which process was last looked at for its end.
    looked_at: SpaceId,
    /// The userfaultfds alone, to look for faults between two steps of other work.
    faults_poll: Epoll,
    poll: Epoll,
    signals: Signals,
    clock: Clock,
    observer: Observer,
    /// Who takes over if this process is killed.
    standby: Option<Standby>,
    /// Another process served before, so that more is there than is known.
    took_over: bool,
    /// For the messages of userfaultfds, where nobody stands by.
    room: Room,
    scratch: Vec<u8>,
    /// Takes out of the local images what nobody needs any more.
    auto_dedup: Option<AutoDedup>,
    /// Filled since faults were last looked for behind a fill, bytes.
    unlooked_bytes: u64,
    /// Answered by the source since more was last asked for behind an answer, bytes.
    unasked_bytes: u64,
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
    /// Waits for the images as long as `config` says, and checks them. What is left of the wait is for the
    /// source. [`block_signals`] must have been called.
    pub fn await_images(config: &RestoreConfig) -> Result<StartWait> {
        Intake::check_free(std::path::Path::new("."))?;
        let mut wait = StartWait::new(config.wait)?;
        wait.until(|| prepared::look_at_images(config))?;
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
        restore.intake = Intake::listen(std::path::Path::new("."))?;
        restore.links.connect(&restore.config, &mut wait)?;
        if restore.links.ours {
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
        // Whatever made the images: a restore must not take other pages for those of huge mappings.
        let finished = rewrite::finish(&images)?;
        if finished.filled_pages > 0 {
            tracing::info!(
                "{} pages that CRIU does not look for in parents are in {} now",
                finished.filled_pages,
                config.images_dir.display()
            );
        }
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
        let links = Links::new(&config, wire, page)?;
        let observer = Observer::new(config.trace.as_deref(), page)?;
        let new_poll = || {
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
                .map_err(|errno| Error::wrap(Kind::Io, "cannot make an epoll descriptor", errno))
        };
        let mut restore = Restore {
            limit: config.max_bandwidth.map(RateLimit::new),
            auto_dedup: config.auto_dedup.then(AutoDedup::default),
            second_dump: SecondDump::new(),
            planner: Planner::new(page),
            config,
            images,
            earlier_images,
            intake: Intake::ended(),
            intake_done: false,
            restore_heard: Instant::now(),
            finished: false,
            processes: BTreeMap::new(),
            retries: VecDeque::new(),
            batched_wakeup: BatchedWakeup::default(),
            links,
            loss: None,
            deferred: Deferred::default(),
            unreadable: Unreadable::default(),
            last_unreadable: None,
            fallback: None,
            given_up: GivenUp::default(),
            reserve: Reserve::new()?,
            is_stopping: false,
            complaints: Complaints::default(),
            looked_at: SpaceId(0),
            faults_poll: new_poll()?,
            poll: new_poll()?,
            signals: Signals::new()?,
            clock: Clock(Instant::now()),
            observer,
            scratch: Vec::new(),
            unlooked_bytes: 0,
            unasked_bytes: 0,
            standby,
            took_over: false,
            room: Room::zeroed(),
        };
        restore.watch_all()?;
        Ok(restore)
    }

    fn watch_all(&mut self) -> Result<()> {
        let readable = EpollFlags::EPOLLIN;
        watch(
            &self.poll,
            &self.faults_poll.0,
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

    fn watch_intake(&self) -> Result<()> {
        match self.intake.socket() {
            Some(socket) => watch(
                &self.poll,
                &socket,
                EpollFlags::EPOLLIN,
                Token::Intake as u64,
            ),
            None => Ok(()),
        }
    }

    /// Serves until every page of every process is installed or gone. Returns what was done; an
    /// error says which process lacks how many pages.
    pub fn run(mut self) -> (Summary, Result<()>) {
        let result = self.serve();
        self.end_auto_dedup(&result);
        let result = result.and_then(|()| self.close_links());
        let result = match self.observer.finish_trace() {
            Err(error) if result.is_ok() => Err(error),
            _ => result,
        };
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
        let mut mentioned = Instant::now();
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
                        self.bear_failures(failed_rounds)?;
                    }
                }
            }
            self.look_for_second_dump();
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.tick();
            }
            self.expect_restore();
            if self.intake.is_listening() && mentioned.elapsed() >= WAITING_LINE {
                mentioned = Instant::now();
                let path = std::path::absolute(self.intake.path()).unwrap_or_default();
                tracing::warn!(
                    "no restore has come yet: start criu restore --lazy-pages with the work directory (-W, else -D) that makes it connect to {}",
                    path.display()
                );
            }
        }
        self.wake_held_threads();
        let outcome = match self.loss.take() {
            None => Ok(()),
            Some(loss) => Err(loss.into_error()),
        };
        std::mem::take(&mut self.given_up).conclude(outcome)
    }

    /// Gives the source up if the restore that it waits for does not come, or not on.
    fn expect_restore(&mut self) {
        let Some(most) = self.config.restore_timeout else {
            return;
        };
        let waits = !self.intake_done && self.config.source.is_some();
        if !waits || self.restore_heard.elapsed() < most {
            return;
        }
        let what = match self.intake.is_listening() {
            true => "no restore has come",
            false => "the restore has said nothing",
        };
        let text = format!(
            "{what} for {} s (--restore-timeout): the source is told that nothing comes of it",
            most.as_secs()
        );
        self.intake = Intake::ended();
        self.lose(Error::new(Kind::PeerLost, text));
    }

    fn is_done(&self) -> bool {
        let nothing_to_come = self.intake_done && self.planner.is_complete();
        match &self.loss {
            None => nothing_to_come && self.finished,
            // An operator decides about held processes, as long as there are any.
            Some(_) => nothing_to_come,
        }
    }

    /// One round: waits for something to happen, or does a step of background work.
    fn round(&mut self) -> Result<()> {
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
        if self.finished {
            self.close_unneeded();
        }
    }

    /// Everything that the restore has said.
    fn take_in(&mut self) -> Result<()> {
        while let Some(word) = self.intake.next()? {
            self.restore_heard = Instant::now();
            // The socket to poll changes when the restore connects; a closed one leaves by itself.
            match word {
                IntakeEvent::Process(pid, uffd, host) => {
                    let started = host_process::started(host);
                    self.add_process(pid, uffd, host, started)?;
                }
                IntakeEvent::Zombie(pid) => {
                    tracing::info!("pid {pid} is a zombie: it has no memory");
                }
                IntakeEvent::Finished => {
                    self.finished = true;
                    self.note_finished();
                    self.observer.restored(self.clock.now_us());
                    tracing::info!(
                        "the restore is finished, {} pages are missing",
                        self.planner.missing_pages()
                    );
                    self.fetch_what_thread_ends_touch()?;
                }
                IntakeEvent::End => {
                    self.intake_done = true;
                    if !self.finished {
                        return Err(self.restore_failed());
                    }
                    return Ok(());
                }
            }
        }
        if let Some(socket) = self.intake.socket() {
            rewatch(
                &self.poll,
                &socket,
                EpollFlags::EPOLLIN,
                Token::Intake as u64,
            )?;
        }
        Ok(())
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

    /// `host` is the process's pid on this host, 0 if that is not known, and `started` its start, in clock ticks since
    /// that of the host.
    fn add_process(&mut self, pid: u32, uffd: Uffd, host: i32, started: u64) -> Result<SpaceId> {
        let opened = process::open(&self.images, pid, self.config.source.is_some())?;
        let space = match self.config.auto_dedup {
            true => opened.space.accounting(),
            false => opened.space,
        };
        tracing::info!(
            "pid {pid}: {} pages missing in {} runs, {} of them with the source",
            space.missing_bytes() >> self.images.page().shift(),
            space.runs(),
            space.remote_bytes() >> self.images.page().shift(),
        );
        self.build_on_earlier(pid, space.origins())?;
        let id = self.planner.add(space);
        let chain = opened.chain.map(Arc::new);
        if let (Some(auto_dedup), Some(chain)) = (&mut self.auto_dedup, &chain) {
            auto_dedup.add(pid, chain);
        }
        self.tell(
            StandbyMessage::Process {
                id,
                pid,
                host,
                started,
            },
            Some(uffd.as_fd()),
        );
        let process = Process {
            host: HostProcess::open(host, started),
            ..Process::new(pid, uffd, chain)
        };
        self.adopt(id, process)?;
        Ok(id)
    }

    fn adopt(&mut self, id: SpaceId, process: Process) -> Result<()> {
        watch(
            &self.faults_poll,
            &process.uffd,
            EpollFlags::EPOLLIN,
            u64::from(id.0),
        )?;
        self.processes.insert(id, process);
        Ok(())
    }
}

fn watch(poll: &Epoll, fd: &impl AsFd, flags: EpollFlags, data: u64) -> Result<()> {
    poll.add(fd, EpollEvent::new(flags, data))
        .map_err(|errno| Error::wrap(Kind::Io, "cannot wait for a descriptor", errno))
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
