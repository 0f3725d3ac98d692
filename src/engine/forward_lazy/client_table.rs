//! Who is being served, and what that means for the dump.
//!
//! A client that says that it has everything ends the dump, unless it has been given up by then: which of the
//! two it is, is decided once. A dump to which no client comes, or to whose clients nobody comes back, is
//! given up, and without `--keep` also one whose only client has failed: its connection is reset, and its
//! processes go on.
//!
//! An entry is a connection, and a client has several. Only those that say so tell of their client
//! ([`ClientEntry::may_return`], [`ClientEntry::leave_for_good`]): a connection for faults that ends later than the one by
//! which its client failed, or another that was turned away, changes nothing about who is waited for.

use std::time::{Duration, Instant};

use crate::engine::ferry::lock;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// How often somebody who waits looks for what nobody is notified of.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// See the module's text.
#[derive(Debug)]
pub(super) struct ClientTable {
    state: Mutex<State>,
    changed: Condvar,
    timeouts: ClientTimeouts,
    since: Instant,
}

/// How long clients are waited for; `None` is for ever.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientTimeouts {
    /// For the first one.
    pub(super) first: Option<Duration>,
    /// For one to come back, or another one, when none is here any more.
    pub(super) next: Option<Duration>,
    /// Whether a client that has failed for good is the end.
    pub(super) only_one: bool,
}

#[derive(Debug, Default)]
struct State {
    here: usize,
    /// A client has everything.
    confirmed: bool,
    /// The dump was given up: who has everything comes too late.
    given_up: bool,
    /// The dump has ended: whether it has confirmed that a client has everything.
    dump_confirmed: Option<bool>,
    /// When the last client left that may come back.
    left: Option<Instant>,
    /// A client has left that will not come back.
    failed: bool,
}

/// What is to be done about the dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DumpOutcome {
    /// A client has everything.
    Confirmed,
    /// Nobody came for too long.
    NobodyCame,
    /// Nobody came back for too long.
    GivenUp,
    /// The last client has failed for good.
    Failed,
    /// Asked to stop.
    Stopped,
}

/// A client that is being served, until this is dropped.
#[derive(Debug)]
pub(super) struct ClientEntry<'a> {
    clients: &'a ClientTable,
    leaves: Option<Leaves>,
}

/// What a client's leaving means.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    ToReturn,
    ForGood,
}

impl State {
    /// The outcome when nobody is here or is still waited for. `since` is when waiting began.
    fn abandoned(&self, timeouts: &ClientTimeouts, since: Instant) -> Option<DumpOutcome> {
        if self.here > 0 {
            return None;
        }
        let over = |since: Instant, most: Option<Duration>| {
            most.is_some_and(|most| since.elapsed() >= most)
        };
        match self.left {
            Some(left) if !over(left, timeouts.next) => None,
            _ if self.failed && timeouts.only_one => Some(DumpOutcome::Failed),
            Some(_) => Some(DumpOutcome::GivenUp),
            None => over(since, timeouts.first).then_some(DumpOutcome::NobodyCame),
        }
    }
}

impl ClientTable {
    /// Clients that are waited for with `timeouts` from now on.
    pub(super) fn new(timeouts: ClientTimeouts) -> ClientTable {
        ClientTable {
            state: Mutex::default(),
            changed: Condvar::new(),
            timeouts,
            since: Instant::now(),
        }
    }

