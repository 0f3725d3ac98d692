//! Progress for people: a bar on a terminal, else a line in the log every few seconds.
//!
//! Drawn by a thread of its own from a snapshot of counters: a slow terminal holds nothing up.

use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

/// Between two drawings of the bar.
const BAR_EVERY: Duration = Duration::from_millis(100);

/// Between two lines in the log.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How far something is.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Snapshot {
    /// Pages done.
    pub done_pages: u64,
    /// Pages in all; 0 if nobody knows.
    pub total_pages: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Anything else worth a few words.
    pub note: String,
}

/// A running display; it ends when this is dropped.
#[derive(Debug)]
pub struct Display {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Shows what `snapshot` says until dropped.
    pub fn start(snapshot: impl Fn() -> Snapshot + Send + 'static) -> Display {
        let (stop, stopped) = channel();
        let on_terminal = std::io::stderr().is_terminal();
        let every = if on_terminal { BAR_EVERY } else { LINE_EVERY };
        let began = Instant::now();
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || {
                let bar = on_terminal.then(new_bar);
                let mut shown = Snapshot::default();
                while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                    let now = snapshot();
                    let moved = (now.done_pages, now.total_pages, now.bytes)
                        != (shown.done_pages, shown.total_pages, shown.bytes);
                    match &bar {
                        Some(bar) => draw(bar, &now, began.elapsed()),
                        None if moved => tracing::info!("{}", line(&now, began.elapsed())),
                        None => {}
                    }
                    shown = now;
                }
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
            });
        // Without a thread there is no display, and the work goes on.
        Display {
            stop: Some(stop),
            thread: thread.ok(),
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to say about how it ended.
            let _ = thread.join();
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{bar:30} {percent:>3}% {msg}";
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar
}

fn draw(bar: &ProgressBar, now: &Snapshot, elapsed: Duration) {
    if now.total_pages == 0 {
        // There is no telling how full a bar would be.
        bar.set_style(ProgressStyle::default_spinner());
        bar.tick();
    } else {
        bar.set_length(now.total_pages.max(now.done_pages));
        bar.set_position(now.done_pages);
    }
    bar.set_message(line(now, elapsed));
}

/// A snapshot in words, with the rate so far and the time that the rest takes at that rate.
fn line(now: &Snapshot, elapsed: Duration) -> String {
    let elapsed_ms = elapsed.as_millis().max(1);
    let rate = u128::from(now.bytes) * 1000 / elapsed_ms;
    let mut words = match now.total_pages {
        0 => format!("{} pages", now.done_pages),
        total => format!("{} of {total} pages", now.done_pages),
    };
    words += &format!(
        ", {}/s",
        HumanBytes(u64::try_from(rate).unwrap_or(u64::MAX))
    );
    let left = now.total_pages.saturating_sub(now.done_pages);
    if left > 0 && now.done_pages > 0 {
        let left_ms = elapsed_ms * u128::from(left) / u128::from(now.done_pages);
        let left = Duration::from_millis(u64::try_from(left_ms).unwrap_or(u64::MAX));
        words += &format!(", {} left", HumanDuration(left));
    }
    if !now.note.is_empty() {
        words += ", ";
        words += &now.note;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let half = Snapshot {
            done_pages: 512,
            total_pages: 1024,
            bytes: 2 << 20,
            note: "7 faults".into(),
        };
        let text = line(&half, Duration::from_secs(2));
        assert_eq!(
            text,
            "512 of 1024 pages, 1.00 MiB/s, 2 seconds left, 7 faults"
        );
    }
}
