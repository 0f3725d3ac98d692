//! `cargo xtask bench figure`: the README's figure and the plots of docs/performance.md, from committed results.
//!
//! ```text
//!   FILES (document.rs) -> DIR/figure.svg            a panel for each benchmark of PANELS
//!                          DIR/BENCH-CASE-KIND.svg   report/plots.rs
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::document::{Case, Document, Metric};
use super::report::plots::{self, drawing};
use super::report::read;
use super::stats::{Bound, Sample};
use super::table::cell;

/// What to draw, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Results, as benchmarks write them with --json.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Directory of the pictures, made if it is missing.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// What the figure shows of the first case of a benchmark.
struct Panel {
    bench: &'static str,
    metric: &'static str,
    /// Before and behind the case's name.
    title: (&'static str, &'static str),
    /// Names in the results, and in the figure, from above.
    rows: &'static [(&'static str, &'static str)],
}

const PANELS: [Panel; 2] = [
    Panel {
        bench: "post-copy",
        metric: "drained s",
        title: ("Post-copy, ", ": seconds until the last page"),
        rows: &[
            ("CRIU", "CRIU"),
            ("pageferry", "pageferry, from criu dump"),
            ("pageferry, own source", "pageferry, from page-server"),
        ],
    },
    Panel {
        bench: "migrate",
        metric: "pause ms",
        title: ("Move, ", ": pause of the process, ms"),
        rows: &[
            ("CRIU cold", "CRIU, all memory in the freeze"),
            ("CRIU post-copy", "CRIU, post-copy"),
            ("hybrid", "pageferry, hybrid"),
        ],
    },
];

/// Width, pixels.
const WIDTH: u32 = 880;

/// Height of a row, of what is around the rows of a panel, of a line of the text below all, pixels.
const ROW: u32 = 34;
const AROUND: u32 = 92;
const FOOT_LINE: u32 = 16;

/// Colours of CRIU's bars and of others: they differ also for who sees few.
const CRIU: RGBColor = RGBColor(213, 94, 0);
const OURS: RGBColor = RGBColor(0, 114, 178);

/// How far a logarithmic axis goes beyond its longest bar: the value stands there.
const VALUE_ROOM: f64 = 4.0;

/// Draws everything.
pub(crate) fn run(args: &Args) -> Result<()> {
    fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the directory {}", args.output.display()))?;
    let mut documents = Vec::new();
    for path in &args.files {
        let document = read(path)?;
        let bench = &document.bench;
        let same = documents
            .iter()
            .any(|other: &Document| other.bench == *bench);
        ensure!(!same, "{}: another file is of {bench} too", path.display());
        for (at, case) in document.cases.iter().enumerate() {
            plots::of_case(case, &args.output, &format!("{bench}-{}", at + 1))?;
        }
        documents.push(document);
    }
    let path = args.output.join("figure.svg");
    figure(&documents, &path)?;
    println!("{}", path.display());
    Ok(())
}

/// One bar with its runs.
struct Row<'a> {
    label: &'a str,
    colour: RGBColor,
    median: Sample,
    runs: Vec<f64>,
}

fn rows<'a>(panel: &'a Panel, case: &Case, metric: &Metric) -> Vec<Row<'a>> {
    let row = |&(name, label): &(&str, &'a str)| {
        let at = case.contenders.iter().position(|who| who == name)?;
        Some(Row {
            label,
            colour: if name.starts_with("CRIU") { CRIU } else { OURS },
            median: metric.median(at)?,
            runs: metric.of(at).map(|sample| sample.value).collect(),
        })
    };
    panel.rows.iter().filter_map(row).collect()
}

fn figure(documents: &[Document], path: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for panel in &PANELS {
        let Some(document) = documents
            .iter()
            .find(|document| document.bench == panel.bench)
        else {
            continue;
        };
        let case = document.cases.first();
        let metric = case.and_then(|case| Some((case, case.metric(panel.metric)?)));
        let (case, metric) =
            metric.with_context(|| format!("{} has no {}", panel.bench, panel.metric))?;
        let title = format!("{}{}{}", panel.title.0, case.name, panel.title.1);
        panels.push((document, title, rows(panel, case, metric)));
    }
    ensure!(
        !panels.is_empty(),
        "no result of post-copy or migrate: nothing to draw"
    );
    let heights: Vec<u32> = panels
        .iter()
        .map(|(_, _, rows)| Ok(AROUND + ROW * u32::try_from(rows.len())?))
        .collect::<Result<_>>()?;
    let lines = foot(&panels);
    let height =
        heights.iter().sum::<u32>() + FOOT_LINE / 2 + FOOT_LINE * u32::try_from(lines.len())?;
    let mut rest = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    rest.fill(&WHITE).map_err(drawing)?;
    let whole = rest.clone();
    for ((_, title, rows), height) in panels.iter().zip(heights) {
        let (area, below) = rest.split_vertically(height);
        draw(&area, title, rows)?;
        rest = below;
    }
    let style = ("sans-serif", 12).into_font().color(&BLACK.mix(0.7));
    for (line, text) in (0..).zip(&lines) {
        rest.draw_text(text, &style, (12, 2 + line * FOOT_LINE.cast_signed()))
            .map_err(drawing)?;
    }
    whole.present().map_err(drawing)
}

