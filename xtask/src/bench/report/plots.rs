//! Pictures of a case: every run as a point with the median, latencies by their quantiles, CPU beside time; and
//! throughput over size for several cases.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::super::document::{Case, Metric};
use super::super::table::cell;

/// Width and height, pixels.
const SIZE: (u32, u32) = (900, 380);

/// Colours that differ also for who sees few.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 120),
];

/// The quantiles that benchmarks record of latencies.
const QUANTILES: [(&str, f64); 4] = [
    ("p50 µs", 0.5),
    ("p90 µs", 0.9),
    ("p99 µs", 0.99),
    ("max µs", 1.0),
];

/// Names of metrics that are the time of a run, best first.
const TIMES: [&str; 3] = ["drained s", "downtime ms", "s"];

/// How much further than the data a logarithmic axis goes where the legend stands beside them.
const LEGEND_ROOM: f64 = 12.0;

/// How much further it goes where values stand behind points.
const VALUE_ROOM: f64 = 3.0;

/// A curve of one contender.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Draws what a case allows into `dir`, and tells the files.
pub(in super::super) fn of_case(case: &Case, dir: &Path, stem: &str) -> Result<Vec<String>> {
    let mut files = Vec::new();
    if let Some(time) = time_of(case) {
        let file = format!("{stem}-runs.svg");
        runs(case, time, &dir.join(&file))?;
        files.push(file);
        if let Some(cpu) = case.metric("CPU s") {
            let file = format!("{stem}-cpu.svg");
            beside(case, time, cpu, &dir.join(&file))?;
            files.push(file);
        }
    }
    let curves = latencies(case);
    if !curves.is_empty() {
        let file = format!("{stem}-latencies.svg");
        let title = format!(
            "{}: latency of faults (50, 90, 99, 100 %; medians of runs)",
            case.name
        );
        let axes = (
            "latency of a fault, µs",
            "share of faults up to this latency",
        );
        lines(&title, axes, true, &curves, &dir.join(&file))?;
        files.push(file);
    }
    Ok(files)
}

/// Throughput over size, for cases that differ in size alone.
pub(super) fn over_size(cases: &[Case], dir: &Path, stem: &str) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut groups: Vec<(String, Vec<(f64, &Case)>)> = Vec::new();
    for case in cases {
        let Some(mib) = case.conditions["mib"].as_f64() else {
            continue;
        };
        let mut others = case.conditions.clone();
        others["mib"] = serde_json::Value::Null;
        let key = others.to_string();
        match groups.iter_mut().find(|(have, _)| *have == key) {
            Some((_, group)) => group.push((mib, case)),
            None => groups.push((key, vec![(mib, case)])),
        }
    }
    for (number, (_, group)) in groups
        .iter()
        .filter(|(_, group)| group.len() > 1)
        .enumerate()
    {
        let mut curves: Vec<Curve> = Vec::new();
        for (mib, case) in group {
            let Some(time) = time_of(case) else {
                continue;
            };
            let to_s = if time.name.ends_with("ms") { 1e3 } else { 1.0 };
            for (at, who) in case.contenders.iter().enumerate() {
                let Some(median) = time.median(at).filter(|median| median.value > 0.0) else {
                    continue;
                };
                let point = (*mib, mib / (median.value / to_s));
                match curves.iter_mut().find(|curve| curve.name == *who) {
                    Some(curve) => curve.points.push(point),
                    None => curves.push(Curve {
                        name: who.clone(),
                        points: vec![point],
                    }),
                }
            }
        }
        let file = format!("{stem}-size-{}.svg", number + 1);
        let title = format!("Throughput over size, as in: {}", group[0].1.name);
        lines(
            &title,
            ("size, MiB", "throughput, MiB/s"),
            false,
            &curves,
            &dir.join(&file),
        )?;
        files.push(file);
    }
    Ok(files)
}

fn time_of(case: &Case) -> Option<&Metric> {
    let named = |name: &&str| case.metric(name);
    TIMES
        .iter()
        .find_map(named)
        .or_else(|| case.metrics.first())
}

/// The quantiles of each contender, as curves.
fn latencies(case: &Case) -> Vec<Curve> {
    let of = |(at, who): (usize, &String)| {
        let point = |&(name, share): &(&str, f64)| {
            let median = case.metric(name)?.median(at)?;
            (median.value > 0.0).then_some((median.value, share))
        };
        let points: Vec<(f64, f64)> = QUANTILES.iter().filter_map(point).collect();
        (points.len() > 1).then(|| Curve {
            name: who.clone(),
            points,
        })
    };
    case.contenders.iter().enumerate().filter_map(of).collect()
}

