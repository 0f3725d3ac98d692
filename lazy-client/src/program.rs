//! `lazy-client`, in place of `criu lazy-pages`: wiring and exit codes.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use pageferry::daemon::command_line::{Action, parse};
use pageferry::daemon::sandbox::Needs;
use pageferry::daemon::{self, Daemon, Forked, fork_waiting};
use pageferry::engine::restore::standby::{Ends, Received, Standby, StoredRestore, Watch};
use pageferry::engine::restore::{Progress, Restore, RestoreConfig, Summary, block_signals};
use pageferry::engine::service_manager::ServiceManager;
use pageferry::error::{Error, Result};
use pageferry::lazy::policy::{ADAPTIVE, Policy};
use pageferry::observe::progress::{Display, Snapshot};
use pageferry::observe::trace::{CSV_HEAD, TraceReader};

use crate::args::Args;

const ACTIONS: &[Action] = &[Action {
    word: "lazy-pages",
    operand_option: None,
}];

/// Runs with the arguments of this process, to its end.
pub fn run_program() -> ExitCode {
    run_program_with(&ADAPTIVE)
}

/// The same with another policy: what faults bring, and in what order the rest comes.
pub fn run_program_with(policy: &'static dyn Policy) -> ExitCode {
    let parsed = match parse::<Args>(ACTIONS, std::env::args_os()) {
        Ok(parsed) => parsed,
        Err(error) => return ExitCode::from(error.report()),
    };
    if let Some(trace) = &parsed.args.read_trace {
        // Where --trace writes it: in the work directory.
        return match print_trace(&parsed.args.common.work_dir().join(trace)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        };
    }
    daemon::run(&parsed.args.common, &parsed.diagnostics, |daemon| {
        restore(&parsed.args, policy, daemon)
    })
}

fn restore(args: &Args, policy: &'static dyn Policy, daemon: &mut Daemon) -> Result<()> {
    // Before any thread is started, so that no other thread is ever interrupted.
    block_signals()?;
    let config = RestoreConfig {
        policy,
        ..args.config(daemon.images_dir().to_owned())?
    };
    let writes_later = config.auto_dedup || config.record_working_set.is_some();
    daemon.confine(Needs::filling(writes_later));
    let manager = match manager_of(args).map(StoredRestore::receive).transpose()? {
        Some(Received::StoredRestore(kept)) => return take_up(args, config, *kept, daemon),
        Some(Received::Nothing(manager)) => Some(manager),
        None => None,
    };
    // Before there are two processes, both of which need them.
    let wait = Restore::await_images(&config)?;
    let standby = match manager.and_then(|manager| kept_by(manager, &config)) {
        // It ends a process that stands by together with this one.
        Some(standby) => Some(standby),
        None if args.no_standby => None,
        None => match split() {
            Ok(Side::Serves(standby)) => Some(standby),
            Ok(Side::StandsBy(watch)) => return stand_by(args, config, &watch, daemon),
            Err(error) => {
                tracing::warn!("{error}: no standby takes over if this process is killed");
                None
            }
        },
    };
    let restore = Restore::prepare(config, standby, wait)?;
    let report = Report::create_if_wanted(args)?;
    daemon.listening()?;
    finish(restore, report)
}

/// The service manager that may keep what this process needs. It does so for the process that it knows, which is not the
/// one that goes on in the background.
fn manager_of(args: &Args) -> Option<ServiceManager> {
    let manager = ServiceManager::of_environment()?;
    if args.common.daemon {
        tracing::warn!(
            "with --daemon the service manager keeps no userfaultfds: if all processes of the service are killed, the \
             restored ones read zeros (start it with Type=notify and without --daemon)"
        );
        return None;
    }
    Some(manager)
}

/// The manager, if it stands by for this restore.
fn kept_by(manager: ServiceManager, config: &RestoreConfig) -> Option<Standby> {
    if !manager.keeps_descriptors() {
        tracing::warn!(
            "the service manager keeps no descriptors for this service (FileDescriptorStoreMax=, NotifyAccess=): if all \
             its processes are killed, the restored ones read zeros"
        );
        return None;
    }
    let standby = Restore::kept_by(manager, config);
    if let Err(error) = &standby {
        tracing::warn!("{error}");
    }
    standby.ok()
}

/// Goes on with what this service had under way when it was killed.
fn take_up(
    args: &Args,
    config: RestoreConfig,
    kept: StoredRestore,
    daemon: &mut Daemon,
) -> Result<()> {
    let restore = Restore::take_up(config, kept)?;
    let report = Report::create_if_wanted(args).unwrap_or_else(|error| {
        tracing::error!("{error}");
        None
    });
    daemon.listening()?;
    finish(restore, report)
}

