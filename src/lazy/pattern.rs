//! What a process's faults show about the faults to come, and so how much to bring with each.
//!
//! Several threads read in order at once, so a few sequences are followed, each with where its last fault was and
//! how often it went on the same way. A fault near the front of a sequence continues it, and twice as
//! much is read ahead as before. Three faults at one distance, too far apart for a sequence, are a
//! stride. Any other fault begins a new sequence, and stands alone for now.

use super::batched_wakeup::WAKEUP_BATCH_BYTES;

/// Sequences followed at once in a process: more threads than that fault as if at random.
const SEQUENCES: usize = 8;

/// Most pages brought with one fault: 256 KiB in 4 KiB pages.
const AHEAD_PAGES_MAX: u64 = 64;

/// How far beyond what was read ahead a fault still continues a sequence, pages: the background stream
/// may have filled what lies between.
const SLACK_PAGES: u64 = 64;

/// The same for a sequence that is known for one, pages: it may have slept for a whole batch, twice its
/// length in 4 KiB pages.
const KNOWN_SLACK_PAGES: u64 = 2 * (WAKEUP_BATCH_BYTES >> 12);

/// How many further pages of a stride are brought.
const STRIDE_PAGES: i64 = 4;

/// Missing memory of this many bytes gets blocks of one byte: their size grows with the square of it.
const BLOCK_UNIT_BYTES: u64 = 2 << 20;

/// Smallest and largest block for a fault that stands alone, bytes: what CRIU's dump serves in about
/// the time of a single page, and beyond which a fault waits longer than the memory is there sooner.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 32 << 10..=256 << 10;

/// The block to bring for a fault that stands alone, when `missed_bytes` were missing at the start:
/// the more memory, the more a fault brings, so that a reader at random comes through little memory
/// with short waits, and through much of it with few.
pub fn block_bytes(missed_bytes: u64) -> u64 {
    let wanted = (missed_bytes / BLOCK_UNIT_BYTES).saturating_pow(2);
    1 << wanted
        .clamp(*BLOCK_BYTES.start(), *BLOCK_BYTES.end())
        .ilog2()
}

/// What to fetch for a fault, in pages relative to the faulting one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultAround {
    /// Nothing is known of what comes next.
    Alone,
    /// The page and those above it, this many in all.
    Up(u64),
    /// The page and those below it, this many in all.
    Down(u64),
    /// The page, and `count` single pages at multiples of `step` pages from it.
    Stride {
        /// Distance in pages, negative for downwards.
        step: i64,
        /// How many pages besides the faulting one.
        count: i64,
    },
}

#[derive(Clone, Copy, Default, Debug)]
struct Sequence {
    last: u64,
    upwards: bool,
    /// How many faults in a row went the same way; 0 for a sequence of one fault.
    run: u32,
    used: u64,
}

impl Sequence {
    /// How many pages its last fault brought.
    fn ahead(self) -> u64 {
        1_u64
            .checked_shl(2 * self.run)
            .unwrap_or(u64::MAX)
            .clamp(1, AHEAD_PAGES_MAX)
    }

    /// Whether a fault upwards of its last would be one of a sequence upwards.
    fn leads_up(self) -> bool {
        self.upwards && self.run > 1
    }

    fn reaches(self, page: u64) -> bool {
        let slack = if self.leads_up() && page > self.last {
            KNOWN_SLACK_PAGES
        } else {
            SLACK_PAGES
        };
        self.used > 0 && self.last.abs_diff(page) <= self.ahead() + slack
    }
}

/// The sequences of one process.
#[derive(Clone, Default, Debug)]
pub struct Pattern {
    sequences: [Sequence; SEQUENCES],
    faults: u64,
    last: u64,
    stride: i64,
    strides: u32,
}

impl Pattern {
    /// Takes note of a fault on page number `page` and says what to bring.
    pub fn observe(&mut self, page: u64) -> FaultAround {
        self.faults += 1;
        let used = self.faults;
        self.observe_stride(page);
        if let Some(sequence) = self
            .sequences
            .iter_mut()
            .find(|sequence| sequence.reaches(page))
        {
            let upwards = page >= sequence.last;
            let run = if sequence.run == 0 || sequence.upwards == upwards {
                sequence.run + 1
            } else {
                0
            };
            *sequence = Sequence {
                last: page,
                upwards,
                run,
                used,
            };
            return if upwards {
                FaultAround::Up(sequence.ahead())
            } else {
                FaultAround::Down(sequence.ahead())
            };
        }
        if self.strides >= 2 {
            return FaultAround::Stride {
                step: self.stride,
                count: STRIDE_PAGES,
            };
        }
        if let Some(oldest) = self
            .sequences
            .iter_mut()
            .min_by_key(|sequence| sequence.used)
        {
            *oldest = Sequence {
                last: page,
                upwards: true,
                run: 0,
                used,
            };
        }
        FaultAround::Alone
    }

