//! A directory of one test's own, with large pipes; its logs are shown if it fails.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::pipes::LargePipes;
use crate::process::tail;
use crate::wait::interrupt_on_signals;

/// Set to keep the directories of failed tests.
pub const KEEP_VARIABLE: &str = "PAGEFERRY_KEEP";

/// A test's own directory. Made first, dropped last.
#[derive(Debug)]
pub struct TestDir {
    dir: TempDir,
    _pipes: LargePipes,
}

impl TestDir {
    /// A fresh directory, and pipes large enough for `criu dump --lazy-pages`.
    ///
    /// # Errors
    /// Neither root, nor large pipes already.
    pub fn new() -> Result<TestDir> {
        TestDir::new_in(&env::temp_dir())
    }

    /// The same with the directory made in `parent`: a file system chosen for its speed.
    ///
    /// # Errors
    /// As [`TestDir::new`]; or `parent` cannot be written.
    pub fn new_in(parent: &Path) -> Result<TestDir> {
        let pipes = LargePipes::allow()?;
        let dir = tempfile::Builder::new()
            .prefix("pageferry-")
            .tempdir_in(parent);
        let dir = dir.with_context(|| format!("a directory in {}", parent.display()))?;
        Ok(TestDir { dir, _pipes: pipes })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Shows the end of every log in the directory.
    pub fn show_logs(&self) {
        let mut logs = Vec::new();
        collect_logs(self.dir.path(), &mut logs);
        for log in logs {
            eprintln!("{}", tail(&log));
        }
    }
}

/// Lets the machine have `bytes` bytes of memory at hand: what a virtual machine has not used for a
/// while its host must find first, which takes several times as long as to store a page. `dir` is on
/// a tmpfs.
///
/// # Errors
/// There is not so much room in `dir`.
pub fn warm_memory(dir: &Path, bytes: u64) -> Result<()> {
    let path = dir.join("warm");
    let mut file = File::create(&path)?;
    io::copy(&mut io::repeat(0).take(bytes), &mut file)?;
    Ok(fs::remove_file(path)?)
}

fn collect_logs(dir: &Path, logs: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() && !path.is_symlink() {
            collect_logs(&path, logs);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
}

/// Runs a test in a test directory of its own; what it returns or panics with is shown with all logs.
///
/// # Panics
/// The test fails.
pub fn with_test_dir(test: impl FnOnce(&TestDir) -> Result<()>) {
    // A test that is ended from outside cleans up as well.
    interrupt_on_signals().unwrap_or_else(|error| panic!("{error:#}"));
    let mut test_dir =
        TestDir::new().unwrap_or_else(|error| panic!("making the test's directory: {error:#}"));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&test_dir)));
    if matches!(result, Ok(Ok(()))) {
        return;
    }
    test_dir.show_logs();
    if env::var_os(KEEP_VARIABLE).is_some() {
        test_dir.dir.disable_cleanup(true);
        eprintln!("kept: {}", test_dir.dir.path().display());
    }
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:#}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
