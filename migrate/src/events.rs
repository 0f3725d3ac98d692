//! The event log as this program writes it: lines are appended to one file or to several.
//!
//! A log that cannot be written never stops a migration: that is told once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::criu::log::cause;
use pageferry::error::{Error, Result};
use pageferry::limits::LOG_FETCH_BYTES_MAX;
use pageferry::migration::events::{Event, EventLog, Side, State, Step, Writer};
use pageferry::migration::messages::MigrationId;
use pageferry::observe::schema::Output;

use crate::facts::now_us;

/// Its name in the directory of a migration, on both sides.
pub(crate) const EVENTS: &str = "events.jsonl";

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Event>(
        "event",
        "pageferry migrate, plan, watch with --events FILE, a line for each event",
    )
}

/// Writes events of one migration. Copies write to the same files.
#[derive(Clone, Debug)]
pub(crate) struct Events(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    migration: Option<MigrationId>,
    writer: Writer,
    number: u64,
    /// They are opened for each line: an agent has many migrations that are over.
    files: Vec<PathBuf>,
    /// Lines so far, for files that come later; `None` once no more come.
    lines: Option<Vec<u8>>,
    /// Steps under way, and since when.
    open: Vec<(Step, Instant)>,
    has_failed: bool,
}

/// What an event says of its step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Details {
    pub(crate) text: Option<String>,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) criu: Option<String>,
}

impl Details {
    /// In words.
    pub(crate) fn text(text: impl Into<String>) -> Details {
        Details {
            text: Some(text.into()),
            ..Details::default()
        }
    }

    /// Of what went wrong, with the line of CRIU's log that it names.
    pub(crate) fn error(error: &str) -> Details {
        Details {
            text: Some(error.to_owned()),
            criu: cause(error).map(str::to_owned),
            ..Details::default()
        }
    }

    /// By numbers.
    pub(crate) fn counts(counts: &[(&str, u64)]) -> Details {
        let counts = counts
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        Details {
            counts: counts.collect(),
            ..Details::default()
        }
    }
}

impl Events {
    /// Of a migration that `writer` takes part in. Lines are kept until there is a file.
    pub(crate) fn new(writer: Writer, migration: Option<MigrationId>) -> Events {
        Events(Arc::new(Mutex::new(Inner {
            migration,
            writer,
            number: 0,
            files: Vec::new(),
            lines: Some(Vec::new()),
            open: Vec::new(),
            has_failed: false,
        })))
    }

    /// Of who finishes the migration in `dir`, for the user's file too.
    pub(crate) fn of_guard(migration: &MigrationId, dir: &Path, users: Option<&Path>) -> Events {
        let events = Events::new(Writer::Guard, Some(migration.clone()));
        if let Some(Err(error)) = users.map(|path| events.also_to(path)) {
            tracing::warn!("{error}: events are not written there");
        }
        events.in_dir(dir);
        events
    }

    /// Appends to the file that the user names, if there is one.
    pub(crate) fn with_file(self, path: Option<&Path>) -> Result<Events> {
        if let Some(path) = path {
            self.also_to(path)?;
        }
        Ok(self)
    }

    /// Appends to the log in the directory of the migration too, the last file that there is; tells if that cannot be.
    pub(crate) fn in_dir(&self, dir: &Path) {
        if let Err(error) = self.also_to(&dir.join(EVENTS)) {
            tracing::warn!("{error}: events are not written there");
        }
        self.lock().lines = None;
    }

