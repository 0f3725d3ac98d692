//! Stands in for `criu page-server`: wiring and exit codes.

use std::env::args_os;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use pageferry::daemon::command_line::{self, Parsed};
use pageferry::daemon::sandbox::Needs;
use pageferry::daemon::{self, Daemon, Forked, fork_waiting};
use pageferry::engine::forward::SenderConfig;
use pageferry::engine::forward::destination::check_destination;
use pageferry::engine::forward::{ForwardContext, forward_client};
use pageferry::engine::forward_lazy::{DumpGuard, ForwardLazy, ForwardLazyConfig, GuardEnds, Left};
use pageferry::engine::io::Io;
use pageferry::engine::io::driver::Writes;
use pageferry::engine::io::transport::Peer;
use pageferry::engine::listening::listen::{Place, Source, is_passed_by_systemd};
use pageferry::engine::listening::sessions::{EndPolicy, Rules, run_sessions};
use pageferry::engine::listening::stop::{Stop, Watched, block_stop_signals};
use pageferry::engine::receive::ingest_modes::IngestOptions;
use pageferry::engine::receive::precopy_listener::{Handled, PrecopyListener};
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::engine::receive::{ReceiveContext, receive_client};
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::error::{Error, Kind, Result};
use pageferry::image::check::{check_parents_writable, check_served};
use pageferry::image::consume::refuse_consumed;
use pageferry::image::dir::ImageDir;
use pageferry::limits::{CLIENTS_MAX, START_WAIT_DEFAULT};
use pageferry::stream::Stream;
use pageferry::sys::process::page_size;
use pageferry::tls::Tls;
use pageferry::units::PageSize;

use crate::args::{ACTIONS, Args};
use crate::confinement::{self, read_proc};
use crate::entry::{Entry, PeerKind};
use crate::hashes;
use crate::report::Report;
use crate::rpc::Rpc;

/// Runs with the arguments of this process, to its end.
pub fn run_program() -> ExitCode {
    let argv: Vec<OsString> = args_os().collect();
    let mut parsed: Parsed<Args> = match command_line::parse(ACTIONS, argv.clone()) {
        Ok(parsed) => parsed,
        Err(error) => return ExitCode::from(error.report()),
    };
    let asked = parsed
        .args
        .swrk
        .map(|number| Rpc::accept(number, &argv, &parsed.args));
    let mut rpc = match asked.transpose() {
        Ok(None) => None,
        Ok(Some((rpc, asked))) => {
            parsed = asked;
            Some(rpc)
        }
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Parsed {
        mut args,
        diagnostics,
    } = parsed;
    args.stay_where_typed();
    let code = daemon::run(&args.common, &diagnostics, |daemon| {
        // Before any thread is started, so that none is ended by a signal.
        block_stop_signals()?;
        let mut start = Start {
            args: &args,
            daemon,
            rpc: rpc.as_mut(),
        };
        let ended = if args.lazy_pages {
            serve(&mut start)
        } else if let Some(far_end) = &args.ferry.forward {
            forward(&mut start, far_end)
        } else if let Some(dump) = &args.ferry.forward_lazy {
            forward_lazy(&mut start, dump)
        } else {
            receive(&mut start)
        };
        ended.inspect_err(|error| start.refuse(&error.to_string()))
    });
    if let Some(rpc) = &mut rpc {
        rpc.refuse("the page server did not start: its standard error says why");
    }
    code
}

/// What a server starts with.
struct Start<'a> {
    args: &'a Args,
    daemon: &'a mut Daemon,
    /// Who asked for it, if not the command line alone.
    rpc: Option<&'a mut Rpc>,
}

