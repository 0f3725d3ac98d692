//! Stands between `criu dump --lazy-pages` and those who restore from it.
//!
//! ```text
//! criu dump ── drain, all of it at once ──> held (memfd or spill file) ──> lazy clients, as they ask
//!     ^                                                                       │
//!     └────────── CLOSE, when the first of them has everything <──────────────┘
//! ```
//!
//! The dump takes one connection in its life, and loses its processes' memory with it. From here many
//! clients are served, at a time or one after another, over connections that may break: pages that
//! have come from what is held, others by asking the dump for them first.
//!
//! Invariants: the dump is sent CLOSE only when a client has said that it has everything, and is reset
//! otherwise, whatever happens here, so that its processes go on; a page is never made up.

mod client_table;
mod drain;
mod dump_memory;
mod fault_responder;
mod frozen_tree;
mod guard;
mod memory_file;
mod postcopy_listener;

use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::criu::header::Wire;
use crate::engine::forward_lazy::postcopy_listener::{PostcopyListener, PushAccepted};
use crate::engine::io::transport::Peer;
use crate::engine::listening::listen::Source;
use crate::engine::listening::sessions::{Rules, run_sessions};
use crate::engine::listening::stop::{Stop, Watched};
use crate::engine::restore::wire_of;
use crate::engine::serve::memory::Memory;
use crate::engine::serve::{Memories, ServeContext, Summary, serve_until_closed};
use crate::engine::start_wait::{Attempt, StartWait, not_yet};
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::known_hashes::KnownHashes;
use crate::image::check::check_lazy;
use crate::image::dir::ImageDir;
use crate::observe::ferried::Forwarded;
use crate::observe::traffic::{Traffic, cpu_time};
use crate::stream::Stream;
use client_table::{ClientEntry, ClientTable, ClientTimeouts, DumpOutcome};
use drain::Drain;
use dump_memory::{DumpMemory, ProcessMemory};
pub use guard::{DumpGuard, GuardEnds};

/// What CRIU writes once a dump has ended well, after a lazy one has given all pages away.
const STATS_OF_DUMP: &str = "stats-dump";

/// A dump listens as soon as it has written its images: one that does not by then has ended. CRIU 4.2.1 takes some ms.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);

/// What is wrong when the dump cannot be told of the end.
const BOTH_MAY_RUN: &str = "a client has everything, but the dump's processes may run on as well";

/// What is to be forwarded, and how.
#[derive(Debug)]
pub struct ForwardLazyConfig {
    /// Where the dump listens.
    pub dump: Peer,
    /// The directory in which memory is kept, if not in a memfd.
    pub spill: Option<PathBuf>,
    /// The header layout of the dump and the clients, if it is not to be found out.
    pub wire: Option<Wire>,
    /// Whether it stays for further clients when one has everything.
    pub keep: bool,
    /// After so long without a client that was there before the dump is given up; if it is to stay,
    /// after the idle timeout.
    pub reconnect_timeout: Duration,
    /// Ends the sessions of clients that are silent for so long where they may not be, as those of a
    /// page server, and gives the dump up if no client comes for so long.
    pub idle_timeout: Option<Duration>,
    /// Counts what is served.
    pub traffic: Arc<Traffic>,
    /// How long to wait at the start for the dump to listen.
    pub wait: Duration,
    /// Hashes of what earlier rounds have left at the clients' side.
    pub known_hashes: Option<KnownHashes>,
}

/// A dump that is being forwarded. See the module's text.
#[derive(Debug)]
pub struct ForwardLazy {
    config: ForwardLazyConfig,
    drain: Drain,
    clients: Clients,
}

/// What the clients share.
#[derive(Debug)]
struct Clients {
    dump_memory: Arc<DumpMemory>,
    context: ServeContext,
    listener: PostcopyListener,
    dump: String,
    wire: Wire,
    table: ClientTable,
}

