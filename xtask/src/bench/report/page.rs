//! The page: facts, tables, pictures.

use std::fmt::Write as _;
use std::path::Path;

use super::super::document::{Case, Document};
use super::super::stats::{Bound, Sample};

/// Fewer faults than this have no 99th percentile worth the name: ten lie above it then.
const FAULTS_FOR_P99: f64 = 1000.0;

const HEAD: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>pageferry: benchmarks</title>\n\
<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;margin:1em 0}\
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
img{max-width:100%;border:1px solid #ddd;margin:.4em 0}</style></head><body>\n";

/// All sections as one page.
pub(super) fn page(sections: &[String]) -> String {
    format!("{HEAD}{}</body></html>\n", sections.concat())
}

/// What one file has.
pub(super) fn section(
    path: &Path,
    document: &Document,
    pictures: &[Vec<String>],
    over_size: &[String],
) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let machine = &document.machine;
    let mut text = format!(
        "<h1>{} ({})</h1>\n<table>",
        escaped(&document.bench),
        escaped(&name)
    );
    for (fact, value) in [
        ("date", document.date.clone()),
        ("commit", document.commit.clone()),
        ("command", document.command.join(" ")),
        (
            "machine",
            format!(
                "{} x {}, {} MiB",
                machine.cpus, machine.cpu, machine.memory_mib
            ),
        ),
        ("kernel", machine.kernel.clone()),
        (
            "versions",
            match &machine.criu {
                Some(criu) => format!("pageferry {}, CRIU {criu}", machine.pageferry),
                None => format!("pageferry {}", machine.pageferry),
            },
        ),
        ("clock", machine.clock.clone().unwrap_or_default()),
    ] {
        if value.is_empty() {
            continue;
        }
        _ = write!(text, "<tr><td>{fact}</td><td>{}</td></tr>", escaped(&value));
    }
    text += "</table>\n";
    if let Some(limit) = document.limit_s {
        _ = writeln!(
            text,
            "<p>A run is ended after {limit} s. Its figures are bounds then: &gt; or &lt;.</p>"
        );
    }
    for (case, pictures) in document.cases.iter().zip(pictures) {
        text += &of_case(case, pictures);
    }
    text += &images(over_size);
    if document.bars.is_empty() {
        return text;
    }
    text +=
        "<h2>Bars</h2>\n<table><tr><th>what</th><th>measured</th><th>at most</th><th></th></tr>";
    for bar in &document.bars {
        let verdict = match bar.kept() {
            Some(true) => "pass",
            Some(false) => "FAIL",
            None => "open",
        };
        let (name, measured, limit) = (
            escaped(bar.name()),
            shown(bar.measured()),
            number(bar.limit()),
        );
        _ = write!(
            text,
            "<tr><td>{name}</td><td>{measured}</td><td>{limit}</td><td>{verdict}</td></tr>"
        );
    }
    text + "</table>\n"
}

fn of_case(case: &Case, pictures: &[String]) -> String {
    let mut text = format!(
        "<h2>{}</h2>\n<h3>Medians</h3>\n<table><tr><th></th>",
        escaped(&case.name)
    );
    for metric in &case.metrics {
        _ = write!(text, "<th>{}</th>", escaped(&metric.name));
    }
    text += "</tr>";
    for (at, who) in case.contenders.iter().enumerate() {
        _ = write!(text, "<tr><td>{}</td>", escaped(who));
        for metric in &case.metrics {
            _ = write!(text, "<td>{}</td>", shown(metric.median(at)));
        }
        text += "</tr>";
    }
    text += "</table>\n";
    for lacking in &case.lacking {
        _ = writeln!(
            text,
            "<p>{} is not measured: {}.</p>",
            escaped(&lacking.contender),
            escaped(&lacking.why)
        );
    }
    text += &ratios(case);
    for who in too_few(case) {
        _ = writeln!(
            text,
            "<p>{}: too few faults for a 99th percentile (under {FAULTS_FOR_P99}).</p>",
            escaped(who)
        );
    }
    text + &images(pictures)
}

/// Each contender against the last one, round by round.
fn ratios(case: &Case) -> String {
    let Some(to) = case.contenders.len().checked_sub(1).filter(|to| *to > 0) else {
        return String::new();
    };
    let mut text = format!(
        "<h3>Ratios to {}, each of two runs of the same round: median (min to max)</h3>\n<table><tr><th></th>",
        escaped(&case.contenders[to])
    );
    for metric in &case.metrics {
        _ = write!(text, "<th>{}</th>", escaped(&metric.name));
    }
    text += "</tr>";
    for (at, who) in case.contenders.iter().enumerate().take(to) {
        _ = write!(text, "<tr><td>{}</td>", escaped(who));
        for metric in &case.metrics {
            let ratios = metric.ratios(at, to);
            let cell = match (ratios.first(), ratios.get(ratios.len() / 2), ratios.last()) {
                (Some(least), Some(median), Some(most)) => {
                    format!(
                        "{} ({} to {})",
                        number(*median),
                        number(*least),
                        number(*most)
                    )
                }
                _ => "-".to_owned(),
            };
            _ = write!(text, "<td>{cell}</td>");
        }
        text += "</tr>";
    }
    text + "</table>\n"
}

/// Who had too few faults.
fn too_few(case: &Case) -> Vec<&str> {
    let (Some(faults), Some(_)) = (case.metric("faults"), case.metric("p99 µs")) else {
        return Vec::new();
    };
    let few = |at: &usize| {
        faults
            .median(*at)
            .is_some_and(|count| count.value < FAULTS_FOR_P99)
    };
    let which = (0..case.contenders.len()).filter(few);
    which.map(|at| case.contenders[at].as_str()).collect()
}

fn images(pictures: &[String]) -> String {
    pictures
        .iter()
        .map(|file| format!("<p><img src=\"{file}\" alt=\"\"></p>\n"))
        .collect()
}

fn shown(sample: Option<Sample>) -> String {
    let Some(sample) = sample else {
        return "-".to_owned();
    };
    let bound = match sample.bound {
        Bound::Exact => "",
        Bound::AtLeast => "&gt; ",
        Bound::AtMost => "&lt; ",
    };
    format!("{bound}{}", number(sample.value))
}

/// Three digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
