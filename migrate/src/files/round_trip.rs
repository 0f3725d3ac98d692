//! Trees on disk through all of it: look, plan, stream, write, and the trees are the same, file by file.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{geteuid, mkfifo};
use pageferry::migration::messages::Seal;
use tempfile::TempDir;

use super::hash::BlockHasher;
use super::receiver::ReceivedTree;
use super::scan::Scanner;
use super::sender::{Known, unpack_index};
use super::staging::{Permitted, StagingDir};
use super::table::digest;
use super::tree_dir::TreeDir;

const STRICT: Permitted = Permitted {
    replace: false,
    unused: true,
};

/// A source's tree, and one that arrives.
struct Pair {
    tmp: TempDir,
    received: ReceivedTree,
    known: Known,
}

impl Pair {
    fn new() -> Pair {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("source")).unwrap();
        let staging = StagingDir::of(&tmp.path().join("there/target"));
        staging.prepare("m-1", STRICT).unwrap();
        let received = ReceivedTree::new(staging).unwrap();
        let mut pair = Pair {
            tmp,
            received,
            known: Known::default(),
        };
        pair.ask();
        pair
    }

    fn source(&self) -> PathBuf {
        self.tmp.path().join("source")
    }

    fn arrived(&self) -> PathBuf {
        self.tmp.path().join("there/target.pageferry/tree")
    }

    fn ask(&mut self) {
        let (key, have) = unpack_index(&self.received.index().unwrap()).unwrap();
        let root = TreeDir::open(&self.source()).unwrap();
        let fresh = || Scanner::new(root, BlockHasher::new(key));
        self.known.scanner.get_or_insert_with(fresh);
        self.known.have = Some(have);
    }

    /// Sends one difference: its operations, packed.
    fn send(&mut self) -> Vec<u8> {
        let mut stream = Vec::new();
        self.known.send(&[], &mut stream).unwrap();
        stream
    }

    fn round(&mut self) -> usize {
        let stream = self.send();
        self.received.store(&stream[..]).unwrap();
        stream.len()
    }

    fn expect_same(&self, when: &str) {
        let (wanted, found) = (describe(&self.source()), describe(&self.arrived()));
        for (path, wanted) in &wanted {
            assert_eq!(found.get(path), Some(wanted), "{when}: {}", path.display());
        }
        assert_eq!(found.len(), wanted.len(), "{when}");
        self.received
            .seal(&digest(self.known.have.as_ref().unwrap()))
            .unwrap();
    }
}

/// A whole tree as it travels to who has told this index.
pub(crate) struct SentBytes {
    pub(crate) stream: Vec<u8>,
    pub(crate) seal: Seal,
}

impl SentBytes {
    pub(crate) fn of(source: &Path, index: &[u8]) -> SentBytes {
        let (key, have) = unpack_index(index).unwrap();
        let root = TreeDir::open(source).unwrap();
        let mut known = Known::default();
        known.scanner = Some(Scanner::new(root, BlockHasher::new(key)));
        known.have = Some(have);
        let mut stream = Vec::new();
        known.send(&[], &mut stream).unwrap();
        let digest = digest(known.have.as_ref().unwrap());
        let seal = Seal { digest };
        SentBytes { stream, seal }
    }
}

/// A file's attributes and contents; equal descriptions are equal files.
#[derive(PartialEq, Eq, Debug)]
struct Described {
    mode: u32,
    device: u64,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same file.
    same_as: PathBuf,
    contents: Vec<u8>,
}