/// What became of a client.
#[derive(Debug)]
pub enum Left<'a> {
    /// It asked in CRIU's protocol.
    Asked(&'a str, &'a Result<Summary>),
    /// Everything was pushed to it over ferry.
    Pushed(&'a Forwarded, &'a Result<()>),
}

impl Memories for Arc<DumpMemory> {
    fn memory(&self, pid: u32) -> Result<Arc<dyn Memory>> {
        let dump_memory = Arc::clone(self);
        Ok(Arc::new(ProcessMemory { dump_memory, pid }))
    }
}

impl Clients {
    /// None has come yet. `wire` is the layout of the dump.
    fn new(config: &mut ForwardLazyConfig, dump_memory: Arc<DumpMemory>, wire: Wire) -> Clients {
        let context = ServeContext::of(
            Box::new(Arc::clone(&dump_memory)),
            dump_memory.page(),
            config.wire,
        );
        let context = context
            .counting_in(Arc::clone(&config.traffic))
            .ending_idle(config.idle_timeout);
        let timeouts = ClientTimeouts {
            first: config.idle_timeout,
            next: match config.keep {
                true => config.idle_timeout,
                false => Some(config.reconnect_timeout),
            },
            only_one: !config.keep,
        };
        let listener = PostcopyListener::new(
            Arc::clone(&dump_memory),
            wire,
            config.reconnect_timeout,
            Arc::clone(&config.traffic),
            config.known_hashes.take(),
        );
        Clients {
            dump_memory,
            context,
            listener,
            dump: config.dump.to_string(),
            wire,
            table: ClientTable::new(timeouts),
        }
    }
}

impl ForwardLazy {
    /// Connects to the dump that writes `images`, once it has and listens, and makes room for its memory. `guard` gives
    /// the dump up if this process is killed.
    ///
    /// # Errors
    ///
    /// Nobody listens before the wait is over, or no page has stayed with the dump.
    pub fn connect(
        mut config: ForwardLazyConfig,
        images: &ImageDir,
        guard: Option<DumpGuard>,
    ) -> Result<ForwardLazy> {
        config.dump.resolve()?;
        let mut wait = StartWait::new(config.wait)?;
        let kept = wait.until(|| look_at_images(images))?;
        let wire = match config.wire {
            Some(wire) => wire,
            None => wire_of(images)?,
        };
        let mut dump_memory = DumpMemory::new(images, config.spill.as_deref())?;
        // The last step that may fail: from here on the dump is told when it is given up.
        if !kept {
            wait.shorten(LISTENS_WITHIN);
        }
        let stream = wait.until(|| not_yet(Drain::connect(&config.dump)));
        let stream = match kept {
            true => stream?,
            false => stream.map_err(|refused| nothing_stayed(images, Some(refused)))?,
        };
        // Others may come when the dump has ended: it is drained for them, and where it is to be kept on a disk.
        if !config.keep && config.spill.is_none() {
            dump_memory.read_processes_of(&stream);
        }
        let dump_memory = Arc::new(dump_memory);
        let (_, pages) = dump_memory.progress();
        tracing::info!(
            "{pages} pages stayed with the dump at {} (wire layout {})",
            config.dump,
            wire.name()
        );
        let mut drain = Drain::new(&config.dump, stream, wire, &dump_memory);
        drain.guard_with(guard);
        drain.refuse_pending(images)?;
        Ok(ForwardLazy {
            clients: Clients::new(&mut config, dump_memory, wire),
            drain,
            config,
        })
    }

