//! The units of systemd that packages install: how much they leave open, by systemd's own judgement.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use testbed::{gate, workspace};

/// What docs/security.md says of each unit: its score, of which 0 is best and 10 is worst, in tenths.
fn documented() -> Vec<(String, u32)> {
    let text = std::fs::read_to_string(workspace::root().join("docs/security.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`'));
        let (unit, score) = (cells.nth(1)?, cells.next()?);
        unit.ends_with(".service")
            .then(|| (unit.to_owned(), tenths(score)))
    });
    rows.collect()
}

fn tenths(score: &str) -> u32 {
    let (whole, tenth) = score.split_once('.').unwrap();
    whole.parse::<u32>().unwrap() * 10 + tenth.parse::<u32>().unwrap()
}

/// The score of `unit` by the systemd in `usr`.
fn score(usr: &Path, unit: &Path) -> u32 {
    let at = |path: &&str| -> Option<PathBuf> { Some(usr.join(path)).filter(|path| path.exists()) };
    let loaders = ["lib64/ld-linux-x86-64.so.2", "lib/ld-linux-aarch64.so.1"];
    let libraries = ["lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"];
    let loader = loaders.iter().find_map(at).unwrap();
    let libraries = libraries.iter().find_map(at).unwrap();
    let (own, all) = (libraries.join("systemd"), libraries);
    let mut command = Command::new(loader);
    command
        .arg("--library-path")
        .arg(format!("{}:{}", own.display(), all.display()))
        .arg(usr.join("bin/systemd-analyze"))
        .args(["security", "--offline=true", "--no-pager"])
        .arg(unit)
        .envs([("LC_ALL", "C"), ("SYSTEMD_EMOJI", "0")]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .find(|line| line.contains("Overall exposure level"));
    let line = line.unwrap_or_else(|| panic!("{output:?}"));
    let (_, verdict) = line.rsplit_once(": ").unwrap();
    tenths(verdict.split_whitespace().next().unwrap())
}

#[test]
fn units_are_as_closed_as_the_document_says() {
    let Some(usr) = gate::systemd() else { return };
    let documented = documented();
    let units = workspace::root().join("packaging/systemd");
    let installed = std::fs::read_dir(&units).unwrap().count();
    assert_eq!(documented.len(), installed, "{documented:?}");
    for (unit, promised) in documented {
        let found = score(&usr, &units.join(&unit));
        assert!(
            found <= promised,
            "{unit}: {found} tenths, {promised} are promised"
        );
    }
}
