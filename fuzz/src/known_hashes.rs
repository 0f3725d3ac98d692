//! Files of page hashes: what one sender writes of a receiver's pages, and another goes on from.

use std::collections::BTreeMap;

use pageferry::criu::header::Target;
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::frame::{Kind, OpenFrame, Split, split};
use pageferry::ferry::hash::PageHash;
use pageferry::ferry::known_hashes::KnownHashes;
use pageferry::ferry::message::{Hashes, StateId, encode_close};
use pageferry::units::{PageCount, PageRange, Vaddr};

use crate::ferry::{PAGE, bytes_of_frames, frames_of, on_wire};
use crate::{byte, canary, take};

/// Pages by whose they are and their numbers.
type Model = BTreeMap<(Target, u64), PageHash>;

/// Bytes in front of the frames.
const HEAD_BYTES: usize = 32;

/// What a file begins with.
fn head(key: u8) -> Vec<u8> {
    let mut head = b"PFHASHES".to_vec();
    head.extend_from_slice(&1_u32.to_le_bytes());
    head.extend_from_slice(&4096_u32.to_le_bytes());
    head.extend_from_slice(&[key; 16]);
    head
}

/// A file as structures: runs of seven bytes each, their frames, and how many pages it says to have more than it has.
fn made(mut data: &[u8]) -> Vec<u8> {
    let [key, wrong] = take(&mut data);
    let mut file = head(key);
    let mut pages = u64::from(wrong);
    while !data.is_empty() {
        let [target, chunk, page, count, fill, far, breaks] = take(&mut data);
        let target = match target % 8 {
            7 => Target::Shmem(u64::from(breaks)),
            pid => Target::Process(u32::from(pid) + 1),
        };
        let number = u64::from(chunk) * 512 + u64::from(page);
        let number = match far {
            255 => (1 << 52) - 1 - number,
            _ => number,
        };
        let count = u64::from(count % 20);
        let Some(end) = number.checked_add(count).filter(|end| *end < 1 << 52) else {
            continue;
        };
        let run = PageRange::new(number << 12, end << 12);
        let hashes = vec![PageHash([fill; 16]); usize::try_from(count).expect("a few")];
        let begin = file.len();
        Hashes::encode(target, PAGE, &[run], &hashes, breaks == 1, &mut file);
        if breaks == 255 {
            file[begin + 40] ^= fill;
        }
        pages += count;
    }
    let close = OpenFrame::begin(&mut file);
    encode_close(PageCount(pages), &mut file);
    close.finish(&mut file, Kind::Close, 0);
    file
}

/// What is read has a hash for each page, another sender knows each of them, and writes them again.
pub(crate) fn known_hashes(mut data: &[u8]) {
    let file = match byte(&mut data) % 3 {
        0 => data.to_vec(),
        1 => {
            let mut file = head(byte(&mut data));
            let frames = frames_of(data);
            frames.iter().for_each(|frame| on_wire(frame, &mut file));
            file
        }
        _ => made(data),
    };
    let Ok(known) = KnownHashes::read(&file, PAGE) else {
        return;
    };
    let model = model(&known);
    assert!(model.len() * 16 <= file.len(), "no page without a hash");
    let state = StateId([1; 16]);
    let mut memory = PageMemory::for_hashes_of(PAGE, known.ranges());
    memory.begin_with(state, known.key(), known.runs(PAGE));
    for ((target, number), hash) in &model {
        let base = memory.base_of(*target, Vaddr(number << 12));
        assert_eq!(base, Some(*hash), "there is room for each");
    }
    let mut again = Vec::new();
    let written = KnownHashes::write(&memory, |bytes| {
        again.extend_from_slice(bytes);
        Ok(())
    });
    written.expect("memory takes all");
    let again = KnownHashes::read(&again, PAGE).expect("what was written is read");
    assert!(again.key() == known.key() && self::model(&again) == model);
    // No seed has memory that processes share.
    let shared = |target: &Target| matches!(target, Target::Shmem(_));
    canary(model.len() > 4 && model.keys().any(|(target, _)| shared(target)));
}

fn model(known: &KnownHashes) -> Model {
    let mut model = Model::new();
    for (target, run, hashes) in known.runs(PAGE) {
        let numbers = run.start().get() >> 12..run.end().get() >> 12;
        assert_eq!(numbers.end - numbers.start, hashes.len() as u64);
        for (number, hash) in numbers.zip(hashes) {
            let before = model.insert((target, number), *hash);
            assert_eq!(before, None, "each page is named once");
        }
    }
    model
}

/// A file of two processes: as it is written, as frames, as structures.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let runs = [
        [0, 0, 7, 3, 9, 0, 0],
        [0, 2, 0, 2, 8, 0, 0],
        [1, 0, 1, 4, 7, 0, 0],
        [1, 0, 1, 1, 6, 255, 0],
    ];
    let runs = runs.concat();
    let made_of = [&[3, 0], runs.as_slice()].concat();
    let file = made(&made_of);
    let mut frames = Vec::new();
    let mut rest = &file[HEAD_BYTES..];
    while let Ok(Split::Frame(frame)) = split(rest) {
        frames.push((frame.kind, 0, rest[frame.body.clone()].to_vec()));
        rest = &rest[frame.end()..];
    }
    vec![
        [&[0], file.as_slice()].concat(),
        [&[1, 3], bytes_of_frames(&frames).as_slice()].concat(),
        [&[2], made_of.as_slice()].concat(),
        [&[2, 7, 1], runs.as_slice()].concat(),
        [&[2, 0, 0][..], &head(1)].concat(),
    ]
}
