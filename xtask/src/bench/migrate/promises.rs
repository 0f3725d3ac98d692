//! What pageferry promises of migrations, at 1 Gbit/s with 2 % of the pages written in a second.

use super::super::bars::Bar;
use super::{CaseResult, Contender, LinkKind, Metric, ratio};

/// Sizes of memory that promises are about, MiB.
const SIZES_MIB: [u32; 2] = [1024, 4096];
const PERCENT: u32 = 2;

const PAUSE_TO_FLOOR: f64 = 1.4;
const HYBRID_TO_CRIU_COLD: f64 = 1.0 / 25.0;
const PRE_COPY_TO_CRIU_COLD: f64 = 1.0 / 6.0;
const COMPLETE_TO_POST_COPY: f64 = 0.25;
const WIRE_TO_ONE_COPY: f64 = 1.15;

/// All promises, judged as far as `results` can.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    SIZES_MIB
        .iter()
        .flat_map(|&mib| of_size(results, mib))
        .collect()
}

fn of_size(results: &[CaseResult], mib: u32) -> Vec<Bar> {
    use Contender::{Cold, CriuCold, CriuPostCopy, Hybrid, PostCopy, PreCopy};
    use Metric::{Complete, Floor, Pause, Wire};
    let result = results.iter().find(|result| {
        let case = result.case;
        (case.mib, case.percent, case.link) == (mib, PERCENT, LinkKind::Gigabit)
    });
    let of = |who, to| result.and_then(|result| ratio(result, who, to));
    let bar =
        |what: &str, who, to, limit| Bar::new(format!("{mib} MiB: {what}"), of(who, to), limit);
    let floor = (CriuPostCopy, Floor);
    let mut bars = vec![
        bar(
            "hybrid's pause / floor",
            (Hybrid, Pause),
            floor,
            PAUSE_TO_FLOOR,
        ),
        bar(
            "hybrid's pause / CRIU cold",
            (Hybrid, Pause),
            (CriuCold, Pause),
            HYBRID_TO_CRIU_COLD,
        ),
    ];
    if mib == SIZES_MIB[0] {
        bars.extend([
            bar(
                "hybrid complete after the resume / post-copy",
                (Hybrid, Complete),
                (PostCopy, Complete),
                COMPLETE_TO_POST_COPY,
            ),
            bar(
                "hybrid's bytes / one copy by ferry (cold)",
                (Hybrid, Wire),
                (Cold, Wire),
                WIRE_TO_ONE_COPY,
            ),
            bar(
                "pre-copy's pause / CRIU cold",
                (PreCopy, Pause),
                (CriuCold, Pause),
                PRE_COPY_TO_CRIU_COLD,
            ),
            bar(
                "post-copy's pause / floor",
                (PostCopy, Pause),
                floor,
                PAUSE_TO_FLOOR,
            ),
        ]);
    }
    bars
}
