//! What a power cut may leave of a session with `--sync close`. The server's calls about its images are recorded. Every
//! prefix of them is taken, with any part of the names that the disk was not waited for, and with any contents of files
//! that it was not waited for. In each such state an image is absent, or as it was before, or whole.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};

use common::{FIRST_PAGE, PAGE, Run, naive_memory, page_content, write_target};
use dump_bytes::dump;
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use place::Place;
use testbed::gate;
use testbed::process::Spawned;
use testbed::recording::{Recording, Step};
use testbed::wait::GENEROUS;

const TARGETS: [Target; 2] = [Target::Process(7), Target::Process(8)];

/// Names that wait for the disk at most: each doubles the states.
const PENDING_MAX: usize = 12;

/// What a file holds that was written and not waited for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Contents {
    Whole,
    Half,
    Nothing,
}

/// A change of a directory, of the file with this number.
#[derive(Clone, Debug)]
enum NameChange {
    Made(PathBuf, usize),
    Renamed(PathBuf, PathBuf, usize),
    Removed(PathBuf),
}

/// The files of a disk by name: the number of each, and what it holds.
type State = BTreeMap<PathBuf, (usize, Contents)>;

/// A directory as the program sees it, and what of it is on the disk.
#[derive(Default)]
struct Disk {
    names: BTreeMap<PathBuf, usize>,
    safe_names: BTreeMap<PathBuf, usize>,
    pending: Vec<NameChange>,
    unsafe_files: BTreeSet<usize>,
    files: usize,
}

impl Disk {
    /// With these files on the disk.
    fn with(names: impl Iterator<Item = PathBuf>) -> Disk {
        let names: BTreeMap<PathBuf, usize> = names.zip(0..).collect();
        Disk {
            safe_names: names.clone(),
            files: names.len(),
            names,
            ..Disk::default()
        }
    }

    /// Takes a step. False if nothing that a cut may leave is new.
    fn take(&mut self, step: &Step) -> bool {
        match step {
            Step::Make(path) => {
                if self.names.contains_key(path) {
                    return false;
                }
                let file = self.files;
                self.files += 1;
                self.names.insert(path.clone(), file);
                self.pending.push(NameChange::Made(path.clone(), file));
            }
            Step::Write(path) => {
                let Some(file) = self.names.get(path) else {
                    return false;
                };
                return self.unsafe_files.insert(*file);
            }
            Step::Sync(path) if path.is_dir() => {
                let is_elsewhere = |change: &NameChange| match change {
                    NameChange::Made(name, _)
                    | NameChange::Renamed(_, name, _)
                    | NameChange::Removed(name) => name.parent() != Some(path),
                };
                self.pending.retain(is_elsewhere);
                assert!(self.pending.is_empty(), "one directory at a time");
                self.safe_names = self.names.clone();
            }
            Step::Sync(path) => {
                if let Some(file) = self.names.get(path) {
                    self.unsafe_files.remove(file);
                }
            }
            Step::Rename(from, to) => {
                let Some(file) = self.names.remove(from) else {
                    return false;
                };
                self.names.insert(to.clone(), file);
                let change = NameChange::Renamed(from.clone(), to.clone(), file);
                self.pending.push(change);
            }
            Step::Unlink(path) => {
                if self.names.remove(path).is_none() {
                    return false;
                }
                self.pending.push(NameChange::Removed(path.clone()));
            }
            Step::Other(_) => return false,
        }
        true
    }

    /// Everything that a cut may leave now.
    fn states(&self, states: &mut BTreeSet<State>) {
        assert!(self.pending.len() <= PENDING_MAX, "{:?}", self.pending);
        for part in 0..1_u32 << self.pending.len() {
            let mut names = self.safe_names.clone();
            for (bit, change) in self.pending.iter().enumerate() {
                if part >> bit & 1 == 1 {
                    apply(change, &mut names);
                }
            }
            for contents in [Contents::Whole, Contents::Half, Contents::Nothing] {
                let held = |file: &usize| match self.unsafe_files.contains(file) {
                    true => contents,
                    false => Contents::Whole,
                };
                let state = names.iter();
                let state = state.map(|(name, file)| (name.clone(), (*file, held(file))));
                states.insert(state.collect());
            }
        }
    }
}

fn apply(change: &NameChange, names: &mut BTreeMap<PathBuf, usize>) {
    match change {
        NameChange::Made(path, file) => drop(names.insert(path.clone(), *file)),
        NameChange::Removed(path) => drop(names.remove(path)),
        NameChange::Renamed(from, to, file) => {
            names.remove(from);
            names.insert(to.clone(), *file);
        }
    }
}

/// The plain files in a directory.
fn files_in(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.is_file());
    files
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// Pages of a target with their contents: those of `first_seed` and of what follows it.
fn runs(first_seed: u32) -> Vec<Run> {
    vec![
        Run::present(FIRST_PAGE, 2, PageFlags::default(), first_seed),
        Run::present(FIRST_PAGE + 9, 3, PageFlags::LAZY, first_seed + 10),
    ]
}

