//! When rounds of pre-copy end, and how long the processes would stand still.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a migration carries memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Freeze, dump, send, restore.
    Cold,
    /// Rounds while the processes run; then freeze, send what changed, restore.
    PreCopy,
    /// Freeze, send the execution state, resume there; memory follows.
    PostCopy,
    /// Rounds, then post-copy of what changed.
    Hybrid,
}

impl Mode {
    /// Whether rounds come before the freeze.
    pub fn has_rounds(self) -> bool {
        matches!(self, Mode::PreCopy | Mode::Hybrid)
    }

    /// Whether processes run at the destination before all their memory is there.
    pub fn is_lazy(self) -> bool {
        matches!(self, Mode::PostCopy | Mode::Hybrid)
    }

    /// Its name, as `--mode` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Cold => "cold",
            Mode::PreCopy => "pre-copy",
            Mode::PostCopy => "post-copy",
            Mode::Hybrid => "hybrid",
        }
    }
}

/// What to do when rounds end without the promised downtime in reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnMissed {
    /// Freeze all the same.
    Proceed,
    /// Go on as post-copy, whose downtime does not depend on what changes.
    PostCopy,
    /// Leave the processes where they are.
    Cancel,
}

/// What a user allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The longest downtime that is wanted; none: as short as rounds make it.
    pub max_downtime: Option<Duration>,
    /// The most rounds.
    pub max_rounds: u32,
    /// What happens when the downtime is out of reach.
    pub on_missed: OnMissed,
    /// Whether the processes may be slowed when rounds do not shrink.
    pub throttles: bool,
}

/// What one round did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
pub struct RoundResult {
    /// Pages that were new or had changed.
    pub pages: u64,
    /// Bytes that left the source for them.
    pub bytes: u64,
    /// From its start to the destination's message that all is stored, ms.
    pub ms: u64,
}

/// What a freeze costs on these hosts. The defaults are medians of `cargo xtask bench migrate --size 1024 --dirty 2 --link
/// gigabit` on two quiet CPUs with CRIU 4.2.1: docs/performance.md.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Costs {
    /// A dump and a restore that move no memory, ms.
    pub base_ms: f64,
    /// What CRIU needs for each GiB of a lazy dump (it maps all of it into pipes), ms.
    pub lazy_ms_per_gib: f64,
    /// What CRIU and the comparison by hash need for each GiB that a dump writes into files, ms.
    pub dump_ms_per_gib: f64,
    /// What CRIU and the forwarder need for each GiB of a whole dump: all of it is packed and sent, ms.
    pub forward_ms_per_gib: f64,
    /// What a comparison by hash needs for each GiB of memory that a lazy dump has stopped, ms.
    pub compare_ms_per_gib: f64,
    /// What CRIU needs to read a GiB of images into the restored processes, ms.
    pub restore_ms_per_gib: f64,
    /// The link, bytes a second.
    pub bytes_per_s: f64,
}

impl Default for Costs {
    fn default() -> Costs {
        Costs {
            base_ms: 105.0,
            lazy_ms_per_gib: 115.0,
            dump_ms_per_gib: 1_050.0,
            forward_ms_per_gib: 2_400.0,
            compare_ms_per_gib: 650.0,
            restore_ms_per_gib: 690.0,
            bytes_per_s: 110e6,
        }
    }
}

/// What [`HostFacts::copy_us_per_gib`] was where the defaults of [`Costs`] were measured.
///
/// [`HostFacts::copy_us_per_gib`]: super::messages::HostFacts::copy_us_per_gib
const MEASURED_COPY_US_PER_GIB: f64 = 730_000.0;

/// How much slower or faster than those hosts a host is taken to be at most.
const SPEED_FACTORS: std::ops::RangeInclusive<f64> = 0.25..=8.0;