fn receive(start: &mut Start<'_>) -> Result<()> {
    let args = start.args;
    args.check_split()?;
    args.check_tree()?;
    // Before any thread is started.
    let _reader = read_proc(start.daemon)?;
    let mut report = Report::open(args)?;
    let page = pages_of_system()?;
    let context = receive_context(start, page, &report)?;
    let tls = Tls::load(&args.tls)?;
    let needs = confinement::receiving(args, start.daemon.images_dir(), &context.stores);
    start.daemon.confine(needs);
    let source = start.listen()?;
    let stop = Stop::on_signals()?;
    let timeout = Duration::from_secs(args.ferry.reconnect_timeout);
    let listener = PrecopyListener::new(&context, &stop, timeout, !args.keep)?;
    let entry = Entry::new(&source, args.keep)?;
    // A ferry session has several connections, one after another and at a time.
    let rules = rules(args, EndPolicy::UntilShutDown, args.max_sessions);
    let _display = report.show()?;
    run(source, &rules, &stop, |stream, watched| {
        let peer = stream.peer().to_owned();
        let mut stream = match stream.secure(tls.as_ref()) {
            Ok(stream) => stream,
            Err(error) => {
                report.rejected(&peer, page, &error);
                return entry.reject(error, &listener);
            }
        };
        let kind = entry
            .admit(&mut stream, &context, &listener)
            .inspect_err(|error| report.rejected(&peer, page, error))?;
        let (received, result) = match kind {
            None => {
                stream.reset();
                return Ok(());
            }
            Some(PeerKind::Dump) => receive_client(stream, &context),
            Some(PeerKind::Ferry) => match listener.handle(stream, watched, entry.is_open()) {
                Ok(Handled::Joined) => return Ok(()),
                Ok(Handled::Session(received, result)) => {
                    entry.shut();
                    (*received, result)
                }
                Err(error) => {
                    entry.shut();
                    return Err(error);
                }
            },
        };
        report.received(&received, result.as_ref().err());
        result
    })
}

/// What a server that receives dumps has at hand for each of them.
fn receive_context(start: &Start<'_>, page: PageSize, report: &Report) -> Result<ReceiveContext> {
    let args = start.args;
    let options = StoreOptions {
        dir: start.daemon.images_dir().to_owned(),
        page,
        previous: args.prev_images_dir.clone(),
        sync: args.sync.into(),
        split_lazy: args.split_lazy.clone(),
        dedup_tree: args.dedup_tree,
    };
    let stores = Stores::open(options, args.images_dir_template.clone())?;
    if let Stores::Shared(store) = &stores
        && args.auto_dedup
    {
        check_parents_writable(store.dir())?;
    }
    Ok(ReceiveContext {
        stores,
        wire: args.wire.forced(),
        io: Io::choose(args.io.map(Into::into))?,
        writes: Writes::of_machine(),
        ingest: IngestOptions {
            dedup_content: args.dedup_content,
            dedup_tree: args.dedup_tree,
            compress: args.compress,
        },
        auto_dedup: args.auto_dedup,
        idle_timeout: args.idle_timeout(),
        traffic: report.traffic(),
    })
}

fn forward(start: &mut Start<'_>, far_end: &Peer) -> Result<()> {
    let args = start.args;
    // Before any thread is started.
    let _reader = read_proc(start.daemon)?;
    let mut report = Report::open(args)?;
    let tls = Tls::load(&args.tls)?;
    let page = pages_of_system()?;
    let hashes = args.ferry.save_hashes.as_deref().map(hashes::to_be_saved);
    let hashes = hashes.transpose()?;
    start.daemon.confine(confinement::forwarding(args, far_end));
    let source = start.bind()?;
    check_far_end(&source, far_end, tls.as_ref(), page)?;
    start.announce(&source)?;
    let stop = Stop::on_signals()?;
    let entry = Entry::new(&source, args.keep)?;
    let sender = SenderConfig {
        peer: far_end.clone(),
        streams: args.ferry.streams,
        reconnect_timeout: Duration::from_secs(args.ferry.reconnect_timeout),
        delta_cache_bytes: args.ferry.delta_cache,
        tls,
        stop: stop.clone(),
        traffic: report.traffic(),
    };
    let wire = args.wire.forced();
    let remembers = args.keep || hashes.is_some();
    let context =
        ForwardContext::new(sender, wire, page, remembers).ending_idle(args.idle_timeout());
    let context = context.saving_hashes(hashes);
    let rules = rules(args, EndPolicy::UntilShutDown, args.max_sessions);
    let _display = report.show()?;
    run(source, &rules, &stop, |mut stream, _watched| {
        if !entry.admit_dump(&mut stream, args.idle_timeout())? {
            stream.reset();
            return Ok(());
        }
        let (forwarded, result) = forward_client(stream, &context);
        report.forwarded(&forwarded, result.as_ref().err());
        result
    })
}

