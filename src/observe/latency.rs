//! Fault latencies, kept as a histogram: any number of them in a few KiB.

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;

/// Longest latency that is told apart, µs: an hour. Longer ones count as that.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// A histogram of latencies in µs, exact to two digits.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

/// The latencies in a few numbers, all but `count` in µs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, JsonSchema)]
pub struct LatencySummary {
    /// How many there were.
    pub count: u64,
    /// Half were at most this long, µs.
    pub p50_us: u64,
    /// 90 % were at most this long, µs.
    pub p90_us: u64,
    /// 99 % were at most this long, µs.
    pub p99_us: u64,
    /// The longest, µs.
    pub max_us: u64,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies(Histogram::new_with_max(LATENCY_MAX_US, 2).expect("valid bounds"))
    }
}

impl Latencies {
    /// Adds a latency of `us` µs.
    pub fn record(&mut self, us: u64) {
        self.0.saturating_record(us.min(LATENCY_MAX_US));
    }

    /// The latencies in a few numbers.
    pub fn summary(&self) -> LatencySummary {
        LatencySummary {
            count: self.0.len(),
            p50_us: self.0.value_at_quantile(0.5),
            p90_us: self.0.value_at_quantile(0.9),
            p99_us: self.0.value_at_quantile(0.99),
            max_us: self.0.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_percent() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.summary(), LatencySummary::default());
        (1..=10_000).for_each(|us| latencies.record(us));
        let summary = latencies.summary();
        assert_eq!(summary.count, 10_000);
        assert!(summary.p50_us.abs_diff(5_000) <= 50);
        assert!(summary.p99_us.abs_diff(9_900) <= 99);
        assert!(summary.max_us.abs_diff(10_000) <= 100);
    }
}
