//! Event logs of migrations, as a peer's agent hands them out, and what CRIU's own logs say.

use arbitrary::{Arbitrary, Unstructured};
use pageferry::criu::log::{advice, cause, errors};
use pageferry::limits::EVENT_LINE_BYTES_MAX;
use pageferry::migration::events::EventLog;
use pageferry::migration::messages::MigrationId;
use serde_json::{Map, Value, json};

use crate::{byte, canary};

/// A line, honest but for what is told here.
#[derive(Arbitrary, Debug)]
struct Line {
    time: u64,
    pid: u32,
    number: u64,
    names: u8,
    took: f64,
    text: Option<String>,
    counts: Vec<(String, u64)>,
    /// How often text and names of counts are repeated.
    longer: u16,
    /// A field that has another value, and that value.
    other: Option<(u8, Option<String>)>,
    /// Bytes that are missing at the end of the line.
    torn: u8,
}

/// Values of the fields that name something, good ones and others.
const SIDES: [&str; 3] = ["destination", "source", "Source"];
const PROGRAMS: [&str; 3] = ["agent", "migrate", ""];
const STEPS: [&str; 4] = ["restore", "end", "memory", "no-step"];
const STATES: [&str; 4] = ["failed", "begun", "done", "no-state"];
const IDS: [&str; 3] = ["m-1", "m-2", "-m"];

impl Line {
    fn encode(&self, out: &mut Vec<u8>) {
        let named = |names: &[&'static str], shift: u8| {
            names[usize::from(self.names >> shift) % names.len()]
        };
        let longer = |text: &str| {
            text.repeat(1 + usize::from(self.longer) % (1 + 70_000 / text.len().max(1)))
        };
        let counts: Map<String, Value> = self
            .counts
            .iter()
            .map(|(name, count)| (longer(name), json!(count)))
            .collect();
        let mut line = json!({
            "time_us": self.time, "migration": named(&IDS, 0), "side": named(&SIDES, 1),
            "program": named(&PROGRAMS, 2), "pid": self.pid, "number": self.number,
            "step": named(&STEPS, 3), "state": named(&STATES, 5), "took_ms": self.took,
            "text": self.text.as_deref().map(longer), "counts": counts, "criu": null,
        });
        if let (Some(line), Some((which, value))) = (line.as_object_mut(), &self.other) {
            let name = line.keys().nth(usize::from(*which) % line.len()).cloned();
            let name = name.unwrap_or_default();
            match value {
                Some(value) => drop(line.insert(name, json!(value))),
                None => drop(line.remove(&name)),
            }
        }
        let line = line.to_string();
        let whole = line.len();
        out.extend_from_slice(&line.as_bytes()[..whole - whole.min(usize::from(self.torn))]);
        out.push(b'\n');
    }
}

/// What was read is written as one line each, which is read again.
pub(crate) fn events(mut data: &[u8]) {
    let mut log = Vec::new();
    match byte(&mut data) % 2 {
        0 => log.extend_from_slice(data),
        _ => {
            let mut input = Unstructured::new(data);
            let lines: Vec<Line> = input.arbitrary().unwrap_or_default();
            lines.iter().take(8).for_each(|line| line.encode(&mut log));
        }
    }
    let read = EventLog::read(&log);
    let lines = log.split(|byte| *byte == b'\n');
    let lines = lines.filter(|line| !line.is_empty()).count();
    assert_eq!(read.events.len() + read.torn, lines);
    let id: MigrationId = "m-1".parse().expect("it is a name");
    let mut from_there = 0;
    for event in &read.events {
        from_there += u32::from(event.is_from_destination(&id));
        // As it is merged into the log of this side, where it must be known again.
        let line = event.line();
        assert!(line.len() <= EVENT_LINE_BYTES_MAX, "{}", line.len());
        let mut again = EventLog::read(&line);
        assert_eq!((again.torn, again.events.len()), (0, 1));
        assert!(again.events[0].is_same(event));
        // The last digit of a fraction need not be read as it was written.
        again.events[0].took_ms = event.took_ms;
        assert_eq!(again.events[0].line(), line);
    }
    canary(from_there >= 2 && read.torn > 0);
    if let Ok(text) = std::str::from_utf8(&log) {
        let found = cause(text);
        assert_eq!(found.is_some(), errors(text).next().is_some());
        let _ = found.and_then(advice);
    }
}

/// A log of three lines of which one is torn, lines of CRIU's, and lines that are made.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let line = |number: u8, side: &str| {
        json!({
            "time_us": 1_000_000 + u64::from(number), "migration": "m-1", "side": side, "program": "agent",
            "pid": 7, "number": number, "step": "restore", "state": "begun", "took_ms": 12.5,
            "text": "a\nb", "counts": {"bytes": 4096}, "criu": null,
        })
        .to_string()
    };
    let torn = &line(3, "source")[..60];
    let log = [line(1, "destination"), line(2, "source"), torn.to_owned()].join("\n");
    let criu = "(00.012) 77: Error (criu/files-reg.c:2345): Can't open file srv/data: No such file\n\
        (00.014) Error (criu/cr-restore.c:2557): Restoring FAILED.\n";
    let made = |step: u8| {
        let bytes = (0..180).map(|number: u8| number.wrapping_mul(step) & 0x3f);
        [1].into_iter().chain(bytes).collect()
    };
    let mut seeds = vec![
        [&[0], log.as_bytes()].concat(),
        [&[0], criu.as_bytes()].concat(),
    ];
    seeds.extend([1, 3, 5, 17].map(made));
    seeds
}
