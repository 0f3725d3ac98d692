//! Who is being served, and what that means for the dump.
//!
//! A client that says that it has everything ends the dump, unless it has been given up by then: which of the
//! two it is, is decided once. Without `--keep`, a dump to whose clients
//! nobody comes back, or whose last client has failed, is given up: its connection is reset, and its
//! processes go on.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::engine::ferry::lock;

/// How often somebody who waits looks for what nobody rings for.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Guests {
    state: Mutex<State>,
    changed: Condvar,
    give_up_after: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    here: usize,
    /// A client has everything.
    confirmed: bool,
    /// The dump was given up: who has everything comes too late.
    given_up: bool,
    /// The dump has ended: whether it has heard that a client has everything.
    dump_heard: Option<bool>,
    /// Since when nobody is here who was.
    alone_since: Option<Instant>,
    /// Nobody is here, and the last one will not come back.
    failed: bool,
}

/// What is to be done about the dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// A client has everything.
    Confirmed,
    /// Nobody came back for too long.
    GivenUp,
    /// The last client has failed for good.
    Failed,
    /// Asked to stop.
    Stopped,
}

/// A client that is being served, until this is dropped.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    guests: &'a Guests,
    failed: bool,
}

impl Guests {
    /// Clients that are given up when none is here for so long, if that is given.
    pub(super) fn new(give_up_after: Option<Duration>) -> Guests {
        Guests {
            state: Mutex::default(),
            changed: Condvar::new(),
            give_up_after,
        }
    }

    /// A client comes.
    pub(super) fn enter(&self) -> Guest<'_> {
        let mut state = lock(&self.state);
        state.here += 1;
        state.alone_since = None;
        state.failed = false;
        Guest {
            guests: self,
            failed: false,
        }
    }

    /// Whether a client has everything.
    pub(super) fn confirmed(&self) -> bool {
        lock(&self.state).confirmed
    }

    /// Waits for a verdict. `stopped` says whether it is to stop.
    pub(super) fn wait_for_verdict(&self, stopped: impl Fn() -> bool) -> Verdict {
        self.wait(|state| {
            let alone = state.alone_since.map(|since| since.elapsed());
            let verdict = if state.confirmed {
                Verdict::Confirmed
            } else if stopped() {
                Verdict::Stopped
            } else if state.failed && self.give_up_after.is_some() {
                Verdict::Failed
            } else if alone
                .is_some_and(|alone| self.give_up_after.is_some_and(|most| alone >= most))
            {
                Verdict::GivenUp
            } else {
                return None;
            };
            state.given_up = verdict != Verdict::Confirmed;
            Some(verdict)
        })
    }

    /// The dump is lost. Says whether a client has everything by now.
    pub(super) fn give_up(&self) -> bool {
        let mut state = lock(&self.state);
        state.given_up = true;
        state.confirmed
    }

    /// The dump has ended. `heard`: it was told that a client has everything, and said so. The first
    /// word counts.
    pub(super) fn dump_ended(&self, heard: bool) {
        lock(&self.state).dump_heard.get_or_insert(heard);
        self.changed.notify_all();
    }

    /// Waits until it is `stopped` or, unless it `stays` for others, nobody is here.
    pub(super) fn wait_until_gone(&self, stopped: impl Fn() -> bool, stays: bool) {
        self.wait(|state| (stopped() || (!stays && state.here == 0)).then_some(()));
    }

    fn wait<T>(&self, mut found: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = found(&mut state) {
                return found;
            }
            state = self.look_again(state);
        }
    }

    fn look_again<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, LOOK_AGAIN) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }
}

impl Guest<'_> {
    /// This client has everything. Says whether it is in time: if not, the dump's processes go on.
    pub(super) fn confirm(&self) -> bool {
        let mut state = lock(&self.guests.state);
        state.confirmed |= !state.given_up;
        let in_time = !state.given_up;
        drop(state);
        self.guests.changed.notify_all();
        in_time
    }

    /// Waits until the dump has ended. Says whether it has heard that a client has everything.
    pub(super) fn wait_for_dump(&self) -> bool {
        self.guests.wait(|state| state.dump_heard)
    }

    /// This client will not come back.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.guests.state);
        state.here -= 1;
        if state.here == 0 {
            state.alone_since = Some(Instant::now());
            state.failed = self.failed;
        }
        drop(state);
        self.guests.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_has_failed_is_not_waited_for_unless_others_are_here() {
        let guests = Guests::new(Some(Duration::MAX));
        let (mut first, second) = (guests.enter(), guests.enter());
        first.fail();
        drop(first);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Stopped);
        drop(second);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Stopped);
        let mut third = guests.enter();
        third.fail();
        drop(third);
        assert_eq!(guests.wait_for_verdict(|| false), Verdict::Failed);
    }

    #[test]
    fn the_dump_is_given_up_only_when_nobody_comes_back() {
        let guests = Guests::new(Some(Duration::ZERO));
        let first = guests.enter();
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Stopped);
        drop(first);
        assert_eq!(guests.wait_for_verdict(|| false), Verdict::GivenUp);
        let second = guests.enter();
        assert!(!second.confirm(), "its dump has been given up");
        drop(second);
        guests.wait_until_gone(|| false, false);
        assert!(!guests.confirmed());
    }

    #[test]
    fn a_client_that_has_everything_ends_the_dump_whatever_comes_then() {
        let guests = Guests::new(Some(Duration::ZERO));
        let mut client = guests.enter();
        assert!(client.confirm());
        client.fail();
        drop(client);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Confirmed);
        let another = guests.enter();
        assert!(another.confirm(), "with --keep there may be more");
        guests.dump_ended(true);
        guests.dump_ended(false);
        assert!(another.wait_for_dump(), "its end does not change");
    }
}
