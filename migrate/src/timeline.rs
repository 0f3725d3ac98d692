//! `pageferry report FILE --svg OUT`: the phases of a migration on one line of time.
//!
//! ```text
//! rounds     |--1--|-2-|3|
//! freeze                  |dump|images|restore|        red: the processes stand still
//! memory                                      |~~~~~~~~| until the last page
//! faults                                      ▂▇▅▂▁
//! ```

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::HumanBytes;
use pageferry::error::{Error, Kind, Result};

use crate::source::report::{Report, Span};

/// Size of the picture, and of its parts, pixels.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 110.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 64.0;
const ROW: f64 = 44.0;
const BAR: f64 = 24.0;
const FAULTS: f64 = 70.0;
/// Of a letter, about.
const LETTER: f64 = 6.6;
/// Most of these fit under the axis.
const TICKS: f64 = 8.0;

/// Shows the report of a migration, and draws it.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// What `pageferry migrate --report` wrote
    #[arg(value_name = "FILE")]
    report: PathBuf,

    /// Draw the migration into FILE
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Prints the table of a report, and draws it if that is wanted.
pub(crate) fn run(args: &Args) -> ExitCode {
    match show(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(args: &Args) -> Result<()> {
    let report: Report = crate::records::read(&args.report)?.ok_or_else(|| {
        let text = format!("there is no file {}", args.report.display());
        Error::new(Kind::Usage, text)
    })?;
    report.print();
    if let Some(path) = &args.svg {
        fs::write(path, draw(&report)).map_err(|error| Error::file("write", path, error))?;
    }
    Ok(())
}

/// Where a time lies in the picture.
struct Scale {
    until_ms: f64,
}

impl Scale {
    fn x(&self, ms: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (ms / self.until_ms).clamp(0.0, 1.0)
    }
}

/// The picture of a migration.
fn draw(report: &Report) -> String {
    let last = report.timeline.iter().map(|span| span.end_ms);
    let until_ms = last.fold(report.total_ms.max(1.0), f64::max);
    let scale = Scale { until_ms };
    let rows = ["rounds", "freeze", "memory"];
    let bottom = TOP + ROW * 3.0 + FAULTS + 16.0;
    let height = bottom + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    heading(&mut svg, report);
    frozen(&mut svg, report, &scale, bottom);
    axis(&mut svg, &scale, bottom);
    for (row, at) in rows.iter().zip(0_u8..) {
        let y = TOP + ROW * f64::from(at);
        label(&mut svg, row, y + BAR - 7.0);
        let spans: Vec<&Span> = report
            .timeline
            .iter()
            .filter(|span| span.row == *row)
            .collect();
        for (span, index) in spans.iter().zip(0_usize..) {
            bar(&mut svg, span, &scale, y, colour(row, index));
        }
    }
    faults(&mut svg, report, &scale, TOP + ROW * 3.0);
    svg + "</svg>\n"
}

fn heading(svg: &mut String, report: &Report) {
    let downtime = match report.downtime_ms {
        Some(ms) => format!("{} of downtime", time(ms)),
        None => "not moved".to_owned(),
    };
    let title = format!("{}: {}, {}", report.id, report.mode, report.result);
    let facts = format!(
        "{} in {} processes, {downtime}, {} sent, {} faults",
        HumanBytes(report.memory_bytes),
        report.processes,
        HumanBytes(report.wire_bytes),
        report.faults.count
    );
    let _ = write!(
        svg,
        "<text x=\"{LEFT}\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"44\" fill=\"#555555\">{}</text>\n",
        escaped(&title),
        escaped(&facts)
    );
}

/// The time in which the processes stand still, over all rows.
fn frozen(svg: &mut String, report: &Report, scale: &Scale, bottom: f64) {
    let Some(downtime) = report.downtime_ms else {
        return;
    };
    let from = scale.x(report.preparation_ms);
    let to = scale.x(report.preparation_ms + downtime);
    let (width, height) = ((to - from).max(1.0), bottom - TOP + 6.0);
    let _ = writeln!(
        svg,
        "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"#fde0dc\"/>",
        TOP - 6.0
    );
}

fn axis(svg: &mut String, scale: &Scale, bottom: f64) {
    let step = step(scale.until_ms / TICKS);
    let right = WIDTH - RIGHT;
    let _ = writeln!(
        svg,
        "<line x1=\"{LEFT}\" y1=\"{bottom:.1}\" x2=\"{right}\" y2=\"{bottom:.1}\" stroke=\"#333333\"/>"
    );
    let mut at = 0.0;
    while at <= scale.until_ms {
        let x = scale.x(at);
        let _ = write!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#00000018\"/>\n\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#333333\">{}</text>\n",
            bottom + 5.0,
            bottom + 20.0,
            time(at)
        );
        at += step;
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn step(least: f64) -> f64 {
    let power = 10_f64.powf(least.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps
        .into_iter()
        .find(|step| *step >= least)
        .unwrap_or(least)
}

fn label(svg: &mut String, text: &str, y: f64) {
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{text}</text>",
        LEFT - 12.0
    );
}

fn colour(row: &str, index: usize) -> &'static str {
    let shades = match row {
        "rounds" => ["#4c78a8", "#7ba3cc"],
        "freeze" => ["#c0392b", "#e07b6f"],
        _ => ["#54a24b", "#8cc084"],
    };
    shades[index % shades.len()]
}

fn bar(svg: &mut String, span: &Span, scale: &Scale, y: f64, colour: &str) {
    let (from, to) = (scale.x(span.start_ms), scale.x(span.end_ms));
    let width = (to - from).max(1.0);
    let name = escaped(&span.name);
    let _ = writeln!(
        svg,
        "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\">\
         <title>{name}: {}</title></rect>",
        time(span.end_ms - span.start_ms)
    );
    #[allow(clippy::cast_precision_loss)]
    let needed = span.name.chars().count() as f64 * LETTER + 6.0;
    // A name that does not fit is told by the pointer alone.
    if width >= needed {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#ffffff\">{name}</text>",
            from + width / 2.0,
            y + BAR - 8.0
        );
    }
}

/// How many faults there were in each part of the time.
fn faults(svg: &mut String, report: &Report, scale: &Scale, y: f64) {
    label(svg, "faults", y + FAULTS - 4.0);
    let most = report
        .faults
        .times
        .iter()
        .map(|bin| bin.count)
        .max()
        .unwrap_or(0);
    if most == 0 {
        return;
    }
    for bin in &report.faults.times {
        #[allow(clippy::cast_precision_loss)]
        let height = FAULTS * bin.count as f64 / most as f64;
        let (from, to) = (scale.x(bin.start_ms), scale.x(bin.end_ms));
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#f58518\">\
             <title>{} faults, {:.1} ms of waiting</title></rect>",
            y + FAULTS - height,
            (to - from).max(0.7),
            bin.count,
            bin.waited_ms
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555555\">at most {most}</text>",
        LEFT - 12.0,
        y + 12.0
    );
}

/// A time for people.
fn time(ms: f64) -> String {
    match ms {
        ms if ms >= 10_000.0 => format!("{:.0} s", ms / 1e3),
        ms if ms >= 1_000.0 => format!("{:.1} s", ms / 1e3),
        ms if ms >= 10.0 || ms == 0.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_shows_each_span_inside_of_it() {
        let svg = draw(&crate::source::report::tests::sample());
        for name in [
            "round 1",
            "dump",
            "&lt;restore&gt;",
            "memory follows",
            "3 faults",
            "hybrid",
        ] {
            assert!(svg.contains(name), "{name}");
        }
        let numbers = svg
            .split("x=\"")
            .skip(1)
            .filter_map(|rest| rest.split('"').next()?.parse().ok());
        assert!(numbers.clone().count() > 10);
        assert!(
            numbers.into_iter().all(|x: f64| (0.0..=WIDTH).contains(&x)),
            "{svg}"
        );
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (least, wanted) in [(0.9, 1.0), (1.1, 2.0), (30.0, 50.0), (60.0, 100.0)] {
            assert!((step(least) - wanted).abs() < 1e-9, "{least}");
        }
        assert_eq!(
            (time(0.0), time(12_345.0)),
            ("0 ms".to_owned(), "12 s".to_owned())
        );
        assert_eq!(escaped("a<b>&"), "a&lt;b&gt;&amp;");
    }
}