type Memory = BTreeMap<u64, Vec<u8>>;

fn expected(first_seed: u32) -> Memory {
    let pages = naive_memory(&[runs(first_seed)]).into_iter();
    let held = |seed: Option<u32>| page_content(seed.unwrap());
    pages.map(|(page, seed)| (page, held(seed))).collect()
}

/// The memory of a target, or why it cannot be had.
fn memory(dir: &Path, target: Target) -> Result<Memory, String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let images = ImageDir::open(dir, PAGE).map_err(|error| told(&error))?;
    let chain = Chain::open(&images, target, Missing::Refuse).map_err(|error| told(&error))?;
    let mut memory = Memory::new();
    for extent in chain.extents() {
        let mut place = extent.place;
        for page in extent.range.start().get() >> 12..extent.range.end().get() >> 12 {
            let mut bytes = vec![0; 4096];
            chain
                .read(place, &mut bytes)
                .map_err(|error| told(&error))?;
            memory.insert(page, bytes);
            place = place.behind(4096, PAGE);
        }
    }
    Ok(memory)
}

/// Receives a dump of both targets and returns the server's steps, and what it answered.
fn receive(place: &Place, first_seed: u32) -> Option<(Vec<Step>, Vec<u8>)> {
    let images = place.images().canonicalize().unwrap();
    let mut command = place.command(&["--io", "epoll", "--sync", "close"]);
    let recording = Recording::of(&mut command, &images, place.root.path());
    let recording = gate::need("a C compiler", recording)?;
    let log = place.work().join("log");
    let mut server = Spawned::start("page-server", &mut command, Some(log)).unwrap();
    let mut stream = place.connect();
    let targets = TARGETS.map(|target| (target, runs(first_seed)));
    stream.write_all(&dump(&targets, Wire::V2)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    server.succeed(GENEROUS).unwrap();
    Some((recording.steps().unwrap(), answers))
}

/// The contents of all files, by their number.
type Files = BTreeMap<usize, Vec<u8>>;

/// Rebuilds each state and looks at both targets in it: `judge` is told what each holds; `None` is absent.
fn in_each_state(
    states: &BTreeSet<State>,
    files: &BTreeMap<usize, Vec<u8>>,
    judge: impl Fn(Option<Memory>) -> bool,
) {
    for state in states {
        let dir = tempfile::tempdir().unwrap();
        for (path, (file, contents)) in state {
            let bytes = &files[file];
            let length = match contents {
                Contents::Whole => bytes.len(),
                Contents::Half => bytes.len() / 2,
                Contents::Nothing => 0,
            };
            fs::write(dir.path().join(path.file_name().unwrap()), &bytes[..length]).unwrap();
        }
        for target in TARGETS {
            let there = dir.path().join(target.pagemap_name()).exists();
            let found = there.then(|| memory(dir.path(), target)).transpose();
            let found = found.unwrap_or_else(|error| panic!("{error}: {target} in {state:#?}"));
            assert!(judge(found), "{target} in {state:#?}");
        }
    }
}

/// All states of a session over what `place` holds, and the contents of all files.
fn states_of(place: &Place, first_seed: u32) -> Option<(BTreeSet<State>, Files)> {
    let images = place.images().canonicalize().unwrap();
    let before = files_in(&images);
    let mut disk = Disk::with(before.keys().cloned());
    let mut files: BTreeMap<usize, Vec<u8>> = (0..).zip(before.into_values()).collect();
    let (steps, answers) = receive(place, first_seed)?;
    assert_eq!(answers, [0; 6], "it was told of success");
    let mut states = BTreeSet::new();
    disk.states(&mut states);
    for step in &steps {
        if disk.take(step) {
            disk.states(&mut states);
        }
    }
    let after = files_in(&images);
    assert!(
        disk.names.keys().eq(after.keys()),
        "{:?}: {steps:#?}",
        disk.names
    );
    for (path, bytes) in after {
        files.insert(disk.names[&path], bytes);
    }
    println!("{} steps, {} states", steps.len(), states.len());
    // Whoever was told of success has it all, whatever comes.
    let mut last = BTreeSet::new();
    disk.states(&mut last);
    in_each_state(&last, &files, |found| found == Some(expected(first_seed)));
    Some((states, files))
}

#[test]
fn a_first_image_is_absent_or_whole() {
    let place = Place::new();
    let Some((states, files)) = states_of(&place, 1) else {
        return;
    };
    let whole = expected(1);
    in_each_state(&states, &files, |found| {
        found.is_none_or(|found| found == whole)
    });
}

#[test]
fn an_image_over_another_one_is_that_or_whole() {
    let place = Place::new();
    for (id, target) in (1..).zip(TARGETS) {
        write_target(&place.images(), target, Wire::V2, id, &runs(500));
    }
    let Some((states, files)) = states_of(&place, 1) else {
        return;
    };
    let both = [expected(1), expected(500)];
    in_each_state(&states, &files, |found| {
        found.is_some_and(|found| both.contains(&found))
    });
}
