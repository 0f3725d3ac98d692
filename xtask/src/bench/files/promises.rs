//! What pageferry promises of the last difference of files: 1 GiB with 2 % changed, at 1 Gbit/s.

use super::super::bars::Bar;
use super::super::stats::Sample;
use super::{CaseResult, Contender, Metric};

const MIB: u32 = 1024;
const PERCENT: u32 = 2;

/// Of rsync's time.
const TIME: f64 = 0.1;

/// A freeze that is no longer needs no comparison.
const SHORT_MS: f64 = 100.0;

const BYTES: f64 = 1.1;

/// All promises, judged as far as `results` can.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    let result = results
        .iter()
        .find(|result| (result.case.mib, result.case.percent) == (MIB, PERCENT));
    let median = |who, metric| result.and_then(|result| result.median(who, metric));
    let bytes = result
        .and_then(|result| result.ratio(Contender::Pageferry, Contender::Rsync, Metric::Bytes));
    let limit = median(Contender::Rsync, Metric::Last)
        .map_or(SHORT_MS, |rsync: Sample| (rsync.value * TIME).max(SHORT_MS));
    vec![
        Bar::new(
            "last difference of 1 GiB, 2 % changed: ms (a tenth of rsync's, or 100)",
            median(Contender::Pageferry, Metric::Last),
            limit,
        ),
        Bar::new(
            "last difference of 1 GiB, 2 % changed: bytes / rsync -z",
            bytes,
            BYTES,
        ),
    ]
}
