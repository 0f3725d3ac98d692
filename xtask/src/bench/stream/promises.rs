//! What pageferry promises of ferry, judged by the cases that were measured.

use super::super::bars::Bar;
use super::super::stats::Sample;
use super::subject::Memory;
use super::{CaseResult, Contender, LinkKind, Metric, Which};

/// Of CRIU's time, where so much changes.
const LATER_TIME: f64 = 1.0 / 6.0;
const LATER_BYTES: f64 = 1.0 / 15.0;
const LATER_PERCENT: u32 = 2;
const REDIS_BYTES: f64 = 0.5;
/// Of the plain page server's time.
const RANDOM_TIME: f64 = 1.03;
const LOOPBACK_TIME: f64 = 2.0;

/// All promises, judged as far as `results` can.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    let of = |memory: Memory, link: LinkKind, percent: Option<u32>| {
        results.iter().find(move |result| {
            let case = result.case;
            let share = percent.is_none_or(|percent| case.percent == percent);
            case.memory == memory && case.link == link && share
        })
    };
    let ratio = |result: Option<&CaseResult>, to, which, metric| -> Option<Sample> {
        super::ratio(result?, to, which, metric)
    };
    let mixed = of(Memory::Mixed, LinkKind::Gigabit, Some(LATER_PERCENT));
    let redis = of(Memory::Redis, LinkKind::Gigabit, None);
    let random = of(Memory::Random, LinkKind::Gigabit, None);
    let near = of(Memory::Random, LinkKind::Loopback, None);
    vec![
        Bar::new(
            "2 % of mixed pages changed, 1 Gbit/s: time / CRIU",
            ratio(mixed, Contender::Criu, Which::Later, Metric::Seconds),
            LATER_TIME,
        ),
        Bar::new(
            "2 % of mixed pages changed, 1 Gbit/s: bytes / CRIU",
            ratio(mixed, Contender::Criu, Which::Later, Metric::Bytes),
            LATER_BYTES,
        ),
        Bar::new(
            "first round of Redis, 1 Gbit/s: bytes / CRIU",
            ratio(redis, Contender::Criu, Which::First, Metric::Bytes),
            REDIS_BYTES,
        ),
        Bar::new(
            "random pages, 1 Gbit/s: time / plain page-server",
            ratio(random, Contender::Plain, Which::All, Metric::Seconds),
            RANDOM_TIME,
        ),
        Bar::new(
            "random pages, loopback: time / plain page-server",
            ratio(near, Contender::Plain, Which::All, Metric::Seconds),
            LOOPBACK_TIME,
        ),
    ]
}
