//! What a run has met with, so that a test can tell whether it tested anything.

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Stats {
    pub(crate) rounds: u64,
    pub(crate) successes: u64,
    pub(crate) failures: u64,
    /// The receiver has published the round, but the sender did not hear of it.
    pub(crate) unheard: u64,
    pub(crate) crashes: u64,
    pub(crate) cuts: u64,
    pub(crate) flips: u64,
    /// Those of them that came before the recovery from an earlier one was over.
    pub(crate) cuts_in_recovery: u64,
    pub(crate) crashes_in_recovery: u64,
    pub(crate) sent_frames: u64,
    pub(crate) same_pages: u64,
    pub(crate) delta_pages: u64,
    /// Pages that were named as those of another process of the round.
    pub(crate) shared_pages: u64,
    pub(crate) learned_hashes: u64,
    /// Frames that came before their turn, and that came twice.
    pub(crate) held_frames: u64,
    pub(crate) repeated_frames: u64,
    /// Batches that the receiver refused, for it has other bases than the sender meant.
    pub(crate) disagreements: u64,
    /// Rounds that were cut somewhere and succeeded.
    pub(crate) resumed_rounds: u64,
    /// The traces of all rounds together.
    pub(crate) trace: u64,
}

impl Stats {
    pub(crate) fn add(&mut self, other: &Stats) {
        self.rounds += other.rounds;
        self.successes += other.successes;
        self.failures += other.failures;
        self.unheard += other.unheard;
        self.crashes += other.crashes;
        self.cuts += other.cuts;
        self.flips += other.flips;
        self.cuts_in_recovery += other.cuts_in_recovery;
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.sent_frames += other.sent_frames;
        self.same_pages += other.same_pages;
        self.delta_pages += other.delta_pages;
        self.shared_pages += other.shared_pages;
        self.learned_hashes += other.learned_hashes;
        self.held_frames += other.held_frames;
        self.repeated_frames += other.repeated_frames;
        self.disagreements += other.disagreements;
        self.resumed_rounds += other.resumed_rounds;
        self.trace = self.trace.rotate_left(5) ^ other.trace;
    }
}
