//! The log, with CRIU's verbosities and timestamps, written by a thread of its own.
//!
//! Until the process has forked (`--daemon`) there may be no thread, so lines go straight to the
//! file; from [`Log::hand_over`] on they go through a queue, and no engine ever waits for the disk of
//! the log. The queue is bounded ([`LOG_LINES_MAX`]): when the disk cannot follow, lines are dropped
//! and counted rather than memory dragged along.

use std::fmt as text;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, Kind, Result};
use crate::limits::LOG_LINES_MAX;

/// Errors and warnings: what CRIU logs when it is not told otherwise.
pub(super) const VERBOSITY_DEFAULT: u32 = 2;

/// From this verbosity on lines carry timestamps, as CRIU's do.
const VERBOSITY_TIMESTAMPS: u32 = 3;

/// Access to the log's file is for its owner, as CRIU makes it.
const LOG_MODE: u32 = 0o600;

/// The running log. Dropping it writes what is still queued.
#[derive(Debug)]
pub(super) struct Log {
    sink: Arc<Sink>,
    /// Ends the writing thread, after the last line, when it is dropped.
    writer: Option<WorkerGuard>,
}

#[derive(Debug)]
struct Sink {
    file: File,
    queue: OnceLock<NonBlocking>,
}

impl Log {
    /// Opens the log and makes it the process's: `file` in the current directory, `-` for standard
    /// output, or standard error without a name.
    pub(super) fn start(file: Option<&Path>, verbosity: u32) -> Result<Log> {
        let sink = Arc::new(Sink {
            file: open(file)?,
            queue: OnceLock::new(),
        });
        let format = CriuLines {
            started: (verbosity >= VERBOSITY_TIMESTAMPS).then(Instant::now),
        };
        let subscriber = tracing_subscriber::fmt()
            .event_format(format)
            .with_max_level(level(verbosity))
            .with_writer(Lines(Arc::clone(&sink)))
            .finish();
        tracing::subscriber::set_global_default(subscriber)
            .map_err(|error| Error::wrap(Kind::Usage, "cannot start the log", error))?;
        report_panics(Arc::clone(&sink));
        Ok(Log { sink, writer: None })
    }

    /// Starts the writing thread; from now on no line waits for the file.
    pub(super) fn hand_over(&mut self) -> Result<()> {
        // Without a thread lines go to the file as before. What starts one for the log panics where none can be.
        let probe = std::thread::Builder::new().spawn(|| ());
        probe.map_err(|error| Error::wrap(Kind::Io, "cannot start the log's thread", error))?;
        let file = self.sink.file.try_clone();
        let file =
            file.map_err(|error| Error::wrap(Kind::Io, "cannot duplicate the log", error))?;
        let (queue, writer) = NonBlockingBuilder::default()
            .buffered_lines_limit(LOG_LINES_MAX)
            .lossy(true)
            .thread_name("log")
            .finish(file);
        if self.sink.queue.set(queue).is_ok() {
            self.writer = Some(writer);
        }
        Ok(())
    }

    fn dropped_lines(&self) -> usize {
        let counter = self.sink.queue.get().map(NonBlocking::error_counter);
        counter.as_ref().map_or(0, ErrorCounter::dropped_lines)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let dropped = self.dropped_lines();
        if dropped > 0 {
            tracing::warn!("{dropped} lines of this log were dropped: the disk was too slow");
        }
    }
}

fn open(file: Option<&Path>) -> Result<File> {
    let standard = |stream: io::Result<std::os::fd::OwnedFd>| {
        stream
            .map(File::from)
            .map_err(|error| Error::wrap(Kind::Io, "cannot duplicate a standard stream", error))
    };
    match file {
        None => standard(std::os::fd::AsFd::as_fd(&io::stderr()).try_clone_to_owned()),
        Some(path) if path == Path::new("-") => {
            standard(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned())
        }
        Some(path) => File::options()
            .append(true)
            .create(true)
            .mode(LOG_MODE)
            .open(path)
            .and_then(|file| file.set_len(0).map(|()| file))
            .map_err(|error| Error::file("create the log", path, error)),
    }
}

fn level(verbosity: u32) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// A panic is our own mistake; its message must not get lost in a daemon's /dev/null.
fn report_panics(sink: Arc<Sink>) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // There is nobody to tell when the log itself fails here.
        let _ = writeln!(&sink.file, "error: bug: {panic}");
        before(panic);
    }));
}

/// Hands out the way that a line takes at this moment.
struct Lines(Arc<Sink>);

enum Line<'a> {
    Direct(&'a File),
    Queued(NonBlocking),
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        match self.0.queue.get() {
            Some(queue) => Line::Queued(queue.clone()),
            None => Line::Direct(&self.0.file),
        }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Line::Direct(file) => file.write(bytes),
            Line::Queued(queue) => queue.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `(00.012345) error: what happened`, the time in seconds since the start. The prefixes are those of
/// standard error.
struct CriuLines {
    started: Option<Instant>,
}

impl<S, N> FormatEvent<S, N> for CriuLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> text::Result {
        if let Some(started) = self.started {
            let since = started.elapsed();
            write!(
                out,
                "({:02}.{:06}) ",
                since.as_secs(),
                since.subsec_micros()
            )?;
        }
        match *event.metadata().level() {
            Level::ERROR => write!(out, "error: ")?,
            Level::WARN => write!(out, "warning: ")?,
            _ => {}
        }
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_one_form_and_are_all_there_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "of an earlier run").unwrap();
        let mut log = Log::start(Some(&path), 4).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        tracing::error!("first");
        assert!(std::fs::read_to_string(&path).unwrap().contains("first"));
        log.hand_over().unwrap();
        tracing::warn!(pid = 7, "second");
        tracing::debug!("third");
        tracing::trace!("too much");
        drop(log);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines = text.lines().filter(|line| {
            // Other tests of this process log to the same subscriber.
            line.contains("first") || line.contains("second") || line.contains("third")
        });
        let mut next = || {
            let (stamp, rest) = lines.next().unwrap().split_once(") ").unwrap();
            let (seconds, micros) = stamp[1..].split_once('.').unwrap();
            assert_eq!((seconds.len(), micros.len()), (2, 6));
            rest.to_owned()
        };
        assert_eq!(next(), "error: first");
        assert_eq!(next(), "warning: second pid=7");
        assert_eq!(next(), "third");
        assert!(!text.contains("too much"));
    }

    #[test]
    fn verbosity_opens_one_level_after_the_other() {
        let levels: Vec<LevelFilter> = (0..6).map(level).collect();
        assert!(levels.is_sorted());
        assert_eq!(level(99), LevelFilter::TRACE);
    }
}
