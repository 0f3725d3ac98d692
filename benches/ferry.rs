//! Rates of ferry's codec on one core: hashing, judging and packing, unpacking.
//!
//! `cargo bench --bench ferry`. Each case runs over 64 MiB in batches of 256 KiB, so that neither
//! the source nor the memory of earlier rounds stays in the processor's caches.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pageferry::ferry::batch::{Batch, PageKind};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::unpack::Unpacker;
use workloads::codec::{Codec, PAGE, dirtied, hasher, heap};

const BYTES: usize = 64 << 20;

fn random() -> Vec<u8> {
    let mut memory = vec![0; BYTES];
    fastrand::Rng::with_seed(2).fill(&mut memory);
    memory
}

fn hashing(criterion: &mut Criterion) {
    let memory = random();
    let hasher = hasher();
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
    for (memory_name, memory) in [("heap", heap(BYTES)), ("random", random())] {
        for level in [Level::None, Level::Zstd(-5), Level::Zstd(1), Level::Zstd(3)] {
            group.bench_function(format!("{memory_name} {level:?}"), |bencher| {
                bencher.iter_batched(
                    Codec::default,
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
    let before = heap(BYTES);
    let after = dirtied(&before);
    group.bench_function("heap", |bencher| {
        bencher.iter_batched(
            || {
                let mut codec = Codec::default();
                codec.round(&before, Level::None, |_| {});
                codec.commit();
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
        ("heap, packed", heap(BYTES), Level::Zstd(1)),
        ("random, raw", random(), Level::Zstd(1)),
    ] {
        let mut bodies = Vec::new();
        Codec::default().round(&memory, level, |body| bodies.push(body.to_vec()));
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
