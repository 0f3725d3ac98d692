//! What this host has that a migration depends on.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

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
    })
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
