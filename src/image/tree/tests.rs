//! Trees of processes, written and read back.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::criu::header::PageFlags;
use crate::ferry::hash::HashKey;
use crate::image::chain::{Chain, Missing};
use crate::image::store::ImageStore;
use crate::image::writer::SessionImages;

const PAGE: PageSize = PageSize::KIB_4;
const LAZY: PageFlags = PageFlags::PRESENT.with(PageFlags::LAZY);

/// First byte of each page by its number; 0 is a zero page.
type Memory = BTreeMap<u64, u8>;

fn store(dir: &Path, previous: Option<&Path>) -> Arc<ImageStore> {
    ImageStore::open_tree(dir, PAGE, previous, Sync::Close, HashKey([7; 16])).unwrap()
}

fn page(number: u64) -> PageRange {
    PageRange::new(number << 12, (number + 1) << 12)
}

/// What is to become of pages.
#[derive(Clone, Copy, Debug)]
enum As {
    /// Processes may share them.
    Lazy,
    /// CRIU does not look into parents for them.
    Here,
    /// Said to be in the parent.
    InParent,
}

fn put(images: &mut SessionImages, memory: &Memory, how: impl Fn(u64) -> As) {
    for (number, content) in memory {
        let bytes = [*content; 4096];
        let to = match how(*number) {
            As::InParent => {
                let flags = PageFlags::PARENT.with(PageFlags::LAZY);
                assert!(images.append(page(*number), flags).unwrap().is_none());
                None
            }
            As::Here => images.append(page(*number), PageFlags::PRESENT).unwrap(),
            As::Lazy => {
                assert!(images.goes_to_tree(LAZY));
                let some = (*content != 0).then_some(bytes.as_slice());
                match images.append_to_tree(page(*number), LAZY, some).unwrap() {
                    TreePlace::At(to) => Some(to),
                    TreePlace::Settled => None,
                }
            }
        };
        if let Some(to) = to {
            to.part.file().write_all_at(&bytes, to.offset).unwrap();
        }
    }
}

fn contents(dir: &Path, target: Target) -> Memory {
    let dir = ImageDir::open(dir, PAGE).unwrap();
    let chain = Chain::open(&dir, target, Missing::Refuse).unwrap();
    let mut memory = Memory::new();
    for extent in chain.extents() {
        let mut bytes = vec![0; usize::try_from(extent.range.bytes()).unwrap()];
        chain.read(extent.place, &mut bytes).unwrap();
        let numbers = extent.range.start().get() / 4096..;
        memory.extend(numbers.zip(bytes.chunks(4096).map(|page| page[0])));
    }
    memory
}

/// Lengths of all pages files below `dir` in pages.
fn stored_pages(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            bytes += stored_pages(&entry.path()) << 12;
        } else if name.starts_with("pages-") {
            bytes += entry.metadata().unwrap().len();
        }
    }
    bytes >> 12
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn dirs(tmp: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
    std::fs::create_dir(&old).unwrap();
    std::fs::create_dir(&new).unwrap();
    (old, new)
}

fn filled(pages: u64) -> Memory {
    let content = |number: u64| u8::try_from(number % 250 + 1).unwrap();
    (16..16 + pages)
        .map(|number| (number, content(number)))
        .collect()
}

#[test]
fn forks_that_wrote_nothing_take_no_room() {
    let tmp = tempfile::tempdir().unwrap();
    let memory = filled(3000);
    let mut images = store(tmp.path(), None).begin();
    for pid in 1..=9 {
        images.open(Target::Process(pid), Wire::V2).unwrap();
        put(&mut images, &memory, |_| As::Lazy);
    }
    images.end_target_in_tree().unwrap();
    let counts = images.tree_counts();
    assert_eq!((counts.same, counts.stored), (8 * 3000, 3000));
    images.commit().unwrap();
    assert_eq!(stored_pages(tmp.path()), 3000);
    for pid in 1..=9 {
        assert_eq!(contents(tmp.path(), Target::Process(pid)), memory);
    }
    // One directory is enough.
    assert_eq!(names(&tmp.path().join("tree")), ["1"]);
    let sizes = std::fs::metadata(tmp.path().join("tree/1/pagemap-9.img")).unwrap();
    assert!(sizes.len() < 100, "{} bytes", sizes.len());
}

