//! Whether the background stream should wait for the next fault rather than be in its way.
//!
//! A source that serves one request at a time makes a fault wait for what was asked for before it.
//! A thread whose fault was just answered often runs into the next one within microseconds; a
//! request of the stream sent in between delays it by as long as that request takes, and the source
//! would not have been idle for long anyway. So after an answer the stream holds back for a moment,
//! as long as such moments have lately ended with a fault. It is never held back for good: every so
//! often it has its turn whatever the faults do.
//!
//! ```text
//!   fault -> answer .. fault -> answer .. fault -> answer ............ fault
//!                   ^^                 ^^                 ^^^^|stream|
//!                   the next fault comes soon: hold       it did not: go, and do not hold
//!                                                         before one came soon again
//! ```

/// How long after the answer to a fault the next one is waited for, µs: to wake a thread on another
/// CPU and to read its fault takes about 60 (measured on a guest).
const HOLD_US: u64 = 100;

/// While faults follow each other the stream has a turn this often, µs: about one of four faults
/// finds it in its way, so that the median fault does not.
const TURN_US: u64 = 500;

/// See the module's text. All times are µs on one clock.
#[derive(Debug, Default)]
pub struct FaultPrediction {
    /// Faults asked for and not yet answered.
    waiting: u64,
    answered_us: Option<u64>,
    streamed_us: Option<u64>,
    /// The last fault came soon after an answer.
    is_back_to_back: bool,
}

impl FaultPrediction {
    /// A fault is asked for.
    pub fn faulted(&mut self, now_us: u64) {
        if self.waiting == 0 {
            self.is_back_to_back = self
                .answered_us
                .is_some_and(|answered| now_us.saturating_sub(answered) < HOLD_US);
        }
        self.waiting += 1;
    }

    /// The answer to a fault is complete.
    pub fn answered(&mut self, now_us: u64) {
        self.waiting = self.waiting.saturating_sub(1);
        self.answered_us = Some(now_us);
    }

    /// A request of the stream is sent.
    pub fn streamed(&mut self, now_us: u64) {
        self.streamed_us = Some(now_us);
    }

    /// Whether a fault waits for its answer, or the next one is likely to come soon.
    pub fn is_fault_due(&self, now_us: u64) -> bool {
        let soon = |answered_us| now_us < answered_us + HOLD_US;
        self.waiting > 0 || self.is_back_to_back && self.answered_us.is_some_and(soon)
    }

    /// Until when the stream holds back, unless a fault comes before; `None`: it may go now.
    pub fn holds_until_us(&self, now_us: u64) -> Option<u64> {
        let answered_us = self.answered_us.filter(|_| self.is_back_to_back)?;
        let turn_us = self.streamed_us.unwrap_or(0) + TURN_US;
        let hold_us = if self.waiting > 0 {
            turn_us
        } else {
            turn_us.min(answered_us + HOLD_US)
        };
        (now_us < hold_us).then_some(hold_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults that are answered after 100 µs, each `gap_us` after the answer to the one before.
    fn faults(gap_us: u64, count: usize) -> (FaultPrediction, u64) {
        let mut prediction = FaultPrediction::default();
        let mut now_us = 10_000;
        prediction.streamed(now_us);
        for _ in 0..count {
            now_us += gap_us;
            prediction.faulted(now_us);
            now_us += 100;
            prediction.answered(now_us);
        }
        (prediction, now_us)
    }

    #[test]
    fn the_stream_holds_while_the_next_fault_is_near() {
        let (prediction, now_us) = faults(20, 2);
        assert_eq!(prediction.holds_until_us(now_us), Some(now_us + HOLD_US));
        assert_eq!(prediction.holds_until_us(now_us + HOLD_US), None);
    }

    #[test]
    fn the_stream_does_not_wait_for_faults_that_are_far_apart() {
        let (prediction, now_us) = faults(HOLD_US, 2);
        assert_eq!(prediction.holds_until_us(now_us), None);
        assert_eq!(FaultPrediction::default().holds_until_us(0), None);
    }

    #[test]
    fn a_first_fault_after_a_pause_ends_the_holding() {
        let (mut prediction, now_us) = faults(20, 2);
        prediction.faulted(now_us + HOLD_US);
        assert_eq!(prediction.holds_until_us(now_us + HOLD_US), None);
    }

    #[test]
    fn the_stream_has_its_turn_whatever_the_faults_do() {
        let (mut prediction, now_us) = faults(20, 5);
        assert_eq!(
            prediction.holds_until_us(now_us),
            None,
            "600 us without a turn"
        );
        prediction.streamed(now_us);
        prediction.faulted(now_us + 1);
        assert_eq!(
            prediction.holds_until_us(now_us + 2),
            Some(now_us + TURN_US),
            "a fault is on the way: until the next turn"
        );
    }

    #[test]
    fn threads_that_fault_together_count_as_one_after_the_other() {
        let (mut prediction, now_us) = faults(20, 2);
        prediction.streamed(now_us);
        prediction.faulted(now_us + 10);
        prediction.faulted(now_us + 1_000);
        assert!(prediction.is_back_to_back);
    }
}
