//! The table of kinds of mappings and of transfers in docs/compatibility.md.
//!
//! A cell names the CRIUs with which the memory is right: `yes` for all that the transfer is tried with, `—` for none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use testbed::kinds::{KINDS, Kind};
use testbed::workspace::root;

/// The CRIUs of the table.
const COLUMNS: [&str; 3] = ["4.1", "4.2", "4.3"];

const BEGIN: &str = "<!-- memory kinds: written by tests/criu_memory_kinds.rs -->\n";
const END: &str = "<!-- end of memory kinds -->\n";

/// A way of carrying memory from a dump to a restore.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// Whether the processes run before their memory is there.
    pub(crate) lazy: bool,
    /// With which CRIUs every run of the tests tries it; with the others the long ones do.
    pub(crate) often: &'static [&'static str],
    /// CRIUs whose dumps it refuses, as the documentation says.
    pub(crate) refuses: &'static [&'static str],
}

impl Transfer {
    /// Whether the images that are restored have a parent.
    pub(crate) fn has_parent(self) -> bool {
        matches!(self.name, "dedup-content" | "auto-dedup")
    }
}

const fn transfer(
    name: &'static str,
    title: &'static str,
    lazy: bool,
    often: &'static [&'static str],
) -> Transfer {
    Transfer {
        name,
        title,
        lazy,
        often,
        refuses: &[],
    }
}

/// All transfers, in the order of the table.
pub(crate) const TRANSFERS: &[Transfer] = &[
    transfer("plain", "received", false, &COLUMNS),
    transfer("dedup-content", "`--dedup-content`", false, &["4.2"]),
    transfer("auto-dedup", "`--auto-dedup`", false, &["4.2"]),
    Transfer {
        refuses: &["4.1"],
        ..transfer("compress", "`--compress`", false, &["4.2"])
    },
    transfer("forward", "`--forward`", false, &["4.1", "4.2"]),
    transfer("served", "served to CRIU", true, &["4.2"]),
    transfer("lazy-dump", "lazy, from a dump", true, &COLUMNS),
    transfer(
        "lazy-page-server",
        "lazy, from a page-server",
        true,
        &["4.2"],
    ),
    transfer("lazy-local", "lazy, local", true, &["4.2"]),
    transfer("forward-lazy", "`--forward-lazy`", true, &["4.2"]),
    transfer("ferry", "`--ferry`", true, &COLUMNS),
    transfer("hybrid", "hybrid", true, &["4.2"]),
];

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
}

/// What is seen with one CRIU.
pub(crate) type Seen = BTreeMap<(Kind, &'static str), Cell>;

/// With which CRIUs each cell is right.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Table(BTreeMap<(Kind, &'static str), BTreeSet<&'static str>>);

fn path() -> PathBuf {
    root().join("docs/compatibility.md")
}

impl Table {
    /// The table in the documentation.
    pub(crate) fn committed() -> Result<Table> {
        let text = fs::read_to_string(path()).context("docs/compatibility.md")?;
        let (_, rest) = text.split_once(BEGIN).context("no table of memory kinds")?;
        let (table, _) = rest.split_once(END).context("the table has no end")?;
        let mut cells = BTreeMap::new();
        for line in table.lines().skip(3) {
            let mut parts = line.trim_matches('|').split('|').map(str::trim);
            let title = parts.next().unwrap_or_default();
            let Some(kind) = KINDS.iter().find(|kind| kind.title == title) else {
                continue;
            };
            for (transfer, cell) in TRANSFERS.iter().zip(parts) {
                let right = COLUMNS.iter().copied().filter(|column| {
                    cell == "yes" || cell.split(", ").any(|named| named == *column)
                });
                cells.insert((*kind, transfer.name), right.collect());
            }
        }
        Ok(Table(cells))
    }

    /// Fails unless what was `seen` with `column` is what the table says.
    pub(crate) fn expect(&self, column: &'static str, seen: &Seen) -> Result<()> {
        let says = |kind: Kind, transfer: &'static str| {
            let right = self.0.get(&(kind, transfer));
            right.is_some_and(|right| right.contains(column))
        };
        let differing: Vec<String> = seen
            .iter()
            .filter(|((kind, transfer), found)| says(*kind, transfer) != (**found == Cell::Right))
            .map(|((kind, transfer), found)| format!("{} by {transfer}: {found:?}", kind.name))
            .collect();
        ensure!(
            differing.is_empty(),
            "docs/compatibility.md says something else of CRIU {column} (PAGEFERRY_WRITE_TABLES=1 writes what is \
             seen): {differing:#?}"
        );
        Ok(())
    }

    /// The table with what was `seen` with `column` in place of what it says.
    pub(crate) fn with(mut self, column: &'static str, seen: &Seen) -> Table {
        for (cell, found) in seen {
            let right = self.0.entry(*cell).or_default();
            match found {
                Cell::Right => right.insert(column),
                _ => right.remove(column),
            };
        }
        self
    }

    /// Puts the table into the documentation.
    pub(crate) fn write(&self) -> Result<()> {
        let text = fs::read_to_string(path()).context("docs/compatibility.md")?;
        let (before, rest) = text.split_once(BEGIN).context("no table of memory kinds")?;
        let (_, after) = rest.split_once(END).context("the table has no end")?;
        Ok(fs::write(
            path(),
            format!("{before}{BEGIN}{}{END}{after}", self.text()),
        )?)
    }

    fn text(&self) -> String {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let titles = TRANSFERS.iter().map(|transfer| transfer.title.to_owned());
        let mut text = String::from("\n");
        text += &row(std::iter::once("mapping".to_owned())
            .chain(titles)
            .collect());
        text += &format!("|{}\n", "---|".repeat(TRANSFERS.len() + 1));
        for kind in KINDS {
            let cells = TRANSFERS.iter().map(|transfer| self.cell(*kind, *transfer));
            text += &row(std::iter::once(kind.title.to_owned())
                .chain(cells)
                .collect());
        }
        text + "\n"
    }

    fn cell(&self, kind: Kind, transfer: Transfer) -> String {
        let right = self.0.get(&(kind, transfer.name));
        let right: Vec<&str> = right.into_iter().flatten().copied().collect();
        match right.len() {
            0 => "—".to_owned(),
            all if all == COLUMNS.len() => "yes".to_owned(),
            _ => right.join(", "),
        }
    }
}

/// Fails if something is wrong that CRIU alone gets right.
pub(crate) fn expect_right(column: &str, seen: &Seen) -> Result<()> {
    let wrong = seen
        .iter()
        .filter_map(|((kind, transfer), cell)| match cell {
            Cell::Wrong(wrong) => Some(format!("{} by {transfer}: {wrong}", kind.name)),
            _ => None,
        });
    let wrong: Vec<String> = wrong.collect();
    ensure!(wrong.is_empty(), "CRIU {column}: {wrong:#?}");
    Ok(())
}