#[test]
fn each_change_is_stored_once_for_each_fork() {
    let tmp = tempfile::tempdir().unwrap();
    let memory = filled(5000);
    let mut images = store(tmp.path(), None).begin();
    let mut all = vec![memory.clone()];
    for fork in 1..=8 {
        let change = |(number, content): (&u64, &u8)| match number % 100 == fork {
            true => (*number, 251),
            false => (*number, *content),
        };
        all.push(memory.iter().map(change).collect());
    }
    for (pid, memory) in (1..).zip(&all) {
        images.open(Target::Process(pid), Wire::V1).unwrap();
        put(&mut images, memory, |_| As::Lazy);
    }
    images.commit().unwrap();
    assert_eq!(stored_pages(tmp.path()), 5000 + 8 * 50);
    for (pid, memory) in (1..).zip(&all) {
        assert_eq!(&contents(tmp.path(), Target::Process(pid)), memory);
    }
}

#[test]
fn what_the_parent_has_is_not_hidden_by_what_others_have() {
    let tmp = tempfile::tempdir().unwrap();
    let (old, new) = dirs(&tmp);
    let before = filled(100);
    let mut images = store(&old, None).begin();
    for pid in 1..=2 {
        images.open(Target::Process(pid), Wire::V2).unwrap();
        put(&mut images, &before, |_| As::Lazy);
    }
    images.commit().unwrap();
    // Process 1 has changed its first half; 2 has not, and its other half is stored anew.
    let half = 16 + 50;
    let changed = |(number, content): (&u64, &u8)| match *number < half {
        true => (*number, content ^ 0xff),
        false => (*number, *content),
    };
    let one: Memory = before.iter().map(changed).collect();
    let mut images = store(&new, Some(Path::new("../old"))).begin();
    images.open(Target::Process(1), Wire::V2).unwrap();
    put(&mut images, &one, |_| As::Lazy);
    images.open(Target::Process(2), Wire::V2).unwrap();
    put(&mut images, &before, |number| match number < half {
        true => As::InParent,
        false => As::Lazy,
    });
    images.open(Target::Process(3), Wire::V2).unwrap();
    put(&mut images, &Memory::from([(1, 1)]), |_| As::Here);
    images.commit().unwrap();
    assert_eq!(contents(&new, Target::Process(1)), one);
    assert_eq!(contents(&new, Target::Process(2)), before);
    assert_eq!(contents(&new, Target::Process(3)), Memory::from([(1, 1)]));
    let dir = ImageDir::open(&new, PAGE).unwrap();
    let chain_dirs: Vec<PathBuf> = dir
        .chain_dirs()
        .unwrap()
        .iter()
        .map(|dir| dir.path().to_owned())
        .collect();
    assert!(
        chain_dirs.contains(&old.canonicalize().unwrap()),
        "{chain_dirs:?}"
    );
}

#[test]
fn a_session_that_fails_leaves_the_directory_as_it_was() {
    let tmp = tempfile::tempdir().unwrap();
    let (old, new) = dirs(&tmp);
    let mut images = store(&old, None).begin();
    images.open(Target::Process(1), Wire::V2).unwrap();
    put(&mut images, &filled(10), |_| As::Lazy);
    images.commit().unwrap();

    let store = store(&new, Some(Path::new("../old")));
    let begun = || {
        let mut images = store.begin();
        images.open(Target::Process(1), Wire::V2).unwrap();
        put(&mut images, &filled(20), |_| As::Lazy);
        images
    };
    let before = names(&new);
    drop(begun());
    assert_eq!(names(&new), before);
    // A name that cannot be given, when the tree has its name already.
    let images = begun();
    std::fs::create_dir(new.join("pagemap-1.img")).unwrap();
    images.commit().unwrap_err();
    std::fs::remove_dir(new.join("pagemap-1.img")).unwrap();
    assert_eq!(names(&new), before);
    assert_eq!(
        std::fs::read_link(new.join("parent")).unwrap(),
        Path::new("../old")
    );
    begun().commit().unwrap();
    assert_eq!(contents(&new, Target::Process(1)), filled(20));
}

