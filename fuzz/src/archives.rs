//! Tar streams that others wrote: image files on their way to an agent, archives of containers.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};
use pageferry_cli::fuzzing::{unpack_archive, unpack_images};

use crate::{canary, scratch};

/// Names of entries, good ones and others. What leads out of its directory stays within the scratch directory.
const NAMES: [&str; 14] = [
    "core-1.img",
    "a",
    "b",
    "a/b",
    "a/b/c",
    "b/a",
    ".",
    "a/.",
    "a/../b",
    "../untouched",
    "a/../../untouched",
    "../../untouched",
    "",
    "checksum",
];

/// Kinds of entries, as a header's byte says them.
const KINDS: &[u8] = b"000055122346gLKxS7";

/// An entry of an archive.
#[derive(Arbitrary, Clone, Debug)]
struct Entry {
    name: u8,
    kind: u8,
    mode: u16,
    link: u8,
    content: Vec<u8>,
    /// How many bytes longer than its content the header says it is.
    longer: Option<u8>,
    /// A byte of the header that is something else, and whether the header's checksum fits it.
    damage: Option<(u16, u8, bool)>,
}

fn name(number: u8) -> &'static str {
    NAMES[usize::from(number) % NAMES.len()]
}

impl Entry {
    fn kind(&self) -> u8 {
        KINDS[usize::from(self.kind) % KINDS.len()]
    }

    /// What stands in the archive behind the header.
    fn content(&self) -> Vec<u8> {
        match self.kind() {
            b'x' | b'g' => self.records(),
            b'L' | b'K' => [name(self.link).as_bytes(), &[0]].concat(),
            _ => self.content.iter().copied().take(600).collect(),
        }
    }

    /// Records of a PAX header: a known name and what it is.
    fn records(&self) -> Vec<u8> {
        let words = ["path", "linkpath", "size", "mtime", "SCHILY.xattr.user.x"];
        let mut out = Vec::new();
        for pair in self.content.chunks(2).take(6) {
            let key = words[usize::from(pair[0]) % words.len()];
            let value = match (key, pair.get(1).copied().unwrap_or(0)) {
                ("path" | "linkpath", number) => name(number).to_owned(),
                ("size", number) => (u64::from(number) << (number % 64)).to_string(),
                ("mtime", number) if number % 3 == 0 => format!("-{number}.{number}"),
                ("mtime", number) => format!("{}.5", u64::from(number) << (number % 64)),
                (_, number) => number.to_string(),
            };
            let rest = format!(" {key}={value}\n");
            let length = rest.len() + 2;
            let line = match length {
                ..=99 => format!("{length}{rest}"),
                _ => continue,
            };
            out.extend_from_slice(line.as_bytes());
        }
        out
    }

    fn write(&self, out: &mut Vec<u8>) {
        let content = self.content();
        let mut header = tar::Header::new_gnu();
        let path = name(self.name).as_bytes();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        let link = name(self.link).as_bytes();
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_mode(u32::from(self.mode) & 0o7777);
        header.set_uid(u64::from(self.link));
        header.set_gid(7);
        header.set_mtime(u64::from(self.mode) << 20);
        header.set_size(content.len() as u64 + self.longer.map_or(0, u64::from));
        header.as_old_mut().linkflag = [self.kind()];
        header.set_cksum();
        if let Some((at, byte, fits)) = self.damage {
            header.as_mut_bytes()[usize::from(at) % 512] = byte;
            if fits {
                header.set_cksum();
            }
        }
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

/// What makes an entry, as a vector's next item: name, kind, access, link, content, nothing wrong.
fn honest_entry(name: u8, kind: u8, link: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![1, name, kind, 0xa4, 1, link];
    out.extend(content.iter().flat_map(|byte| [1, *byte]));
    out.extend([0, 0, 0]);
    out
}

fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    entries.iter().for_each(|entry| entry.write(&mut out));
    out
}

/// A scratch directory with a file that nobody may touch. What is unpacked goes two levels below.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = scratch::directory();
        for path in ["untouched", "in/untouched"] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("below it")).expect("a directory is made");
            fs::write(&path, "mine").expect("a file is written");
        }
        fs::create_dir(dir.path().join("in/root")).expect("a directory is made");
        Place { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("in/root")
    }

    /// Nothing but the root was touched.
    fn check(&self, also: &[&str]) {
        for (dir, expected) in [
            ("", &["in", "untouched"][..]),
            ("in", &["root", "untouched"]),
        ] {
            let entries = fs::read_dir(self.dir.path().join(dir)).expect("it is there");
            for entry in entries {
                let found = entry.expect("it is read").file_name();
                let found = found.to_string_lossy();
                let known = expected.contains(&&*found) || also.contains(&&*found);
                assert!(known, "{found} was made in {dir:?}");
            }
        }
        for path in ["untouched", "in/untouched"] {
            let path = self.dir.path().join(path);
            assert_eq!(fs::read(&path).expect("it is there"), b"mine");
            let meta = fs::metadata(&path).expect("it is there");
            assert_eq!((meta.nlink(), meta.mode() & 0o7777 & !0o022), (1, 0o644));
        }
    }
}

