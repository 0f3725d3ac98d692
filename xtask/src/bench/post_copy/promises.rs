//! What pageferry promises of post-copy, judged by the cases that were measured.
//!
//! All but those about the slow link are about loopback. A promise about CRIU compares runs of the
//! same round; one about pageferry itself compares medians.

use super::super::bars::Bar;
use super::super::rounds::Contend;
use super::super::stats::Sample;
use super::CaseResult;
use super::case::{Access, Case, Contender, LinkKind, Shape, Side};
use super::measure::Metric;

const SMALL_MIB: u32 = 256;
const MIDDLE_MIB: u32 = 1024;
const LARGE_MIB: u32 = 4096;

const RANDOM_DRAIN_S: f64 = 2.5;
const RANDOM_TO_ORDERED: f64 = 1.3;
const LARGE_TO_MIDDLE_DRAIN: f64 = 4.5;
const LARGE_TO_MIDDLE_FAULTS: f64 = 1.3;
const P50_TO_CRIU: f64 = 0.25;
const P99_TO_CRIU: f64 = 0.5;
const P50_TO_CRIU_OWN_SOURCE: f64 = 1.0 / 6.0;
/// Of the time that the link needs for the bytes.
const LINK_DRAIN: f64 = 1.15;
const FRAGMENTED_TO_WHOLE: f64 = 1.3;
const LINK_P50_US: f64 = 1600.0;
/// Of memory that is one extent a process: what an extent may take vanishes in this.
const PEAK_MIB: f64 = 64.0;

/// All promises, judged as far as `results` can.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    let measured = Measured(results);
    let mut bars = drains(measured);
    bars.extend(faults(measured));
    for result in results
        .iter()
        .filter(|result| result.case.link != LinkKind::Loopback)
    {
        bars.extend(slow_link(result));
    }
    let fragmented = results
        .iter()
        .filter(|result| result.case.shape != Shape::Whole);
    bars.extend(fragmented.flat_map(shaped));
    bars.extend(peak_memory(results));
    bars
}

/// What fragmented memory may take, by the time of whole memory and of CRIU.
fn shaped(result: &CaseResult) -> Vec<Bar> {
    let ours = result
        .contenders
        .iter()
        .filter(|who| who.side == Side::Ours && who.shape != Shape::Whole);
    let bars = ours.flat_map(|&who| {
        let most = |to: Contender| match to.side {
            Side::Ours => Some(("whole", FRAGMENTED_TO_WHOLE)),
            Side::Criu => Some(("CRIU", 1.0)),
            Side::Baseline => None,
        };
        let judged = |to: Contender| {
            let (name, most) = most(to)?;
            let what = result.case.access.name();
            let what = format!("{}, {what}: drained / {name}", who.name());
            Some(Bar::new(what, result.ratio(who, to, Metric::Drain), most))
        };
        who.rivals()
            .into_iter()
            .filter_map(judged)
            .collect::<Vec<_>>()
    });
    bars.collect()
}

#[derive(Clone, Copy)]
struct Measured<'a>(&'a [CaseResult]);

impl<'a> Measured<'a> {
    fn on_loopback(self, mib: u32, access: Access) -> Option<&'a CaseResult> {
        let link = LinkKind::Loopback;
        let shape = Shape::Whole;
        let case = Case {
            mib,
            access,
            link,
            shape,
        };
        self.0.iter().find(|result| result.case == case)
    }

    /// Pageferry's median with CRIU's dump as the source.
    fn ours(self, mib: u32, access: Access, metric: Metric) -> Option<Sample> {
        self.on_loopback(mib, access)?
            .median(Contender::PAGEFERRY, metric)
    }

    fn to_criu(self, mib: u32, access: Access, who: Contender, metric: Metric) -> Option<Sample> {
        self.on_loopback(mib, access)?
            .ratio(who, Contender::CRIU, metric)
    }
}

fn quotient(above: Option<Sample>, below: Option<Sample>) -> Option<Sample> {
    above?.ratio_to(below?)
}