    /// Drains the dump, and serves the clients that come to `source`, each after `secure`. Every client
    /// that leaves is told to `report`. Fails if the dump was not closed in the end: its processes go
    /// on then.
    pub fn run(
        self,
        source: &Source,
        rules: &Rules,
        stop: &Stop,
        secure: impl Fn(Stream) -> Result<Stream> + Sync,
        report: impl Fn(&Left<'_>) + Sync,
    ) -> Result<()> {
        let ForwardLazy {
            config,
            drain,
            clients,
        } = self;
        let (clients, config) = (&clients, &config);
        let (dumped, served) = std::thread::scope(|scope| {
            let keeper = scope.spawn(move || {
                let ended = clients.keep_dump(drain, config, stop);
                clients.table.dump_ended(ended.is_ok());
                if ended.is_err() {
                    // Nobody can be served any more.
                    stop.request();
                }
                shut(&source.socket);
                ended
            });
            let served = run_sessions(&source.socket, rules, stop, |stream, watched| {
                clients.serve((stream, watched), stop, &secure, &report);
                Ok(())
            });
            let ended = keeper.join();
            let ended = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (ended, served)
        });
        // What became of the dump says more than that sessions were ended because of it.
        dumped.and(served)
    }
}

impl Clients {
    /// Serves one client. That it fails is no failure here: it may come again.
    fn serve(
        &self,
        (stream, watched): (Stream, Watched),
        stop: &Stop,
        secure: impl Fn(Stream) -> Result<Stream>,
        report: impl Fn(&Left<'_>),
    ) {
        let peer = stream.peer().to_owned();
        let mut entry = self.table.enter();
        let ferry = secure(stream).and_then(|mut stream| {
            match self.context.begins_with(&mut stream, frame::MAGIC) {
                Ok(ferry) => {
                    entry.may_return();
                    Ok((stream, ferry))
                }
                Err(error) if error.kind() == Kind::NothingCame => Err(error),
                Err(error) => {
                    entry.may_return();
                    stream.reset();
                    Err(error.within(format!("client {peer}")))
                }
            }
        });
        let served = match ferry {
            Err(error) => Err(error),
            Ok((stream, true)) => self.push((stream, watched), stop, report, &mut entry),
            Ok((stream, false)) => {
                let served = serve_until_closed(stream, &self.context, &|| end_dump(&entry));
                report(&Left::Asked(&peer, &served));
                served.map(drop)
            }
        };
        match served {
            Err(error) if error.kind() == Kind::NothingCame => tracing::info!("{error}"),
            Err(error) => tracing::warn!("{error}"),
            Ok(()) => {}
        }
    }

    /// Pushes everything to the client, or lends its session one more connection.
    fn push(
        &self,
        (stream, watched): (Stream, Watched),
        stop: &Stop,
        report: impl Fn(&Left<'_>),
        entry: &mut ClientEntry<'_>,
    ) -> Result<()> {
        let (start, cpu_before) = (Instant::now(), cpu_time());
        let peer = stream.peer().to_owned();
        // The session knows who may come back to it.
        entry.is_one_of_many();
        match self
            .listener
            .handle(stream, watched, stop, &|| end_dump(entry))?
        {
            PushAccepted::Joined => Ok(()),
            PushAccepted::Session(sent, ended) => {
                let forwarded = Forwarded {
                    peer: self.dump.clone(),
                    far_end: peer,
                    wire: Some(self.wire),
                    sent: *sent,
                    page: self.dump_memory.page(),
                    elapsed: start.elapsed(),
                    cpu: cpu_time().saturating_sub(cpu_before),
                };
                report(&Left::Pushed(&forwarded, &ended));
                if ended.is_err() {
                    // It has said so, or was waited for long enough.
                    entry.leave_for_good();
                }
                ended
            }
        }
    }

    /// Takes the dump's memory over, or as much of it as is needed until a client has everything if the dump does not stay.
    fn drain(&self, drain: &mut Drain, stays: bool, stop: &Stop) -> Result<()> {
        let start = Instant::now();
        let _watched = drain.watch(stop)?;
        let drained = drain.run(&self.dump_memory, || self.table.confirmed() && !stays, stop);
        let drained = drained.and_then(|()| match self.dump_memory.progress() {
            (present, pages) if present == pages => {
                let seconds = start.elapsed().as_secs_f64();
                tracing::info!("took over the dump's {pages} pages in {seconds:.3} s");
                self.dump_memory.complete()
            }
            (present, pages) => {
                tracing::info!("{present} of the dump's {pages} pages were needed");
                Ok(())
            }
        });
        drained.map_err(|error| {
            self.dump_memory.fail(&error.to_string());
            match self.table.give_up() {
                true => error.within(BOTH_MAY_RUN),
                false => error,
            }
        })
    }

    /// The dump's life from here on: drained if need be, and closed when a client has everything.
    fn keep_dump(&self, mut drain: Drain, config: &ForwardLazyConfig, stop: &Stop) -> Result<()> {
        let stays = config.keep;
        match self.dump_memory.reads_processes() {
            true => tracing::info!("the pages are read in the dump's processes"),
            false => self.drain(&mut drain, stays, stop)?,
        }
        let stopped = || stop.is_requested();
        match self.table.wait_for_outcome(stopped) {
            DumpOutcome::Confirmed => {}
            DumpOutcome::Stopped => {
                return Err(Error::new(Kind::Interrupted, drain::STOPPED));
            }
            DumpOutcome::Failed => {
                let text = "the lazy client has failed: the dump fails, its processes continue";
                return Err(Error::new(Kind::PeerLost, text));
            }
            outcome @ (DumpOutcome::NobodyCame | DumpOutcome::GivenUp) => {
                let seconds = |timeout: Option<Duration>| timeout.unwrap_or_default().as_secs();
                let idle = seconds(config.idle_timeout);
                let what = match (outcome, config.keep) {
                    (DumpOutcome::NobodyCame, _) => {
                        format!("connected within {idle} s (--idle-timeout)")
                    }
                    (_, true) => format!("reconnected within {idle} s (--idle-timeout)"),
                    (_, false) => {
                        let reconnect = config.reconnect_timeout.as_secs();
                        format!("reconnected within {reconnect} s (--reconnect-timeout)")
                    }
                };
                let text = format!("no client {what}: the dump fails, its processes continue");
                return Err(Error::new(Kind::PeerLost, text));
            }
        }
        let closed = drain.close();
        closed.map_err(|error| error.within(BOTH_MAY_RUN))?;
        tracing::info!("a client has all memory: closing the dump");
        self.table.dump_ended(true);
        self.table.wait_until_gone(stopped, stays);
        Ok(())
    }
}

/// A client has everything: notes it, unless the dump has been given up by now, and waits until the dump
/// has been told and has ended its processes. A client that was told of the end before could outlive this
/// process while the dump, left alone, lets its processes go on.
fn end_dump(entry: &ClientEntry<'_>) -> Result<()> {
    if !entry.confirm() {
        let text = "the lazy client has everything, but the dump has been given up before: its processes go on \
                    at the source, so those that were restored must end";
        return Err(Error::new(Kind::PeerLost, text));
    }
    if entry.wait_for_dump() {
        return Ok(());
    }
    Err(Error::new(Kind::PeerLost, BOTH_MAY_RUN))
}

/// Waits for the images of all processes, and tells whether a page stayed with the dump. None need: the memory of a
/// process may be locked as a whole, and the dump listens all the same.
///
/// # Errors
///
/// No page did, and the dump has written its statistics, which is the last that it does: nobody will ever listen.
fn look_at_images(images: &ImageDir) -> Result<Attempt<bool>> {
    match check_lazy(images) {
        Ok(false) if images.path().join(STATS_OF_DUMP).exists() => {
            Err(nothing_stayed(images, None))
        }
        Ok(kept) => Ok(Attempt::Done(kept)),
        Err(incomplete) => Ok(Attempt::NotYet(incomplete)),
    }
}

fn nothing_stayed(images: &ImageDir, refused: Option<Error>) -> Error {
    let text = format!(
        "no page stayed with the dump in {}: it was made without --lazy-pages, and has ended (page-server \
         --lazy-pages serves such images; those of an earlier dump must go before a new one writes there)",
        images.path().display()
    );
    match refused {
        Some(refused) => refused.within(text),
        None => Error::new(Kind::Usage, text),
    }
}

/// Ends the wait for further clients.
fn shut(listener: &Socket) {
    // It may have been shut before.
    let _ = listener.shutdown(Shutdown::Both);
}
