//! Rates of ferry's codec on one core: hashing, judging and packing, unpacking.
//!
//! `cargo bench --bench ferry`. Each case runs over 64 MiB in batches of 256 KiB, so that neither
//! the source nor the memory of earlier rounds stays in the processor's caches.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pageferry::criu::header::{PageFlags, Target};
use pageferry::ferry::batch::{Batch, PageKind};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::gather::Run;
use pageferry::ferry::hash::{Fingerprint, HashKey, PageHasher};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::StateId;
use pageferry::ferry::unpack::Unpacker;
use pageferry::limits::FERRY_BATCH_BYTES_MAX;
use pageferry::units::{PageRange, PageSize};

const PAGE: PageSize = PageSize::KIB_4;
const TARGET: Target = Target::Process(1);
const BYTES: usize = 64 << 20;

/// Memory like a heap: pointers, small numbers, text, and zeros between them.
fn heap() -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut memory = Vec::with_capacity(BYTES);
    while memory.len() < BYTES {
        match rng.u8(0..4) {
            0 => memory.extend_from_slice(&(0x7f00_0000_0000 + rng.u64(..1 << 28)).to_le_bytes()),
            1 => memory.extend_from_slice(&rng.u64(..1 << 10).to_le_bytes()),
            2 => memory.extend(std::iter::repeat_with(|| rng.alphanumeric() as u8).take(16)),
            _ => memory.extend_from_slice(&[0; 16]),
        }
    }
    memory.truncate(BYTES);
    memory
}

fn random() -> Vec<u8> {
    let mut memory = vec![0; BYTES];
    fastrand::Rng::with_seed(2).fill(&mut memory);
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

struct Codec {
    hasher: PageHasher,
    memory: PageMemory,
    encoder: Encoder,
    verdicts: Verdicts,
}

impl Codec {
    fn new() -> Codec {
        Codec {
            hasher: PageHasher::new(HashKey([1; 16]), PAGE),
            memory: PageMemory::new(PAGE, 1 << 30),
            encoder: Encoder::new(PAGE).expect("zstd works"),
            verdicts: Verdicts::default(),
        }
    }

    /// Packs `memory` batch by batch and hands each body to `done`.
    fn round(&mut self, memory: &[u8], level: Level, mut done: impl FnMut(&[u8])) {
        let mut out = Vec::new();
        let batches = memory.chunks(FERRY_BATCH_BYTES_MAX);
        for (start, plain) in (0_u64..).step_by(FERRY_BATCH_BYTES_MAX).zip(batches) {
            let runs = [Run {
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
                .encode(batch, &self.verdicts, &self.hasher, level, &mut out)
                .expect("zstd works");
            done(&out);
        }
    }
}

fn hashing(criterion: &mut Criterion) {
    let memory = random();
    let hasher = PageHasher::new(HashKey([1; 16]), PAGE);
    let mut group = criterion.benchmark_group("ferry/fingerprint");
    group.throughput(Throughput::Bytes(BYTES as u64));
    for (name, memory) in [("random", memory), ("zeros", vec![0; BYTES])] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for page in memory.chunks_exact(PAGE.as_usize()) {
                    black_box(hasher.fingerprint(page));
                }
            });
        });
    }
    group.finish();
}

fn first_round(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ferry/first round");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    for (memory_name, memory) in [("heap", heap()), ("random", random())] {
        for level in [Level::None, Level::Zstd(-5), Level::Zstd(1), Level::Zstd(3)] {
            group.bench_function(format!("{memory_name} {level:?}"), |bencher| {
                bencher.iter_batched(
                    Codec::new,
                    |mut codec| {
                        codec.round(&memory, level, |body| {
                            black_box(body.len());
                        });
                    },
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

fn later_round(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ferry/later round, 2 % changed");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    let before = heap();
    let after = dirtied(&before);
    group.bench_function("heap", |bencher| {
        bencher.iter_batched(
            || {
                let mut codec = Codec::new();
                codec.round(&before, Level::None, |_| {});
                codec.memory.commit(StateId([1; 16]));
                codec
            },
            |mut codec| {
                codec.round(&after, Level::Zstd(1), |body| {
                    black_box(body.len());
                });
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn unpacking(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ferry/unpack");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(20);
    for (name, memory, level) in [
        ("heap, packed", heap(), Level::Zstd(1)),
        ("random, raw", random(), Level::Zstd(1)),
    ] {
        let mut bodies = Vec::new();
        Codec::new().round(&memory, level, |body| bodies.push(body.to_vec()));
        let (mut unpacker, mut out) = (Unpacker::default(), Vec::new());
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for body in &bodies {
                    let batch = Batch::parse(body, PAGE).expect("well-formed");
                    assert!(batch.pages().all(|(_, kind)| kind != PageKind::Delta));
                    unpacker.unpack(&batch, &[], &mut out).expect("undamaged");
                    black_box(batch.places().count());
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hashing, first_round, later_round, unpacking);
criterion_main!(benches);
