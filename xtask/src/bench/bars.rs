//! Bars: what pageferry promises, against what was measured.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::stats::Sample;
use super::table::{Table, cell};

/// A value that must not be larger than a limit.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bar {
    /// What is promised of what.
    name: String,
    /// What was measured, if the run had what it needs.
    measured: Option<Sample>,
    /// The most that it may be, in the unit of what was measured.
    limit: f64,
    /// Whether the promise is kept; none: this run cannot tell.
    kept: Option<bool>,
}

impl Bar {
    /// `measured` must be at most `limit`.
    pub(crate) fn new(name: impl Into<String>, measured: Option<Sample>, limit: f64) -> Bar {
        Bar {
            name: name.into(),
            measured,
            limit,
            kept: measured.and_then(|sample| sample.is_at_most(limit)),
        }
    }

    /// What is promised of what.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What was measured.
    pub(crate) fn measured(&self) -> Option<Sample> {
        self.measured
    }

    /// The most that it may be.
    pub(crate) fn limit(&self) -> f64 {
        self.limit
    }

    /// Whether the promise is kept.
    pub(crate) fn kept(&self) -> Option<bool> {
        self.kept
    }
}

/// All bars as a table.
pub(crate) fn table(bars: &[Bar]) -> Table {
    let mut table = Table::new(["bar", "measured", "at most", ""]);
    for bar in bars {
        let verdict = match (bar.kept, bar.measured) {
            (Some(true), _) => "pass",
            (Some(false), _) => "FAIL",
            (None, Some(_)) => "open: a run hit --limit",
            (None, None) => "not measured",
        };
        let limit = cell(Some(Sample::exact(bar.limit)));
        table.row(&bar.name, [cell(bar.measured), limit, verdict.to_owned()]);
    }
    table
}
