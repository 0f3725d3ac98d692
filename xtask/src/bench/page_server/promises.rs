//! What page-server promises, judged by the cases that were measured. All rates are promised as
//! times: twice as fast is half the time.

use super::super::bars::Bar;
use super::super::stats::Sample;
use super::CaseResult;
use super::case::{Case, Contender, Feed, Link, RequestPattern};
use super::run::Metric;

const SMALL_FRAMES_TO_CRIU: f64 = 1.0 / 2.0;
const LARGE_FRAMES_TO_CRIU: f64 = 1.0 / 1.3;
const TO_SINK: f64 = 1.0 / 0.85;
const SMALL_FRAMES_CPU: f64 = 0.7;
const LARGE_FRAMES_CPU: f64 = 0.9;
const EPOLL_TO_URING: f64 = 1.0 / 0.8;
const SERVING_TO_CRIU: f64 = 1.0 / 1.5;
const TLS_OWN_ENDS_TO_CRIU: f64 = 1.0 / 1.5;
/// Of the whole server, whatever the size of the images.
const PEAK_MIB: f64 = 64.0;

/// Frames of so many pages are large.
const LARGE_FRAME_PAGES: u32 = 1024;

/// All promises, judged as far as `results` can.
pub(super) fn judge(results: &[CaseResult]) -> Vec<Bar> {
    let mut bars: Vec<Bar> = results.iter().flat_map(of_case).collect();
    bars.extend(peak_memory(results));
    bars
}

fn of_case(result: &CaseResult) -> Vec<Bar> {
    let to = |who, metric, limit, what: &str| {
        let name = format!("{}: {what}", result.case.describe());
        let ratio = result.ratio(Contender::Pageferry, who, metric);
        Bar::new(name, ratio, limit)
    };
    let to_criu = |metric, limit, what| to(Contender::Criu, metric, limit, what);
    match (result.case, result.case.link()) {
        (Case::Receive { .. }, Link::Tls) => {
            vec![to_criu(Metric::Wall, TLS_OWN_ENDS_TO_CRIU, "s / CRIU")]
        }
        (Case::Receive { feed, .. }, Link::Plain) => {
            let mut bars = Vec::new();
            let (wall, cpu) = match feed {
                Feed::Frames(1) => (Some(SMALL_FRAMES_TO_CRIU), Some(SMALL_FRAMES_CPU)),
                Feed::Frames(LARGE_FRAME_PAGES..) => {
                    (Some(LARGE_FRAMES_TO_CRIU), Some(LARGE_FRAMES_CPU))
                }
                Feed::Frames(_) | Feed::Captured => (None, None),
            };
            bars.extend(wall.map(|limit| to_criu(Metric::Wall, limit, "s / CRIU")));
            bars.extend(cpu.map(|limit| to_criu(Metric::Cpu, limit, "CPU s / CRIU")));
            bars.push(to(Contender::Sink, Metric::Wall, TO_SINK, "s / bare sink"));
            let epoll = result.ratio(Contender::Epoll, Contender::Pageferry, Metric::Wall);
            let name = format!("{}: s with epoll / with io_uring", result.case.describe());
            bars.push(Bar::new(name, epoll, EPOLL_TO_URING));
            bars
        }
        (Case::Serve { pattern, .. }, _) => match pattern {
            RequestPattern::OneByOne => vec![to_criu(Metric::P50, 1.0, "p50 / CRIU")],
            RequestPattern::Ahead { clients: 1, .. } => {
                vec![to_criu(Metric::Wall, SERVING_TO_CRIU, "s / CRIU")]
            }
            // CRIU's serves one client alone.
            RequestPattern::Ahead { .. } => Vec::new(),
        },
        (Case::Dump { .. }, _) => vec![to_criu(Metric::Wall, 1.0, "s frozen / CRIU")],
    }
}

/// The most that any run of ours needed.
fn peak_memory(results: &[CaseResult]) -> Option<Bar> {
    let peaks = results.iter().flat_map(|result| {
        let ours = result.contenders.iter().filter(|who| who.is_ours());
        ours.flat_map(|&who| result.samples(who, Metric::Peak))
            .flatten()
    });
    let most: Option<Sample> = peaks.max_by(|a, b| a.value.total_cmp(&b.value));
    Some(Bar::new(
        "peak memory of page-server, MiB",
        Some(most?),
        PEAK_MIB,
    ))
}