    /// A connection comes.
    pub(super) fn enter(&self) -> ClientEntry<'_> {
        lock(&self.state).here += 1;
        ClientEntry {
            clients: self,
            leaves: None,
        }
    }

    /// Whether a client has everything.
    pub(super) fn confirmed(&self) -> bool {
        lock(&self.state).confirmed
    }

    /// Waits for a outcome. `stopped` says whether it is to stop.
    pub(super) fn wait_for_outcome(&self, stopped: impl Fn() -> bool) -> DumpOutcome {
        self.wait(|state| {
            let outcome = if state.confirmed {
                DumpOutcome::Confirmed
            } else if stopped() {
                DumpOutcome::Stopped
            } else {
                state.abandoned(&self.timeouts, self.since)?
            };
            state.given_up = outcome != DumpOutcome::Confirmed;
            Some(outcome)
        })
    }

    /// The dump is lost. Returns whether a client has everything by now.
    pub(super) fn give_up(&self) -> bool {
        let mut state = lock(&self.state);
        state.given_up = true;
        state.confirmed
    }

    /// The dump has ended. `confirmed`: it was notified that a client has everything, and has confirmed that. The first
    /// call counts.
    pub(super) fn dump_ended(&self, confirmed: bool) {
        lock(&self.state).dump_confirmed.get_or_insert(confirmed);
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

impl ClientEntry<'_> {
    /// This client has everything. Returns whether it is in time: if not, the dump's processes go on.
    pub(super) fn confirm(&self) -> bool {
        let mut state = lock(&self.clients.state);
        state.confirmed |= !state.given_up;
        let in_time = !state.given_up;
        drop(state);
        self.clients.changed.notify_all();
        in_time
    }

    /// Waits until the dump has ended. Returns whether it has confirmed that a client has everything.
    pub(super) fn wait_for_dump(&self) -> bool {
        self.clients.wait(|state| state.dump_confirmed)
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

impl Drop for ClientEntry<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.clients.state);
        state.here -= 1;
        match self.leaves {
            Some(Leaves::ToReturn) => state.left = Some(Instant::now()),
            Some(Leaves::ForGood) => {
                state.failed = true;
                if !self.clients.timeouts.only_one {
                    state.left = Some(Instant::now());
                }
            }
            None => {}
        }
        drop(state);
        self.clients.changed.notify_all();
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;

#[cfg(test)]
mod tests {
    use super::*;

    fn timeouts(next: Duration) -> ClientTimeouts {
        ClientTimeouts {
            first: None,
            next: Some(next),
            only_one: true,
        }
    }

    #[test]
    fn a_dump_to_which_no_client_comes_is_given_up() {
        let clients = ClientTable::new(ClientTimeouts {
            first: Some(Duration::ZERO),
            ..timeouts(Duration::MAX)
        });
        let other = clients.enter();
        assert_eq!(clients.wait_for_outcome(|| true), DumpOutcome::Stopped);
        drop(other);
        assert_eq!(clients.wait_for_outcome(|| false), DumpOutcome::NobodyCame);
    }

    #[test]
    fn with_room_for_others_a_failed_client_is_one_that_has_left() {
        let several = |next| ClientTimeouts {
            only_one: false,
            ..timeouts(next)
        };
        for (next, outcome) in [
            (Duration::MAX, DumpOutcome::Stopped),
            (Duration::ZERO, DumpOutcome::GivenUp),
        ] {
            let clients = ClientTable::new(several(next));
            let mut failed = clients.enter();
            failed.leave_for_good();
            drop(failed);
            let stopped = outcome == DumpOutcome::Stopped;
            assert_eq!(clients.wait_for_outcome(|| stopped), outcome);
        }
    }

    fn served(clients: &ClientTable) -> ClientEntry<'_> {
        let mut entry = clients.enter();
        entry.may_return();
        entry
    }

    #[test]
    fn a_client_that_has_failed_is_not_waited_for() {
        let clients = ClientTable::new(timeouts(Duration::MAX));
        let (mut first, for_faults) = (clients.enter(), clients.enter());
        first.leave_for_good();
        drop(first);
        assert_eq!(clients.wait_for_outcome(|| true), DumpOutcome::Stopped);
        // Whichever of its connections ends last.
        drop(for_faults);
        assert_eq!(clients.wait_for_outcome(|| false), DumpOutcome::Failed);
    }

    #[test]
    fn another_client_than_the_one_that_has_failed_may_come_back() {
        let clients = ClientTable::new(timeouts(Duration::MAX));
        drop(served(&clients));
        let mut failed = clients.enter();
        failed.leave_for_good();
        drop(failed);
        assert_eq!(clients.wait_for_outcome(|| true), DumpOutcome::Stopped);
    }

    #[test]
    fn the_dump_is_given_up_only_when_nobody_comes_back() {
        let clients = ClientTable::new(timeouts(Duration::ZERO));
        drop(clients.enter());
        assert_eq!(
            clients.wait_for_outcome(|| true),
            DumpOutcome::Stopped,
            "another client has gone"
        );
        let first = served(&clients);
        assert_eq!(clients.wait_for_outcome(|| true), DumpOutcome::Stopped);
        drop(first);
        assert_eq!(clients.wait_for_outcome(|| false), DumpOutcome::GivenUp);
        let second = clients.enter();
        assert!(!second.confirm(), "its dump has been given up");
        drop(second);
        clients.wait_until_gone(|| false, false);
        assert!(!clients.confirmed());
    }

    #[test]
    fn a_client_that_has_everything_ends_the_dump_whatever_comes_then() {
        let clients = ClientTable::new(timeouts(Duration::ZERO));
        let mut client = clients.enter();
        assert!(client.confirm());
        client.leave_for_good();
        drop(client);
        assert_eq!(clients.wait_for_outcome(|| true), DumpOutcome::Confirmed);
        let another = clients.enter();
        assert!(another.confirm(), "with --keep there may be more");
        clients.dump_ended(true);
        clients.dump_ended(false);
        assert!(another.wait_for_dump(), "its end does not change");
    }
}
