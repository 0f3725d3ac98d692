//! Pages that cannot be had although the source works: they are poisoned and counted. Everything else goes on.

use std::collections::BTreeMap;

use super::poison::poison_limit;
use super::{OnLoss, Restore};
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::SpaceId;
use crate::lazy::space::Space;
use crate::units::PageRange;

/// What was given up so far.
#[derive(Debug, Default)]
pub(super) struct GivenUp {
    /// Pages by pid.
    pages: BTreeMap<u32, u64>,
    /// Why the first ones were.
    why: String,
}

impl GivenUp {
    pub(super) fn note(&mut self, pid: u32, pages: u64, why: &str) {
        if self.pages.is_empty() {
            why.clone_into(&mut self.why);
        }
        *self.pages.entry(pid).or_insert(0) += pages;
    }

    /// Adds what was given up to how the restore ends otherwise.
    pub(super) fn conclude(self, outcome: Result<()>) -> Result<()> {
        if self.pages.is_empty() {
            return outcome;
        }
        let each = self.pages.iter();
        let each: Vec<String> = each
            .map(|(pid, pages)| format!("pid {pid} lacks {pages} pages"))
            .collect();
        let text = format!(
            "memory is lost: {} that cannot be had here (reading one raises SIGBUS): {}",
            each.join(", "),
            self.why
        );
        Err(match outcome {
            Ok(()) => Error::new(Kind::MemoryLost, text),
            Err(error) => error.within(text),
        })
    }
}

impl Restore {
    /// The pages at `at` of `id` cannot be had, because of `why`.
    pub(super) fn give_up_pages(&mut self, id: SpaceId, at: PageRange, why: &str) -> Result<()> {
        let Some(pid) = self.processes.pid(id) else {
            self.planner.handle_exit(id);
            return Ok(());
        };
        if let Some(left_out) = self.losses.may_log(self.clock.now_us()) {
            tracing::error!(
                "the page at {} of pid {pid} is lost: {why}{left_out}",
                at.start()
            );
        }
        if self.losses.policy() == OnLoss::Kill {
            self.kill_processes(|space| (space.pid() == pid).then(|| space.first_missing())?);
        }
        let mut poisoned = 0;
        let mut limit = poison_limit();
        let mut start = at.start().get();
        while start < at.end().get() {
            let left = PageRange::new(start, at.end().get());
            let done = self.poison_some(id, left, &mut limit)?;
            poisoned += done.poisoned;
            start += done.bytes;
            if self.processes.get(id).is_none() {
                return Ok(());
            }
        }
        let pages = poisoned >> self.images.page().shift();
        if pages > 0 {
            self.losses.note_given_up(pid, pages, why);
        }
        Ok(())
    }

    /// Nothing that `id` lacks can be had, because of `why`.
    pub(super) fn give_up_process(&mut self, id: SpaceId, why: &str) -> Result<()> {
        loop {
            self.read_events(id)?;
            let space = self.planner.space(id);
            let Some(piece) = space.and_then(Space::first_missing) else {
                return Ok(());
            };
            if let Err(error) = self.give_up_pages(id, piece.at, why) {
                return self.hold_pages(error);
            }
        }
    }

    /// Pages could not be poisoned because of `why`: where the kernel cannot, they are held.
    pub(super) fn hold_pages(&mut self, why: Error) -> Result<()> {
        if why.kind() != Kind::Unsupported || self.losses.is_stopping() {
            return Err(why);
        }
        tracing::error!("{why}: threads that read a lost page wait instead");
        self.losses.hold_from_now_on();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_told_with_the_first_reason() {
        assert!(GivenUp::default().conclude(Ok(())).is_ok());
        let given_up = || {
            let mut given_up = GivenUp::default();
            given_up.note(7, 2, "the disk is on fire");
            given_up.note(7, 3, "it still is");
            given_up.note(9, 1, "it still is");
            given_up
        };
        let error = given_up().conclude(Ok(())).unwrap_err();
        assert_eq!(error.kind(), Kind::MemoryLost);
        let text = "memory is lost: pid 7 lacks 5 pages, pid 9 lacks 1 pages that cannot be had here \
                    (reading one raises SIGBUS): the disk is on fire";
        assert_eq!(error.to_string(), text);
        let stopped = Error::new(Kind::Interrupted, "stopped");
        let error = given_up().conclude(Err(stopped)).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted);
        assert!(error.to_string().ends_with("on fire: stopped"), "{error}");
    }
}