/// Finds out before a dump comes whether it can be forwarded.
fn check_far_end(source: &Source, far_end: &Peer, tls: Option<&Tls>, page: PageSize) -> Result<()> {
    if source.is_at(far_end) {
        let text = format!("--forward {far_end} is where this page-server listens itself");
        return Err(Error::new(Kind::Usage, text));
    }
    if let Some(error) = check_destination(far_end, tls, page)? {
        tracing::warn!("{error}: it must be there when a dump comes");
    }
    Ok(())
}

fn forward_lazy(start: &mut Start<'_>, dump: &Peer) -> Result<()> {
    let args = start.args;
    // Before any thread is started.
    let guard = match split() {
        Ok(Side::Forwards(guard)) => Some(guard),
        Ok(Side::Guards(ends)) => {
            start.daemon.stand_by(c"dump-guard", &Needs::guarding())?;
            return ends.guard();
        }
        Err(error) => {
            tracing::warn!(
                "{error}: behind a relay the dump does not notice if this process is killed"
            );
            None
        }
    };
    let mut report = Report::open(args)?;
    let tls = Tls::load(&args.tls)?;
    let page = pages_of_system()?;
    let images = ImageDir::open_any(start.daemon.images_dir(), page)?;
    let known_hashes = args.ferry.known_hashes.as_deref();
    let known_hashes = known_hashes.and_then(|path| hashes::known(path, page));
    let config = ForwardLazyConfig {
        dump: dump.clone(),
        spill: args.ferry.spill.clone(),
        wire: args.wire.forced(),
        keep: args.keep,
        reconnect_timeout: Duration::from_secs(args.ferry.reconnect_timeout),
        idle_timeout: args.idle_timeout(),
        traffic: report.traffic(),
        wait: args
            .ferry
            .wait
            .map_or(START_WAIT_DEFAULT, Duration::from_secs),
        known_hashes,
    };
    let forward = ForwardLazy::connect(config, &images, guard)?;
    start.daemon.confine(confinement::serving(args, &images));
    let source = start.listen()?;
    let rules = rules(args, EndPolicy::UntilShutDown, CLIENTS_MAX);
    let stop = Stop::on_signals()?;
    let _display = report.show()?;
    forward.run(
        &source,
        &rules,
        &stop,
        |stream| stream.secure(tls.as_ref()),
        |left| match left {
            Left::Asked(peer, served) => {
                report.served(peer, served.as_ref().ok(), served.as_ref().err());
            }
            Left::Pushed(forwarded, ended) => report.forwarded(forwarded, ended.as_ref().err()),
        },
    )
}

/// Which of two processes this is.
enum Side {
    Forwards(DumpGuard),
    Guards(GuardEnds),
}

/// Makes two processes of this one.
fn split() -> Result<Side> {
    let ends = GuardEnds::new()?;
    Ok(match fork_waiting(Forked::Background)? {
        Some(child) => {
            child.release()?;
            Side::Forwards(ends.forward())
        }
        None => Side::Guards(ends),
    })
}

/// At most `most` sessions at a time. Without `--keep` the server ends as `ends` says.
fn rules(args: &Args, ends: EndPolicy, most: usize) -> Rules {
    Rules {
        ends: if args.keep { EndPolicy::Keep } else { ends },
        most,
        allowed: args.allow.clone(),
    }
}

