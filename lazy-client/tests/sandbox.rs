//! What a lazy-client cannot do any more once it waits for the restore. What it still must do with other processes the
//! tests with a real CRIU show: they run with the same sandbox.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/process_images.rs"]
mod process_images;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use process_images::whole;
use testbed::gate;

/// What a lazy-client with `args` on `images` tries, and how it ends; or what it says instead.
fn tried(images: &Path, args: &[&str]) -> Result<BTreeMap<String, String>, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-client"));
    command
        .args(["--sandbox-check", "--no-standby", "-D"])
        .arg(images)
        .args(args);
    let output = command.output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let ended = text.lines().filter_map(|line| line.split_once(": "));
    Ok(ended
        .map(|(name, ended)| (name.to_owned(), ended.to_owned()))
        .collect())
}

#[test]
fn it_starts_no_program_and_writes_no_file() {
    let images = process_images::images(&whole());
    let dir = images.path();
    let required = tried(dir, &["--sandbox", "require"]);
    let Some(confined) = gate::need("seccomp", required) else {
        return;
    };
    let deduplicates = tried(dir, &["--auto-dedup"]).unwrap();
    let free = tried(dir, &["--sandbox", "off"]).unwrap();
    let (no, missing) = ("not permitted", "not implemented");
    for (name, ended, when_deduplicating, without) in [
        ("make a file in the images directory", no, "done", "done"),
        ("make a file elsewhere", no, "done", "done"),
        ("read a file elsewhere", "done", "done", "done"),
        ("look at another process", "done", "done", "done"),
        ("signal another process", "done", "done", "done"),
        ("start a program", missing, missing, "done"),
        (
            "execute a missing program",
            missing,
            missing,
            "No such file",
        ),
        ("make memory executable", missing, missing, "done"),
        ("start a thread", "done", "done", "done"),
    ] {
        for (attempts, expected) in [
            (&confined, ended),
            (&deduplicates, when_deduplicating),
            (&free, without),
        ] {
            assert!(
                attempts[name].contains(expected),
                "{name}: {}",
                attempts[name]
            );
        }
    }
}
