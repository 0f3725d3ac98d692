//! Small pages put together into huge ones, region by region.

use std::time::Instant;

use anyhow::Result;
use nix::errno::Errno;
use pageferry::sys::collapse::{AdvisedProcess, Collapsed};
use pageferry::sys::laboratory::{Area, Backing, HUGE_BYTES, Modes, Watched};
use pageferry::sys::owned_process::ProcessName;
use pageferry::sys::process::page_size;

use super::fills::touch;
use super::{Scale, Unsupported, need};

/// See [`super::Group::metrics`].
pub(super) const METRICS: [&str; 2] = ["µs a region", "GiB/s"];

const GIB: f64 = (1_u64 << 30) as f64;

/// Who asks, and for what memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// The process itself: madvise.
    Own,
    /// Another process would ask so: process_madvise.
    FromOutside,
    /// The same while the memory is registered with a userfaultfd.
    Registered,
}

impl Way {
    pub(super) const ALL: [Way; 3] = [Way::Own, Way::FromOutside, Way::Registered];

    pub(super) fn name(self) -> &'static str {
        match self {
            Way::Own => "madvise",
            Way::FromOutside => "process_madvise",
            Way::Registered => "the same, under a userfaultfd",
        }
    }
}

/// Collapses all regions of an area of small pages.
pub(super) fn round(way: Way, scale: &Scale) -> Result<Vec<f64>> {
    let area = Area::new(scale.bytes, Backing::Private)?;
    touch(&area, page_size()?.as_usize());
    area.allow_huge(0..scale.bytes)
        .map_err(|error| Unsupported(format!("the kernel has no huge pages: {error}")))?;
    let pid = i32::try_from(std::process::id())?;
    let process = AdvisedProcess::open(ProcessName::of(pid)?)?;
    let begun;
    match way {
        Way::Own => {
            begun = Instant::now();
            for start in regions(scale) {
                let collapsed = area.collapse(start..start + HUGE_BYTES);
                collapsed.map_err(|error| {
                    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                        Errno::EINVAL => refused("EINVAL"),
                        Errno::ENOMEM => refused("no memory for a huge page"),
                        _ => anyhow::Error::new(error).context("madvise(MADV_COLLAPSE)"),
                    }
                })?;
            }
        }
        Way::FromOutside => {
            begun = Instant::now();
            from_outside(&process, &area, scale)?;
        }
        Way::Registered => {
            need(0, "userfaultfd", "4.3")?;
            let watched = Watched::new(area, 0, Modes::MISSING, true)?;
            begun = Instant::now();
            from_outside(&process, watched.area(), scale)?;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let count = scale.bytes / HUGE_BYTES;
    Ok(vec![
        seconds * 1e6 / count as f64,
        scale.bytes as f64 / seconds / GIB,
    ])
}

fn regions(scale: &Scale) -> impl Iterator<Item = usize> {
    (0..scale.bytes).step_by(HUGE_BYTES)
}

fn from_outside(process: &AdvisedProcess, area: &Area, scale: &Scale) -> Result<()> {
    for start in regions(scale) {
        let region = area.range(start..start + HUGE_BYTES)?;
        match process.collapse(region) {
            Collapsed::Huge => {}
            Collapsed::NoMemory => return Err(refused("no memory for a huge page")),
            Collapsed::Refused => return Err(refused("EINVAL")),
            Collapsed::Impossible(errno) => return Err(refused(errno.desc())),
            other => anyhow::bail!("process_madvise(MADV_COLLAPSE) of {region:?}: {other:?}"),
        }
    }
    Ok(())
}

fn refused(why: &str) -> anyhow::Error {
    Unsupported(format!("MADV_COLLAPSE (Linux 6.1) is refused: {why}")).into()
}