impl Costs {
    /// The costs on hosts that copy memory at other speeds (µs for a GiB, 0: not known): most of what CRIU does is to
    /// copy memory.
    #[must_use]
    pub fn on_hosts(self, source_us_per_gib: u64, destination_us_per_gib: u64) -> Costs {
        let factor = |us_per_gib: u64| match us_per_gib {
            0 => 1.0,
            us => (to_f64(us) / MEASURED_COPY_US_PER_GIB)
                .clamp(*SPEED_FACTORS.start(), *SPEED_FACTORS.end()),
        };
        let (source, destination) = (factor(source_us_per_gib), factor(destination_us_per_gib));
        Costs {
            base_ms: self.base_ms * f64::midpoint(source, destination),
            lazy_ms_per_gib: self.lazy_ms_per_gib * source,
            dump_ms_per_gib: self.dump_ms_per_gib * source,
            forward_ms_per_gib: self.forward_ms_per_gib * source,
            compare_ms_per_gib: self.compare_ms_per_gib * source,
            restore_ms_per_gib: self.restore_ms_per_gib * destination,
            bytes_per_s: self.bytes_per_s,
        }
    }
}

/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;

/// How long the processes would stand still if they were frozen now: `memory_bytes` in all, of which
/// `changed_bytes` have yet to travel. Of all, a lazy restore needs `eager_bytes` first: as long as it is not known which
/// of them have changed, all that changed may be of them.
pub fn predict_downtime(
    mode: Mode,
    costs: &Costs,
    memory_bytes: u64,
    changed_bytes: u64,
    eager_bytes: u64,
) -> Duration {
    let gib = to_f64(memory_bytes) / GIB;
    let travel_ms = |bytes: u64| to_f64(bytes) / costs.bytes_per_s.max(1.0) * 1e3;
    let ms = match mode {
        Mode::Cold => {
            let dump = gib * costs.forward_ms_per_gib;
            // Sending overlaps with dumping.
            dump.max(travel_ms(changed_bytes)) + gib * costs.restore_ms_per_gib
        }
        Mode::PreCopy => {
            let dump = gib * costs.lazy_ms_per_gib;
            // Sending overlaps with comparing.
            let compare = gib * costs.compare_ms_per_gib;
            dump + compare.max(travel_ms(changed_bytes)) + gib * costs.restore_ms_per_gib
        }
        Mode::PostCopy | Mode::Hybrid => {
            // CRIU writes it into files, where it is read and compared, and reads it again at the destination.
            let eager_ms_per_gib = costs.dump_ms_per_gib + costs.restore_ms_per_gib;
            let eager = to_f64(eager_bytes) / GIB * eager_ms_per_gib;
            gib * costs.lazy_ms_per_gib + eager + travel_ms(eager_bytes.min(changed_bytes))
        }
    };
    Duration::from_secs_f64((costs.base_ms + ms) / 1e3)
}

/// The nearest float; bytes of memory are far below 2^53.
#[allow(clippy::cast_precision_loss)]
pub(super) fn to_f64(count: u64) -> f64 {
    count as f64
}

/// What to do after a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// One more round.
    Again,
    /// One more round, and from now on the processes are slowed.
    Throttle,
    /// The downtime is in reach, or as short as rounds make it.
    Freeze,
    /// It is not: what the user wants then.
    Missed(OnMissed),
}

/// How long the processes go on until a freeze has stopped them, s.
const STOPPING_S: f64 = 0.1;

/// The nearest count; below 0: 0.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

/// A round that changes at least this share of what the one before did is no progress.
const STALLED: f64 = 0.8;

/// How the rounds of one migration have gone.
#[derive(Clone, Debug, Default)]
pub struct Convergence {
    rounds: Vec<RoundResult>,
    /// Bytes that would have to travel if the processes were frozen now.
    expected_bytes: Option<u64>,
    /// Rounds before the processes were slowed.
    throttled_after: Option<usize>,
}

impl Convergence {
    /// The rounds so far.
    pub fn rounds(&self) -> &[RoundResult] {
        &self.rounds
    }

    /// Bytes that would have to travel if the processes were frozen now; `None` as long as nothing tells.
    pub fn expected_bytes(&self) -> Option<u64> {
        self.expected_bytes
    }

