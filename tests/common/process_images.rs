//! Image directories of one process, and what a program says that refuses them at its start.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::{self, File};
use std::path::Path;

use pageferry::criu::header::{PageFlags, Wire};
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::proto::{Core, Mm, PstreeEntry, TaskCore, Vma};
use tempfile::TempDir;
use testbed::process::Spawned;
use testbed::wait::GENEROUS;

use crate::common::{FIRST_PAGE, Run, TARGET, write_target};

/// [`TaskCore::task_state`] of a process that runs.
const TASK_ALIVE: u32 = 1;

/// Four pages that are here, whole.
pub(crate) fn whole() -> Vec<Run> {
    vec![Run::present(FIRST_PAGE, 4, PageFlags::LAZY, 1)]
}

/// A directory with the images of one process, of which `runs` are its memory.
pub(crate) fn images(runs: &[Run]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_process(dir.path(), runs);
    dir
}

/// The same in a directory that is there. The tree is written last, as a dump does.
pub(crate) fn write_process(dir: &Path, runs: &[Run]) {
    write_core(dir, TASK_ALIVE);
    let vma = Vma {
        start: FIRST_PAGE << 12,
        end: (FIRST_PAGE + 16) << 12,
        ..Vma::default()
    };
    write_message(
        &dir.join("mm-7.img"),
        Magic::Mm,
        &Mm {
            vmas: vec![vma],
            ..Mm::default()
        },
    );
    write_target(dir, TARGET, Wire::V2, 1, runs);
    let tree = PstreeEntry {
        pid: 7,
        ..PstreeEntry::default()
    };
    write_message(&dir.join("pstree.img"), Magic::Pstree, &tree);
}

/// The core image of the process, which is in a state.
pub(crate) fn write_core(dir: &Path, task_state: u32) {
    let core = Core {
        task: Some(TaskCore {
            task_state,
            comm: None,
        }),
        ..Core::default()
    };
    write_message(&dir.join("core-7.img"), Magic::Core, &core);
}

fn write_message<M: prost::Message>(path: &Path, magic: Magic, message: &M) {
    let mut writer = MessageWriter::new(File::create(path).unwrap(), magic).unwrap();
    writer.write(message).unwrap();
}

/// A `program` that fails, and whose last word in the file `log` in `dir` is an error with these `words`.
pub(crate) fn expect_error(mut program: Spawned, dir: &Path, words: &[&str]) {
    program.fail(GENEROUS).unwrap();
    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let error = log.lines().last().unwrap_or_default();
    assert!(error.contains("error: "), "{log}");
    for word in words {
        assert!(error.contains(word), "{word:?}: {error}");
    }
}
