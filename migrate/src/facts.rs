//! What this host has that a migration depends on.

use std::hint::black_box;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::HostFacts;
use pageferry::sys::process::page_size;
use pageferry::sys::uffd::check_permitted;
use procfs::{Current, Meminfo};

use crate::programs::Programs;

/// Looks at the host. `dir` is where images go.
pub(crate) async fn of_host(programs: &Programs, dir: &Path) -> Result<HostFacts> {
    let failed = |what: &str, error: std::io::Error| {
        Error::wrap(Kind::Io, format!("cannot read {what} of this host"), error)
    };
    let names = uname().map_err(|error| failed("the kernel", error.into()))?;
    let page = page_size().map_err(|error| failed("the page size", error))?;
    let room = statvfs(dir).map_err(|error| Error::file("look at", dir, error))?;
    let available = Meminfo::current().ok().and_then(|info| info.mem_available);
    Ok(HostFacts {
        pageferry: env!("CARGO_PKG_VERSION").to_owned(),
        criu: programs.criu_version().await,
        criu_problems: programs.criu_problems().await,
        kernel: names.release().to_string_lossy().into_owned(),
        machine: names.machine().to_string_lossy().into_owned(),
        cpu_flags: cpu_flags(),
        page_bytes: page.bytes(),
        available_bytes: available.unwrap_or_default(),
        disk_bytes: room.blocks_available().saturating_mul(room.fragment_size()),
        userfaultfd: check_permitted().is_ok(),
        clock_us: now_us(),
        copy_us_per_gib: tokio::task::spawn_blocking(copy_us_per_gib)
            .await
            .unwrap_or_default(),
    })
}

/// Memory that is copied to measure how fast the host does it, bytes. More than the C library keeps for reuse, so that
/// each copy is made in new memory, as a restore does it.
const COPIED_BYTES: usize = 40 << 20;

/// How many times it is copied.
const COPIES: usize = 3;

/// How long this host copies a GiB into new memory, µs: by the median of some smaller copies.
fn copy_us_per_gib() -> u64 {
    let memory = vec![1_u8; COPIED_BYTES];
    let mut took: Vec<u128> = (0..COPIES)
        .map(|_| {
            let began = Instant::now();
            black_box(black_box(&memory).clone());
            began.elapsed().as_micros()
        })
        .collect();
    took.sort_unstable();
    let us = took[COPIES / 2] * (1 << 30) / COPIED_BYTES as u128;
    u64::try_from(us).unwrap_or(u64::MAX)
}

/// µs since 1970.
pub(crate) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(u64::MAX))
}

/// The features that all processors of this host have: `flags` on x86_64, `Features` on aarch64.
fn cpu_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| {
        let (name, flags) = line.split_once(':')?;
        matches!(name.trim(), "flags" | "Features").then_some(flags)
    });
    let words = line.unwrap_or_default().split_whitespace();
    words.map(str::to_owned).collect()
}
