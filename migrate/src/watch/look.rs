//! Conditions that are looked at again and again.

use std::path::Path;

use nix::sys::statvfs::statvfs;
use pageferry::error::{Error, Kind, Result};
use pageferry::watch::Level;
use procfs::{Current, LoadAverage, Meminfo};

use super::rules::When;

/// What a condition is now; `None` for those that are told and not looked at.
pub(super) fn look(when: &When) -> Result<Option<Level>> {
    let level = match when {
        When::Psi(_) | When::Command { .. } | When::Shutdown(_) => return Ok(None),
        When::Load { above, clear } => {
            let failed = |error| Error::wrap(Kind::Io, "/proc/loadavg", error);
            let load = f64::from(LoadAverage::current().map_err(failed)?.one);
            rising(load, *above, clear.unwrap_or(*above))
        }
        When::FreeMemory { below, clear } => {
            let failed = |error| Error::wrap(Kind::Io, "/proc/meminfo", error);
            let memory = Meminfo::current().map_err(failed)?;
            let free = memory.mem_available.unwrap_or(memory.mem_free);
            falling(free, below.0, clear.unwrap_or(*below).0)
        }
        When::FreeDisk { path, below, clear } => {
            falling(free_disk(path)?, below.0, clear.unwrap_or(*below).0)
        }
        When::File { path } => match path.try_exists() {
            Ok(true) => Level::High,
            Ok(false) => Level::Low,
            Err(error) => return Err(Error::file("look for", path, error)),
        },
    };
    Ok(Some(level))
}

fn free_disk(path: &Path) -> Result<u64> {
    let found =
        statvfs(path).map_err(|errno| Error::file("ask the file system of", path, errno))?;
    Ok(found
        .blocks_available()
        .saturating_mul(found.fragment_size()))
}

fn rising(value: f64, above: f64, clear: f64) -> Level {
    match value {
        value if value > above => Level::High,
        value if value > clear => Level::Between,
        _ => Level::Low,
    }
}

fn falling(value: u64, below: u64, clear: u64) -> Level {
    match value {
        value if value < below => Level::High,
        value if value < clear => Level::Between,
        _ => Level::Low,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_have_a_gap() {
        let levels = [5, 10, 15, 20].map(|free| falling(free, 10, 20));
        let expected = [Level::High, Level::Between, Level::Between, Level::Low];
        assert_eq!(levels, expected);
        let levels = [9.0, 8.0, 7.0, 6.0].map(|load| rising(load, 8.0, 6.0));
        assert_eq!(
            levels,
            [Level::High, Level::Between, Level::Between, Level::Low]
        );
    }
}