/// Each run as a point, the median as a bar; one line for each contender.
fn runs(case: &Case, metric: &Metric, path: &Path) -> Result<()> {
    let count = case.contenders.len();
    let all = (0..count).flat_map(|at| metric.of(at).map(|sample| sample.value));
    let (low, high) = log_range(all);
    let height = 110 + 34 * u32::try_from(count)?;
    let area = SVGBackend::new(path, (SIZE.0, height)).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let rows = -0.5..(count as f64 - 0.5);
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!(
                "{}: {} (points: runs; bar and number: median)",
                case.name,
                axis(&metric.name)
            ),
            ("sans-serif", 15),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(250)
        .build_cartesian_2d((low..high * VALUE_ROOM).log_scale(), rows)
        .map_err(drawing)?;
    let name = |row: &f64| {
        let at = (0..count).find(|&at| (count as f64 - 1.0 - at as f64 - row).abs() < 0.25);
        at.map(|at| case.contenders[at].clone()).unwrap_or_default()
    };
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_label_formatter(&label)
        .disable_y_mesh()
        .y_labels(count)
        .y_label_formatter(&name)
        .x_desc(axis(&metric.name))
        .draw()
        .map_err(drawing)?;
    for at in 0..count {
        let (row, colour) = (count as f64 - 1.0 - at as f64, colour(at));
        let points = metric
            .of(at)
            .map(|sample| Circle::new((sample.value, row), 4, colour.mix(0.55).filled()));
        chart.draw_series(points).map_err(drawing)?;
        if let Some(median) = metric.median(at) {
            let bar = [(median.value, row - 0.3), (median.value, row + 0.3)];
            chart
                .draw_series(LineSeries::new(bar, colour.stroke_width(3)))
                .map_err(drawing)?;
            let most = metric
                .of(at)
                .fold(median.value, |most, sample| most.max(sample.value));
            let text = Text::new(cell(Some(median)), (10, -7), ("sans-serif", 13));
            let text = EmptyElement::at((most, row)) + text;
            chart.draw_series([text]).map_err(drawing)?;
        }
    }
    area.present().map_err(drawing)
}

/// CPU time over time, a point for each run.
fn beside(case: &Case, time: &Metric, cpu: &Metric, path: &Path) -> Result<()> {
    let points = |at: usize| -> Vec<(f64, f64)> {
        let pairs = time.samples[at].iter().zip(&cpu.samples[at]);
        pairs
            .filter_map(|(time, cpu)| Some(((*time)?.value, (*cpu)?.value)))
            .collect()
    };
    let all: Vec<(f64, f64)> = (0..case.contenders.len()).flat_map(points).collect();
    let (left, right) = log_range(all.iter().map(|point| point.0));
    let (low, high) = log_range(all.iter().map(|point| point.1));
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!("{}: CPU time of the daemon, each run a point", case.name),
            ("sans-serif", 15),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        // Beside the points is room for the legend.
        .build_cartesian_2d(
            (left..right * LEGEND_ROOM).log_scale(),
            (low..high).log_scale(),
        )
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .x_desc(axis(&time.name))
        .y_desc(axis(&cpu.name))
        .draw()
        .map_err(drawing)?;
    for (at, who) in case.contenders.iter().enumerate() {
        let dots = points(at)
            .into_iter()
            .map(|point| Circle::new(point, 4, colour(at).mix(0.6).filled()));
        chart
            .draw_series(dots)
            .map_err(drawing)?
            .label(who)
            .legend(move |place| Circle::new(place, 4, colour(at).filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(drawing)?;
    area.present().map_err(drawing)
}

/// Curves with a legend; `shares` run from 0 to 1.
fn lines(
    title: &str,
    axes: (&str, &str),
    shares: bool,
    curves: &[Curve],
    path: &Path,
) -> Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (left, right) = log_range(points().map(|point| point.0));
    let top = if shares {
        1.0
    } else {
        points().map(|point| point.1).fold(0.0, f64::max) * 1.1
    };
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d((left..right).log_scale(), 0.0..top)
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .x_desc(axes.0)
        .y_desc(axes.1)
        .draw()
        .map_err(drawing)?;
    for (at, curve) in curves.iter().enumerate() {
        let line =
            LineSeries::new(curve.points.iter().copied(), colour(at).stroke_width(2)).point_size(3);
        chart
            .draw_series(line)
            .map_err(drawing)?
            .label(&curve.name)
            .legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 16, y)], colour(at).stroke_width(2))
            });
    }
    let corner = if shares {
        SeriesLabelPosition::LowerRight
    } else {
        SeriesLabelPosition::UpperLeft
    };
    chart
        .configure_series_labels()
        .position(corner)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(drawing)?;
    area.present().map_err(drawing)
}

/// What stands at an axis: the quantity in words, and its unit.
fn axis(metric: &str) -> String {
    match metric {
        "drained s" => "time until the last page, s".to_owned(),
        "pause ms" => "pause of the process, ms".to_owned(),
        "CPU s" => "CPU time, s".to_owned(),
        "s" => "time, s".to_owned(),
        _ => match metric.rsplit_once(' ') {
            Some((what, unit)) => format!("{what}, {unit}"),
            None => metric.to_owned(),
        },
    }
}

/// How far from a power of ten an end of an axis may be to be moved there: only powers of ten have labels.
const NEAR_POWER: f64 = 2.0;

/// A range around all positive values for an axis of powers of ten.
fn log_range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let positive = values.filter(|value| *value > 0.0);
    let (low, high) = positive.fold((f64::MAX, 0.0), |(low, high), value: f64| {
        (value.min(low), value.max(high))
    });
    match low <= high {
        true => {
            let (low, high) = (low / 1.3, high * 1.3);
            let below = 10_f64.powf(low.log10().floor());
            let above = 10_f64.powf(high.log10().ceil());
            (
                if low < below * NEAR_POWER { below } else { low },
                if high > above / NEAR_POWER {
                    above
                } else {
                    high
                },
            )
        }
        false => (0.1, 10.0),
    }
}

/// A number at an axis, without digits that say nothing.
#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "the form that plotters asks for"
)]
pub(in super::super) fn label(value: &f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    match text {
        "" | "0" if *value != 0.0 => format!("{value:e}"),
        _ => text.to_owned(),
    }
}

fn colour(at: usize) -> RGBColor {
    COLOURS[at % COLOURS.len()]
}

pub(in super::super) fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}
