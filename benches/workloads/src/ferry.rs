//! Ferry's codec: hashing, judging, packing and unpacking of 4 MiB.

use pageferry::criu::header::{PageFlags, Target};
use pageferry::ferry::batch::Batch;
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::gather::Run as PageRun;
use pageferry::ferry::hash::{Fingerprint, HashKey, PageHasher};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::StateId;
use pageferry::ferry::unpack::Unpacker;
use pageferry::limits::FERRY_BATCH_BYTES_MAX;
use pageferry::units::{PageRange, PageSize};

use crate::Run;

const PAGE: PageSize = PageSize::KIB_4;
const TARGET: Target = Target::Process(1);
const BYTES: usize = 4 << 20;

/// Memory like a heap: pointers, small numbers, text, and zeros between them.
fn heap() -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut memory = Vec::with_capacity(BYTES);
    while memory.len() < BYTES {
        match rng.u8(0..4) {
            0 => memory.extend_from_slice(&(0x7f00_0000_0000 + rng.u64(..1 << 28)).to_le_bytes()),
            1 => memory.extend_from_slice(&rng.u64(..1 << 10).to_le_bytes()),
            2 => memory.extend_from_slice(&[rng.u8(b'a'..=b'z'); 16]),
            _ => memory.extend_from_slice(&[0; 16]),
        }
    }
    memory.truncate(BYTES);
    memory
}

/// Changes a few bytes in two of a hundred pages.
fn dirtied(memory: &[u8]) -> Vec<u8> {
    let mut memory = memory.to_vec();
    let mut rng = fastrand::Rng::with_seed(3);
    for page in memory.chunks_exact_mut(PAGE.as_usize()) {
        if rng.u8(0..50) == 0 {
            for _ in 0..20 {
                page[rng.usize(0..4096)] = rng.u8(..);
            }
        }
    }
    memory
}

fn hasher() -> PageHasher {
    PageHasher::new(HashKey([1; 16]), PAGE)
}

struct Codec {
    hasher: PageHasher,
    memory: PageMemory,
    encoder: Encoder,
    verdicts: Verdicts,
}

impl Codec {
    fn new() -> Codec {
        Codec {
            hasher: hasher(),
            memory: PageMemory::new(PAGE, 1 << 30),
            encoder: Encoder::new(PAGE).expect("zstd works"),
            verdicts: Verdicts::default(),
        }
    }

    /// Packs `memory` batch by batch and hands each body to `done`.
    fn round(&mut self, memory: &[u8], mut done: impl FnMut(&[u8])) {
        let mut out = Vec::new();
        let batches = memory.chunks(FERRY_BATCH_BYTES_MAX);
        for (start, plain) in (0_u64..).step_by(FERRY_BATCH_BYTES_MAX).zip(batches) {
            let runs = [PageRun {
                range: PageRange::new(start, start + plain.len() as u64),
                flags: PageFlags::PRESENT,
            }];
            let pages = plain.chunks_exact(PAGE.as_usize());
            let prints: Vec<Fingerprint> = pages.map(|p| self.hasher.fingerprint(p)).collect();
            let batch = PlainBatch {
                target: TARGET,
                runs: &runs,
                plain,
            };
            self.memory
                .judge(batch, &prints, &self.hasher, &mut self.verdicts);
            out.clear();
            self.encoder
                .encode(
                    batch,
                    &self.verdicts,
                    &self.hasher,
                    Level::Zstd(1),
                    &mut out,
                )
                .expect("zstd works");
            done(&out);
        }
    }
}

pub(crate) fn hash() -> Run {
    let (memory, hasher) = (heap(), hasher());
    Box::new(move || {
        let pages = memory.chunks_exact(PAGE.as_usize());
        pages.map(|page| u64::from(hasher.hash(page).0[0])).sum()
    })
}

pub(crate) fn encode() -> Run {
    let memory = heap();
    Box::new(move || {
        let mut bytes = 0;
        Codec::new().round(&memory, |body| bytes += body.len() as u64);
        bytes
    })
}

pub(crate) fn later_round() -> Run {
    let mut versions = [heap(), Vec::new()];
    versions[1] = dirtied(&versions[0]);
    let mut codec = Codec::new();
    codec.round(&versions[0], |_| {});
    codec.memory.commit(StateId([1; 16]));
    let mut number = 0;
    Box::new(move || {
        number += 1;
        let mut bytes = 0;
        codec.round(&versions[number % 2], |body| bytes += body.len() as u64);
        codec.memory.commit(StateId([1; 16]));
        bytes
    })
}

pub(crate) fn decode() -> Run {
    let mut bodies = Vec::new();
    Codec::new().round(&heap(), |body| bodies.push(body.to_vec()));
    let (mut unpacker, mut out) = (Unpacker::default(), Vec::new());
    Box::new(move || {
        let mut pages = 0;
        for body in &bodies {
            let batch = Batch::parse(body, PAGE).expect("well-formed");
            unpacker.unpack(&batch, &[], &mut out).expect("undamaged");
            pages += batch.places().count() as u64;
        }
        pages
    })
}