    /// Notes what `round`, the last one, leaves for the next: `written` pages have changed since it began, which is
    /// `since` ago. Where that is not known, as much as in the last round, if it was not the first.
    pub fn expect(&mut self, round: &RoundResult, written: Option<u64>, since: Duration) {
        let again = (!self.rounds.is_empty()).then_some(round.bytes);
        let expected = written.filter(|_| round.pages > 0).map(|written| {
            let until_stopped = 1.0 + STOPPING_S / since.as_secs_f64().max(STOPPING_S);
            let bytes_per_page = to_f64(round.bytes) / to_f64(round.pages);
            rounded(to_f64(written) * until_stopped * bytes_per_page)
        });
        self.expected_bytes = expected.or(again);
    }

    /// Notes a round, after which the downtime would be `predicted`, and decides.
    pub fn add(&mut self, round: RoundResult, predicted: Duration, limits: &Limits) -> Decision {
        self.rounds.push(round);
        // Rounds of processes that were not slowed yet say nothing of those that are.
        let comparable = &self.rounds[self.throttled_after.unwrap_or(0)..];
        let stalled = match comparable {
            [.., before, last] => to_f64(last.bytes) >= STALLED * to_f64(before.bytes),
            _ => false,
        };
        let last_chance = self.rounds.len() >= limits.max_rounds as usize;
        let may_throttle = limits.throttles && self.throttled_after.is_none() && !last_chance;
        match limits.max_downtime {
            Some(most) if predicted <= most => Decision::Freeze,
            _ if stalled && may_throttle => {
                self.throttled_after = Some(self.rounds.len());
                Decision::Throttle
            }
            Some(_) if stalled || last_chance => Decision::Missed(limits.on_missed),
            None if stalled || last_chance => Decision::Freeze,
            _ => Decision::Again,
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::float_cmp,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]
mod tests {
    use super::*;

    fn round(bytes: u64) -> RoundResult {
        RoundResult {
            pages: bytes >> 12,
            bytes,
            ms: 100,
        }
    }

    const LIMITS: Limits = Limits {
        max_downtime: Some(Duration::from_millis(300)),
        max_rounds: 4,
        on_missed: OnMissed::Cancel,
        throttles: false,
    };

    #[test]
    fn costs_follow_the_speed_of_each_host() {
        let (reference, costs) = (MEASURED_COPY_US_PER_GIB as u64, Costs::default());
        assert_eq!(costs.on_hosts(0, 0), costs);
        assert_eq!(costs.on_hosts(reference, reference), costs);
        let slow_source = costs.on_hosts(3 * reference, reference);
        assert_eq!(slow_source.dump_ms_per_gib, 3.0 * costs.dump_ms_per_gib);
        assert_eq!(slow_source.restore_ms_per_gib, costs.restore_ms_per_gib);
        assert_eq!(slow_source.base_ms, 2.0 * costs.base_ms);
        let odd = costs.on_hosts(u64::MAX, 1);
        assert_eq!(odd.dump_ms_per_gib, 8.0 * costs.dump_ms_per_gib);
        assert_eq!(odd.restore_ms_per_gib, costs.restore_ms_per_gib / 4.0);
    }

    #[test]
    fn what_was_written_since_a_round_began_is_expected_to_travel() {
        let mut rounds = Convergence::default();
        let second = Duration::from_secs(1);
        assert_eq!(rounds.expected_bytes(), None);
        // Nothing tells after the first round, since that sent everything.
        rounds.expect(&round(1 << 30), None, second);
        assert_eq!(rounds.expected_bytes(), None);
        let first = RoundResult {
            pages: 1000,
            bytes: 2_000_000,
            ms: 1000,
        };
        rounds.expect(&first, Some(100), second);
        assert_eq!(rounds.expected_bytes(), Some(220_000));
        rounds.expect(&first, Some(0), Duration::ZERO);
        assert_eq!(rounds.expected_bytes(), Some(0));
        rounds.add(first, second, &LIMITS);
        rounds.expect(&round(5000), None, second);
        assert_eq!(rounds.expected_bytes(), Some(5000));
        let empty = RoundResult { pages: 0, ..first };
        rounds.expect(&empty, Some(9), second);
        assert_eq!(rounds.expected_bytes(), Some(2_000_000));
    }

    #[test]
    fn rounds_end_when_the_downtime_is_in_reach() {
        let mut rounds = Convergence::default();
        let far = Duration::from_secs(2);
        assert_eq!(rounds.add(round(1 << 30), far, &LIMITS), Decision::Again);
        let near = Duration::from_millis(299);
        assert_eq!(rounds.add(round(1 << 20), near, &LIMITS), Decision::Freeze);
    }

    #[test]
    fn rounds_that_stop_shrinking_miss() {
        let mut rounds = Convergence::default();
        let far = Duration::from_secs(2);
        assert_eq!(rounds.add(round(1000), far, &LIMITS), Decision::Again);
        assert_eq!(rounds.add(round(500), far, &LIMITS), Decision::Again);
        let missed = Decision::Missed(OnMissed::Cancel);
        assert_eq!(rounds.add(round(450), far, &LIMITS), missed);
    }

    #[test]
    fn processes_are_slowed_once_before_the_downtime_is_missed() {
        let limits = Limits {
            max_rounds: 9,
            throttles: true,
            ..LIMITS
        };
        let far = Duration::from_secs(2);
        let missed = Decision::Missed(OnMissed::Cancel);
        let expected = [
            (1000, Decision::Again),
            (900, Decision::Throttle),
            // The first of the slowed ones has none to be compared with.
            (890, Decision::Again),
            (400, Decision::Again),
            (390, missed),
        ];
        let mut rounds = Convergence::default();
        for (bytes, decision) in expected {
            assert_eq!(rounds.add(round(bytes), far, &limits), decision, "{bytes}");
        }
    }

    #[test]
    fn the_last_round_slows_nobody() {
        let limits = Limits {
            max_rounds: 2,
            throttles: true,
            ..LIMITS
        };
        let mut rounds = Convergence::default();
        let far = Duration::from_secs(2);
        rounds.add(round(1000), far, &limits);
        let missed = Decision::Missed(OnMissed::Cancel);
        assert_eq!(rounds.add(round(1000), far, &limits), missed);
    }

    #[test]
    fn rounds_are_bounded_and_without_a_promise_none_is_missed() {
        for (max_downtime, last) in [
            (LIMITS.max_downtime, Decision::Missed(OnMissed::Cancel)),
            (None, Decision::Freeze),
        ] {
            let limits = Limits {
                max_downtime,
                ..LIMITS
            };
            let mut rounds = Convergence::default();
            let far = Duration::from_secs(2);
            for shift in 0..3 {
                let next = rounds.add(round(1 << (20 - shift)), far, &limits);
                assert_eq!(next, Decision::Again);
            }
            assert_eq!(rounds.add(round(1 << 16), far, &limits), last);
        }
    }

    #[test]
    fn lazy_modes_wait_for_what_is_not_lazy_alone() {
        let costs = Costs {
            dump_ms_per_gib: 1_050.0,
            restore_ms_per_gib: 650.0,
            ..Costs::default()
        };
        let predict = |changed, eager| {
            predict_downtime(Mode::Hybrid, &costs, 1 << 30, changed, eager).as_millis()
        };
        let lazy = predict(1 << 28, 0);
        assert_eq!(predict(1 << 28, 110_000_000) - lazy, 1174);
        // What has not changed is there.
        assert_eq!(predict(11_000_000, 110_000_000) - lazy, 274);
        let lazy = predict_downtime(Mode::Hybrid, &costs, 1 << 30, 1 << 28, 0);
        let cold = predict_downtime(Mode::Cold, &costs, 1 << 30, 1 << 30, 0);
        assert!(cold > lazy * 10);
    }
}
