//! The things that a command is asked for by name, of those that there are.

use anyhow::{Result, ensure};

/// Those of `names` that are `wanted`, or all of them if none is wanted.
///
/// # Errors
/// Something is wanted that there is not.
pub(crate) fn chosen(mut names: Vec<String>, wanted: &[String]) -> Result<Vec<String>> {
    names.sort();
    if wanted.is_empty() {
        return Ok(names);
    }
    for name in wanted {
        ensure!(
            names.contains(name),
            "{name} is none of {}",
            names.join(" ")
        );
    }
    Ok(wanted.to_vec())
}
