//! What a power cut may leave of a session with `--sync close`. The server's calls about its images are recorded. Every
//! prefix of them is taken, with any part of the names that the disk was not waited for, and with any contents of files
//! that it was not waited for. In each such state an image is absent, or as it was before, or whole, and the directory
//! can be received into.

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
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::image::chain::{Chain, Missing, Place as PagePlace};
use pageferry::image::dir::ImageDir;
use place::Place;
use testbed::gate;
use testbed::power_cut::{Disk, State};
use testbed::process::Spawned;
use testbed::recording::{Recording, Step};
use testbed::wait::GENEROUS;

const TARGETS: [Target; 2] = [Target::Process(7), Target::Process(8)];

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

/// The pages of a target that its images have, `None` if there are none of it.
///
/// # Panics
/// What is there cannot be read.
fn memory(dir: &Path, target: Target, missing: Missing) -> Option<Memory> {
    if !dir.join(target.pagemap_name()).exists() {
        return None;
    }
    let images = ImageDir::open(dir, PAGE).unwrap();
    let chain = Chain::open(&images, target, missing).unwrap();
    let mut memory = Memory::new();
    for extent in chain.extents() {
        let mut place = extent.place;
        if matches!(place, PagePlace::Absent { .. }) {
            continue;
        }
        for page in extent.range.start().get() >> 12..extent.range.end().get() >> 12 {
            let mut bytes = vec![0; 4096];
            chain.read(place, &mut bytes).unwrap();
            memory.insert(page, bytes);
            place = place.behind(4096, PAGE);
        }
    }
    Some(memory)
}

/// Where a server works, and the directories that it writes to.
struct Server<'a> {
    place: &'a Place,
    roots: Vec<PathBuf>,
    options: Vec<String>,
}

impl<'a> Server<'a> {
    fn new(place: &'a Place) -> Server<'a> {
        let roots = vec![place.images().canonicalize().unwrap()];
        Server {
            place,
            roots,
            options: Vec::new(),
        }
    }

    /// With another directory beside the images, which is made, and what names it.
    fn beside(mut self, option: &str) -> Server<'a> {
        let dir = self.place.root.path().canonicalize().unwrap().join("lazy");
        fs::create_dir(&dir).unwrap();
        let dir_name = dir.to_str().unwrap().to_owned();
        self.options.extend([option.to_owned(), dir_name]);
        self.roots.push(dir);
        self
    }

    fn with(mut self, options: &[&str]) -> Server<'a> {
        self.options.extend(options.iter().map(ToString::to_string));
        self
    }

    fn roots(&self) -> Vec<&Path> {
        self.roots.iter().map(PathBuf::as_path).collect()
    }

    /// Receives a dump and returns the server's steps.
    fn receive(&self, dump: &[u8]) -> Option<Vec<Step>> {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        let options = [&["--io", "epoll", "--sync", "close"], options.as_slice()].concat();
        let mut command = self.place.command(&options);
        let root = self.place.root.path().canonicalize().unwrap();
        let recording = Recording::of(&mut command, &root, self.place.root.path());
        let recording = gate::need("a C compiler", recording)?;
        let log = self.place.work().join("log");
        let mut server = Spawned::start("page-server", &mut command, Some(log)).unwrap();
        let mut stream = self.place.connect();
        stream.write_all(dump).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        stream.read_to_end(&mut answers).unwrap();
        server.succeed(GENEROUS).unwrap();
        assert!(answers.iter().all(|byte| *byte == 0), "{answers:?}");
        assert_eq!(answers.len(), TARGETS.len() + 4, "it was told of success");
        Some(recording.steps().unwrap())
    }

    /// All states of a session that receives `dump`, and those that may be left once it was told of success.
    fn states(&self, dump: &[u8]) -> Option<States> {
        let mut disk = Disk::of(&self.roots()).unwrap();
        let steps = self.receive(dump)?;
        let mut all = BTreeSet::new();
        disk.states(&mut all);
        for step in &steps {
            if disk.take(step) {
                disk.states(&mut all);
            }
        }
        disk.read_contents()
            .unwrap_or_else(|error| panic!("{error:#}: {steps:#?}"));
        let mut last = BTreeSet::new();
        disk.states(&mut last);
        println!("{} steps, {} states", steps.len(), all.len());
        Some(States { disk, all, last })
    }
}

struct States {
    disk: Disk,
    all: BTreeSet<State>,
    last: BTreeSet<State>,
}

impl States {
    /// Rebuilds each state, and has `judge` look at the directories of it. False is a fault, as is a panic.
    fn each(&self, judge: impl Fn(&[PathBuf]) -> bool) {
        self.look(&self.all, judge);
    }

    /// The same of those after success.
    fn each_last(&self, judge: impl Fn(&[PathBuf]) -> bool) {
        self.look(&self.last, judge);
    }

