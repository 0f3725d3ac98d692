//! What is written reads back, and what is not committed is not there.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::image::blocks::compressed_block;
use crate::image::chain::{Chain, Missing};
use crate::image::proto::{PagemapEntry, PagemapHead};
use crate::limits::ENTRY_PAGES_MAX;
use crate::units::{PageSize, Vaddr};

const PAGE: PageSize = PageSize::KIB_4;
const PID: Target = Target::Process(7);
const HERE: PageFlags = PageFlags::PRESENT;

fn store(dir: &Path, previous: Option<&Path>) -> Arc<ImageStore> {
    ImageStore::open(dir, PAGE, previous, Sync::Close).unwrap()
}

fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(start * 4096, (start + count) * 4096)
}

/// Appends pages whose every byte is `fill`.
fn put(images: &mut SessionImages, range: PageRange, flags: PageFlags, fill: u8) {
    let destination = images.append(range, flags).unwrap();
    assert_eq!(destination.is_some(), flags.has(HERE));
    if let Some(Destination { part, offset }) = destination {
        let bytes = vec![fill; usize::try_from(range.bytes()).unwrap()];
        part.file().write_all_at(&bytes, offset).unwrap();
    }
}

fn write_one(store: &Arc<ImageStore>, target: Target, range: PageRange, fill: u8) {
    let mut images = store.begin();
    images.open(target, Wire::V2).unwrap();
    put(&mut images, range, HERE, fill);
    images.commit().unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn entries(dir: &Path) -> Vec<PagemapEntry> {
    let dir = ImageDir::open(dir, PAGE).unwrap();
    let (_, mut reader) = dir.pagemap(PID).unwrap().unwrap();
    reader.read::<PagemapHead>().unwrap().unwrap();
    std::iter::from_fn(|| reader.read().unwrap()).collect()
}

/// The first byte of every page that the images have.
fn contents(dir: &Path, target: Target) -> BTreeMap<u64, u8> {
    let dir = ImageDir::open(dir, PAGE).unwrap();
    let chain = Chain::open(&dir, target, Missing::Refuse).unwrap();
    let mut out = BTreeMap::new();
    for extent in chain.extents() {
        let mut bytes = vec![0; usize::try_from(extent.range.bytes()).unwrap()];
        chain.read(extent.place, &mut bytes).unwrap();
        let numbers = extent.range.start().get() / 4096..;
        out.extend(numbers.zip(bytes.chunks(4096).map(|page| page[0])));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any two generations of runs, the second with holes to the first, read back as said.
    #[test]
    fn what_was_appended_reads_back(
        before in prop::collection::vec((0..3u64, 1..5u64, 1..255u8), 1..12),
        holes in prop::collection::vec(any::<bool>(), 12),
        v1: bool,
    ) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        std::fs::create_dir(&new).unwrap();
        let (first, second) = (store(&old, None), store(&new, Some(Path::new("../old"))));
        let (mut was, mut is) = (first.begin(), second.begin());
        was.open(PID, wire).unwrap();
        prop_assert!(!is.has_parent(PID).unwrap());
        let mut expected = BTreeMap::new();
        let mut runs = Vec::new();
        let mut at = 16;
        for (gap, count, fill) in before {
            at += gap;
            let range = pages(at, count);
            put(&mut was, range, HERE, fill);
            runs.push((range, fill));
            at += count;
        }
        was.commit().unwrap();
        is.open(PID, wire).unwrap();
        prop_assert!(is.has_parent(PID).unwrap());
        for ((range, fill), hole) in runs.into_iter().zip(holes) {
            let now = if hole { fill } else { fill ^ 0xff };
            let flags = if hole { PageFlags::PARENT } else { HERE.with(PageFlags::LAZY) };
            put(&mut is, range, flags, now);
            let numbers = range.start().get() / 4096..range.end().get() / 4096;
            expected.extend(numbers.map(|number| (number, now)));
        }
        is.commit().unwrap();
        prop_assert_eq!(contents(&new, PID), expected);
        let entries = entries(&new);
        prop_assert!(entries.iter().all(|entry| entry.wire() == wire));
        let both = |entry: &PagemapEntry| entry.nr_pages == Some(entry.compat_nr_pages.into());
        prop_assert!(entries.iter().all(both));
    }
}

#[test]
fn runs_that_go_on_are_one_entry_of_bounded_length() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    let mut images = store.begin();
    images.open(PID, Wire::V1).unwrap();
    for page in 0..10 {
        put(&mut images, pages(16 + page, 1), HERE, 1);
    }
    put(&mut images, pages(26, 1), HERE.with(PageFlags::LAZY), 1);
    put(&mut images, pages(30, 1), HERE, 1);
    // Named, but neither here nor in a parent: nothing is written for them.
    let lazy = pages(40, ENTRY_PAGES_MAX + 2);
    assert!(images.append(lazy, PageFlags::LAZY).unwrap().is_none());
    images.commit().unwrap();
    let counts: Vec<u32> = entries(tmp.path())
        .iter()
        .map(|entry| entry.compat_nr_pages)
        .collect();
    let most = u32::try_from(ENTRY_PAGES_MAX).unwrap();
    assert_eq!(counts, [10, 1, 1, most, 2]);
}

