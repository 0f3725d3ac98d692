//! What a migration is doing, for people: one line that changes on a terminal, and log lines elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use pageferry::migration::RoundResult;

use crate::rounds::RoundRead;

/// How often the line is drawn again, so that the time goes on.
const REDRAW: Duration = Duration::from_millis(200);

/// How often a log line tells how far a round is.
const LOG_TURN: Duration = Duration::from_secs(5);

/// What a round has done so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Read, or known to be there.
    pub(super) bytes: u64,
    /// The whole tree's.
    pub(super) of_bytes: u64,
    /// Since the round's start.
    pub(super) took: Duration,
    /// The downtime, if the processes were frozen now.
    pub(super) predicted: Duration,
}

/// See the module's text.
pub(super) struct Progress(Option<ProgressBar>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Progress on a terminal: {}", self.0.is_some())
    }
}

impl Progress {
    /// On standard error, if that is a terminal.
    pub(super) fn start() -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress(None);
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {elapsed_precise} {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.enable_steady_tick(REDRAW);
        Progress(Some(bar))
    }

    /// A phase begins.
    pub(super) fn phase(&self, name: impl Into<String>) {
        if let Some(bar) = &self.0 {
            bar.set_message(name.into());
        }
    }

    /// How often [`Progress::inside_round`] is worth a call.
    pub(super) fn turn(&self) -> Duration {
        match &self.0 {
            Some(_) => REDRAW,
            None => LOG_TURN,
        }
    }

    /// A part of a round has been read.
    pub(super) fn inside_round(&self, number: u32, part: Part) {
        let line = line_of_part(number, part);
        match &self.0 {
            Some(bar) => bar.set_message(line),
            None => tracing::info!("{line}"),
        }
    }

    /// A round has ended, and a freeze now would take about `predicted`.
    pub(super) fn round(
        &self,
        number: u32,
        round: RoundResult,
        read: RoundRead,
        predicted: Duration,
    ) {
        let line = line_of_round(number, round, read, predicted);
        match &self.0 {
            Some(bar) => bar.println(line),
            None => tracing::info!("{line}"),
        }
    }

    /// Nothing more is shown.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn line_of_part(number: u32, part: Part) -> String {
    let ms = u64::try_from(part.took.as_millis()).unwrap_or(u64::MAX);
    let rate = part.bytes.saturating_mul(1000) / ms.max(1);
    format!(
        "round {number}: {} of {} read ({}/s), {} left; a freeze now would take about {} ms",
        HumanBytes(part.bytes),
        HumanBytes(part.of_bytes),
        HumanBytes(rate),
        HumanBytes(part.of_bytes.saturating_sub(part.bytes)),
        part.predicted.as_millis()
    )
}

fn line_of_round(number: u32, round: RoundResult, read: RoundRead, predicted: Duration) -> String {
    let rate = round.bytes.saturating_mul(1000) / round.ms.max(1);
    format!(
        "round {number}: {} of {} pages had changed, read in {} ms, {} sent in {} ms ({}/s); about as much \
         has changed since; a freeze now would take about {} ms",
        round.pages,
        read.pages,
        read.took.as_millis(),
        HumanBytes(round.bytes),
        round.ms,
        HumanBytes(rate),
        predicted.as_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_round_tells_what_is_left() {
        let part = Part {
            bytes: 3 << 20,
            of_bytes: 4 << 20,
            took: Duration::from_millis(1500),
            predicted: Duration::from_millis(90),
        };
        let line = line_of_part(1, part);
        assert_eq!(
            line,
            "round 1: 3.00 MiB of 4.00 MiB read (2.00 MiB/s), 1.00 MiB left; a freeze now would take about 90 ms"
        );
    }

    #[test]
    fn a_round_tells_pages_rate_and_prediction() {
        let round = RoundResult {
            pages: 3,
            bytes: 2 << 20,
            ms: 500,
        };
        let read = RoundRead {
            pages: 9,
            took: Duration::from_millis(300),
        };
        let line = line_of_round(2, round, read, Duration::from_millis(120));
        for part in [
            "round 2: 3 of 9 pages",
            "2.00 MiB sent",
            "4.00 MiB/s",
            "about 120 ms",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }
}