/// Image files that a source sends: plain files in one directory, or an error.
pub(crate) fn image_stream(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok((honest, entries)) = <(bool, Vec<Entry>)>::arbitrary(&mut input) else {
        return;
    };
    let mut stream = archive(&entries);
    if honest {
        let mut sum = crc32fast::Hasher::new();
        for entry in &entries {
            sum.update(name(entry.name).as_bytes());
            sum.update(&entry.content());
        }
        let end = Entry {
            name: 13,
            kind: 0,
            mode: 0o600,
            link: 0,
            content: sum.finalize().to_le_bytes().to_vec(),
            longer: None,
            damage: None,
        };
        end.write(&mut stream);
    }
    let place = Place::new();
    let unpacked = unpack_images(&stream, &place.root());
    place.check(&[]);
    let mut files = 0;
    for entry in fs::read_dir(place.root()).expect("it is there") {
        let entry = entry.expect("it is read");
        assert!(entry.file_type().expect("it has one").is_file());
        files += 1;
    }
    assert!(files <= entries.len());
    canary(unpacked.is_ok() && files > 1);
}

/// Streams of two files, with and without an end.
pub(crate) fn stream_seeds() -> Vec<Vec<u8>> {
    let of = |honest: u8, step: u8| {
        let byte = |number: u8| number.wrapping_mul(step) % 7;
        let mut seed = vec![honest];
        seed.extend((0..90).map(byte));
        seed
    };
    let files = [honest_entry(0, 0, 0, &[7; 9]), honest_entry(1, 0, 0, &[8])].concat();
    let honest = [&[1], files.as_slice(), &[0]].concat();
    vec![vec![1], of(1, 1), of(0, 3), of(1, 5), honest]
}

/// What an archive of a container has besides images.
#[derive(Arbitrary, Debug)]
struct Container {
    parts: Vec<Entry>,
    files: Vec<Entry>,
    deleted: Option<Vec<u8>>,
    packed: bool,
    damage: Option<(u16, u8)>,
}

/// An archive of a container: its parts stay in their directory, its files in the root.
pub(crate) fn container(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(container) = Container::arbitrary(&mut input) else {
        return;
    };
    let place = Place::new();
    let parts = place.dir.path().join("in/parts");
    fs::create_dir(&parts).expect("a directory is made");
    let mut builder = tar::Builder::new(archive(&container.parts));
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        let added = builder.append_data(&mut header, name, bytes);
        added.expect("memory is written");
    };
    add("config.dump", br#"{"name":"c1"}"#);
    add("rootfs-diff.tar", &archive(&container.files));
    if let Some(deleted) = &container.deleted {
        let names: Vec<&str> = deleted
            .iter()
            .take(20)
            .map(|number| name(*number))
            .collect();
        add("deleted.files", &serde_json::to_vec(&names).expect("names"));
    }
    let mut bytes = builder.into_inner().expect("memory is written");
    if container.packed {
        bytes = zstd::bulk::compress(&bytes, 1).expect("memory is packed");
    }
    if let Some((at, byte)) = container.damage {
        let length = bytes.len();
        bytes[usize::from(at) % length] = byte;
    }
    let file = place.dir.path().join("in/archive");
    fs::write(&file, &bytes).expect("a file is written");
    let made = unpack_archive(&file, &parts, &place.root());
    place.check(&["parts", "archive"]);
    canary(made.is_ok() && container.packed && has_link_and_file(&place.root()));
}

fn has_link_and_file(root: &Path) -> bool {
    let kinds = |path: &str| fs::symlink_metadata(root.join(path)).map(|meta| meta.file_type());
    let (a, b) = (kinds("a"), kinds("b"));
    a.is_ok_and(|kind| kind.is_symlink()) && b.is_ok_and(|kind| kind.is_file())
}

/// Archives with a bit of everything.
pub(crate) fn container_seeds() -> Vec<Vec<u8>> {
    let of = |step: u8| {
        let byte = |number: u8| number.wrapping_mul(step) ^ (number / 3);
        (0..=220).map(byte).collect()
    };
    let image = honest_entry(0, 0, 0, &[7; 9]);
    // A symbolic link and a file.
    let files = [honest_entry(1, 7, 2, &[]), honest_entry(2, 0, 0, &[8; 5])].concat();
    // Nothing was deleted, it is packed, nothing is damaged.
    let end = [0, 0, 1, 0];
    let honest = [image.as_slice(), &[0], &files, &end].concat();
    let mut seeds: Vec<_> = [1, 3, 9, 27, 81].into_iter().map(of).collect();
    seeds.push(honest);
    seeds
}