#[test]
fn pages_that_nobody_wrote_are_zero_to_the_last() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    let mut images = store.begin();
    images.open(PID, Wire::V2).unwrap();
    put(&mut images, pages(1, 1), HERE, 9);
    images.append(pages(2, 3), HERE).unwrap();
    images.commit().unwrap();
    let expected = BTreeMap::from([(1, 9), (2, 0), (3, 0), (4, 0)]);
    assert_eq!(contents(tmp.path(), PID), expected);
}

#[test]
fn a_session_that_is_dropped_leaves_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    write_one(&store, Target::Process(9), pages(1, 1), 3);
    let before = names(tmp.path());
    assert_eq!(before, ["pagemap-9.img", "pages-65537.img"]);
    let mut images = store.begin();
    for id in [5, 7] {
        images.open(Target::Shmem(id), Wire::V2).unwrap();
        put(&mut images, pages(1, 2), HERE, 1);
    }
    images.open(PID, Wire::V2).unwrap();
    assert_eq!(names(tmp.path()).len(), 8);
    drop(images);
    assert_eq!(names(tmp.path()), before);
}

#[test]
fn a_name_that_cannot_be_given_takes_the_others_back() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    let mut images = store.begin();
    images.open(PID, Wire::V2).unwrap();
    put(&mut images, pages(1, 2), HERE, 1);
    // A directory in the way of the last rename.
    std::fs::create_dir_all(tmp.path().join("pagemap-7.img/x")).unwrap();
    let error = images.commit().unwrap_err();
    assert!(error.to_string().contains("pagemap-7.img"), "{error}");
    assert_eq!(names(tmp.path()), ["pagemap-7.img"]);
}

#[test]
fn two_sessions_do_not_mix_one_target() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    let (mut one, mut two) = (store.begin(), store.begin());
    one.open(PID, Wire::V2).unwrap();
    let error = two.open(PID, Wire::V2).unwrap_err();
    assert!(error.to_string().contains("pid 7"), "{error}");
    two.open(Target::Shmem(7), Wire::V2).unwrap();
    put(&mut one, pages(1, 1), HERE, 1);
    put(&mut two, pages(1, 1), HERE, 2);
    two.commit().unwrap();
    one.commit().unwrap();
    assert_eq!(contents(tmp.path(), PID), BTreeMap::from([(1, 1)]));
    assert_eq!(
        contents(tmp.path(), Target::Shmem(7)),
        BTreeMap::from([(1, 2)])
    );
}

#[test]
fn a_newer_image_takes_the_place_of_an_older_one_with_its_pages() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path(), None);
    write_one(&store, PID, pages(1, 1), 1);
    write_one(&store, Target::Process(9), pages(1, 1), 2);
    // The dump's own pages file is not ours to remove.
    std::fs::write(tmp.path().join("pages-1.img"), "x").unwrap();
    write_one(&store, PID, pages(1, 1), 3);
    let expected = [
        "pagemap-7.img",
        "pagemap-9.img",
        "pages-1.img",
        "pages-65538.img",
        "pages-65539.img",
    ];
    assert_eq!(names(tmp.path()), expected);
    assert_eq!(contents(tmp.path(), PID), BTreeMap::from([(1, 3)]));
}