fn drains(measured: Measured<'_>) -> Vec<Bar> {
    let ours = |mib, access| measured.ours(mib, access, Metric::Drain);
    let middle = ours(MIDDLE_MIB, Access::Random);
    let ordered = ours(MIDDLE_MIB, Access::Ascending);
    let large = ours(LARGE_MIB, Access::Random);
    let mut bars = vec![
        Bar::new("1 GiB at random: drained, s", middle, RANDOM_DRAIN_S),
        Bar::new(
            "1 GiB drained: at random / in order",
            quotient(middle, ordered),
            RANDOM_TO_ORDERED,
        ),
        Bar::new(
            "drained at random: 4 GiB / 1 GiB",
            quotient(large, middle),
            LARGE_TO_MIDDLE_DRAIN,
        ),
    ];
    for mib in [SMALL_MIB, MIDDLE_MIB, LARGE_MIB] {
        let ratio = measured.to_criu(mib, Access::Ascending, Contender::PAGEFERRY, Metric::Drain);
        bars.push(Bar::new(
            format!("{mib} MiB in order: drained / CRIU"),
            ratio,
            1.0,
        ));
    }
    bars
}

fn faults(measured: Measured<'_>) -> Vec<Bar> {
    let to_criu = |mib, who, metric| measured.to_criu(mib, Access::Random, who, metric);
    let growth = |metric| {
        quotient(
            measured.ours(LARGE_MIB, Access::Random, metric),
            measured.ours(MIDDLE_MIB, Access::Random, metric),
        )
    };
    vec![
        Bar::new(
            "1 GiB at random: fault p50 / CRIU",
            to_criu(MIDDLE_MIB, Contender::PAGEFERRY, Metric::P50),
            P50_TO_CRIU,
        ),
        Bar::new(
            "1 GiB at random: fault p99 / CRIU",
            to_criu(MIDDLE_MIB, Contender::PAGEFERRY, Metric::P99),
            P99_TO_CRIU,
        ),
        Bar::new(
            "1 GiB at random: fault p50 with own source / CRIU",
            to_criu(MIDDLE_MIB, Contender::OWN_SOURCE, Metric::P50),
            P50_TO_CRIU_OWN_SOURCE,
        ),
        Bar::new(
            "256 MiB at random: fault p50 / CRIU",
            to_criu(SMALL_MIB, Contender::PAGEFERRY, Metric::P50),
            1.0,
        ),
        Bar::new(
            "fault p50 at random: 4 GiB / 1 GiB",
            growth(Metric::P50),
            LARGE_TO_MIDDLE_FAULTS,
        ),
        Bar::new(
            "fault p99 at random: 4 GiB / 1 GiB",
            growth(Metric::P99),
            LARGE_TO_MIDDLE_FAULTS,
        ),
    ]
}

fn slow_link(result: &CaseResult) -> Vec<Bar> {
    let ours = result
        .contenders
        .iter()
        .filter(|&&who| who != Contender::CRIU);
    let bars = ours.flat_map(|&who| {
        let what = format!("{}, {}", result.case.describe(), who.name());
        let least = result.case.link.least_s(result.case.bytes() as f64);
        let drained = result.median(who, Metric::Drain);
        [
            Bar::new(
                format!("{what}: drained / size by rate"),
                quotient(drained, least.map(Sample::exact)),
                LINK_DRAIN,
            ),
            Bar::new(
                format!("{what}: fault p50, µs"),
                result.median(who, Metric::P50),
                LINK_P50_US,
            ),
        ]
    });
    bars.collect()
}

/// The most that any run of lazy-client needed.
fn peak_memory(results: &[CaseResult]) -> Option<Bar> {
    let whole = results
        .iter()
        .filter(|result| result.case.shape == Shape::Whole);
    let peaks = whole.flat_map(|result| {
        let ours = result
            .contenders
            .iter()
            .filter(|who| who.side == Side::Ours);
        ours.flat_map(|&who| result.samples(who, Metric::Peak))
            .flatten()
    });
    let most = peaks.max_by(|a, b| a.value.total_cmp(&b.value))?;
    Some(Bar::new(
        "peak memory of lazy-client, MiB",
        Some(most),
        PEAK_MIB,
    ))
}
