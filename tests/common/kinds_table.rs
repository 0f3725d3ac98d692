//! Tables of kinds of memory by ways of carrying it, in docs/compatibility.md.
//!
//! A cell names the CRIUs with which the memory is right: `yes` for all that the way is tried with, `—` for none, `?` where none was.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use testbed::criu::Criu;
use testbed::kinds::Kind;
use testbed::workspace::root;

/// The CRIUs of the tables.
pub(crate) const COLUMNS: [&str; 3] = ["4.1", "4.2", "4.3"];

/// A cell of which nothing is known: the kernel lacks the kind.
const NOT_TRIED: &str = "?";

/// Set to write what is seen into docs/compatibility.md instead of comparing it.
const WRITE_VARIABLE: &str = "PAGEFERRY_WRITE_TABLES";

/// Kinds that some version cannot dump or restores otherwise: each is judged in a process of its own, for a dump
/// that fails would take the others along.
pub(crate) const SUSPECTS: &[&str] = &[
    "guard",
    "guard-edges",
    "guard-many",
    "guard-readonly",
    "guard-thp",
    "guard-wipe",
    "guard-locked",
    "guard-shared",
    "guard-file",
    "child-guard",
    "parent-guard",
    "hugetlb-private",
    "hugetlb-shared",
    "hugetlb-memfd",
    "hugetlb-memfd-private",
    "hugetlb-sysv",
    "huge-neighbours",
    "droppable",
    "aio",
    "dev-zero",
    "memfd-sealed",
];

/// The names in a variable, separated by commas; everything if it is not set.
pub(crate) fn is_asked(variable: &str, name: &str) -> bool {
    let asked = env::var(variable).unwrap_or_default();
    asked.is_empty() || asked.split(',').any(|asked| asked == name)
}

/// The name by which the tables know a CRIU: the suites move.
pub(crate) fn column(criu: &Criu) -> Result<&'static str> {
    let (major, minor) = criu.release()?;
    Ok(match (major, minor) {
        (..=3, _) | (4, ..=1) => "4.1",
        (4, 2) => "4.2",
        _ => "4.3",
    })
}

/// A way of carrying memory: a column of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
}

/// A table's place and form.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The line before it.
    pub(crate) begin: &'static str,
    /// The line behind it.
    pub(crate) end: &'static str,
    pub(crate) rows: Vec<Kind>,
    pub(crate) ways: Vec<Way>,
}

/// What was seen of a kind with a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Cell {
    /// The memory is right.
    Right,
    /// CRIU alone cannot carry it either.
    Criu,
    /// The transfer refuses the dump, as the documentation says.
    Refused,
    /// It is wrong or refused, and how.
    Wrong(String),
    /// The process lives nowhere.
    Lost(String),
}

/// What is seen with one CRIU.
pub(crate) type Seen = BTreeMap<(Kind, &'static str), Cell>;

/// With which CRIUs each cell is right.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    layout: Layout,
    cells: BTreeMap<(Kind, &'static str), BTreeSet<&'static str>>,
}

fn path() -> PathBuf {
    root().join("docs/compatibility.md")
}

impl Table {
    /// The table in the documentation.
    pub(crate) fn committed(layout: Layout) -> Result<Table> {
        let text = fs::read_to_string(path()).context("docs/compatibility.md")?;
        let (_, rest) = text.split_once(layout.begin).context("no such table")?;
        let (table, _) = rest
            .split_once(layout.end)
            .context("the table has no end")?;
        let mut cells = BTreeMap::new();
        for line in table.lines().skip(3) {
            let mut parts = line.trim_matches('|').split('|').map(str::trim);
            let title = parts.next().unwrap_or_default();
            let Some(kind) = layout.rows.iter().find(|kind| kind.title == title) else {
                continue;
            };
            for (way, cell) in layout.ways.iter().zip(parts) {
                if cell == NOT_TRIED {
                    continue;
                }
                let right = COLUMNS.iter().copied().filter(|column| {
                    cell == "yes" || cell.split(", ").any(|named| named == *column)
                });
                cells.insert((*kind, way.name), right.collect());
            }
        }
        Ok(Table { layout, cells })
    }

    /// Whether the memory is right with the CRIU `column`.
    pub(crate) fn says(&self, kind: Kind, way: &'static str, column: &str) -> bool {
        let right = self.cells.get(&(kind, way));
        right.is_some_and(|right| right.contains(column))
    }

    /// Fails unless what was `seen` with `column` is what the table says, as far as it knows; or writes it into the
    /// documentation.
    pub(crate) fn judge(self, column: &'static str, seen: &Seen) -> Result<()> {
        expect_right(column, seen)?;
        if env::var_os(WRITE_VARIABLE).is_some() {
            return self.with(column, seen).write();
        }
        let differing: Vec<String> = seen
            .iter()
            .filter(|(cell, _)| self.cells.contains_key(cell))
            .filter(|((kind, way), found)| {
                self.says(*kind, way, column) != (**found == Cell::Right)
            })
            .map(|((kind, way), found)| format!("{} by {way}: {found:?}", kind.name))
            .collect();
        ensure!(
            differing.is_empty(),
            "docs/compatibility.md says something else of CRIU {column} (PAGEFERRY_WRITE_TABLES=1 writes what is \
             seen): {differing:#?}"
        );
        Ok(())
    }

    /// The table with what was `seen` with `column` in place of what it says.
    fn with(mut self, column: &'static str, seen: &Seen) -> Table {
        for (cell, found) in seen {
            let right = self.cells.entry(*cell).or_default();
            match found {
                Cell::Right => right.insert(column),
                _ => right.remove(column),
            };
        }
        self
    }

    /// Puts the table into the documentation.
    fn write(&self) -> Result<()> {
        let text = fs::read_to_string(path()).context("docs/compatibility.md")?;
        let Layout { begin, end, .. } = self.layout;
        let (before, rest) = text.split_once(begin).context("no such table")?;
        let (_, after) = rest.split_once(end).context("the table has no end")?;
        Ok(fs::write(
            path(),
            format!("{before}{begin}{}{end}{after}", self.text()),
        )?)
    }

    fn text(&self) -> String {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let ways = &self.layout.ways;
        let titles = ways.iter().map(|way| way.title.to_owned());
        let mut text = String::from("\n");
        text += &row(std::iter::once("mapping".to_owned())
            .chain(titles)
            .collect());
        text += &format!("|{}\n", "---|".repeat(ways.len() + 1));
        for kind in &self.layout.rows {
            let cells = ways.iter().map(|way| self.cell(*kind, way.name));
            text += &row(std::iter::once(kind.title.to_owned())
                .chain(cells)
                .collect());
        }
        text + "\n"
    }

    fn cell(&self, kind: Kind, way: &'static str) -> String {
        let Some(right) = self.cells.get(&(kind, way)) else {
            return NOT_TRIED.to_owned();
        };
        let right: Vec<&str> = right.iter().copied().collect();
        match right.len() {
            0 => "—".to_owned(),
            all if all == COLUMNS.len() => "yes".to_owned(),
            _ => right.join(", "),
        }
    }
}

/// Fails if something is wrong that CRIU alone gets right.
fn expect_right(column: &str, seen: &Seen) -> Result<()> {
    let wrong = seen.iter().filter_map(|((kind, way), cell)| match cell {
        Cell::Wrong(wrong) | Cell::Lost(wrong) => Some(format!("{} by {way}: {wrong}", kind.name)),
        _ => None,
    });
    let wrong: Vec<String> = wrong.collect();
    ensure!(wrong.is_empty(), "CRIU {column}: {wrong:#?}");
    Ok(())
}
