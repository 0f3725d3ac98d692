//! What a migration is doing, for people: one line that changes on a terminal, and log lines elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use pageferry::migration::RoundResult;

use crate::rounds::RoundRead;

/// How often the line is drawn again, so that the time goes on.
const REDRAW: Duration = Duration::from_millis(200);

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

fn line_of_round(number: u32, round: RoundResult, read: RoundRead, predicted: Duration) -> String {
    let rate = round.bytes.saturating_mul(1000) / round.ms.max(1);
    format!(
        "round {number}: {} of {} pages had changed, read in {} ms, {} sent in {} ms ({}/s); about as much is \
         left; a freeze now would take about {} ms",
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
