//! The files that git knows, or would take.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Those below `root` that match `pattern`, as paths relative to it.
///
/// # Errors
/// git cannot be run, or there is none.
pub(crate) fn files(root: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .arg(pattern)
        .current_dir(root)
        .output()
        .context("cannot run git")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "git ls-files: {stderr}");
    let names = String::from_utf8(output.stdout).context("a file's name")?;
    let paths: Vec<PathBuf> = names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        // One that was removed and not committed is still in the index.
        .filter(|path| root.join(path).exists())
        .collect();
    ensure!(
        !paths.is_empty(),
        "git knows no {pattern} below {}",
        root.display()
    );
    Ok(paths)
}
