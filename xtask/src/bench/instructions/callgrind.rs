//! How many instructions a program takes, counted by valgrind's callgrind.

use std::fs;
use std::path::Path;
use std::process::{self, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Fails unless valgrind can be run.
pub(super) fn check() -> Result<()> {
    let version = Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    match version {
        Ok(status) if status.success() => Ok(()),
        _ => bail!(
            "valgrind is missing, which counts instructions: install your distribution's package of that name \
             (apt-get install valgrind)"
        ),
    }
}

/// Runs `program`, which must succeed, and tells how many instructions it took.
pub(super) fn count(program: &Path, words: &[&str]) -> Result<u64> {
    let out = std::env::temp_dir().join(format!("pageferry-callgrind-{}", process::id()));
    let run = Command::new("valgrind")
        .args(["--quiet", "--tool=callgrind"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args(words)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("valgrind")?;
    let text = fs::read_to_string(&out);
    _ = fs::remove_file(&out);
    ensure!(
        run.status.success(),
        "valgrind {}: {}: {}",
        program.display(),
        run.status,
        String::from_utf8_lossy(&run.stderr).trim()
    );
    instructions(&text.with_context(|| out.display().to_string())?)
}

/// What a file of callgrind's counts in all.
fn instructions(text: &str) -> Result<u64> {
    let field = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        lines.next().map(str::trim)
    };
    ensure!(
        field("events:") == Some("Ir"),
        "callgrind counts {:?}, not instructions (Ir)",
        field("events:")
    );
    let total = field("summary:").or_else(|| field("totals:"));
    let total = total.context("callgrind's file has no sum")?;
    total
        .parse()
        .with_context(|| format!("callgrind's sum {total:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# callgrind format\nversion: 1\ncreator: callgrind-3.19.0\npid: 7\ncmd:  workloads window 8\n\
        part: 1\n\n\ndesc: I1 cache: \n\ndesc: Timerange: Basic block 0 - 99\ndesc: Trigger: Program termination\n\n\
        positions: line\nevents: Ir\nsummary: 21540311\n\n\nob=(1) workloads\nfl=(1) lib.rs\nfn=(1) main\n16 3\n\n\
        totals: 21540311\n";

    #[test]
    fn the_sum_of_a_file_is_read() {
        assert_eq!(instructions(FILE).unwrap(), 21_540_311);
        let older = FILE.replace("summary: 21540311\n", "");
        assert_eq!(instructions(&older).unwrap(), 21_540_311);
    }

    #[test]
    fn other_events_and_cut_files_are_refused() {
        let other = FILE.replace("events: Ir", "events: Dr");
        assert!(instructions(&other).is_err());
        let cut = FILE.split("summary").next().unwrap();
        assert!(instructions(cut).unwrap_err().to_string().contains("sum"));
    }
}
