//! Finds links that lead nowhere: to a file that is missing, or a heading that no document has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// The links and headings of all documents.
#[derive(Default)]
pub(crate) struct Links {
    documents: BTreeMap<PathBuf, Document>,
}

struct Document {
    anchors: BTreeSet<String>,
    /// Line, and what stands between the parentheses.
    links: Vec<(usize, String)>,
}

impl Links {
    /// Reads the document at `path`, relative to the root.
    pub(crate) fn add(&mut self, path: PathBuf, text: &str) {
        let mut anchors = BTreeSet::new();
        let mut links = Vec::new();
        let mut is_code = false;
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim_start().starts_with("```") {
                is_code = !is_code;
            } else if !is_code {
                if line.starts_with('#') {
                    let name = anchor(line.trim_start_matches('#'));
                    let again = (1..).map(|count| format!("{name}-{count}"));
                    let free = std::iter::once(name.clone()).chain(again);
                    anchors.extend(free.into_iter().find(|name| !anchors.contains(name)));
                }
                links.extend(links_of(line).map(|link| (number, link)));
            }
        }
        self.documents.insert(path, Document { anchors, links });
    }

    /// What is wrong with the links, each once.
    pub(crate) fn broken(&self, root: &Path) -> Vec<String> {
        let mut problems = Vec::new();
        for (path, document) in &self.documents {
            for (line, link) in &document.links {
                if let Some(why) = self.why_broken(root, path, link) {
                    problems.push(format!("{}:{line}: the link {link}: {why}", path.display()));
                }
            }
        }
        problems
    }

    /// The files that documents link to and that are no documents themselves.
    pub(crate) fn files(&self, root: &Path) -> BTreeSet<PathBuf> {
        let mut files = BTreeSet::new();
        for (path, document) in &self.documents {
            for (_, link) in &document.links {
                let file = link.split('#').next().unwrap_or_default();
                let target = plain(&path.with_file_name(file));
                let is_page = target
                    .extension()
                    .is_some_and(|extension| extension == "md");
                if !link.contains("://") && !is_page && root.join(&target).is_file() {
                    files.insert(target);
                }
            }
        }
        files
    }

    fn why_broken(&self, root: &Path, from: &Path, link: &str) -> Option<String> {
        if link.contains("://") || link.starts_with("mailto:") {
            return None;
        }
        let (file, anchor) = match link.split_once('#') {
            Some((file, anchor)) => (file, Some(anchor)),
            None => (link, None),
        };
        let target = match file {
            "" => from.to_owned(),
            file => plain(&from.with_file_name(file)),
        };
        if !root.join(&target).exists() {
            return Some(format!("there is no {}", target.display()));
        }
        let anchor = anchor?;
        let document = self.documents.get(&target)?;
        let is_known = document.anchors.contains(anchor);
        (!is_known).then(|| format!("{} has no such heading", target.display()))
    }
}

/// The path without `.` and `..`.
pub(crate) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// The anchor of a heading, as forges make it.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let heading = heading.trim().to_lowercase();
    let plain = heading.chars().filter(kept);
    plain.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Where the links of a line lead. What stands between backticks is no link.
pub(crate) fn links_of(line: &str) -> impl Iterator<Item = String> {
    let parts = line.split('`').enumerate();
    let plain: String = parts
        .map(|(index, part)| if index % 2 == 0 { part } else { "" })
        .collect();
    let behind: Vec<String> = plain
        .split("](")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()))
        .collect();
    behind.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(documents: &[(&str, &str)]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        let mut links = Links::default();
        for (path, text) in documents {
            let file = root.path().join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
            links.add(PathBuf::from(path), text);
        }
        links.broken(root.path())
    }

    #[test]
    fn links_to_files_and_headings_that_exist_are_good() {
        let documents = [
            (
                "a.md",
                "# One `two`, three\n[b](docs/b.md#four) [own](#one-two-three) [x](https://x.invalid/y)\n",
            ),
            (
                "docs/b.md",
                "## Four\n## Four\n[a](../a.md) [again](#four-1) `[no](link)`\n",
            ),
        ];
        assert_eq!(broken(&documents), [""; 0]);
    }

    #[test]
    fn links_that_lead_nowhere_are_told_with_their_line() {
        let documents = [("a.md", "\n[b](b.md)\n```\n[c](c.md)\n```\n[d](#d)\n")];
        let problems = broken(&documents);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("a.md:2: ") && problems[1].starts_with("a.md:6: "));
    }
}
