//! What a lazy-client cannot do any more once it waits for the restore. What it still must do with other processes the
//! tests with a real CRIU show: they run with the same sandbox.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use common::{FIRST_PAGE, Run, TARGET, write_target};
use pageferry::criu::header::{PageFlags, Wire};
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::proto::{Core, Mm, PstreeEntry, TaskCore, Vma};
use testbed::gate;

fn write<M: prost::Message>(path: &Path, magic: Magic, message: &M) {
    let mut writer = MessageWriter::new(File::create(path).unwrap(), magic).unwrap();
    writer.write(message).unwrap();
}

/// Images of one process with all of its pages.
fn images() -> tempfile::TempDir {
    let images = tempfile::tempdir().unwrap();
    let dir = images.path();
    let core = Core {
        task: Some(TaskCore {
            task_state: 1,
            comm: None,
        }),
        ..Core::default()
    };
    write(&dir.join("core-7.img"), Magic::Core, &core);
    let vma = Vma {
        start: FIRST_PAGE << 12,
        end: (FIRST_PAGE + 16) << 12,
        ..Vma::default()
    };
    write(&dir.join("mm-7.img"), Magic::Mm, &Mm { vmas: vec![vma] });
    let runs = [Run::present(FIRST_PAGE, 4, PageFlags::LAZY, 1)];
    write_target(dir, TARGET, Wire::V2, 1, &runs);
    let tree = PstreeEntry {
        pid: 7,
        ..PstreeEntry::default()
    };
    write(&dir.join("pstree.img"), Magic::Pstree, &tree);
    images
}

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
    let images = images();
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
