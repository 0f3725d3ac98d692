//! The metrics of page-server and agent as a page, read off what they answer.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, bail};

/// What stands above the tables.
const HEAD: &str = "\
# Metrics

Written by `cargo xtask assets --docs -o DIR` from what the programs answer to `GET /metrics`, in the text format of
Prometheus. A value is in the unit of its row. Counters begin at 0 when the program starts.
";

/// Units, and the words of names that have them.
const UNITS: &[&str] = &[
    "bytes",
    "pages",
    "seconds",
    "requests",
    "sessions",
    "migrations",
];

/// A metric.
#[derive(Debug, Default)]
struct Metric {
    name: String,
    kind: String,
    meaning: String,
    /// Values of each label.
    labels: BTreeMap<String, Vec<String>>,
}

/// The page.
pub(super) fn page() -> Result<String> {
    let mut page = HEAD.to_owned();
    let answers = [
        ("page-server --metrics HOST:PORT", page_server::metrics()),
        (
            "pageferry agent, at the address of its interface",
            pageferry_cli::metrics(),
        ),
    ];
    for (program, answer) in answers {
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            page,
            "\n## {program}\n\n| metric | type | unit | labels | meaning |\n|---|---|---|---|---|"
        );
        for metric in metrics(&answer)? {
            let labels = metric.labels.iter().map(|(name, values)| {
                let values = values.iter().map(|value| format!("`{value}`"));
                format!("`{name}`: {}", values.collect::<Vec<_>>().join(", "))
            });
            let labels = labels.collect::<Vec<_>>().join("; ");
            let _ = writeln!(
                page,
                "| `{}` | {} | {} | {labels} | {} |",
                metric.name,
                metric.kind,
                unit(&metric.name)?,
                metric.meaning
            );
        }
    }
    Ok(page)
}

fn unit(name: &str) -> Result<&'static str> {
    let unit = name
        .split('_')
        .rev()
        .find_map(|word| UNITS.iter().find(|unit| **unit == word));
    unit.copied()
        .with_context(|| format!("{name} names no unit"))
}

/// The metrics of an answer, in their order.
fn metrics(answer: &str) -> Result<Vec<Metric>> {
    let mut found: Vec<Metric> = Vec::new();
    for line in answer.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, meaning) = rest.split_once(' ').with_context(|| line.to_owned())?;
            found.push(Metric {
                name: name.to_owned(),
                meaning: meaning.to_owned(),
                ..Metric::default()
            });
            continue;
        }
        let metric = found
            .last_mut()
            .with_context(|| format!("{line} has no HELP before it"))?;
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            metric.kind = rest.rsplit(' ').next().unwrap_or_default().to_owned();
            continue;
        }
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        if name != metric.name || metric.kind.is_empty() {
            bail!("{line} does not belong to {}", metric.name);
        }
        if let Some((_, labels)) = line.split_once('{') {
            let (label, value) = labels.split_once("=\"").with_context(|| line.to_owned())?;
            let (value, _) = value.split_once('"').with_context(|| line.to_owned())?;
            metric
                .labels
                .entry(label.to_owned())
                .or_default()
                .push(value.to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read_off_an_answer() {
        let answer = "# HELP a_pages_total Pages.\n# TYPE a_pages_total counter\n\
            a_pages_total{kind=\"zero\"} 1\na_pages_total{kind=\"raw\"} 2\n";
        let metrics = metrics(answer).unwrap();
        assert_eq!(metrics[0].labels["kind"], ["zero", "raw"]);
        assert_eq!(unit(&metrics[0].name).unwrap(), "pages");
        assert!(unit("a_total").is_err());
        assert!(super::metrics("a 1\n").is_err());
    }
}