fn describe(root: &Path) -> BTreeMap<PathBuf, Described> {
    let (mut found, mut first) = (BTreeMap::new(), BTreeMap::new());
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let at = root.join(&path);
        let meta = fs::symlink_metadata(&at).unwrap();
        if meta.is_dir() {
            let names = fs::read_dir(&at).unwrap();
            let mut names: Vec<PathBuf> = names
                .map(|entry| path.join(entry.unwrap().file_name()))
                .collect();
            names.sort();
            left.extend(names.into_iter().rev());
        }
        let contents = match meta.file_type() {
            kind if kind.is_file() => fs::read(&at).unwrap(),
            kind if kind.is_symlink() => fs::read_link(&at).unwrap().as_os_str().as_bytes().into(),
            _ => Vec::new(),
        };
        let xattrs = xattr::list(&at).unwrap().map(|name| {
            let value = xattr::get(&at, &name).unwrap().unwrap_or_default();
            (name.as_bytes().to_vec(), value)
        });
        let key = (meta.dev(), meta.ino());
        let same_as = match meta.is_dir() {
            true => path.clone(),
            false => first.entry(key).or_insert_with(|| path.clone()).clone(),
        };
        let described = Described {
            mode: meta.mode(),
            device: meta.rdev(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            xattrs: xattrs.collect(),
            same_as,
            contents,
        };
        found.insert(path, described);
    }
    found
}

/// The value of `security.capability` (version 2) with CAP_NET_BIND_SERVICE.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn set_mtime(path: &Path, time: SystemTime) {
    let times = FileTimes::new().set_modified(time);
    File::open(path).unwrap().set_times(times).unwrap();
}

/// Everything that a tree can hold.
fn fill(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("dir/deep/er")).unwrap();
    fs::write(at("dir/plain"), "contents").unwrap();
    fs::write(at("empty"), "").unwrap();
    let mut random = vec![0; 700_001];
    Rng::with_seed(7).fill(&mut random);
    fs::write(at("large"), random).unwrap();
    for name in ["dir/link-1", "dir/deep/link-2", "link-3"] {
        fs::hard_link(at("dir/plain"), at(name)).unwrap();
    }
    symlink("../nowhere", at("dir/symlink")).unwrap();
    symlink("/absolute", at("symlink")).unwrap();
    mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    sparse.write_all_at(b"island", 20 << 20).unwrap();
    sparse.write_all_at(b"end", (40 << 20) - 3).unwrap();
    let strange = OsStr::from_bytes(b"dir/\xff\xfe \n\"strange");
    fs::write(root.join(strange), "strange").unwrap();
    fs::write(at(&"n".repeat(255)), "long").unwrap();
    for (name, mode) in [("set-uid", 0o4755), ("secret", 0o000), ("sticky", 0o1777)] {
        fs::write(at(name), name).unwrap();
        chown(at(name), Some(1234), Some(4321)).unwrap();
        fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
    }
    lchown(at("symlink"), Some(1000), Some(1000)).unwrap();
    xattr::set(at("empty"), "user.note", b"value\0\xff").unwrap();
    xattr::set(at("dir"), "user.dir", b"").unwrap();
    xattr::set(at("dir/deep"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(at("large"), "security.capability", &CAPABILITY).unwrap();
    for (name, kind, device) in [
        ("null", SFlag::S_IFCHR, makedev(1, 3)),
        ("whiteout", SFlag::S_IFCHR, makedev(0, 0)),
        ("disk", SFlag::S_IFBLK, makedev(7, 200)),
    ] {
        mknod(&at(name), kind, Mode::S_IRUSR, device).unwrap();
    }
    fs::hard_link(at("whiteout"), at("dir/whiteout")).unwrap();
    let before_1970 = SystemTime::UNIX_EPOCH - Duration::new(1_000_000, 123_456_789);
    set_mtime(&at("empty"), before_1970);
    set_mtime(
        &at("dir/deep"),
        SystemTime::UNIX_EPOCH + Duration::new(1, 1),
    );
    fs::create_dir(at("read-only")).unwrap();
    fs::write(at("read-only/file"), "inside").unwrap();
    fs::set_permissions(at("read-only"), Permissions::from_mode(0o555)).unwrap();
}

/// What containers do to their files between two looks.
fn change(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::remove_file(at("dir/plain")).unwrap();
    fs::write(at("link-3"), "through another name").unwrap();
    fs::rename(at("large"), at("dir/deep/er/moved")).unwrap();
    fs::rename(at("empty"), at("large")).unwrap();
    let sparse = File::options().write(true).open(at("sparse")).unwrap();
    sparse.set_len((20 << 20) + 3).unwrap();
    sparse.set_len(50 << 20).unwrap();
    // What was a file is a directory, and the other way round.
    fs::remove_file(at("fifo")).unwrap();
    fs::create_dir(at("fifo")).unwrap();
    fs::write(at("fifo/inside"), "new").unwrap();
    fs::rename(at("dir/deep/er"), at("er")).unwrap();
    fs::remove_dir_all(at("dir/deep")).unwrap();
    fs::write(at("dir/deep"), "a file now").unwrap();
    fs::remove_file(at("read-only/file")).unwrap();
    fs::write(at("read-only/other"), "made by root").unwrap();
    xattr::remove(at("dir"), "user.dir").unwrap();
    xattr::set(at("dir"), "user.other", b"x").unwrap();
    fs::set_permissions(at("secret"), Permissions::from_mode(0o640)).unwrap();
    fs::remove_file(at("symlink")).unwrap();
    symlink("/elsewhere", at("symlink")).unwrap();
    fs::remove_file(at("whiteout")).unwrap();
    fs::hard_link(at("dir/whiteout"), at("again")).unwrap();
}

fn is_root() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        assert!(std::env::var("CI").is_err(), "run the tests as root");
        eprintln!("skipped: files of other owners need root");
    }
    is_root
}

