//! `cargo xtask bench report`: results of benchmarks as one page with plots.
//!
//! ```text
//!   FILES (document.rs) -> DIR/index.html      facts, medians, ratios, bars
//!                          DIR/N-M-KIND.svg    plots.rs
//! ```

mod page;
pub(super) mod plots;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::document::{Case, Document, FORM, Metric};
use super::stats::{Sample, median};

/// What to show, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Results, as benchmarks write them with --json.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Directory of the page, made if it is missing.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// Writes the page and its plots.
pub(crate) fn run(args: &Args) -> Result<()> {
    // Before anything is read or drawn.
    fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the directory {}", args.output.display()))?;
    let mut sections = Vec::new();
    for (number, path) in args.files.iter().enumerate() {
        let document = read(path)?;
        let mut pictures = Vec::new();
        for (at, case) in document.cases.iter().enumerate() {
            let stem = format!("{}-{}", number + 1, at + 1);
            pictures.push(plots::of_case(case, &args.output, &stem)?);
        }
        let over_size =
            plots::over_size(&document.cases, &args.output, &format!("{}", number + 1))?;
        sections.push(page::section(path, &document, &pictures, &over_size));
    }
    let index = args.output.join("index.html");
    fs::write(&index, page::page(&sections)).with_context(|| index.display().to_string())?;
    println!("{}", index.display());
    Ok(())
}

/// Reads a file of results.
pub(super) fn read(path: &Path) -> Result<Document> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let document: Document = serde_json::from_str(&text)
        .with_context(|| format!("{} is no result of a benchmark", path.display()))?;
    ensure!(
        document.form == FORM,
        "{} is of form {}, and this program reads form {FORM}",
        path.display(),
        document.form
    );
    for case in &document.cases {
        for metric in &case.metrics {
            ensure!(
                metric.samples.len() == case.contenders.len(),
                "{}: case {:?} has {} contenders and {:?} of {}",
                path.display(),
                case.name,
                case.contenders.len(),
                metric.name,
                metric.samples.len()
            );
        }
    }
    Ok(document)
}

impl Case {
    /// The metric of this name.
    pub(super) fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.name == name)
    }
}

impl Metric {
    /// What a contender's runs had.
    pub(super) fn of(&self, contender: usize) -> impl Iterator<Item = Sample> {
        self.samples[contender].iter().flatten().copied()
    }

    /// The median of a contender's runs.
    pub(super) fn median(&self, contender: usize) -> Option<Sample> {
        median(self.of(contender))
    }

    /// A contender's ratios to another in the same rounds, sorted.
    fn ratios(&self, who: usize, to: usize) -> Vec<f64> {
        let pairs = self.samples[who].iter().zip(&self.samples[to]);
        let ratio = |(a, b): (&Option<Sample>, &Option<Sample>)| (*a)?.ratio_to((*b)?);
        let mut ratios: Vec<f64> = pairs.filter_map(ratio).map(|ratio| ratio.value).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A result that was taken on a busy machine: it shows the form, and no speed.
    const SAMPLE: &str = include_str!("sample.json");

    fn place(name: &str) -> (PathBuf, PathBuf) {
        let dir = std::env::temp_dir().join(format!("pageferry-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("result.json");
        fs::write(&path, SAMPLE).unwrap();
        (dir, path)
    }

    #[test]
    fn a_result_makes_a_page_with_pictures() {
        let (dir, path) = place("report");
        let mut document = read(&path).unwrap();
        // The same in another size, for the throughput over size.
        let mut larger = document.cases[0].clone();
        larger.conditions["mib"] = 64.into();
        document.cases.push(larger);
        let bytes = serde_json::to_vec(&document).unwrap();
        fs::write(&path, bytes).unwrap();
        let output = dir.join("page");
        run(&Args {
            files: vec![path],
            output: output.clone(),
        })
        .unwrap();
        let page = fs::read_to_string(output.join("index.html")).unwrap();
        for kind in [
            "1-1-runs",
            "1-1-cpu",
            "1-1-latencies",
            "1-2-runs",
            "1-size-1",
        ] {
            let file = format!("{kind}.svg");
            assert!(page.contains(&format!("src=\"{file}\"")), "{file}");
            let text = fs::read_to_string(output.join(&file)).unwrap();
            let whole = text.starts_with("<svg") && text.trim_end().ends_with("</svg>");
            assert!(whole && text.contains("pageferry, own source"), "{file}");
        }
        assert!(page.contains("too few faults for a 99th percentile"));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn results_of_another_form_are_refused() {
        let (dir, path) = place("forms");
        assert!(read(&path).is_ok());
        for (text, expected) in [
            (
                SAMPLE.replacen("\"form\": 1", "\"form\": 7", 1),
                "is of form 7",
            ),
            (SAMPLE.replacen("\"CRIU\",", "", 1), "has 2 contenders"),
            (r#"{"form": 1}"#.to_owned(), "is no result"),
        ] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", read(&path).unwrap_err());
            assert!(
                error.contains(expected) && error.contains("result.json"),
                "{error}"
            );
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
