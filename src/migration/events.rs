//! The event log of a migration: a line of JSON for each thing that happened, on both sides under one name. Pure.
//!
//! ```text
//! plan, preflight ──> rounds ──> dump ──> restore ──> route ──> commit ──> end
//!    source             source     source   destination   source    both      source
//! ```
//!
//! Lines are appended and never changed. A program that is killed may leave half a line at the end: whoever appends
//! next ends it, and whoever reads skips what is no event.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::messages::MigrationId;
use crate::limits::{
    EVENT_COUNT_NAME_BYTES_MAX, EVENT_COUNTS_MAX, EVENT_LINE_BYTES_MAX, EVENT_TEXT_BYTES_MAX,
};

/// One of the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that is left.
    Source,
    /// The host of the agent.
    Destination,
}

impl Side {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// The program that wrote a line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Writer {
    /// `pageferry plan`
    Plan,
    /// `pageferry migrate`
    Migrate,
    /// The process that finishes a migration whose command was killed, by itself or by `--resume`.
    Guard,
    /// `pageferry watch`
    Watch,
    /// `pageferry agent`
    Agent,
}

/// A part of a migration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// A rule of `pageferry watch` has fired, and its action runs.
    Rule,
    /// The cost of each mode is predicted, and a mode is chosen.
    Plan,
    /// Both hosts are checked for what prevents a migration.
    Preflight,
    /// The agent accepts the migration.
    Begin,
    /// Files, layers or a container's image are sent or stored.
    Files,
    /// A round: memory is sent while the processes run.
    Round,
    /// The processes are stopped.
    Freeze,
    /// The last dump.
    Dump,
    /// The pages of the last dump are sent.
    Pages,
    /// Shared memory is sent that must arrive before the processes run.
    Shared,
    /// CRIU's image files are sent.
    Images,
    /// The program that serves the rest of the memory starts.
    Forwarder,
    /// Addresses move to the destination.
    Address,
    /// The processes are restored, up to their first instruction.
    Restore,
    /// A container or a service is started afresh.
    Start,
    /// The commands of clients are replayed.
    Replay,
    /// Clients are held.
    Hold,
    /// The rest of a log is replayed, and the digests are compared.
    Rest,
    /// Clients are sent to the destination.
    Route,
    /// The decision is made on which host the processes continue.
    Commit,
    /// The processes run at the destination.
    Resume,
    /// The rest of the memory is sent.
    Memory,
    /// Connections to the old container get time to end.
    Drain,
    /// The old container or service is stopped.
    Stop,
    /// The processes continue at the source, and clients are sent back.
    Release,
    /// The destination removes what it has of the migration.
    Discard,
    /// The output of the container is moved.
    Output,
    /// Logs of the other side are fetched.
    Logs,
    /// The migration is over.
    End,
}

impl Step {
    /// Its name, as it is written.
    pub fn name(self) -> String {
        let name = serde_json::to_value(self).ok();
        let name = name.and_then(|name| name.as_str().map(str::to_owned));
        name.unwrap_or_default()
    }
}

/// The state of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It begins.
    Begun,
    /// It is done.
    Done,
    /// It has failed.
    Failed,
    /// Information; the step continues.
    Note,
    /// A problem that does not stop the step.
    Warning,
}

/// A line of the event log.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
pub struct Event {
    /// When, µs since 1970 by the clock of the side that wrote it.
    pub time_us: u64,
    /// The migration's name; null for a rule whose action is no migration.
    #[cfg_attr(feature = "engine", schemars(with = "Option<String>"))]
    pub migration: Option<MigrationId>,
    /// The host on which it happened.
    pub side: Side,
    /// The program that wrote it.
    pub program: Writer,
    /// Pid of that program, as its own namespace numbers it.
    pub pid: u32,
    /// Number of the line among those that this program wrote about this migration, from 1.
    pub number: u64,
    /// The part of the migration.
    pub step: Step,
    /// The state of the step.
    pub state: State,
    /// From its begin, ms; null unless it is done or has failed.
    pub took_ms: Option<f64>,
    /// A description.
    pub text: Option<String>,
    /// Numbers by what they count: `bytes`, `pages`, `processes`.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
    /// The line in which CRIU's own log says what went wrong.
    pub criu: Option<String>,
}

impl Event {
    /// The line, with its end. What is too long for one is cut, or left out if it is a count.
    pub fn line(&self) -> Vec<u8> {
        let mut event = self.clone();
        for text in [&mut event.text, &mut event.criu].into_iter().flatten() {
            cut(text, EVENT_TEXT_BYTES_MAX);
        }
        // A peer may call its counts anything.
        event
            .counts
            .retain(|name, _| name.len() <= EVENT_COUNT_NAME_BYTES_MAX);
        while event.counts.len() > EVENT_COUNTS_MAX {
            event.counts.pop_last();
        }
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        line
    }

