//! A move as a list of steps, which a failure replaces by the way back. Pure.
//!
//! ```text
//! steps ... Switching ... Switched ... Complete        records on the source's disk
//!   └─────────┴── failure ──> way back ── RolledBack
//! ```
//!
//! `Switched` decides: before it, whatever fails ends with the service here; after it, the steps that are left are tried,
//! each once. [`Stateless`](super::Stateless) and [`LogReplay`](super::LogReplay) are such moves.

use std::collections::VecDeque;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};

/// What the source writes down, each with an fsync before what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveRecord {
    /// The container here may have been stopped.
    Stopping,
    /// Clients may be led to the destination.
    Switching,
    /// They are, and the service lives there.
    Switched,
    /// It serves here as if nothing had happened.
    RolledBack,
    /// Nothing is left to do; it lives at the destination.
    Complete,
}

/// How a move ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MoveEnd {
    /// The service lives at the destination.
    Moved,
    /// It serves here.
    RolledBack,
    /// It is to serve on one side, and could not be started or continued there.
    Stuck,
}

/// What is to be done at the source in one kind of move.
pub trait MoveAction: Copy + PartialEq + Debug + Send + Sync + 'static {
    /// Leads clients to the destination.
    const SWITCH: Self;

    /// Lets the agent end what it has.
    const DISCARD: Self;

    /// Writes a record to disk.
    fn of_record(record: MoveRecord) -> Self;

    /// The record that it writes, if it is that.
    fn record(self) -> Option<MoveRecord>;

    /// Whether nobody serves if it fails: then the move ends, and whoever looks next finds it undone.
    fn is_vital(self) -> bool;

    /// What leads back before the agent ends what it has, by the last record that may be on disk.
    fn way_back(tried: Option<MoveRecord>) -> &'static [Self];
}

/// The source's half of one move.
#[derive(Clone, Debug)]
pub struct MoveSteps<A> {
    todo: VecDeque<A>,
    /// The last record that may be on disk, but for the one that decides.
    tried: Option<MoveRecord>,
    /// Whether the one that decides may be there.
    deciding: bool,
    end: MoveEnd,
}

impl<A: MoveAction> MoveSteps<A> {
    /// A move that begins, and goes through `todo`.
    pub(super) fn begin(todo: impl Into<VecDeque<A>>) -> MoveSteps<A> {
        MoveSteps {
            todo: todo.into(),
            tried: None,
            deciding: false,
            end: MoveEnd::Moved,
        }
    }

    /// The same move after its process died, from the last record that it wrote.
    #[must_use]
    pub fn recovered(mut self, last: Option<MoveRecord>) -> MoveSteps<A> {
        self.tried = last;
        match last {
            Some(MoveRecord::Complete) => self.todo.clear(),
            Some(MoveRecord::RolledBack) => {
                self.todo.clear();
                self.end = MoveEnd::RolledBack;
            }
            Some(MoveRecord::Switched) => {
                let decided = A::of_record(MoveRecord::Switched);
                let at = self.todo.iter().position(|&action| action == decided);
                self.todo.drain(..=at.unwrap_or(0));
            }
            None | Some(MoveRecord::Stopping | MoveRecord::Switching) => self.roll_back(),
        }
        self
    }

    /// What is to be done next; `None` at the end.
    pub fn next_action(&mut self) -> Option<A> {
        let next = self.todo.front().copied();
        match next.and_then(A::record) {
            Some(MoveRecord::Switched) => self.deciding = true,
            Some(record) => self.tried = Some(record),
            None => {}
        }
        next
    }

    /// What was to be done has been done.
    pub fn done(&mut self) {
        if let Some(record) = self.todo.pop_front().and_then(A::record) {
            self.tried = Some(record);
        }
    }

    /// What was to be done has failed, or is to be given up. Returns whether it changes the end.
    pub fn failed(&mut self) -> bool {
        match (self.may_roll_back(), self.todo.front()) {
            (true, _) => {
                self.roll_back();
                true
            }
            (false, Some(action)) if action.is_vital() => {
                self.todo.clear();
                self.end = MoveEnd::Stuck;
                true
            }
            (false, _) => {
                self.todo.pop_front();
                false
            }
        }
    }

    /// Whether a failure, or the user, can still end it with the service here.
    pub fn may_roll_back(&self) -> bool {
        let decided = matches!(
            self.tried,
            Some(MoveRecord::Switched | MoveRecord::Complete)
        );
        self.end == MoveEnd::Moved && !decided
    }

    /// How it ends, as far as is known.
    pub fn end(&self) -> MoveEnd {
        self.end
    }

    fn roll_back(&mut self) {
        // A record that may be on the disk although it could not be written is overruled first.
        let overrules = self.deciding.then(|| A::of_record(MoveRecord::Switching));
        let ends = [A::DISCARD, A::of_record(MoveRecord::RolledBack)];
        let back = A::way_back(self.tried).iter().copied();
        self.todo = overrules.into_iter().chain(back).chain(ends).collect();
        self.end = MoveEnd::RolledBack;
    }
}
