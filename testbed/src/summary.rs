//! What the daemons write with `--summary-json`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::schema;
use crate::wait::{self, GENEROUS};

/// The summary of the `nth` session of a page-server, from 0, that `file` tells of, a line each. Waits for it.
///
/// # Errors
/// It does not come, or has not the form of its schema.
pub fn of_session(file: &Path, nth: usize) -> Result<Value> {
    let line = wait::until("a summary", GENEROUS, || {
        let text = fs::read_to_string(file)?;
        Ok(text.lines().nth(nth).map(ToOwned::to_owned))
    })?;
    let summary = serde_json::from_str(&line).with_context(|| line.clone())?;
    schema::expect("page-server-summary", &summary)?;
    Ok(summary)
}

/// The summary of a lazy-client, which is all of `file`.
///
/// # Errors
/// It is not there, or has not the form of its schema.
pub fn whole(file: &Path) -> Result<Value> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let summary = serde_json::from_str(&text).with_context(|| text.clone())?;
    schema::expect("lazy-client-summary", &summary)?;
    Ok(summary)
}

/// The number at `path`, a JSON pointer, of `summary`.
///
/// # Errors
/// There is none.
pub fn number(summary: &Value, path: &str) -> Result<u64> {
    let value = summary.pointer(path).and_then(Value::as_u64);
    value.with_context(|| format!("no {path} in {summary}"))
}