/// How to read the bars, and what the results of each panel depend on.
fn foot(panels: &[(&Document, String, Vec<Row<'_>>)]) -> Vec<String> {
    let mut rows = panels.iter().flat_map(|(_, _, rows)| rows);
    let is_ended = rows.any(|row| row.median.bound != Bound::Exact);
    let limits = panels.iter().filter_map(|(document, ..)| document.limit_s);
    let ended = match limits.max().filter(|_| is_ended) {
        Some(limit) => format!(" >: ended after {limit} s."),
        None => String::new(),
    };
    let mut lines = vec![format!(
        "Bars: medians; points: runs. Logarithmic scale; shorter is better.{ended}"
    )];
    for (document, ..) in panels {
        let machine = &document.machine;
        lines.push(format!(
            "{}: {} CPUs ({}), Linux {}, CRIU {}, pageferry {} ({}), {}",
            document.bench,
            machine.cpus,
            machine.cpu,
            machine.kernel,
            machine.criu.as_deref().unwrap_or("none"),
            machine.pageferry,
            document.commit,
            document.date.get(..10).unwrap_or(&document.date)
        ));
    }
    lines
}

fn draw(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, rows: &[Row<'_>]) -> Result<()> {
    let values = || {
        rows.iter()
            .flat_map(|row| row.runs.iter().chain([&row.median.value]))
    };
    let least = values().copied().fold(f64::MAX, f64::min).max(1e-6);
    let most = values().copied().fold(least, f64::max);
    let low = 10_f64.powf((least / 2.0).log10().floor());
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .margin_right(24)
        .x_label_area_size(26)
        .y_label_area_size(220)
        .build_cartesian_2d((low..most * VALUE_ROOM).log_scale(), -0.5..count - 0.5)
        .map_err(drawing)?;
    let place = |at: usize| count - 1.0 - at as f64;
    let name = |row: &f64| {
        let at = (0..rows.len()).find(|&at| (place(at) - row).abs() < 0.25);
        at.map(|at| rows[at].label.to_owned()).unwrap_or_default()
    };
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .label_style(("sans-serif", 14))
        .x_label_formatter(&plots::label)
        .disable_y_mesh()
        .y_labels(rows.len())
        .y_label_formatter(&name)
        .draw()
        .map_err(drawing)?;
    for (at, row) in rows.iter().enumerate() {
        let (middle, colour) = (place(at), row.colour);
        let bar = [(low, middle - 0.3), (row.median.value, middle + 0.3)];
        let bar = Rectangle::new(bar, colour.mix(0.75).filled());
        chart.draw_series([bar]).map_err(drawing)?;
        let points = row.runs.iter();
        let points = points.map(|run| Circle::new((*run, middle), 3, BLACK.mix(0.6).filled()));
        chart.draw_series(points).map_err(drawing)?;
        let right = row.runs.iter().copied().fold(row.median.value, f64::max);
        let text = Text::new(cell(Some(row.median)), (10, -8), ("sans-serif", 15));
        chart
            .draw_series([EmptyElement::at((right, middle)) + text])
            .map_err(drawing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use testbed::workspace::root;

    use super::*;

    /// Where results and their pictures are committed.
    const RESULTS: &str = "docs/results";

    #[test]
    fn committed_pictures_are_made_of_committed_results() {
        let dir = tempfile::tempdir().unwrap();
        let committed = root().join(RESULTS);
        let all = fs::read_dir(&committed).unwrap();
        let mut all: Vec<PathBuf> = all.map(|entry| entry.unwrap().path()).collect();
        all.sort();
        let of_kind = |kind: &str| -> Vec<PathBuf> {
            let right =
                |path: &&PathBuf| path.extension().is_some_and(|extension| extension == kind);
            all.iter().filter(right).cloned().collect()
        };
        let files = of_kind("json");
        for file in &files {
            let value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
            testbed::schema::expect("bench", &value).unwrap();
        }
        run(&Args {
            files,
            output: dir.path().to_owned(),
        })
        .unwrap();
        let pictures = of_kind("svg");
        assert!(!pictures.is_empty());
        for picture in pictures {
            let made = dir.path().join(picture.file_name().unwrap());
            let same = fs::read(&made).unwrap_or_default() == fs::read(&picture).unwrap();
            assert!(
                same,
                "{}: cargo xtask bench figure {RESULTS}/*.json -o {RESULTS}",
                picture.display()
            );
        }
    }

    #[test]
    fn two_files_of_one_benchmark_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        fs::write(&file, include_str!("report/sample.json")).unwrap();
        let args = |files: &[&PathBuf]| Args {
            files: files.iter().map(|file| (*file).clone()).collect(),
            output: dir.path().join("pictures"),
        };
        run(&args(&[&file])).unwrap();
        let text = fs::read_to_string(dir.path().join("pictures/figure.svg")).unwrap();
        assert!(text.contains("pageferry, from criu dump") && text.contains("until the last page"));
        assert!(run(&args(&[&file, &file])).is_err());
    }
}