#[test]
fn holes_that_the_parent_lacks_are_named() {
    let tmp = tempfile::tempdir().unwrap();
    let old = tmp.path().join("old");
    let new = tmp.path().join("new");
    std::fs::create_dir(&old).unwrap();
    std::fs::create_dir(&new).unwrap();
    let (first, orphan) = (store(&old, None), store(&new, None));
    let mut images = first.begin();
    images.open(PID, Wire::V2).unwrap();
    put(&mut images, pages(2, 2), HERE, 1);
    put(&mut images, pages(4, 2), HERE.with(PageFlags::LAZY), 1);
    assert!(
        images
            .append(pages(6, 1), PageFlags::LAZY)
            .unwrap()
            .is_none()
    );
    images.commit().unwrap();

    let ask = |store: &Arc<ImageStore>, range| {
        let mut images = store.begin();
        images.open(PID, Wire::V2).unwrap();
        images.append(range, PageFlags::PARENT).map(|_| ())
    };
    let error = ask(&orphan, pages(2, 1)).unwrap_err();
    assert!(error.to_string().contains("pid 7 at 0x2000"), "{error}");
    drop(orphan);
    let child = store(&new, Some(Path::new("../old")));
    ask(&child, pages(2, 4)).unwrap();
    ask(&child, pages(3, 1)).unwrap();
    for (range, missing) in [
        (pages(1, 2), Vaddr(0x1000)),
        (pages(2, 5), Vaddr(0x6000)),
        (pages(7, 1), Vaddr(0x7000)),
    ] {
        let error = ask(&child, range).unwrap_err();
        assert_eq!(error.kind(), Kind::Image);
        let text = error.to_string();
        assert!(
            text.contains("pid 7") && text.contains(&missing.to_string()),
            "{text}"
        );
    }
}

const MOVED: PageFlags = PageFlags::PRESENT.with(PageFlags::LAZY);

fn split_store(tmp: &Path) -> Arc<ImageStore> {
    let (dir, lazy) = (tmp.join("images"), tmp.join("lazy"));
    std::fs::create_dir_all(&dir).unwrap();
    ImageStore::open_split(&dir, &lazy, PAGE, Sync::Close).unwrap()
}

/// Runs of an image: first page, number of pages, flags.
fn runs(dir: &Path) -> Vec<(u64, u64, u32)> {
    let run = |entry: &PagemapEntry| {
        let pages = entry.nr_pages.unwrap();
        (entry.vaddr / 4096, pages, entry.flags.unwrap())
    };
    entries(dir).iter().map(run).collect()
}

#[test]
fn lazy_pages_go_to_their_own_directory_and_leave_entries_behind() {
    for wire in [Wire::V1, Wire::V2] {
        let tmp = tempfile::tempdir().unwrap();
        let store = split_store(tmp.path());
        let mut images = store.begin();
        images.open(PID, wire).unwrap();
        put(&mut images, pages(1, 2), MOVED, 1);
        put(&mut images, pages(3, 1), HERE, 2);
        put(&mut images, pages(4, 1), MOVED, 3);
        put(&mut images, pages(5, 1), MOVED, 4);
        images.open(Target::Process(8), wire).unwrap();
        put(&mut images, pages(1, 1), HERE, 5);
        images.open(Target::Shmem(9), wire).unwrap();
        put(&mut images, pages(1, 1), MOVED, 6);
        images.commit().unwrap();

        let (dir, lazy) = (tmp.path().join("images"), tmp.path().join("lazy"));
        let (here, moved) = (HERE.bits(), MOVED.bits());
        let left_out = PageFlags::LAZY.bits();
        assert_eq!(
            runs(&dir),
            [(1, 2, left_out), (3, 1, here), (4, 2, left_out)]
        );
        assert_eq!(runs(&lazy), [(1, 2, moved), (4, 2, moved)]);
        let all = |dir: &Path| entries(dir).iter().all(|entry| entry.wire() == wire);
        assert!(all(&dir) && all(&lazy));
        assert_eq!(
            contents(&lazy, PID),
            BTreeMap::from([(1, 1), (2, 1), (4, 3), (5, 4)])
        );
        // What has nothing to leave out is in the images alone, and shared memory is not restored lazily.
        assert_eq!(names(&lazy), ["pagemap-7.img", "pages-65537.img"]);
        assert_eq!(contents(&dir, Target::Process(8)), BTreeMap::from([(1, 5)]));
        assert_eq!(contents(&dir, Target::Shmem(9)), BTreeMap::from([(1, 6)]));
    }
}