    fn also_to(&self, path: &Path) -> Result<()> {
        let mut inner = self.lock();
        let failed = |error| Error::file("open", path, error);
        let mut file = open(path).map_err(failed)?;
        let lines = inner.lines.as_deref().unwrap_or_default();
        file.write_all(lines).map_err(failed)?;
        inner.files.push(path.to_owned());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The step that was begun last and is under way.
    pub(crate) fn step(&self) -> Option<Step> {
        self.lock().open.last().map(|(step, _)| *step)
    }

    /// A step begins.
    pub(crate) fn begin(&self, step: Step) {
        let mut inner = self.lock();
        inner.open.retain(|(open, _)| *open != step);
        inner.open.push((step, Instant::now()));
        inner.add(step, State::Begun, None, Details::default());
    }

    /// A step is done. One that was not begun has taken as long as is not known.
    pub(crate) fn done(&self, step: Step, details: Details) {
        self.lock().end(step, State::Done, details);
    }

    /// A step has failed.
    pub(crate) fn failed(&self, step: Step, details: Details) {
        self.lock().end(step, State::Failed, details);
    }

    /// A step has ended as `result` says.
    pub(crate) fn ended<T>(&self, step: Step, result: &Result<T>) {
        match result {
            Ok(_) => self.done(step, Details::default()),
            Err(error) => self.failed(step, Details::error(&error.to_string())),
        }
    }

    /// The migration is over: what is under way has ended as `result` says.
    pub(crate) fn end(&self, result: &std::result::Result<&str, String>) {
        let open: Vec<Step> = self.lock().open.iter().map(|(step, _)| *step).collect();
        for step in open.into_iter().rev() {
            match result {
                Ok(_) => self.done(step, Details::default()),
                Err(error) => self.failed(step, Details::error(error)),
            }
        }
        match result {
            Ok(text) => self.done(Step::End, Details::text(*text)),
            Err(error) => self.failed(Step::End, Details::error(error)),
        }
    }

    /// Something to know.
    pub(crate) fn note(&self, step: Step, details: Details) {
        self.lock().add(step, State::Note, None, details);
    }

    /// Something went wrong beside the step that is under way.
    pub(crate) fn warn(&self, text: &str) {
        let step = self.step().unwrap_or(Step::End);
        self.lock()
            .add(step, State::Warning, None, Details::text(text));
    }

    /// Adds what the destination's log has and this one has not, as far as it speaks for itself.
    pub(crate) fn merge(&self, text: &[u8]) {
        let inner = self.lock();
        let Some(id) = &inner.migration else {
            return;
        };
        let there = EventLog::read(text).events;
        let there: Vec<&Event> = there
            .iter()
            .filter(|event| event.is_from_destination(id))
            .collect();
        for path in &inner.files {
            let known = read_end(path).unwrap_or_default();
            let known = EventLog::read(&known).events;
            let is_new = |event: &&&Event| !known.iter().any(|known| known.is_same(event));
            let lines: Vec<u8> = there
                .iter()
                .filter(is_new)
                .flat_map(|event| event.line())
                .collect();
            if let Err(error) = append(path, &lines) {
                tracing::warn!("{}", Error::file("write", path, error));
            }
        }
    }
}

impl Inner {
    fn end(&mut self, step: Step, state: State, details: Details) {
        let at = self.open.iter().rposition(|(open, _)| *open == step);
        let took = at.map(|at| self.open.remove(at).1.elapsed());
        self.add(step, state, took, details);
    }

