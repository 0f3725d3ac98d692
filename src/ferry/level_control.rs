//! Which zstd level: the one that keeps both the processor and the link busy.
//!
//! Compressing and sending go on at the same time, so a batch costs the longer of the two:
//!
//! ```text
//! cost(level) = max( time to compress a byte / encoders,  ratio x time to carry a byte )
//! ```
//!
//! On a slow link the right side rules and a higher level wins; on a fast one the left side does,
//! and no compression wins. All rates are measured: the engine tells what each batch cost and how
//! fast the link was while it had something to carry. Levels next to the best one are tried again
//! now and then, because memory changes its nature as the addresses go up.

use std::time::Duration;

/// How hard fresh pages are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// Not at all.
    None,
    /// At this level of zstd.
    Zstd(i32),
}

/// The levels in use, with what is believed of each before it was measured: nanoseconds a byte and
/// compressed bytes a byte (typical heaps, one core of 2020s servers).
const LEVELS: [(Level, f64, f64); 6] = [
    (Level::None, 0.05, 1.0),
    (Level::Zstd(-5), 0.9, 0.55),
    (Level::Zstd(1), 1.8, 0.42),
    (Level::Zstd(3), 3.0, 0.39),
    (Level::Zstd(6), 9.0, 0.36),
    (Level::Zstd(9), 18.0, 0.35),
];

/// Weight of a new measurement against all earlier ones.
const NEWEST: f64 = 0.15;

/// One batch in so many tries the level above or below the best.
const TRY_NEIGHBOUR_EVERY: u32 = 32;

/// What is believed of the link before it was measured, nanoseconds a byte: 10 Gbit/s.
const LINK_AT_FIRST: f64 = 0.8;

/// Processor time counts a little even where the link rules, so that a level which gains nothing
/// is not chosen.
const PROCESSOR_SHARE: f64 = 0.05;

#[derive(Clone, Copy, Debug)]
struct Rate {
    nanos_per_byte: f64,
    ratio: f64,
}

/// Chooses the level of each batch from what the ones before have cost.
#[derive(Clone, Debug)]
pub struct LevelControl {
    rates: [Rate; LEVELS.len()],
    link_nanos_per_byte: f64,
    encoders: f64,
    batches: u32,
}

impl LevelControl {
    /// For `encoders` threads that compress at the same time.
    pub fn new(encoders: u32) -> LevelControl {
        LevelControl {
            rates: LEVELS.map(|(_, nanos_per_byte, ratio)| Rate {
                nanos_per_byte,
                ratio,
            }),
            link_nanos_per_byte: LINK_AT_FIRST,
            encoders: f64::from(encoders.max(1)),
            batches: 0,
        }
    }

    /// From now on `encoders` threads compress at the same time; what was measured stays.
    pub fn set_encoders(&mut self, encoders: u32) {
        self.encoders = f64::from(encoders.max(1));
    }

    /// The level for the next batch.
    pub fn level(&mut self) -> Level {
        self.batches = self.batches.wrapping_add(1);
        let best = self.best();
        let turn = self.batches / TRY_NEIGHBOUR_EVERY;
        let at = match (self.batches % TRY_NEIGHBOUR_EVERY, turn % 2) {
            (0, 0) => (best + 1).min(LEVELS.len() - 1),
            (0, _) => best.saturating_sub(1),
            _ => best,
        };
        LEVELS[at].0
    }

    fn best(&self) -> usize {
        let costs = self.rates.map(|rate| {
            let processor = rate.nanos_per_byte / self.encoders;
            let link = rate.ratio * self.link_nanos_per_byte;
            processor.max(link) + PROCESSOR_SHARE * processor
        });
        let cheapest = costs.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
        cheapest.map_or(0, |(at, _)| at)
    }

    /// `plain` bytes of fresh pages became `packed` bytes at `level`, which took `took`.
    pub fn observe_batch(&mut self, level: Level, plain: u64, packed: u64, took: Duration) {
        let Some(at) = LEVELS.iter().position(|(other, ..)| *other == level) else {
            return;
        };
        if plain == 0 {
            return;
        }
        let rate = &mut self.rates[at];
        blend(&mut rate.nanos_per_byte, nanos(took) / bytes(plain));
        blend(&mut rate.ratio, bytes(packed) / bytes(plain));
    }

    /// The link carried `carried` bytes in `busy`, a time in which it always had something to
    /// carry.
    pub fn observe_link(&mut self, carried: u64, busy: Duration) {
        if carried > 0 {
            blend(&mut self.link_nanos_per_byte, nanos(busy) / bytes(carried));
        }
    }
}

fn blend(old: &mut f64, new: f64) {
    *old += (new - *old) * NEWEST;
}

#[expect(clippy::cast_precision_loss, reason = "rates are estimates")]
fn bytes(count: u64) -> f64 {
    count as f64
}

fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs 2000 batches of memory with fixed rates per level over a link of `link` ns a byte and
    /// returns how often each level was chosen in the last half.
    fn chosen(link: f64, cost: impl Fn(Level) -> (f64, f64)) -> Vec<(Level, usize)> {
        let mut level_control = LevelControl::new(1);
        let mut counts = LEVELS.map(|(level, ..)| (level, 0)).to_vec();
        const BATCH: u64 = 256 << 10;
        for round in 0..2000 {
            let level = level_control.level();
            let (nanos_per_byte, ratio) = cost(level);
            let size = bytes(BATCH);
            let packed = (size * ratio).round();
            let took = Duration::from_secs_f64(size * nanos_per_byte / 1e9);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let packed = packed as u64;
            level_control.observe_batch(level, BATCH, packed, took);
            let busy = Duration::from_secs_f64(bytes(packed) * link / 1e9);
            level_control.observe_link(packed, busy);
            if round >= 1000 {
                let count = counts.iter_mut().find(|(other, _)| *other == level);
                count.expect("a known level").1 += 1;
            }
        }
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        counts
    }

    /// Rates of a typical heap.
    fn heap(level: Level) -> (f64, f64) {
        let found = LEVELS.iter().find(|(other, ..)| *other == level);
        let (_, nanos_per_byte, ratio) = *found.expect("a known level");
        (nanos_per_byte * 1.3, ratio * 0.9)
    }

    #[test]
    fn a_fast_link_gets_no_compression() {
        let (level, count) = chosen(0.3, heap)[0];
        assert_eq!(level, Level::None);
        assert!(count > 900, "{count}");
    }

    #[test]
    fn a_gigabit_link_gets_compression() {
        let (level, count) = chosen(8.5, heap)[0];
        assert!(matches!(level, Level::Zstd(1..=3)), "{level:?}");
        assert!(count > 900, "{count}");
    }

    #[test]
    fn a_slower_link_gets_a_higher_level() {
        let (level, _) = chosen(80.0, heap)[0];
        assert!(matches!(level, Level::Zstd(6..)), "{level:?}");
    }

    #[test]
    fn memory_that_gains_nothing_gets_no_compression_on_any_link() {
        for link in [0.3, 8.5, 80.0] {
            let random = |level| match level {
                Level::None => (0.05, 1.0),
                Level::Zstd(_) => (0.6, 1.0),
            };
            assert_eq!(chosen(link, random)[0].0, Level::None, "{link} ns a byte");
        }
    }
}
