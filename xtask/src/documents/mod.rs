//! Checks what the documents say: short sentences, links that lead somewhere, complete tables of contents, commands
//! whose options exist.
//!
//! ```text
//! *.md ── blocks ──> paragraphs ──> sentences of SENTENCE_WORDS_MAX words at most
//!            │
//!            ├── headings, links ──> files and anchors that exist
//!            ├── docs/SUMMARY.md ──> each page of the book, once
//!            └── docs/README.md ───> each page
//! ```
//!
//! Tables and blocks of code are no prose.

mod commands;
mod contents;
mod links;
mod sentences;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::workspace;

use contents::LIST;
pub(crate) use contents::{BOOK, SUMMARY};
pub(crate) use links::{Links, links_of, plain};
use sentences::{long_sentences, paragraphs};

use crate::{assets, tracked};

/// Longest sentence, words.
const SENTENCE_WORDS_MAX: usize = 35;

/// Documents at the root whose sentences are counted, besides all below `docs/`.
const DOCUMENTS: [&str; 4] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
];

/// The log of experiments: its commands are those of their time.
const LOG: &str = "docs/experiments.md";

#[derive(clap::Args)]
pub(crate) struct Args {}

/// Checks all documents of the workspace.
pub(crate) fn run(_args: &Args) -> Result<()> {
    let root = workspace::root();
    let mut problems = Vec::new();
    let mut links = Links::default();
    let programs = assets::programs();
    let documents = tracked::files(root, "*.md")?;
    for path in &documents {
        let text = fs::read_to_string(root.join(path))
            .with_context(|| format!("cannot read {}", path.display()))?;
        if path == Path::new(SUMMARY) {
            problems.extend(contents::problems(&text, &documents));
        }
        if path == Path::new(LIST) {
            problems.extend(contents::missing(&text, &documents));
        }
        if is_prose(path) {
            problems.extend(
                long_sentences(&paragraphs(&text), SENTENCE_WORDS_MAX).map(|(line, words, start)| {
                    format!(
                        "{}:{line}: a sentence of {words} words, {SENTENCE_WORDS_MAX} at most: {start}...",
                        path.display()
                    )
                }),
            );
        }
        if is_prose(path) && path != Path::new(LOG) {
            let wrong = commands::problems(&text, &programs).into_iter();
            problems.extend(wrong.map(|(line, what)| format!("{}:{line}: {what}", path.display())));
        }
        links.add(path.clone(), &text);
    }
    problems.extend(links.broken(root));
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

fn is_prose(path: &Path) -> bool {
    path.starts_with("docs") || DOCUMENTS.iter().any(|name| path == Path::new(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_are_short_in_their_sentences_and_their_links_lead_somewhere() {
        run(&Args {}).unwrap();
    }
}
