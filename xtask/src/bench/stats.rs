//! Samples that may be mere bounds, and what can be said of several.
//!
//! A run that is ended at its time limit is worth something: it took at least that long. Such a
//! sample keeps its value and says that it is a bound, and medians and ratios pass that on, so that
//! no table shows a bound as if it had been measured.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a value was measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Bound {
    /// The value was measured.
    Exact,
    /// The real value is at least this.
    AtLeast,
    /// The real value is at most this.
    AtMost,
}

/// One measured value, in whatever unit its owner says.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sample {
    /// The value, in the unit that the name of the metric has.
    pub(crate) value: f64,
    /// Whether it was measured, or is a bound.
    pub(crate) bound: Bound,
}

impl Sample {
    /// A measured value.
    pub(crate) fn exact(value: f64) -> Sample {
        Sample {
            value,
            bound: Bound::Exact,
        }
    }

    /// A value that would have grown further.
    pub(crate) fn at_least(value: f64) -> Sample {
        Sample {
            value,
            bound: Bound::AtLeast,
        }
    }

    /// This one divided by another; `None` if nothing follows about it.
    pub(crate) fn ratio_to(self, other: Sample) -> Option<Sample> {
        if other.value <= 0.0 {
            return None;
        }
        let bound = match (self.bound, other.bound) {
            (bound, Bound::Exact) => bound,
            (Bound::Exact | Bound::AtMost, Bound::AtLeast) => Bound::AtMost,
            (Bound::Exact | Bound::AtLeast, Bound::AtMost) => Bound::AtLeast,
            _ => return None,
        };
        let value = self.value / other.value;
        Some(Sample { value, bound })
    }

    /// Whether the truth is at most `limit`; `None` if a bound leaves that open.
    pub(crate) fn is_at_most(self, limit: f64) -> Option<bool> {
        let within = self.value <= limit;
        match self.bound {
            Bound::Exact => Some(within),
            Bound::AtLeast => (!within).then_some(false),
            Bound::AtMost => within.then_some(true),
        }
    }
}

/// The median of several samples; of an even number the mean of the middle two.
pub(crate) fn median(samples: impl IntoIterator<Item = Sample>) -> Option<Sample> {
    let mut sorted: Vec<Sample> = samples.into_iter().collect();
    sorted.sort_by(|a, b| a.value.total_cmp(&b.value));
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = sorted[sorted.len() / 2 - 1];
    let bound = match (lower.bound, upper.bound) {
        (Bound::Exact, bound) | (bound, Bound::Exact) => bound,
        (lower, upper) if lower == upper => lower,
        _ => return None,
    };
    let value = f64::midpoint(lower.value, upper.value);
    Some(Sample { value, bound })
}

/// The median of the ratios of samples taken in the same round: what slows a whole round down
/// cancels out.
pub(crate) fn median_ratio(
    pairs: impl IntoIterator<Item = (Option<Sample>, Option<Sample>)>,
) -> Option<Sample> {
    median(pairs.into_iter().filter_map(|(a, b)| a?.ratio_to(b?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_their_bounds() {
        let exact = |values: &[f64]| median(values.iter().copied().map(Sample::exact));
        assert_eq!(exact(&[]), None);
        assert_eq!(exact(&[3.0, 1.0, 2.0]), Some(Sample::exact(2.0)));
        assert_eq!(exact(&[4.0, 1.0, 2.0, 8.0]), Some(Sample::exact(3.0)));
        let cut = [Sample::at_least(60.0), Sample::exact(1.0)];
        assert_eq!(median(cut), Some(Sample::at_least(30.5)));
        let mostly_cut = [cut[0], cut[1], cut[0]];
        assert_eq!(median(mostly_cut), Some(Sample::at_least(60.0)));
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        let pairs = [(1.0, 2.0), (10.0, 10.0), (3.0, 30.0)];
        let pairs = pairs.map(|(a, b)| (Some(Sample::exact(a)), Some(Sample::exact(b))));
        assert_eq!(median_ratio(pairs), Some(Sample::exact(0.5)));
        assert_eq!(median_ratio([(Some(Sample::exact(1.0)), None)]), None);
    }

    #[test]
    fn a_bound_never_decides_what_it_leaves_open() {
        let ours = Sample::exact(1.5);
        let limit = Sample::at_least(60.0);
        let ratio = ours.ratio_to(limit).unwrap();
        assert_eq!(ratio.bound, Bound::AtMost);
        assert_eq!(ratio.is_at_most(0.25), Some(true));
        assert_eq!(ratio.is_at_most(0.01), None);
        assert_eq!(limit.is_at_most(2.5), Some(false));
        assert_eq!(limit.is_at_most(90.0), None);
        assert_eq!(limit.ratio_to(limit), None);
    }
}
