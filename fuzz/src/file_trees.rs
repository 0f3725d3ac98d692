//! Trees of files on their way to an agent: operations, which it carries out, and the index that it answers.

use std::fs;

use arbitrary::{Arbitrary, Unstructured};
use pageferry_cli::fuzzing::{ArrivingTree, file_index};

use crate::{canary, scratch};

/// Paths, good ones and others. What leads out of the tree stays within the scratch directory.
const PATHS: [&str; 13] = [
    "a",
    "b",
    "a/b",
    "a/c",
    "b/a",
    "a/b/c",
    "",
    ".",
    "..",
    "../untouched",
    "a/../b",
    "/a",
    "a//b",
];

/// An operation of the stream, with what it has besides its path.
#[derive(Arbitrary, Debug)]
struct Operation {
    kind: u8,
    path: u8,
    other: u8,
    small: u8,
    number: u64,
    data: Vec<u8>,
}

fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).expect("a short string");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}

fn path(number: u8) -> &'static [u8] {
    PATHS[usize::from(number) % PATHS.len()].as_bytes()
}

impl Operation {
    /// As migrate/src/files/operation.rs draws it.
    fn encode(&self, out: &mut Vec<u8>) {
        let kind = self.kind % 11;
        out.push(kind);
        put_string(out, path(self.path));
        // What a terabyte's index takes is no finding.
        let few = |number: u64| match self.small % 4 {
            0 => number >> 40,
            1 => u64::MAX - number % 3,
            _ => number % 5,
        };
        match kind {
            1 | 2 => out.extend_from_slice(&u32::from(self.small % 3).to_le_bytes()),
            4 => {
                let made = self.small % 8;
                out.push(made);
                match made {
                    3 => put_string(out, path(self.other)),
                    // A device that leads nowhere.
                    6 | 7 => out.extend_from_slice(&0_u64.to_le_bytes()),
                    _ => {}
                }
            }
            5 => put_string(out, path(self.other)),
            6 => out.extend_from_slice(&few(self.number).to_le_bytes()),
            7 => {
                out.extend_from_slice(&few(self.number).to_le_bytes());
                put_string(out, &self.data);
            }
            8 => {
                out.extend_from_slice(&few(self.number).to_le_bytes());
                out.extend_from_slice(&few(u64::from(self.other)).to_le_bytes());
            }
            9 => {
                for word in [u32::from(self.other), 7, 8] {
                    out.extend_from_slice(&word.to_le_bytes());
                }
                out.extend_from_slice(&self.number.to_le_bytes());
                out.extend_from_slice(&self.number.to_le_bytes()[..4]);
                out.extend_from_slice(&u32::from(self.small % 2).to_le_bytes());
                if self.small % 2 == 1 {
                    put_string(out, b"user.x");
                    put_string(out, &self.data);
                }
            }
            _ => {}
        }
    }
}

/// A batch as it travels: lengths, a checksum, packed.
fn batch(plain: &[u8]) -> Vec<u8> {
    let packed = zstd::bulk::compress(plain, 1).expect("memory is packed");
    let length = |bytes: &[u8]| {
        u32::try_from(bytes.len())
            .expect("a short batch")
            .to_le_bytes()
    };
    let lengths = [length(plain), length(&packed)].concat();
    let sum = crc32fast::hash(&[&lengths[..], &packed].concat());
    [b"PFFB", &lengths[..], &sum.to_le_bytes(), &packed].concat()
}

/// Whatever operations come, they are carried out within the tree, and the index is what the tree holds.
pub(crate) fn operations(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok((honest, operations)) = <(bool, Vec<Operation>)>::arbitrary(&mut input) else {
        return;
    };
    let mut plain = Vec::new();
    for operation in operations.iter().take(40) {
        operation.encode(&mut plain);
    }
    if !honest && !plain.is_empty() {
        let at = operations.len() * 7 % plain.len();
        plain[at] ^= 0x15;
    }
    let place = scratch::directory();
    let dir = place.path().join("in");
    fs::create_dir(&dir).expect("a directory is made");
    fs::write(dir.join("untouched"), "mine").expect("a file is written");
    let tree = ArrivingTree::new(&dir.join("target")).expect("a tree is made");
    let stored = tree.store(&[batch(&plain), batch(&[])].concat());
    let index = tree.index().expect("the tree is looked at");
    let digest = file_index(&index).expect("what was written is read");
    assert!(!digest.is_empty());
    assert_eq!(
        fs::read(dir.join("untouched")).expect("it is there"),
        b"mine"
    );
    let mut names: Vec<_> = fs::read_dir(&dir)
        .expect("it is there")
        .map(|entry| entry.expect("it is read").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["target.pageferry", "untouched"]);
    canary(stored.is_ok() && tree.names().len() > 1);
}

/// Some operations of each kind.
pub(crate) fn operation_seeds() -> Vec<Vec<u8>> {
    let of = |step: u8| {
        let byte = |number: u8| number.wrapping_mul(step).wrapping_add(number / 9);
        let mut seed = vec![1];
        seed.extend((0..200).map(byte));
        seed
    };
    // Makes something: what is made is told by `small`.
    let make = |path: u8, small: u8| [1, 4, path, 1, small, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let honest = [make(0, 1), make(1, 2), make(2, 3)].concat();
    let mut seeds: Vec<Vec<u8>> = [1, 5, 13, 29].into_iter().map(of).collect();
    seeds.push([&[1], honest.as_slice(), &[0]].concat());
    seeds
}

/// The index that an agent answers: a key, and a table that is packed here.
pub(crate) fn index(data: &[u8]) {
    let packed = zstd::bulk::compress(data, 1).expect("memory is packed");
    let length = (data.len() as u64).to_le_bytes();
    let answer = [&[7; 16][..], &length, &packed].concat();
    let read = file_index(&answer);
    // No time, access or name of the seeds has such a byte.
    canary(read.is_ok() && data.len() > 60 && data.iter().any(|byte| *byte >= 0xf0));
}

/// Tables of real trees.
pub(crate) fn index_seeds() -> Vec<Vec<u8>> {
    let place = scratch::directory();
    let tree = ArrivingTree::new(&place.path().join("target")).expect("a tree is made");
    let unpacked = |tree: &ArrivingTree| {
        let index = tree.index().expect("the tree is looked at");
        let length = index[16..24].try_into().map(u64::from_le_bytes);
        let length = usize::try_from(length.expect("eight bytes")).expect("a short table");
        zstd::bulk::decompress(&index[24..], length).expect("what was packed is unpacked")
    };
    let mut seeds = vec![unpacked(&tree)];
    let make = |path: u8, small: u8| Operation {
        kind: 4,
        path,
        other: 1,
        small,
        number: 0,
        data: Vec::new(),
    };
    let mut plain = Vec::new();
    make(0, 1).encode(&mut plain);
    make(1, 2).encode(&mut plain);
    make(2, 3).encode(&mut plain);
    let stored = tree.store(&[batch(&plain), batch(&[])].concat());
    stored.expect("an honest stream is stored");
    seeds.push(unpacked(&tree));
    seeds
}
