//! Tables of text: columns as wide as their widest cell, words to the left, numbers to the right.

use std::fmt::{self, Display, Formatter};

use super::stats::{Bound, Sample};

/// Shown where nothing was measured.
const NOTHING: &str = "-";

/// A table with one column of words and any number of columns of numbers.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with only its headings.
    pub(crate) fn new<'a>(headings: impl IntoIterator<Item = &'a str>) -> Table {
        let headings = headings.into_iter().map(str::to_owned).collect();
        Table {
            rows: vec![headings],
        }
    }

    /// Adds a row: what it is about, and its numbers.
    pub(crate) fn row(&mut self, what: &str, numbers: impl IntoIterator<Item = String>) {
        let cells = std::iter::once(what.to_owned()).chain(numbers);
        self.rows.push(cells.collect());
    }
}

impl Display for Table {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                match column {
                    0 => write!(out, "{cell:<width$}")?,
                    _ => write!(out, "  {cell:>width$}")?,
                }
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// A sample as a cell: three significant digits, and a sign where it is a bound.
pub(crate) fn cell(sample: Option<Sample>) -> String {
    let Some(Sample { value, bound }) = sample else {
        return NOTHING.to_owned();
    };
    let sign = match bound {
        Bound::Exact => "",
        Bound::AtLeast => "> ",
        Bound::AtMost => "< ",
    };
    let decimals = match value.abs() {
        0.0 | 100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{sign}{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["who", "s"]);
        table.row("pageferry", [cell(Some(Sample::exact(1.234)))]);
        table.row("CRIU", [cell(Some(Sample::at_least(60.0)))]);
        table.row("nobody", [cell(None)]);
        let shown = "who             s\npageferry    1.23\nCRIU       > 60.0\nnobody          -\n";
        assert_eq!(table.to_string(), shown);
    }
}
