//! Which other target of the session may have a page: a process that was forked has most pages of its parent.
//!
//! Nobody says who was forked from whom. So those are tried first that had a page lately, and in each batch one more, in
//! turn. A page takes no more than a few look-ups, however many processes there are.

use crate::criu::header::Target;

/// Targets that are tried for a page.
const TRIED_MAX: usize = 8;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(super) struct Others {
    named: bool,
    /// In the order of their numbers.
    opened: Vec<Target>,
    /// Numbers of targets to be tried, those that had a page last first. None of them is that of the open target.
    likely: Vec<u16>,
    /// Whose turn it is to be tried in this batch.
    turn: u16,
    /// Pages of the batch are of the target that was opened last.
    active: bool,
}

impl Others {
    /// A session without targets, in which pages of others are `named`.
    pub(super) fn new(named: bool) -> Others {
        Others {
            named,
            ..Others::default()
        }
    }

    /// Whether pages of other targets are named.
    pub(super) fn are_named(&self) -> bool {
        self.named
    }

    /// `target` is opened: it has the next number.
    pub(super) fn open(&mut self, target: Target) {
        if !self.named {
            return;
        }
        if let Some(last) = self.opened.len().checked_sub(1).map(u16::try_from) {
            // Beyond what a number can tell nobody is named.
            let Ok(last) = last else {
                return;
            };
            self.likely.insert(0, last);
            self.likely.truncate(TRIED_MAX);
        }
        self.opened.push(target);
    }

    /// The next pages are of `target`.
    pub(super) fn begin_batch(&mut self, target: Target) {
        self.active = self.named && self.opened.last() == Some(&target);
        let earlier = self.opened.len().saturating_sub(1);
        if !self.active || earlier <= TRIED_MAX {
            return;
        }
        self.turn = u16::try_from((usize::from(self.turn) + 1) % earlier).unwrap_or(0);
        if !self.likely.contains(&self.turn) {
            self.likely.truncate(TRIED_MAX - 1);
            self.likely.push(self.turn);
        }
    }

    /// The first target to be tried that `has` the page.
    pub(super) fn find(&mut self, mut has: impl FnMut(Target) -> bool) -> Option<u16> {
        if !self.active {
            return None;
        }
        let opened = &self.opened;
        let place = self
            .likely
            .iter()
            .position(|number| has(opened[usize::from(*number)]))?;
        let number = self.likely.remove(place);
        self.likely.insert(0, number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(count: u32) -> Others {
        let mut others = Others::new(true);
        (1..=count).for_each(|pid| others.open(Target::Process(pid)));
        others
    }

    #[test]
    fn no_target_is_its_own_other() {
        let mut others = opened(1);
        others.begin_batch(Target::Process(1));
        assert_eq!(others.find(|_| true), None);
        others.open(Target::Process(2));
        others.begin_batch(Target::Process(2));
        assert_eq!(others.find(|other| other == Target::Process(1)), Some(0));
        assert_eq!(others.find(|other| other == Target::Process(2)), None);
    }

    #[test]
    fn pages_of_a_target_that_is_not_open_are_not_compared() {
        let mut others = opened(2);
        others.begin_batch(Target::Process(1));
        assert_eq!(others.find(|_| true), None);
    }

    #[test]
    fn every_target_is_tried_in_the_end_and_then_at_once() {
        let mut others = opened(100);
        let wanted = Target::Process(42);
        let mut batches = 0;
        loop {
            others.begin_batch(Target::Process(100));
            let mut tried = 0;
            let found = others.find(|other| {
                tried += 1;
                other == wanted
            });
            assert!(tried <= TRIED_MAX);
            batches += 1;
            if found == Some(41) {
                break;
            }
            assert!(batches < 200, "{others:?}");
        }
        others.begin_batch(Target::Process(100));
        let mut tried = 0;
        others.find(|other| {
            tried += 1;
            other == wanted
        });
        assert_eq!(tried, 1);
    }

    #[test]
    fn nothing_is_named_unless_it_was_agreed_on() {
        let mut others = Others::new(false);
        others.open(Target::Process(1));
        others.open(Target::Process(2));
        others.begin_batch(Target::Process(2));
        assert_eq!(others.find(|_| true), None);
    }
}
