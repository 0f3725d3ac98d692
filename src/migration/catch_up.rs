//! Whether a replay comes close to a log that grows, or falls behind it. Pure: time is an argument.

use super::convergence::to_f64;

/// Between two samples that are compared: a shorter time says more of buffers than of rates, ms.
const WINDOW_MS: u64 = 1000;

/// So little of the log is close behind its end whatever the rate is, bytes.
const CLOSE_BYTES: u64 = 16 << 10;

/// A log and its replay at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Sample {
    at_ms: u64,
    /// Bytes that are not replayed.
    left: u64,
    replayed: u64,
}

/// How a replay fares.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Progress {
    /// So many bytes are left.
    Under {
        /// Bytes of the log that are not replayed.
        left: u64,
    },
    /// What is left takes no longer than it may.
    Close,
    /// More than the limit is left, and it becomes more.
    Behind {
        /// Bytes of the log that are not replayed.
        left: u64,
        /// How many more there are each second.
        more_per_s: f64,
    },
}

/// The replay of a log that grows.
#[derive(Clone, Copy, Debug)]
pub struct CatchUp {
    /// More than so many bytes may not be left while they become more.
    limit: u64,
    /// How long the replay of what is left may take, ms.
    close_ms: u64,
    /// The last sample that another one was compared with.
    before: Option<Sample>,
    /// Bytes that are replayed each second, by the last two samples; 0 if it is not known.
    rate: f64,
    most: u64,
}

impl CatchUp {
    /// Of a replay that begins at the time 0. It is close when what is left takes `close_ms`, and is behind when more than
    /// `limit` bytes are left.
    pub fn new(limit: u64, close_ms: u64) -> CatchUp {
        CatchUp {
            limit,
            close_ms,
            before: None,
            rate: 0.0,
            most: 0,
        }
    }

    /// The most that was left, bytes.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Looks: so many bytes of the log were written by now, and so many of them replayed.
    pub fn sample(&mut self, at_ms: u64, written: u64, replayed: u64) -> Progress {
        let left = written.saturating_sub(replayed);
        self.most = self.most.max(left);
        let now = Sample {
            at_ms,
            left,
            replayed,
        };
        let before = *self.before.get_or_insert(now);
        let ms = at_ms.saturating_sub(before.at_ms);
        let (seconds, is_window) = (to_f64(ms) / 1e3, ms >= WINDOW_MS);
        let done = to_f64(replayed.saturating_sub(before.replayed));
        if is_window || (self.rate == 0.0 && seconds > 0.0) {
            self.rate = done / seconds;
        }
        if left <= CLOSE_BYTES || to_f64(left) <= self.rate * to_f64(self.close_ms) / 1e3 {
            return Progress::Close;
        }
        if !is_window {
            return Progress::Under { left };
        }
        let more_per_s = (to_f64(left) - to_f64(before.left)) / seconds;
        self.before = Some(now);
        match more_per_s >= 0.0 && left > self.limit {
            true => Progress::Behind { left, more_per_s },
            false => Progress::Under { left },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_replay_is_close_when_the_rest_takes_no_longer_than_it_may() {
        let mut replay = CatchUp::new(64 * MIB, 50);
        assert_eq!(
            replay.sample(0, 100 * MIB, 0),
            Progress::Under { left: 100 * MIB }
        );
        // 20 MiB a second: 1 MiB takes 50 ms.
        let next = replay.sample(1000, 102 * MIB, 20 * MIB);
        assert_eq!(next, Progress::Under { left: 82 * MIB });
        let next = replay.sample(5500, 111 * MIB, 110 * MIB);
        assert_eq!(next, Progress::Close);
        assert_eq!(replay.most(), 100 * MIB);
    }

    #[test]
    fn what_has_nothing_to_do_is_close() {
        assert_eq!(CatchUp::new(0, 0).sample(0, 0, 0), Progress::Close);
        assert_eq!(CatchUp::new(0, 0).sample(9, 900, 0), Progress::Close);
    }

    #[test]
    fn a_large_log_is_not_behind_as_long_as_it_becomes_less() {
        let mut replay = CatchUp::new(MIB, 50);
        for second in 1..9 {
            let next = replay.sample(second * 1000, 100 * MIB + second * MIB, 10 * second * MIB);
            assert!(matches!(next, Progress::Under { .. }), "{next:?}");
        }
    }

    #[test]
    fn one_that_is_slower_than_what_arrives_is_behind_by_so_much() {
        let mut replay = CatchUp::new(10 * MIB, 50);
        let mut behind = None;
        for tenth in 1..200 {
            let next = replay.sample(tenth * 100, 300 * 1024 * tenth, 100 * 1024 * tenth);
            if let Progress::Behind { left, more_per_s } = next {
                behind.get_or_insert((tenth, left, more_per_s));
            }
        }
        let (tenth, left, more_per_s) = behind.unwrap();
        assert_eq!((tenth, left), (61, 200 * 1024 * 61));
        assert!((more_per_s - 2_048_000.0).abs() < 1.0, "{more_per_s}");
    }
}
