//! Times of the pure hot paths: `cargo bench --bench hot_paths [-- NAME]`.
//!
//! `cargo xtask bench instructions --against REV` counts the instructions of the same work, which says more on a machine
//! that is shared.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use workloads::{ALL, Workload};

/// Does the work `times` times, and prepares it anew as often as need be; only the work is timed.
fn timed(workload: Workload, times: u64) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = times;
    while left > 0 {
        let now = left.min(workload.lasts.into());
        left -= now;
        let mut run = (workload.prepare)();
        let begun = Instant::now();
        for _ in 0..now {
            black_box(run());
        }
        total += begun.elapsed();
    }
    total
}

fn hot_paths(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hot paths");
    group.sample_size(10);
    for workload in ALL {
        group.bench_function(workload.name, |bencher| {
            bencher.iter_custom(|times| timed(workload, times));
        });
    }
    group.finish();
}

criterion_group!(benches, hot_paths);
criterion_main!(benches);
