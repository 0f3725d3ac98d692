//! Who is being served, and what that means for the dump.
//!
//! A client that says that it has everything ends the dump, unless it has been given up by then: which of the
//! two it is, is decided once. Without `--keep`, a dump to whose clients
//! nobody comes back, or whose only client has failed, is given up: its connection is reset, and its
//! processes go on.
//!
//! A guest is a connection, and a client has several. Only those that say so tell of their client
//! ([`Guest::may_return`], [`Guest::leave_for_good`]): a connection for faults that ends later than the one by
//! which its client failed, or a stranger that was turned away, changes nothing about who is waited for.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::engine::ferry::lock;

/// How often somebody who waits looks for what nobody is notified of.
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
    /// When the last client left that may come back.
    left: Option<Instant>,
    /// A client has left that will not come back.
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
    leaves: Option<Leaves>,
}

/// What a client's leaving means.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    ToReturn,
    ForGood,
}

impl State {
    /// The verdict when nobody is here, or is still waited for, after having been here: `most` is how long that is.
    fn abandoned(&self, most: Duration) -> Option<Verdict> {
        let awaited = self.left.is_some_and(|left| left.elapsed() < most);
        if self.here > 0 || awaited {
            return None;
        }
        match (self.failed, self.left) {
            (true, _) => Some(Verdict::Failed),
            (false, Some(_)) => Some(Verdict::GivenUp),
            (false, None) => None,
        }
    }
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

    /// A connection comes.
    pub(super) fn enter(&self) -> Guest<'_> {
        lock(&self.state).here += 1;
        Guest {
            guests: self,
            leaves: None,
        }
    }

    /// Whether a client has everything.
    pub(super) fn confirmed(&self) -> bool {
        lock(&self.state).confirmed
    }

    /// Waits for a verdict. `stopped` says whether it is to stop.
    pub(super) fn wait_for_verdict(&self, stopped: impl Fn() -> bool) -> Verdict {
        self.wait(|state| {
            let verdict = if state.confirmed {
                Verdict::Confirmed
            } else if stopped() {
                Verdict::Stopped
            } else {
                state.abandoned(self.give_up_after?)?
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

    /// When this connection ends its client has left, but may come back.
    pub(super) fn may_return(&mut self) {
        self.leaves = Some(Leaves::ToReturn);
    }

    /// When this connection ends its client has left, and will not come back.
    pub(super) fn leave_for_good(&mut self) {
        self.leaves = Some(Leaves::ForGood);
    }

    /// When this connection ends, that tells nothing of its client: others do.
    pub(super) fn is_one_of_many(&mut self) {
        self.leaves = None;
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.guests.state);
        state.here -= 1;
        match self.leaves {
            Some(Leaves::ToReturn) => state.left = Some(Instant::now()),
            Some(Leaves::ForGood) => state.failed = true,
            None => {}
        }
        drop(state);
        self.guests.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(guests: &Guests) -> Guest<'_> {
        let mut guest = guests.enter();
        guest.may_return();
        guest
    }

    #[test]
    fn a_client_that_has_failed_is_not_waited_for() {
        let guests = Guests::new(Some(Duration::MAX));
        let (mut first, for_faults) = (guests.enter(), guests.enter());
        first.leave_for_good();
        drop(first);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Stopped);
        // Whichever of its connections ends last.
        drop(for_faults);
        assert_eq!(guests.wait_for_verdict(|| false), Verdict::Failed);
    }

    #[test]
    fn another_client_than_the_one_that_has_failed_may_come_back() {
        let guests = Guests::new(Some(Duration::MAX));
        drop(served(&guests));
        let mut failed = guests.enter();
        failed.leave_for_good();
        drop(failed);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Stopped);
    }

    #[test]
    fn the_dump_is_given_up_only_when_nobody_comes_back() {
        let guests = Guests::new(Some(Duration::ZERO));
        drop(guests.enter());
        assert_eq!(
            guests.wait_for_verdict(|| true),
            Verdict::Stopped,
            "a stranger has gone"
        );
        let first = served(&guests);
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
        client.leave_for_good();
        drop(client);
        assert_eq!(guests.wait_for_verdict(|| true), Verdict::Confirmed);
        let another = guests.enter();
        assert!(another.confirm(), "with --keep there may be more");
        guests.dump_ended(true);
        guests.dump_ended(false);
        assert!(another.wait_for_dump(), "its end does not change");
    }
}
