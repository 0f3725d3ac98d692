//! The book's table of contents: each page stands in it, once.

use std::path::{Path, PathBuf};

use super::links::links_of;

/// The directory of the book's pages, and the table in it.
pub(super) const BOOK: &str = "docs";
pub(super) const SUMMARY: &str = "docs/SUMMARY.md";

/// What is wrong with the table of contents `summary`, if these are all documents of the repository.
pub(super) fn problems<'a>(
    summary: &str,
    documents: impl IntoIterator<Item = &'a PathBuf>,
) -> Vec<String> {
    let entries: Vec<PathBuf> = summary
        .lines()
        .flat_map(links_of)
        .map(|link| Path::new(BOOK).join(link))
        .collect();
    let in_book = |path: &&PathBuf| path.starts_with(BOOK) && *path != Path::new(SUMMARY);
    let pages = documents.into_iter().filter(in_book);
    let problem = |page: &PathBuf| {
        let count = entries.iter().filter(|entry| *entry == page).count();
        let page = page.display();
        match count {
            0 => Some(format!("{SUMMARY} lacks {page}")),
            1 => None,
            count => Some(format!("{SUMMARY} names {page} {count} times")),
        }
    };
    let outside = entries
        .iter()
        .filter(|entry| entry.components().any(|part| part.as_os_str() == ".."));
    let outside =
        outside.map(|entry| format!("{SUMMARY}: {} is outside the book", entry.display()));
    pages.filter_map(problem).chain(outside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_stands_in_the_table_once() {
        let pages = ["README.md", "docs/SUMMARY.md", "docs/a.md", "docs/b/c.md"].map(PathBuf::from);
        assert_eq!(problems("[A](a.md)\n- [C](b/c.md)\n", &pages), [""; 0]);
        let wrong = problems("- [A](a.md)\n- [A](a.md)\n- [R](../README.md)\n", &pages);
        assert_eq!(wrong.len(), 3, "{wrong:?}");
    }
}
