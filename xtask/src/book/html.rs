//! Finds links of HTML pages that lead nowhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::documents::plain;

/// The page with all others in one: its links are theirs.
const WHOLE: &str = "print.html";

/// What is wrong with the links of the pages below `book`.
///
/// # Errors
/// A page cannot be read.
pub(super) fn problems(book: &Path) -> Result<Vec<String>> {
    let mut pages = BTreeMap::new();
    read(book, Path::new(""), &mut pages)?;
    let anchors: BTreeMap<&PathBuf, BTreeSet<&str>> = pages
        .iter()
        .map(|(path, text)| (path, attributes(text, "id").collect()))
        .collect();
    let mut problems = BTreeSet::new();
    for (path, text) in pages.iter().filter(|(path, _)| *path != Path::new(WHOLE)) {
        let links = attributes(text, "href").chain(attributes(text, "src"));
        for link in links.filter(|link| !link.contains(':')) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => plain(&path.with_file_name(file)),
            };
            let why = if !book.join(&target).exists() {
                "there is no such file"
            } else if anchor.is_empty()
                || anchors
                    .get(&target)
                    .is_none_or(|known| known.contains(anchor))
            {
                continue;
            } else {
                "the page has no such heading"
            };
            problems.insert(format!("{}: the link {link}: {why}", path.display()));
        }
    }
    Ok(problems.into_iter().collect())
}

/// Reads the pages of a directory of the book and of those below it.
fn read(book: &Path, dir: &Path, pages: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    let at = book.join(dir);
    let entries = fs::read_dir(&at).with_context(|| at.display().to_string())?;
    for entry in entries {
        let entry = entry.with_context(|| at.display().to_string())?;
        let path = dir.join(entry.file_name());
        if entry.path().is_dir() {
            read(book, &path, pages)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "html")
        {
            let text = fs::read_to_string(entry.path())
                .with_context(|| entry.path().display().to_string())?;
            pages.insert(path, text);
        }
    }
    Ok(())
}

/// The values of an attribute, wherever it stands.
fn attributes<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let begin = format!(" {name}=\"");
    let behind: Vec<&str> = text.split(begin.as_str()).skip(1).collect();
    behind
        .into_iter()
        .filter_map(|rest| Some(rest.split_once('"')?.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_lead_nowhere_are_told_and_others_are_not() {
        let book = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let file = book.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write(
            "docs/a.html",
            "<h1 id=\"one\"></h1> <a href=\"../index.html#two\">",
        );
        write("x.svg", "");
        let good =
            "<h2 id=\"two\"><img src=\"x.svg\"><a href=\"docs/a.html#one\"><a href=\"#two\">";
        write(
            "index.html",
            &format!("{good}<a href=\"https://x.invalid\">"),
        );
        assert_eq!(problems(book.path()).unwrap(), [""; 0]);
        write(
            "index.html",
            "<a href=\"docs/a.html#three\"><img src=\"y.svg\">",
        );
        let wrong = problems(book.path()).unwrap();
        assert_eq!(wrong.len(), 3, "{wrong:?}");
    }
}
