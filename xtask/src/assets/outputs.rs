//! What programs write for other programs: a schema of each output, and a page of all fields.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pageferry::observe::schema::Output;

use super::fields;
use crate::bench::document::Document;
use crate::torture::Counts;

/// Directory of the schemas in the repository.
const SCHEMAS: &str = "docs/reference/schemas";

/// The page of all fields in the repository.
const FIELDS: &str = "docs/reference/fields.md";

/// All outputs, in the order in which they are documented.
pub(crate) fn all() -> Vec<Output> {
    let daemons = [page_server::outputs(), lazy_client::outputs()].concat();
    let own = vec![
        Output::of::<Document>("bench", "cargo xtask bench BENCH --json FILE"),
        Output::of::<Counts>("torture", "cargo xtask torture, the last line"),
    ];
    [daemons, pageferry_cli::outputs(), own].concat()
}

/// Every file that is made of the outputs, by its path from the root of the repository.
pub(super) fn files() -> Result<Vec<(String, String)>> {
    let outputs = all();
    let mut files = vec![(FIELDS.to_owned(), fields::page(&outputs))];
    for output in &outputs {
        let text = serde_json::to_string_pretty(&output.schema)?;
        files.push((
            format!("{SCHEMAS}/{}.schema.json", output.name),
            text + "\n",
        ));
    }
    Ok(files)
}

/// Writes these files below `root`, and removes schemas of outputs that are no more.
pub(super) fn write(root: &Path) -> Result<()> {
    let dir = root.join(SCHEMAS);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    for (name, text) in files()? {
        let path = root.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use testbed::workspace::root;

    use super::super::fields::fields_of;
    use super::*;

    #[test]
    fn schemas_and_their_page_are_current_and_no_other_is_there() {
        let files = files().unwrap();
        for (name, text) in &files {
            let committed = fs::read_to_string(root().join(name)).unwrap_or_default();
            let same = committed == *text;
            assert!(
                same,
                "{name} is not current: cargo xtask assets --docs -o DIR writes it"
            );
        }
        let there = fs::read_dir(root().join(SCHEMAS)).unwrap();
        let there: BTreeSet<String> = there
            .map(|entry| format!("{SCHEMAS}/{}", entry.unwrap().file_name().to_string_lossy()))
            .collect();
        let made = files.into_iter().map(|(name, _)| name);
        let made = made.filter(|name| name.starts_with(SCHEMAS)).collect();
        assert_eq!(there, made);
    }

    /// How names and descriptions tell the unit of a number, or what it counts.
    const UNITS: &[&str] = &[
        "ytes", " ms", "µs", "seconds", "ages", "MiB", "ticks", "unit", "ow many", "umber", "pid",
        "Pid",
    ];

    #[test]
    fn each_field_is_described_and_each_number_has_a_unit() {
        let mut wrong = Vec::new();
        for output in all() {
            for field in fields_of(&output.schema) {
                let place = format!("{}: {}", output.name, field.path);
                if field.meaning.trim().is_empty() {
                    wrong.push(format!("{place} has no description"));
                }
                let is_number = field.kind.contains("integer") || field.kind.contains("number");
                let told = |unit: &&str| field.meaning.contains(*unit);
                if is_number && !UNITS.iter().any(told) {
                    wrong.push(format!("{place} has no unit: {}", field.meaning));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
