//! Image directories that somebody has prepared: what is no image is said to be none, and nothing waits for it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs;
use std::os::unix::fs::{lchown, symlink};
use std::path::Path;

use common::{FIRST_PAGE, Images, PAGE, Run, TARGET};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::mkfifo;
use pageferry::criu::header::{PageFlags, Wire};
use pageferry::error::{Error, Kind};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::Magic;
use pageferry::image::proto::PstreeEntry;

fn images() -> Images {
    let runs = vec![Run::present(FIRST_PAGE, 4, PageFlags::default(), 3)];
    Images::of(&[runs], Wire::V1)
}

fn open(dir: &Path) -> Result<Chain, Error> {
    Chain::open(&ImageDir::open(dir, PAGE)?, TARGET, Missing::Refuse)
}

/// Puts something else in the place of each image in turn; opening tells its name and does not wait.
fn refused(replace: impl Fn(&Path)) {
    for name in [TARGET.pagemap_name(), "pages-1.img".to_owned()] {
        let images = images();
        let path = images.dirs[0].join(&name);
        fs::remove_file(&path).unwrap();
        replace(&path);
        let error = open(&images.dirs[0]).unwrap_err();
        assert!(error.to_string().contains(&name), "{error}");
    }
}

#[test]
fn a_fifo_is_no_image_and_nobody_waits_for_its_writer() {
    refused(|path| mkfifo(path, Mode::S_IRWXU).unwrap());
    // In the place of an image with messages alone.
    let images = images();
    let tree = images.dirs[0].join("pstree.img");
    mkfifo(&tree, Mode::S_IRWXU).unwrap();
    let dir = ImageDir::open(&images.dirs[0], PAGE).unwrap();
    let read = dir.messages::<PstreeEntry>(&tree, Magic::Pstree);
    assert!(read.unwrap_err().to_string().contains("regular file"));
}

#[test]
fn a_device_is_no_image() {
    refused(|path| symlink("/dev/zero", path).unwrap());
    if testbed::gate::root().is_some() {
        // Memory without end, by a node of its own.
        let zero = nix::sys::stat::makedev(1, 5);
        refused(|path| mknod(path, SFlag::S_IFCHR, Mode::S_IRWXU, zero).unwrap());
    }
}

#[test]
fn a_directory_is_no_image() {
    refused(|path| fs::create_dir(path).unwrap());
}

#[test]
fn a_link_of_another_user_is_not_followed() {
    if testbed::gate::root().is_none() {
        return;
    }
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), vec![7; 4 * 4096]).unwrap();
    let images = images();
    let pages = images.dirs[0].join("pages-1.img");
    fs::remove_file(&pages).unwrap();
    symlink(secret.path(), &pages).unwrap();
    // One's own is followed: some keep pages on another disk.
    open(&images.dirs[0]).unwrap();
    lchown(&pages, Some(12_345), None).unwrap();
    let error = open(&images.dirs[0]).unwrap_err();
    assert!(error.to_string().contains("user 12345"), "{error}");
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let images = images();
    let chain = open(&images.dirs[0]).unwrap();
    let file = fs::File::options()
        .write(true)
        .open(images.dirs[0].join("pages-1.img"))
        .unwrap();
    file.set_len(4096).unwrap();
    let mut page = [0; 4096];
    let extent = chain.extents()[0];
    chain.read(extent.place, &mut page).unwrap();
    let last = extent.range.end().get() - PAGE.bytes();
    let last = chain.find(pageferry::units::Vaddr(last)).unwrap();
    let error = chain.read(last.place, &mut page).unwrap_err();
    assert!(error.to_string().contains("pages-1.img"), "{error}");
}

#[test]
fn parents_that_go_round_are_refused() {
    let runs = || vec![Run::absent(FIRST_PAGE, 4, PageFlags::PARENT)];
    let images = Images::of(&[runs(), runs()], Wire::V1);
    for dir in &images.dirs {
        let _ = fs::remove_file(dir.join("parent"));
    }
    symlink("../1", images.dirs[0].join("parent")).unwrap();
    symlink("../0", images.dirs[1].join("parent")).unwrap();
    let error = open(&images.dirs[0]).unwrap_err();
    assert_eq!(error.kind(), Kind::Image);
    assert!(error.to_string().contains("come back to"), "{error}");
    // A link to itself, which leads nowhere.
    fs::remove_file(images.dirs[0].join("parent")).unwrap();
    symlink("parent", images.dirs[0].join("parent")).unwrap();
    open(&images.dirs[0]).unwrap_err();
}
