//! `cargo xtask book`: the documents as a book, by mdbook.
//!
//! ```text
//! documents ── each at its path in the repository ──> target/book-source ── mdbook build ──> target/book
//! files that they link to, docs/ ──┘                                              │
//!                                              each link of each page leads somewhere (html)
//! ```
//!
//! mdbook knows the files below its source directory alone. That cannot be `docs/`, because README.md and
//! ARCHITECTURE.md are pages too, nor the root, because mdbook copies all that is no page, `target/` too.

mod html;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use testbed::workspace::{root, target_dir};

use crate::documents::{BOOK, Links, SUMMARY, plain};
use crate::tracked;

/// What a directory's page is named in the repository, and in the book.
const README: &str = "README.md";
const INDEX: &str = "index.md";

/// The version that the book was looked at with.
const MDBOOK: &str = "0.5.4";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the book is written [default: target/book].
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Makes the book, and checks its links.
pub(crate) fn run(args: &Args) -> Result<()> {
    let source = target_dir().join("book-source");
    let book = match &args.output {
        Some(dir) => std::path::absolute(dir).context("--output")?,
        None => target_dir().join("book"),
    };
    let pages = stage(root(), &source)?;
    build(&source, &book)?;
    let problems = html::problems(&book)?;
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    println!("{pages} pages: {}", book.join("index.html").display());
    Ok(())
}

/// Copies what the book is made of into `source`, made anew, and tells how many pages that are.
fn stage(root: &Path, source: &Path) -> Result<usize> {
    match fs::remove_dir_all(source) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", source.display())
        }
        _ => {}
    }
    let mut links = Links::default();
    let read = |path: &Path| {
        fs::read_to_string(root.join(path))
            .with_context(|| format!("cannot read {}", path.display()))
    };
    let summary = read(Path::new(SUMMARY))?;
    let mut pages = 0;
    let mut files: BTreeSet<PathBuf> = tracked::files(root, BOOK)?.into_iter().collect();
    for path in pages_of(&summary) {
        links.add(path.clone(), &read(&path)?);
        files.insert(path);
        pages += 1;
    }
    files.extend(links.files(root));
    files.remove(Path::new(SUMMARY));
    for path in files {
        let to = source.join(path.with_file_name(staged_name(&path)));
        let dir = to.parent().unwrap_or(source);
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let copied = match path.extension() {
            Some(extension) if extension == "md" => fs::write(&to, to_indexes(&read(&path)?)),
            _ => fs::copy(root.join(&path), &to).map(drop),
        };
        copied.with_context(|| to.display().to_string())?;
    }
    let to = source.join("SUMMARY.md");
    let summary = to_indexes(&moved(&summary));
    fs::write(&to, summary).with_context(|| to.display().to_string())?;
    Ok(pages)
}

/// The name of a file of the book: mdbook would make `index.html` of a README, and leave the links to it as they are.
fn staged_name(path: &Path) -> &OsStr {
    match path.file_name() {
        Some(name) if name != README => name,
        _ => OsStr::new(INDEX),
    }
}

/// A page whose links lead to where READMEs have their staged names.
fn to_indexes(page: &str) -> String {
    let mut text = String::new();
    let mut parts = page.split("](");
    text.push_str(parts.next().unwrap_or_default());
    for part in parts {
        text.push_str("](");
        let (link, rest) = part.split_at(part.find(')').unwrap_or(part.len()));
        text.push_str(&link.replace(README, INDEX));
        text.push_str(rest);
    }
    text
}

/// The pages that the table of contents names, by their paths in the repository.
fn pages_of(summary: &str) -> Vec<PathBuf> {
    let links = summary.lines().flat_map(crate::documents::links_of);
    links
        .map(|link| plain(&Path::new(BOOK).join(link)))
        .collect()
}

/// The table of contents as it must read at the root.
fn moved(summary: &str) -> String {
    let mut text = String::new();
    for line in summary.lines() {
        match line.split_once("](") {
            Some((title, link)) => {
                let (link, rest) = link.split_once(')').unwrap_or((link, ""));
                let path = plain(&Path::new(BOOK).join(link));
                text.push_str(&format!("{title}]({}){rest}\n", path.display()));
            }
            None => text.push_str(&format!("{line}\n")),
        }
    }
    text
}

fn build(source: &Path, book: &Path) -> Result<()> {
    let mut command = Command::new("mdbook");
    command
        .arg("build")
        .arg(root())
        .arg("--dest-dir")
        .arg(book)
        .env("MDBOOK_BOOK__SRC", source)
        .stdin(Stdio::null());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("there is no mdbook in PATH: cargo install mdbook --version {MDBOOK} --locked")
        }
        Err(error) => return Err(error).context("cannot run mdbook"),
    };
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "mdbook build: {}\n{log}",
        output.status
    );
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    ensure!(
        warnings.is_empty(),
        "mdbook warns:\n{}",
        warnings.join("\n")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_contents_moves_to_the_root() {
        let summary = "# Contents\n\n[All](../README.md)\n- [A `b`](a.md)\n";
        assert_eq!(
            moved(summary),
            "# Contents\n\n[All](README.md)\n- [A `b`](docs/a.md)\n"
        );
    }

    #[test]
    fn links_lead_to_the_staged_names() {
        let page = "README.md [a](../README.md#b) [c](d.md) `x`";
        assert_eq!(
            to_indexes(page),
            "README.md [a](../index.md#b) [c](d.md) `x`"
        );
    }

    #[test]
    fn each_page_and_what_it_links_to_is_staged() {
        let dir = tempfile::tempdir().unwrap();
        let pages = stage(root(), dir.path()).unwrap();
        let summary = fs::read_to_string(dir.path().join("SUMMARY.md")).unwrap();
        assert_eq!(
            crate::documents::links_of(&summary.replace('\n', " ")).count(),
            pages
        );
        for file in [
            "index.md",
            "docs/index.md",
            "docs/results/figure.svg",
            "LICENSE-MIT",
        ] {
            assert!(dir.path().join(file).is_file(), "{file}");
        }
    }
}
