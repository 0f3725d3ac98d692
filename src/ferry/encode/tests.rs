use super::*;
use crate::criu::header::PageFlags;
use crate::ferry::batch::{Batch, Place};
use crate::ferry::hash::HashKey;
use crate::ferry::unpack::Unpacker;
use crate::units::PageRange;

const PAGE: PageSize = PageSize::KIB_4;
const PAGES: usize = FERRY_BATCH_BYTES_MAX / 4096;

fn encode(encoder: &mut Encoder, plain: &[u8], level: Level) -> (EncodeCounters, Vec<u8>) {
    let count = plain.len() / PAGE.as_usize();
    let runs = [Run {
        range: PageRange::new(0x10_0000, 0x10_0000 + plain.len() as u64),
        flags: PageFlags::PRESENT,
    }];
    let batch = PlainBatch {
        target: Target::Process(1),
        runs: &runs,
        plain,
    };
    let verdicts = Verdicts {
        pages: vec![Verdict::Fresh; count],
        xor: Vec::new(),
    };
    let hasher = PageHasher::new(HashKey::default(), PAGE);
    let mut out = Vec::new();
    let counters = encoder
        .encode(batch, &verdicts, &hasher, level, &mut out)
        .expect("zstd works");
    (counters, out)
}

fn random(bytes: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(bytes).collect()
}

fn text(bytes: usize) -> Vec<u8> {
    let words = b"the quick brown fox jumps over the lazy dog 0123456789\n";
    words.iter().copied().cycle().take(bytes).collect()
}

#[test]
fn random_pages_stay_raw_and_are_hardly_ever_tried() {
    let mut encoder = Encoder::new(PAGE).expect("zstd works");
    let plain = random(PAGES * PAGE.as_usize(), 1);
    let batches = 256;
    let mut tried = 0;
    for _ in 0..batches {
        let (counters, body) = encode(&mut encoder, &plain, Level::Zstd(1));
        assert_eq!(counters.raw, PAGES as u64);
        assert!(body.len() <= plain.len() + 160);
        tried += counters.tried_bytes / plain.len() as u64;
    }
    assert!((2..=12).contains(&tried), "tried {tried} of {batches}");
}

#[test]
fn memory_that_looks_compressible_but_is_not_backs_off_as_well() {
    // Zeros just where the probe looks.
    let mut plain = random(PAGES * PAGE.as_usize(), 2);
    for page in plain.chunks_exact_mut(PAGE.as_usize()) {
        for quarter in 0..4 {
            page[quarter * 1024 + 512..quarter * 1024 + 512 + 32].fill(0);
        }
    }
    let mut encoder = Encoder::new(PAGE).expect("zstd works");
    let tries = (0..256)
        .filter(|_| encode(&mut encoder, &plain, Level::Zstd(1)).0.tried_bytes > 0)
        .count();
    assert!((2..=12).contains(&tries), "tried {tries} of 256");
}

#[test]
fn text_is_packed_and_random_pages_between_it_stay_raw() {
    let mut encoder = Encoder::new(PAGE).expect("zstd works");
    let mut plain = text(PAGES * PAGE.as_usize());
    for (seed, page) in (0..).zip(plain.chunks_exact_mut(2 * PAGE.as_usize())) {
        page[..PAGE.as_usize()].copy_from_slice(&random(PAGE.as_usize(), seed));
    }
    let (counters, body) = encode(&mut encoder, &plain, Level::Zstd(1));
    assert_eq!(counters.packed, PAGES as u64 / 2);
    assert_eq!(counters.raw, PAGES as u64 / 2);
    assert!(body.len() < plain.len() / 2 + 4096);
}

#[test]
fn repeated_random_records_escape_the_probe_but_not_the_trial() {
    let record = random(1 << 10, 4);
    let plain: Vec<u8> = record.iter().copied().cycle().take(1 << 18).collect();
    let mut encoder = Encoder::new(PAGE).expect("zstd works");
    let (counters, _) = encode(&mut encoder, &plain, Level::Zstd(1));
    assert_eq!(counters.packed, PAGES as u64);
}

#[test]
fn without_a_level_nothing_is_packed() {
    let mut encoder = Encoder::new(PAGE).expect("zstd works");
    let plain = text(PAGE.as_usize());
    let (counters, body) = encode(&mut encoder, &plain, Level::None);
    assert_eq!((counters.raw, counters.tried_bytes), (1, 0));
    let batch = Batch::parse(&body, PAGE).expect("well-formed");
    let mut out = Vec::new();
    Unpacker::default()
        .unpack(&batch, &[], &mut out)
        .expect("undamaged");
    let (_, place) = batch.places().next().expect("one page");
    let Place::Body(range) = place else {
        panic!("{place:?}");
    };
    assert_eq!(&body[range], &plain[..]);
}
