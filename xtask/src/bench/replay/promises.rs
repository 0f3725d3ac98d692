//! What pageferry promises of a move by log: a Redis with a log of 100 MiB and 5,000 writes a second, at 1 Gbit/s.

use super::super::bars::Bar;
use super::{CaseResult, Contender, Metric};

const LOG_MIB: u32 = 100;
const WRITES_PER_S: u32 = 5000;

const DOWNTIME_MS: f64 = 150.0;

/// The promise is about writes that come.
const LATE_PERCENT: f64 = 5.0;

/// All promises, judged as far as `results` can. Equal digests are no bar: a move with others fails.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    let result = results
        .iter()
        .find(|result| (result.case.log_mib, result.case.writes_per_s) == (LOG_MIB, WRITES_PER_S));
    let bar = |what: &str, metric, limit| {
        let name = format!("{LOG_MIB} MiB of log, {WRITES_PER_S} writes a second: {what}");
        let measured = result.and_then(|result| result.median(Contender::LogReplay, metric));
        Bar::new(name, measured, limit)
    };
    vec![
        bar("downtime, ms", Metric::Downtime, DOWNTIME_MS),
        bar("no client has an answer, ms", Metric::Silence, DOWNTIME_MS),
        bar("writes without an answer, %", Metric::Late, LATE_PERCENT),
    ]
}