    /// Whether a sequence upwards is about to come to `page`.
    pub fn reads_up_to(&self, page: u64) -> bool {
        self.sequences
            .iter()
            .any(|sequence| sequence.leads_up() && page >= sequence.last && sequence.reaches(page))
    }

    /// Pages that were brought ahead fault no more, so a known stride goes on in multiples.
    fn observe_stride(&mut self, page: u64) {
        let step = page.wrapping_sub(self.last).cast_signed();
        self.last = page;
        let goes_on = self.stride != 0
            && step.checked_rem(self.stride) == Some(0)
            && (1..=STRIDE_PAGES + 1).contains(&(step / self.stride));
        if goes_on {
            self.strides += 1;
        } else {
            self.stride = step;
            self.strides = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many pages a fault brings that is alone or on a sequence upwards.
    fn upwards(pattern: &mut Pattern, page: u64) -> u64 {
        match pattern.observe(page) {
            FaultAround::Alone => 1,
            FaultAround::Up(pages) => pages,
            other => panic!("not upwards: {other:?}"),
        }
    }

    #[test]
    fn a_block_grows_with_the_memory_between_its_bounds() {
        for (missed_mib, block_kib) in [
            (1, 32),
            (256, 32),
            (400, 32),
            (512, 64),
            (1024, 256),
            (4096, 256),
        ] {
            assert_eq!(
                block_bytes(missed_mib << 20),
                block_kib << 10,
                "{missed_mib} MiB"
            );
        }
    }

    #[test]
    fn a_sequence_upwards_is_known_by_its_third_fault_and_left_behind() {
        let mut pattern = Pattern::default();
        for (page, sequences) in [(100, false), (101, false), (102, true), (110, true)] {
            pattern.observe(page);
            assert_eq!(pattern.reads_up_to(page + 1), sequences, "{page}");
        }
        assert!(!pattern.reads_up_to(50), "behind it");
        assert!(!pattern.reads_up_to(10_000), "far ahead of it");
        assert!(
            pattern.reads_up_to(110 + KNOWN_SLACK_PAGES),
            "after a batch in one go"
        );
    }

    #[test]
    fn a_sequence_upwards_reads_further_and_further_ahead() {
        let mut pattern = Pattern::default();
        let mut page = 1000;
        let mut brought = Vec::new();
        for _ in 0..5 {
            let pages = upwards(&mut pattern, page);
            brought.push(pages);
            page += pages;
        }
        assert_eq!(brought, [1, 4, 16, 64, 64]);
    }

    #[test]
    fn a_sequence_downwards_reads_below() {
        let mut pattern = Pattern::default();
        assert_eq!(pattern.observe(1000), FaultAround::Alone);
        assert_eq!(pattern.observe(999), FaultAround::Down(4));
        assert_eq!(pattern.observe(995), FaultAround::Down(16));
    }

    #[test]
    fn lone_faults_bring_only_themselves() {
        let mut pattern = Pattern::default();
        for page in [
            10, 9_000, 77_000, 3_000, 500_000, 123_456, 42_000, 8_888, 1_000_000,
        ] {
            assert_eq!(pattern.observe(page), FaultAround::Alone);
        }
    }

    #[test]
    fn a_wide_stride_is_followed_although_its_next_pages_fault_no_more() {
        let mut pattern = Pattern::default();
        for page in [10_000, 11_000, 12_000] {
            assert_eq!(pattern.observe(page), FaultAround::Alone);
        }
        let stride = FaultAround::Stride {
            step: 1000,
            count: STRIDE_PAGES,
        };
        assert_eq!(pattern.observe(13_000), stride);
        assert_eq!(pattern.observe(18_000), stride);
    }

    #[test]
    fn threads_that_read_in_order_at_once_do_not_disturb_each_other() {
        let mut pattern = Pattern::default();
        let mut fronts = [1_000_u64, 100_000, 200_000, 300_000];
        for round in 0..4 {
            for front in &mut fronts {
                let pages = upwards(&mut pattern, *front);
                assert_eq!(pages, [1, 4, 16, 64][round]);
                *front += pages;
            }
        }
    }
}