/// Which of two processes this is.
enum Side {
    Serves(Standby),
    StandsBy(Watch),
}

/// Makes two processes of this one.
fn split() -> Result<Side> {
    let ends = Ends::new()?;
    match fork_waiting(Forked::Background)? {
        Some(child) => {
            child.release()?;
            Ok(Side::Serves(ends.serve()))
        }
        None => Ok(Side::StandsBy(ends.stand_by())),
    }
}

/// The second process: nothing to do, unless the first is killed.
fn stand_by(args: &Args, config: RestoreConfig, watch: &Watch, daemon: &mut Daemon) -> Result<()> {
    // If it takes over it writes the pidfile, the summary and the trace.
    daemon.stand_by(c"lazy-standby", &Needs::filling(true))?;
    match Restore::stand_by(config, watch)? {
        None => Ok(()),
        Some(restore) => {
            // Whatever is missing, the memory comes first.
            let ready = daemon
                .take_over()
                .and_then(|()| Report::create_if_wanted(args));
            let report = ready.unwrap_or_else(|error| {
                tracing::error!("{error}");
                None
            });
            finish(restore, report)
        }
    }
}

fn finish(restore: Restore, report: Option<Report>) -> Result<()> {
    let progress = restore.progress();
    let display = Display::start(move || snapshot(&progress));
    let (summary, result) = restore.run();
    drop(display);
    log_summary(&summary);
    let written = report.map_or(Ok(()), |report| report.write(&summary));
    // What became of the memory says more than what became of a file.
    if let (Err(_), Err(error)) = (&result, &written) {
        tracing::error!("{error}");
    }
    result.and(written)
}

fn snapshot(progress: &Progress) -> Snapshot {
    Snapshot {
        done_pages: progress.settled_pages.load(Ordering::Relaxed),
        total_pages: progress.total_pages.load(Ordering::Relaxed),
        bytes: progress.bytes.load(Ordering::Relaxed),
        note: format!("{} faults", progress.faults.load(Ordering::Relaxed)),
    }
}

fn log_summary(summary: &Summary) {
    let pages = &summary.pages;
    tracing::info!(
        "{} pages of {} processes: {} by fault, {} around faults, {} by the stream, {} from local images, {} zero, {} gone, {} poisoned, {} missing",
        summary.total_pages,
        summary.processes,
        pages.fault,
        pages.around,
        pages.stream,
        pages.local,
        pages.zero,
        pages.gone,
        pages.poisoned,
        summary.missing_pages,
    );
    let latency = &summary.fault_latency;
    tracing::info!(
        "{} faults: p50 {} µs, p90 {} µs, p99 {} µs, max {} µs; {} bytes received; last page after {} ms",
        latency.count,
        latency.p50_us,
        latency.p90_us,
        latency.p99_us,
        latency.max_us,
        summary.bytes_received,
        summary.drain_ms,
    );
}

/// The file of `--summary-json`, opened before the restore: that it cannot be written is to be known
/// before, not when all is done.
struct Report {
    path: PathBuf,
    file: File,
}

impl Report {
    fn create_if_wanted(args: &Args) -> Result<Option<Report>> {
        args.summary_json.as_deref().map(Report::create).transpose()
    }

    fn create(path: &Path) -> Result<Report> {
        let file = File::create(path).map_err(|error| Error::file("create", path, error))?;
        Ok(Report {
            path: path.to_owned(),
            file,
        })
    }

    fn write(&self, summary: &Summary) -> Result<()> {
        let failed = |error: std::io::Error| Error::file("write the summary to", &self.path, error);
        serde_json::to_writer_pretty(&self.file, summary).map_err(|error| failed(error.into()))?;
        writeln!(&self.file).map_err(failed)
    }
}

fn print_trace(path: &Path) -> Result<()> {
    let trace = TraceReader::open(path)?;
    let printed = print_faults(trace, BufWriter::new(std::io::stdout().lock()));
    printed.or_else(|problem| match problem {
        Problem::Reading(error) => Err(error),
        // Whoever read it, as `head` does, has seen enough.
        Problem::Printing(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Problem::Printing(error) => Err(Error::file("print", path, error)),
    })
}

/// Why a trace was not printed to its end.
enum Problem {
    Reading(Error),
    Printing(std::io::Error),
}

fn print_faults(trace: TraceReader, mut out: impl Write) -> std::result::Result<(), Problem> {
    writeln!(out, "{CSV_HEAD}").map_err(Problem::Printing)?;
    for fault in trace {
        let fault = fault.map_err(Problem::Reading)?;
        writeln!(out, "{fault}").map_err(Problem::Printing)?;
    }
    out.flush().map_err(Problem::Printing)
}