    /// Whether two lines are of one event: the same program's, with the same number and time.
    pub fn is_same(&self, other: &Event) -> bool {
        let key = |event: &Event| {
            (
                event.side,
                event.program,
                event.pid,
                event.number,
                event.time_us,
            )
        };
        key(self) == key(other)
    }

    /// Whether a destination may say this of the migration `id`.
    pub fn is_from_destination(&self, id: &MigrationId) -> bool {
        self.side == Side::Destination
            && self.program == Writer::Agent
            && self.migration.as_ref() == Some(id)
    }
}

/// Cuts a text to at most `most` bytes.
fn cut(text: &mut String, most: usize) {
    if text.len() <= most {
        return;
    }
    let mut at = most;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.truncate(at);
}

/// What was read of an event log.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EventLog {
    /// The events, in the order of their lines.
    pub events: Vec<Event>,
    /// How many lines are no events: cut by a crash, or too long.
    pub torn: usize,
}

impl EventLog {
    /// Reads a log, of which the begin or the end may be missing.
    pub fn read(text: &[u8]) -> EventLog {
        let mut log = EventLog::default();
        for line in text.split(|byte| *byte == b'\n') {
            if line.is_empty() {
                continue;
            }
            let fits = line.len() <= EVENT_LINE_BYTES_MAX;
            match serde_json::from_slice(line) {
                Ok(event) if fits => log.events.push(event),
                _ => log.torn += 1,
            }
        }
        log
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(number: u64) -> Event {
        Event {
            time_us: 1_000_000 + number,
            migration: Some("m-1".parse().unwrap()),
            side: Side::Destination,
            program: Writer::Agent,
            pid: 7,
            number,
            step: Step::Restore,
            state: State::Failed,
            took_ms: Some(12.5),
            text: Some("criu restore failed\nwith two lines".to_owned()),
            counts: BTreeMap::from([("bytes".to_owned(), 4096)]),
            criu: None,
        }
    }

    #[test]
    fn a_log_is_read_back_and_a_torn_line_costs_itself_alone() {
        let events: Vec<Event> = (1..4).map(sample).collect();
        let lines: Vec<Vec<u8>> = events.iter().map(Event::line).collect();
        let whole = lines.concat();
        let read = EventLog::read(&whole);
        assert_eq!((read.torn, &read.events), (0, &events));
        for cut in 0..whole.len() {
            let read = EventLog::read(&whole[..cut]);
            assert!(read.torn <= 1, "{cut}");
            assert_eq!(read.events, events[..read.events.len()], "{cut}");
            // Whoever goes on begins a line of its own.
            let gone_on = [&whole[..cut], b"\n", &lines[2]].concat();
            assert_eq!(EventLog::read(&gone_on).events.last(), Some(&events[2]));
        }
    }

    #[test]
    fn lines_are_no_longer_than_the_limit() {
        let mut event = sample(1);
        let long = "\u{1}ü".repeat(EVENT_LINE_BYTES_MAX);
        event.text = Some(long.clone());
        event.criu = Some(long);
        event.counts = (0..10_000)
            .map(|number| (format!("count-{number}"), u64::MAX))
            .collect();
        for name_bytes in [1, EVENT_COUNT_NAME_BYTES_MAX, EVENT_LINE_BYTES_MAX] {
            let name = "\u{1}".repeat(name_bytes - 1);
            let counts =
                (0..100).map(|number: u8| (format!("{name}{}", char::from(number)), u64::MAX));
            event.counts.extend(counts);
            let line = event.line();
            assert!(line.len() <= EVENT_LINE_BYTES_MAX, "{}", line.len());
            let read = EventLog::read(&line);
            assert_eq!((read.torn, read.events.len()), (0, 1));
            assert!(read.events[0].is_same(&event));
            event.counts.clear();
        }
    }

    #[test]
    fn a_destination_speaks_for_itself_alone() {
        let id = "m-1".parse().unwrap();
        assert!(sample(1).is_from_destination(&id));
        let others = [
            Event {
                side: Side::Source,
                ..sample(1)
            },
            Event {
                program: Writer::Migrate,
                ..sample(1)
            },
            Event {
                migration: None,
                ..sample(1)
            },
        ];
        for other in others {
            assert!(!other.is_from_destination(&id), "{other:?}");
            assert!(!other.is_same(&sample(2)));
        }
    }

    #[test]
    fn names_of_steps_are_those_of_lines() {
        assert_eq!(Step::Preflight.name(), "preflight");
        assert_eq!(Side::Source.name(), "source");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let read = EventLog::read(&bytes);
            prop_assert!(read.events.is_empty());
        }
    }
}
