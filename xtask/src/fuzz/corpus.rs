//! The committed corpora.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::workspace::root;

use crate::chosen;

/// Longest input: a page with what stands around it, and more.
pub(super) const INPUT_BYTES_MAX: usize = 8 << 10;

/// Most inputs of a target that are committed, the shortest ones.
const INPUTS_MAX: usize = 64;

/// What findings that were fixed are called: they stay.
const FOUND: &str = "found-";

/// Where the corpus of a target lies.
pub(super) fn dir(name: &str) -> PathBuf {
    root().join("fuzz/corpus").join(name)
}

/// The targets that are wanted, or all.
pub(super) fn chosen(wanted: &[String]) -> Result<Vec<String>> {
    let corpora = root().join("fuzz/corpus");
    let mut names = Vec::new();
    for entry in fs::read_dir(&corpora).with_context(|| corpora.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    chosen::chosen(names, wanted)
}

/// The files of a directory.
pub(super) fn inputs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Puts the inputs of `merged` in place of those in `committed`.
pub(super) fn replace(committed: &Path, merged: &Path) -> Result<()> {
    let mut better = Vec::new();
    for path in inputs(merged)? {
        better.push((fs::metadata(&path)?.len(), path));
    }
    better.sort();
    better.truncate(INPUTS_MAX);
    ensure!(
        !better.is_empty(),
        "nothing is left of {}",
        committed.display()
    );
    for path in inputs(committed)? {
        let name = path.file_name().unwrap_or_default();
        if !name.to_string_lossy().starts_with(FOUND) {
            fs::remove_file(&path)?;
        }
    }
    for (_, path) in better {
        fs::copy(&path, committed.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}
