//! The book's table of contents, and the list of documents by kind: each page stands in both.

use std::path::{Path, PathBuf};

use super::links::{links_of, plain};

/// The directory of most of the book's pages, and the table in it.
pub(crate) const BOOK: &str = "docs";
pub(crate) const SUMMARY: &str = "docs/SUMMARY.md";

/// The list of documents by kind.
pub(super) const LIST: &str = "docs/README.md";

/// What is wrong with the table of contents `summary`, if these are all documents of the repository.
pub(super) fn problems<'a>(
    summary: &str,
    documents: impl IntoIterator<Item = &'a PathBuf>,
) -> Vec<String> {
    let entries = targets(summary);
    let problem = |page: &PathBuf| {
        let count = entries.iter().filter(|entry| *entry == page).count();
        let page = page.display();
        match count {
            0 => Some(format!("{SUMMARY} lacks {page}")),
            1 => None,
            count => Some(format!("{SUMMARY} names {page} {count} times")),
        }
    };
    pages(documents).filter_map(problem).collect()
}

/// What the list of documents lacks.
pub(super) fn missing<'a>(
    list: &str,
    documents: impl IntoIterator<Item = &'a PathBuf>,
) -> Vec<String> {
    let entries = targets(list);
    let pages = pages(documents).filter(|page| *page != Path::new(LIST));
    let lacking = pages.filter(|page| !entries.contains(page));
    lacking
        .map(|page| format!("{LIST} lacks {}", page.display()))
        .collect()
}

/// The pages of the book among the documents. What says where test data come from is none.
fn pages<'a>(
    documents: impl IntoIterator<Item = &'a PathBuf>,
) -> impl Iterator<Item = &'a PathBuf> {
    let is_page = |path: &&PathBuf| !path.starts_with("tests") && *path != Path::new(SUMMARY);
    documents.into_iter().filter(is_page)
}

/// Where the links of a page of the book lead, as paths in the repository.
fn targets(page: &str) -> Vec<PathBuf> {
    let links = page.lines().flat_map(links_of);
    links
        .map(|link| plain(&Path::new(BOOK).join(link)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_stands_in_the_table_once() {
        let pages = [
            "README.md",
            "docs/SUMMARY.md",
            "docs/a.md",
            "docs/b/c.md",
            "tests/d.md",
        ]
        .map(PathBuf::from);
        let good = "[R](../README.md)\n[A](a.md)\n- [C](b/c.md)\n";
        assert_eq!(problems(good, &pages), [""; 0]);
        let wrong = problems("- [A](a.md)\n- [A](a.md)\n- [R](../README.md)\n", &pages);
        assert_eq!(
            wrong,
            [
                "docs/SUMMARY.md names docs/a.md 2 times",
                "docs/SUMMARY.md lacks docs/b/c.md"
            ]
        );
    }

    #[test]
    fn each_page_but_the_list_stands_in_the_list() {
        let pages = ["docs/README.md", "docs/a.md", "docs/b/c.md"].map(PathBuf::from);
        assert_eq!(missing("| [A](a.md), [C](b/c.md) |", &pages), [""; 0]);
        assert_eq!(missing("[A](a.md#x)", &pages).len(), 2);
    }
}