#[test]
fn every_kind_of_file_arrives_and_changes() {
    if !is_root() {
        return;
    }
    let mut pair = Pair::new();
    pair.round();
    pair.expect_same("an empty tree");
    fill(&pair.source());
    pair.round();
    pair.expect_same("all kinds");
    let arrived = fs::metadata(pair.arrived().join("sparse")).unwrap();
    assert!(arrived.blocks() < 1000, "{} blocks", arrived.blocks());
    change(&pair.source());
    let bytes = pair.round();
    pair.expect_same("changed");
    assert!(
        bytes < 10_000,
        "{bytes} bytes: a renamed file has travelled"
    );
    fs::remove_dir_all(pair.source()).unwrap();
    fs::create_dir(pair.source()).unwrap();
    pair.known.scanner = None;
    pair.ask();
    pair.round();
    pair.expect_same("removed");
}

#[test]
fn any_change_arrives_also_when_streams_are_cut() {
    if !is_root() {
        return;
    }
    for seed in 0..30 {
        let mut rng = Rng::with_seed(seed);
        let mut pair = Pair::new();
        for step in 0..6 {
            for _ in 0..rng.usize(..20) {
                // What cannot be done is not done.
                let _ = disturb(&pair.source(), &mut rng);
            }
            let stream = pair.send();
            let cut = rng.usize(..=stream.len());
            if pair.received.store(&stream[..cut]).is_err() {
                pair.ask();
                pair.round();
            }
            pair.expect_same(&format!("seed {seed}, step {step}"));
        }
    }
}

fn disturb(root: &Path, rng: &mut Rng) -> io::Result<()> {
    let names = ["a", "b", "c", "a/a", "a/b", "b/a", "b/c", "c/a", "c/a/b"];
    let mut any = || root.join(names[rng.usize(..names.len())]);
    let (path, other) = (any(), any());
    match rng.u8(..11) {
        0 => fs::create_dir(&path)?,
        1 => fs::rename(&path, &other)?,
        2 => fs::hard_link(&path, &other)?,
        3 => fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path))?,
        4 => symlink(&other, &path)?,
        5 => fs::set_permissions(&path, Permissions::from_mode(rng.u32(..0o7777)))?,
        6 => File::options()
            .write(true)
            .open(&path)?
            .set_len(rng.u64(..200_000))?,
        7 => xattr::set(&path, "user.x", &[rng.u8(..)])?,
        8 => fs::write(&path, vec![rng.u8(..3); rng.usize(..100_000)])?,
        _ => {
            let file = File::options()
                .create(true)
                .write(true)
                .truncate(false)
                .open(&path)?;
            file.write_all_at(&[rng.u8(..)], rng.u64(..150_000))?;
        }
    }
    Ok(())
}