    fn look(&self, states: &BTreeSet<State>, judge: impl Fn(&[PathBuf]) -> bool) {
        for state in states {
            let named = Named(state);
            let place = tempfile::tempdir().unwrap();
            // What is beside the images in a difference's name.
            fs::create_dir(place.path().join("before")).unwrap();
            let dirs = ["images", "lazy"].map(|name| place.path().join(name));
            let paths: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
            self.disk.write_out(state, &paths).unwrap();
            assert!(judge(&dirs));
            drop(named);
        }
    }
}

/// Tells which state it was if a look at it panics.
struct Named<'a>(&'a State);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:#?}", self.0);
        }
    }
}

/// Whether each target is absent or has one of these memories.
fn is_one_of(dir: &Path, memories: &[Option<Memory>]) -> bool {
    let found = TARGETS.map(|target| memory(dir, target, Missing::Refuse));
    found.iter().all(|found| memories.contains(found))
}

fn dump_of(first_seed: u32) -> Vec<u8> {
    dump(&TARGETS.map(|target| (target, runs(first_seed))), Wire::V2)
}

/// Options of a server that finds a state.
fn store(dir: &Path) -> StoreOptions {
    StoreOptions::new(dir, PAGE)
}

#[test]
fn a_first_image_is_absent_or_whole() {
    let place = Place::new();
    let Some(states) = Server::new(&place).states(&dump_of(1)) else {
        return;
    };
    let whole = Some(expected(1));
    states.each_last(|dirs| is_one_of(&dirs[0], std::slice::from_ref(&whole)));
    states.each(|dirs| is_one_of(&dirs[0], &[None, whole.clone()]));
    states.each(|dirs| Stores::open(store(&dirs[0]), None).is_ok());
}

#[test]
fn an_image_over_another_one_is_that_or_whole() {
    let place = Place::new();
    for (id, target) in (1..).zip(TARGETS) {
        write_target(&place.images(), target, Wire::V2, id, &runs(500));
    }
    let Some(states) = Server::new(&place).states(&dump_of(1)) else {
        return;
    };
    let (before, whole) = (Some(expected(500)), Some(expected(1)));
    states.each_last(|dirs| is_one_of(&dirs[0], std::slice::from_ref(&whole)));
    states.each(|dirs| is_one_of(&dirs[0], &[before.clone(), whole.clone()]));
}

/// The pages that a lazy restore can do without, or the others.
fn part(first_seed: u32, lazy: bool) -> Memory {
    let pages = expected(first_seed).into_iter();
    let is_lazy = |page: u64| page >= FIRST_PAGE + 9;
    pages.filter(|(page, _)| is_lazy(*page) == lazy).collect()
}

/// Which images are there says what can be restored: those in the images' directory need those beside it.
#[test]
fn images_apart_are_absent_or_whole_together() {
    let place = Place::new();
    let server = Server::new(&place).beside("--split-lazy");
    let Some(states) = server.states(&dump_of(1)) else {
        return;
    };
    let (rest, apart) = (Some(part(1, false)), Some(part(1, true)));
    let found = |dirs: &[PathBuf], target| {
        [0, 1].map(|number: usize| memory(&dirs[number], target, Missing::Leave))
    };
    let whole = [rest.clone(), apart.clone()];
    states.each_last(|dirs| TARGETS.iter().all(|target| found(dirs, *target) == whole));
    let allowed = [whole, [None, apart], [None, None]];
    states.each(|dirs| {
        let found = TARGETS.map(|target| found(dirs, target));
        found.iter().all(|found| allowed.contains(found))
    });
}

/// The tree is whole where images need it, whatever was there before: nothing, or an older parent.
#[test]
fn images_with_a_tree_are_absent_or_whole() {
    for previous in [None, Some("../before")] {
        let place = Place::new();
        fs::create_dir(place.root.path().join("before")).unwrap();
        let server = Server::new(&place).with(&["--dedup-tree"]);
        let server = match previous {
            Some(path) => server.with(&["--prev-images-dir", path]),
            None => server,
        };
        let Some(states) = server.states(&dump_of(1)) else {
            return;
        };
        let whole = Some(expected(1));
        states.each_last(|dirs| is_one_of(&dirs[0], std::slice::from_ref(&whole)));
        states.each(|dirs| {
            let is_whole = is_one_of(&dirs[0], &[None, whole.clone()]);
            // What is left of a tree that no image needs is in nobody's way.
            let is_free = TARGETS
                .iter()
                .all(|target| !dirs[0].join(target.pagemap_name()).exists());
            let options = StoreOptions {
                previous: previous.map(Into::into),
                dedup_tree: true,
                ..store(&dirs[0])
            };
            let opened = Stores::open(options, None);
            assert!(opened.is_ok() || !is_free, "{opened:?}");
            is_whole
        });
    }
}