fn serve(start: &mut Start<'_>) -> Result<()> {
    let args = start.args;
    let mut report = Report::open(args)?;
    let dir = ImageDir::open(start.daemon.images_dir(), pages_of_system()?)?;
    refuse_consumed(&dir)?;
    check_served(&dir)?;
    start.daemon.confine(confinement::serving(args, &dir));
    let context = ServeContext::new(dir, args.wire.forced())
        .counting_in(report.traffic())
        .ending_idle(args.idle_timeout())
        .reading_again(Duration::from_secs(args.local_timeout));
    let tls = Tls::load(&args.tls)?;
    let source = start.listen()?;
    let rules = rules(args, EndPolicy::Together, CLIENTS_MAX);
    let stop = Stop::on_signals()?;
    let _display = report.show()?;
    let traffic = report.traffic();
    run(source, &rules, &stop, |stream, _watched| {
        let peer = stream.peer().to_owned();
        let running = traffic.begin_session();
        let served = stream
            .secure(tls.as_ref())
            .and_then(|stream| serve_client(stream, &context));
        report.served(&peer, served.as_ref().ok(), served.as_ref().err());
        served.map(|_| running.succeed())
    })
}

/// Runs the sessions that come from `source`.
fn run(
    source: Source,
    rules: &Rules,
    stop: &Stop,
    session: impl Fn(Stream, Watched) -> Result<()> + Sync,
) -> Result<()> {
    if source.connected {
        let stream = Stream::plain(source.socket);
        let watched = stop.watch(&stream.socket())?;
        return session(stream, watched);
    }
    run_sessions(&source.socket, rules, stop, session)
}

fn pages_of_system() -> Result<PageSize> {
    page_size()
        .map_err(|error| Error::wrap(Kind::Unsupported, "cannot determine the page size", error))
}

impl Start<'_> {
    /// Listens, says where, and goes to the background if that is asked for.
    fn listen(&mut self) -> Result<Source> {
        let source = self.bind()?;
        self.announce(&source)?;
        Ok(source)
    }

    /// Listens, and tells nobody.
    fn bind(&self) -> Result<Source> {
        Source::open(&place(self.args))
    }

    /// Says where it listens, and goes to the background if that is asked for.
    fn announce(&mut self, source: &Source) -> Result<()> {
        let is_chosen = source.is_chosen && self.args.port_file.is_none() && self.rpc.is_none();
        match is_chosen {
            // Nobody can connect who does not know the port: it is told at every verbosity but 0 and 1.
            true => tracing::warn!(
                "listening on {source}, a free port: give --port to choose one, --port-file to have it written"
            ),
            false => tracing::info!("listening on {source}"),
        }
        if let (Some(path), Some(port)) = (&self.args.port_file, source.port()) {
            write_port(path, port)?;
        }
        match &mut self.rpc {
            Some(rpc) => rpc.listening(self.daemon, source.port().unwrap_or(0))?,
            None => self.daemon.listening()?,
        }
        Ok(())
    }

    fn refuse(&mut self, why: &str) {
        if let Some(rpc) = &mut self.rpc {
            rpc.refuse(why);
        }
    }
}

fn place(args: &Args) -> Place {
    if let Some(number) = args.ps_socket {
        Place::Connected(number)
    } else if let Some(path) = &args.unix {
        if args.common.port.is_some() || args.common.address.is_some() {
            tracing::warn!(
                "--unix is where this server listens: --address and --port are not used"
            );
        }
        Place::Unix(path.clone())
    } else if is_passed_by_systemd() {
        Place::Passed
    } else {
        Place::Tcp {
            address: args.common.address.clone(),
            port: args.common.port.unwrap_or(0),
        }
    }
}

/// Writes the port so that whoever waits for the file finds it whole.
fn write_port(path: &Path, port: u16) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let written = std::fs::write(&part, format!("{port}\n"));
    written
        .and_then(|()| std::fs::rename(&part, path))
        .map_err(|error| Error::file("write the port to", path, error))
}