#[test]
fn a_full_disk_ends_a_stream_with_its_reason_and_a_damaged_one_changes_no_meaning() {
    if !is_root() {
        return;
    }
    let mut pair = Pair::new();
    fs::write(pair.source().join("file"), vec![1; 100_000]).unwrap();
    let mut stream = pair.send();
    let at = stream.len() - 40;
    stream[at] ^= 1;
    let error = pair.received.store(&stream[..]).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
    let digest = digest(pair.known.have.as_ref().unwrap());
    let error = pair.received.seal(&digest).unwrap_err().to_string();
    assert!(error.contains("not those of the source"), "{error}");
    assert!(!pair.received.is_whole());
    pair.ask();
    pair.round();
    pair.expect_same("after the damage");
    assert!(pair.received.is_whole());
    pair.received.end();
    assert!(!pair.received.is_whole() && pair.received.index().is_err());
}

#[test]
fn a_tree_that_was_sent_ahead_is_gone_on_with() {
    if !is_root() {
        return;
    }
    let mut pair = Pair::new();
    fill(&pair.source());
    let all = pair.round();
    pair.received.end();
    pair.received = ReceivedTree::new(pair.received.staging().clone()).unwrap();
    pair.known = Known::default();
    pair.ask();
    assert!(pair.round() < all / 10);
    pair.expect_same("again");
    let other = ReceivedTree::new(pair.received.staging().clone()).unwrap_err();
    assert!(other.to_string().contains("already"), "{other}");
}

#[test]
fn what_hostile_operations_name_stays_within_the_tree() {
    use super::operation::{Made, Operation};
    use super::stream::Sender;

    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join("untouched"), "mine").unwrap();
    let staging = StagingDir::of(&tmp.path().join("target"));
    staging.prepare("m-1", STRICT).unwrap();
    let path = |text: &str| text.as_bytes().to_vec();
    let make = |name: &str, made| Operation::Make {
        path: path(name),
        made,
    };
    let up = Made::Symlink(path("../../.."));
    let bad = [
        vec![make("../untouched", Made::File)],
        vec![make("/tmp/x", Made::File)],
        vec![make("a", up.clone()), make("a/untouched", Made::File)],
        vec![
            make("a", up.clone()),
            Operation::Size {
                path: path("a/untouched"),
                size: 0,
            },
        ],
        vec![
            make("b", Made::File),
            Operation::Link {
                from: path("../../untouched"),
                path: path("c"),
            },
        ],
        vec![Operation::Remove {
            path: path("../../untouched"),
        }],
        vec![Operation::Remove { path: path("") }],
        vec![
            make("a", Made::Symlink(path("../../untouched"))),
            Operation::Data {
                path: path("a"),
                first: 0,
                data: vec![1],
            },
        ],
    ];
    for operations in bad {
        let received = ReceivedTree::new(staging.clone()).unwrap();
        received.index().unwrap();
        let mut stream = Vec::new();
        let mut sender = Sender::new(&mut stream).unwrap();
        for operation in &operations {
            sender.add(operation).unwrap();
        }
        sender.finish().unwrap();
        received.store(&stream[..]).unwrap_err();
        assert_eq!(fs::read(tmp.path().join("untouched")).unwrap(), b"mine");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
        received.end();
        fs::remove_dir_all(tmp.path().join("target.pageferry/tree")).unwrap();
        staging.prepare("m-1", STRICT).unwrap();
    }
}

#[test]
fn a_link_that_somebody_puts_into_the_tree_leads_nowhere() {
    let mut pair = Pair::new();
    fs::create_dir(pair.source().join("dir")).unwrap();
    pair.round();
    fs::write(pair.tmp.path().join("untouched"), "mine").unwrap();
    fs::remove_dir(pair.arrived().join("dir")).unwrap();
    symlink("../../..", pair.arrived().join("dir")).unwrap();
    fs::write(pair.source().join("dir/untouched"), "yours").unwrap();
    let stream = pair.send();
    pair.received.store(&stream[..]).unwrap_err();
    assert_eq!(
        fs::read(pair.tmp.path().join("untouched")).unwrap(),
        b"mine"
    );
}