#[test]
fn only_pages_that_no_criu_reads_are_compressed() {
    for wire in [Wire::V1, Wire::V2] {
        let tmp = tempfile::tempdir().unwrap();
        let store = split_store(tmp.path());
        let mut images = store.begin();
        images.open(PID, wire).unwrap();
        assert!(images.may_be_compressed(MOVED) && !images.may_be_compressed(HERE));
        put(&mut images, pages(1, 1), HERE, 1);
        let block = compressed_block(&[7; 4096]).into_owned();
        let sizes = vec![u32::try_from(block.len()).unwrap(), 0];
        let to = images.append_blocks(pages(2, 2), MOVED, sizes).unwrap();
        to.part.file().write_all_at(&block, to.offset).unwrap();
        images.commit().unwrap();

        let (dir, lazy) = (tmp.path().join("images"), tmp.path().join("lazy"));
        assert_eq!(
            runs(&dir),
            [(1, 1, HERE.bits()), (2, 2, PageFlags::LAZY.bits())]
        );
        assert!(entries(&dir).iter().all(|entry| entry.blocks.is_none()));
        assert!(entries(&lazy)[0].blocks.is_some());
        assert_eq!(contents(&lazy, PID), BTreeMap::from([(2, 7), (3, 0)]));
    }
}

#[test]
fn split_images_are_whole_or_absent() {
    let tmp = tempfile::tempdir().unwrap();
    let store = split_store(tmp.path());
    let (dir, lazy) = (tmp.path().join("images"), tmp.path().join("lazy"));
    let begin = || {
        let mut images = store.begin();
        images.open(PID, Wire::V2).unwrap();
        put(&mut images, pages(1, 1), HERE, 1);
        put(&mut images, pages(2, 1), MOVED, 2);
        images
    };
    drop(begin());
    assert!(names(&dir).is_empty() && names(&lazy).is_empty());
    // A directory in the way of the last rename, in either place.
    for (at, other) in [(&dir, &lazy), (&lazy, &dir)] {
        let images = begin();
        std::fs::create_dir_all(at.join("pagemap-7.img/x")).unwrap();
        let error = images.commit().unwrap_err();
        assert!(error.to_string().contains("pagemap-7.img"), "{error}");
        assert_eq!(names(at), ["pagemap-7.img"]);
        assert!(names(other).is_empty());
        std::fs::remove_dir_all(at.join("pagemap-7.img")).unwrap();
    }
    begin().commit().unwrap();
    // They belong to the images that are there now, which another session does not take them from.
    let error = store.begin().open(PID, Wire::V2).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert!(
        error.to_string().contains("pages of pid 7 already"),
        "{error}"
    );
    assert_eq!(contents(&lazy, PID), BTreeMap::from([(2, 2)]));
}

#[test]
fn directories_that_images_cannot_be_split_into_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    for name in ["old", "child", "images"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    std::os::unix::fs::symlink("../old", at("child/parent")).unwrap();
    std::os::unix::fs::symlink("images", at("same")).unwrap();
    let open =
        |dir: &str, lazy: &str| ImageStore::open_split(&at(dir), &at(lazy), PAGE, Sync::None);
    for (dir, lazy, word) in [
        ("images", "images", "itself"),
        ("images", "same", "itself"),
        ("images", "new/../images", "itself"),
        ("child", "lazy", "child has a parent"),
        ("images", "child", "child has a parent"),
    ] {
        let error = open(dir, lazy).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains(word), "{dir} {lazy}: {error}");
    }
    open("images", "images/lazy").unwrap();
}