    fn add(&mut self, step: Step, state: State, took: Option<Duration>, details: Details) {
        self.number += 1;
        let side = match self.writer {
            Writer::Agent => Side::Destination,
            _ => Side::Source,
        };
        let event = Event {
            time_us: now_us(),
            migration: self.migration.clone(),
            side,
            program: self.writer,
            pid: std::process::id(),
            number: self.number,
            step,
            state,
            took_ms: took.map(|took| took.as_secs_f64() * 1e3),
            text: details.text,
            counts: details.counts,
            criu: details.criu,
        };
        let line = event.line();
        for path in &self.files {
            if let Err(error) = append(path, &line)
                && !std::mem::replace(&mut self.has_failed, true)
            {
                tracing::warn!("{}: events are lost", Error::file("write", path, error));
            }
        }
        if let Some(lines) = &mut self.lines {
            lines.extend(line);
        }
    }
}

/// Appends in one call: other programs append to the same file.
fn append(path: &Path, lines: &[u8]) -> io::Result<()> {
    let mut file = File::options().append(true).create(true).open(path)?;
    file.write_all(lines)
}

/// Opens a log at its end. Half a line that a killed program left there becomes a line of its own.
fn open(path: &Path) -> io::Result<File> {
    let mut file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .open(path)?;
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// The end of a file: at most as much as is fetched from another host, from the begin of a line.
pub(crate) fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let most = LOG_FETCH_BYTES_MAX as u64;
    let length = fs::metadata(path)?.len();
    let from = length.saturating_sub(most);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    if from > 0 {
        let begin = bytes.iter().position(|byte| *byte == b'\n');
        bytes.drain(..begin.map_or(0, |begin| begin + 1));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> MigrationId {
        "m-1".parse().unwrap()
    }

    #[test]
    fn lines_go_to_files_that_are_opened_late_and_behind_torn_ones() {
        let tmp = tempfile::tempdir().unwrap();
        let users = tmp.path().join("user.jsonl");
        fs::write(&users, "{\"time_us\":1,").unwrap();
        let events = Events::new(Writer::Migrate, Some(id()));
        events.begin(Step::Preflight);
        let events = events.with_file(Some(&users)).unwrap();
        events.done(Step::Preflight, Details::counts(&[("processes", 3)]));
        events.in_dir(tmp.path());
        events.begin(Step::Dump);
        assert_eq!(events.step(), Some(Step::Dump));
        events.warn("slow");
        events.failed(Step::Dump, Details::text("no"));
        assert_eq!(events.step(), None);
        let of_user = EventLog::read(&fs::read(&users).unwrap());
        let of_dir = EventLog::read(&fs::read(tmp.path().join(EVENTS)).unwrap());
        assert_eq!((of_user.torn, of_dir.torn), (1, 0));
        assert_eq!(of_user.events, of_dir.events);
        let states: Vec<State> = of_dir.events.iter().map(|event| event.state).collect();
        use State::{Begun, Done, Failed, Warning};
        assert_eq!(states, [Begun, Done, Begun, Warning, Failed]);
        let numbers: Vec<u64> = of_dir.events.iter().map(|event| event.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
        assert_eq!(of_dir.events[1].counts["processes"], 3);
        assert!(of_dir.events[1].took_ms.is_some() && of_dir.events[0].took_ms.is_none());
        // What cannot be opened is told before anything begins.
        let nowhere = tmp.path().join("no/where");
        assert!(events.with_file(Some(&nowhere)).is_err());
    }

    #[test]
    fn the_destinations_lines_are_merged_once() {
        let tmp = tempfile::tempdir().unwrap();
        let (here, there) = (tmp.path().join("here"), tmp.path().join("there"));
        fs::create_dir(&here).unwrap();
        fs::create_dir(&there).unwrap();
        let agent = Events::new(Writer::Agent, Some(id()));
        agent.in_dir(&there);
        agent.begin(Step::Restore);
        let source = Events::new(Writer::Migrate, Some(id()));
        source.in_dir(&here);
        source.begin(Step::Begin);
        let text = || fs::read(there.join(EVENTS)).unwrap();
        source.merge(&text());
        agent.failed(Step::Restore, Details::text("no"));
        source.merge(&text());
        source.merge(&text());
        // A line in the source's name, or another migration's, is none of the destination's.
        let other = Events::new(Writer::Agent, Some("m-2".parse().unwrap()));
        other.in_dir(&there);
        other.begin(Step::Restore);
        source.merge(&text());
        let all = EventLog::read(&fs::read(here.join(EVENTS)).unwrap()).events;
        let all: Vec<(Side, State)> = all.iter().map(|event| (event.side, event.state)).collect();
        assert_eq!(
            all,
            [
                (Side::Source, State::Begun),
                (Side::Destination, State::Begun),
                (Side::Destination, State::Failed),
            ]
        );
    }

    #[test]
    fn the_end_of_a_long_log_begins_with_a_line() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        let line = format!("{}\n", "x".repeat(99));
        fs::write(&path, line.repeat(LOG_FETCH_BYTES_MAX / 100 + 5)).unwrap();
        let end = read_end(&path).unwrap();
        assert!(end.len() <= LOG_FETCH_BYTES_MAX && end.len() > LOG_FETCH_BYTES_MAX - 200);
        assert!(end.len().is_multiple_of(100));
    }
}
