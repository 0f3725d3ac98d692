//! When the last page came, seen from outside: by how much memory the restored processes have.
//!
//! A daemon ends some time after its last page: `criu dump` first kills and frees its tree, and the
//! two daemons wait for that differently long. What the kernel accounts to the restored processes
//! grows with each page and is the same to look at whoever fills it.

use std::fs;
use std::time::{Duration, Instant};

use testbed::migration::Restored;

/// What a process may need beyond the memory that was moved while it ends its pass, and what the kernel's
/// count may be off by, pages.
const SLACK_PAGES: u64 = 256;

/// The memory of restored processes over time.
#[derive(Debug)]
pub(super) struct Arrival {
    since: Instant,
    /// Time since `since` and resident pages, both growing.
    steps: Vec<(Duration, u64)>,
}

impl Arrival {
    pub(super) fn watch(since: Instant) -> Arrival {
        Arrival {
            since,
            steps: Vec::new(),
        }
    }

    /// Looks how much is there now.
    pub(super) fn look(&mut self, restored: &Restored) {
        let pages = restored.pids().into_iter().filter_map(|pid| {
            // A process that has just ended has none.
            let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            statm.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        self.add(self.since.elapsed(), pages.sum());
    }

    fn add(&mut self, at: Duration, pages: u64) {
        if self.steps.last().is_none_or(|&(_, most)| pages > most) {
            self.steps.push((at, pages));
        }
    }

    /// When all but what is no page of the dump was there; `None` if nobody looked.
    pub(super) fn last_page(&self) -> Option<Duration> {
        let (_, most) = *self.steps.last()?;
        let all = self
            .steps
            .iter()
            .find(|(_, pages)| pages + SLACK_PAGES >= most);
        all.map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_needs_for_itself_is_no_last_page() {
        let mut arrival = Arrival::watch(Instant::now());
        assert_eq!(arrival.last_page(), None);
        let seen = [
            (1, 500),
            (2, 1000),
            (3, 2000),
            (4, 2000),
            (5, 2256),
            (6, 1500),
        ];
        for (ms, pages) in seen {
            arrival.add(Duration::from_millis(ms), pages);
        }
        assert_eq!(arrival.last_page(), Some(Duration::from_millis(3)));
    }
}