#[test]
fn what_a_killed_session_left_goes_when_the_next_begins() {
    let tmp = tempfile::tempdir().unwrap();
    let (_, new) = dirs(&tmp);
    let mut images = store(&new, Some(Path::new("../old"))).begin();
    images.open(Target::Process(1), Wire::V2).unwrap();
    put(&mut images, &filled(10), |_| As::Lazy);
    images.commit().unwrap();
    // As if it had ended before its pagemap had a name.
    std::fs::remove_file(new.join("pagemap-1.img")).unwrap();
    std::fs::create_dir(new.join(TREE_PART)).unwrap();
    std::fs::write(new.join(TREE_PART).join("pages-1.img"), "x").unwrap();
    drop(store(&new, Some(Path::new("../old"))));
    assert!(!new.join("tree").exists() && !new.join(TREE_PART).exists());
    assert_eq!(
        std::fs::read_link(new.join("parent")).unwrap(),
        Path::new("../old")
    );
}

#[test]
fn a_directory_takes_one_session() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    let (mut one, mut other) = (store.begin(), store.begin());
    one.open(Target::Process(1), Wire::V2).unwrap();
    let error = other.open(Target::Process(2), Wire::V2).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    put(&mut one, &filled(10), |_| As::Lazy);
    one.commit().unwrap();
    drop(other);
    let mut late = store.begin();
    let error = late.open(Target::Process(2), Wire::V2).unwrap_err();
    assert!(
        error.to_string().contains("--images-dir-template"),
        "{error}"
    );
    drop(late);
    assert_eq!(contents(tmp.path(), Target::Process(1)), filled(10));
    let again = ImageStore::open_tree(tmp.path(), PAGE, None, Sync::None, HashKey::default());
    assert_eq!(again.unwrap_err().kind(), Kind::Usage);
}

/// One more process: whose fork it is (of those before it; itself: of nobody), and what it did to its memory.
type Step = (usize, Vec<(u64, u8)>);

fn grow(steps: &[Step]) -> Vec<Memory> {
    let mut all: Vec<Memory> = Vec::new();
    for (whose, changes) in steps {
        let mut memory = match all.get(*whose) {
            Some(memory) => memory.clone(),
            None => Memory::new(),
        };
        for (number, content) in changes {
            match content % 8 {
                // Given back.
                7 => {
                    memory.remove(number);
                }
                content => {
                    memory.insert(*number, content);
                }
            }
        }
        all.push(memory);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever processes forked and wrote, and whatever was in the parent: all memory reads back.
    #[test]
    fn any_tree_reads_back(
        steps in prop::collection::vec(
            (0..8usize, prop::collection::vec((1..60u64, any::<u8>()), 1..60)), 1..8),
        seed in any::<u64>(),
        with_parent: bool,
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = dirs(&tmp);
        let memories = grow(&steps);
        let pid = |index: usize| Target::Process(u32::try_from(index).unwrap() + 1);
        // An arbitrary but fixed part of the pages.
        let some = |index: usize, number: u64, of: u64| {
            let mixed = (seed ^ ((index as u64) << 32) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            with_parent && (mixed >> 33).is_multiple_of(of)
        };
        if with_parent {
            let mut images = store(&old, None).begin();
            for (index, memory) in memories.iter().enumerate() {
                images.open(pid(index), Wire::V2).unwrap();
                put(&mut images, memory, |_| As::Lazy);
            }
            images.commit().unwrap();
        }
        let previous = with_parent.then_some(Path::new("../old"));
        let mut images = store(&new, previous).begin();
        for (index, memory) in memories.iter().enumerate() {
            images.open(pid(index), Wire::V2).unwrap();
            put(&mut images, memory, |number| match () {
                () if some(index, number, 3) => As::InParent,
                () if number.wrapping_add(seed).is_multiple_of(11) => As::Here,
                () => As::Lazy,
            });
        }
        images.commit().unwrap();
        for (index, memory) in memories.iter().enumerate() {
            prop_assert_eq!(&contents(&new, pid(index)), memory, "process {}", index);
        }
    }
}
