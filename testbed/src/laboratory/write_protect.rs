//! Which pages are written: by a message for each (WP), or looked for afterwards (WP_ASYNC and PAGEMAP_SCAN).

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use pageferry::sys::laboratory::{Area, Backing, Modes, Watched, own_userfaultfd};
use pageferry::sys::process::page_size;
use pageferry::sys::uffd::{Event, MessageBuffer};
use pageferry::sys::write_tracking::{self, WriteTracking};
use pageferry::units::PageSize;

use super::fills::touch;
use super::{Scale, Unsupported, cpus, need};

/// See [`super::Group::metrics`]: a whole round by the pages of the area, and its three steps.
pub(super) const METRICS: [&str; 4] = [
    "round, ns a page",
    "protect, ns a page",
    "write, µs a written page",
    "look, ns a page",
];

/// How writes are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tracking {
    /// Not at all.
    None,
    /// A message for each.
    Messages,
    /// By a look at the page tables.
    Scan,
}

impl Tracking {
    pub(super) const ALL: [Tracking; 3] = [Tracking::None, Tracking::Messages, Tracking::Scan];

    pub(super) fn name(self) -> &'static str {
        match self {
            Tracking::None => "no tracking",
            Tracking::Messages => "WP, a message each",
            Tracking::Scan => "WP_ASYNC, PAGEMAP_SCAN",
        }
    }
}

/// What the steps of a round took.
#[derive(Default)]
struct Steps {
    protect: Duration,
    write: Duration,
    look: Duration,
}

/// Protects an area of pages that are there, writes to some, and finds out which.
pub(super) fn round(tracking: Tracking, percent: u32, scale: &Scale) -> Result<Vec<f64>> {
    let page = page_size()?;
    let area = Area::new(scale.bytes, Backing::Private)?;
    touch(&area, page.as_usize());
    let pages = scale.bytes / page.as_usize();
    let written = written(pages, percent);
    let steps = match tracking {
        Tracking::None => Steps {
            write: write(&area, &written, page),
            ..Steps::default()
        },
        Tracking::Messages => by_messages(area, &written, page)?,
        Tracking::Scan => by_scan(&area, &written, page)?,
    };
    let a_page = |step: Duration| step.as_secs_f64() * 1e9 / pages as f64;
    Ok(vec![
        a_page(steps.protect + steps.write + steps.look),
        a_page(steps.protect),
        steps.write.as_secs_f64() * 1e6 / written.len() as f64,
        a_page(steps.look),
    ])
}

/// Numbers of pages, spread evenly: `percent` of them, at least one.
fn written(pages: usize, percent: u32) -> Vec<usize> {
    let count = (pages * percent as usize / 100).max(1);
    (0..count).map(|at| at * pages / count).collect()
}

fn write(area: &Area, written: &[usize], page: PageSize) -> Duration {
    let begun = Instant::now();
    for number in written {
        area.store(number * page.as_usize(), 2);
    }
    begun.elapsed()
}

/// The handler takes the protection of each page away when its message comes; it runs on another CPU if there is one.
fn by_messages(area: Area, written: &[usize], page: PageSize) -> Result<Steps> {
    need(Modes::FEATURE_WP, "PAGEFAULT_FLAG_WP", "5.7")?;
    let watched = Watched::new(area, Modes::FEATURE_WP, Modes::WRITE_PROTECTED, true)?;
    let begun = Instant::now();
    watched
        .protect(0..watched.area().length(), true)
        .context("UFFDIO_WRITEPROTECT")?;
    let protect = begun.elapsed();
    let (own, other) = cpus::two()?;
    let (write, seen) = thread::scope(|scope| {
        let writing = scope.spawn(|| {
            cpus::stay_on(own)?;
            Ok::<_, anyhow::Error>(write(watched.area(), written, page))
        });
        let serving = scope.spawn(|| {
            let served = cpus::stay_on(other.unwrap_or(own))
                .and_then(|()| unprotect(&watched, written.len(), page));
            if served.is_err() {
                // Or the writer would wait for ever.
                watched.release()?;
            }
            served
        });
        (writing.join(), serving.join())
    });
    seen.ok().context("the handler")??;
    Ok(Steps {
        protect,
        write: write.ok().context("the writer")??,
        look: Duration::ZERO,
    })
}

/// Serves `count` writes.
fn unprotect(watched: &Watched, count: usize, page: PageSize) -> Result<()> {
    let room = Box::new(MessageBuffer::zeroed());
    let mut served = 0;
    while served < count {
        room.clear();
        let mut faults = Vec::new();
        watched.uffd().read(&room, |event| {
            if let Event::Fault(fault) = event {
                faults.push(fault.address);
            }
        })?;
        for at in faults {
            let part = watched
                .page_at(at, page)
                .with_context(|| format!("a message tells of {at:?}, outside of the area"))?;
            watched.protect(part, false)?;
            served += 1;
        }
    }
    Ok(())
}

fn by_scan(area: &Area, written: &[usize], page: PageSize) -> Result<Steps> {
    if !write_tracking::is_supported() {
        let why = "the kernel has no WP_ASYNC with PAGEMAP_SCAN (Linux 6.7)";
        return Err(Unsupported(why.to_owned()).into());
    }
    let pid = i32::try_from(std::process::id())?;
    let tracking = WriteTracking::begin(own_userfaultfd()?, pid)?;
    let range = area.range(0..area.length())?;
    let begun = Instant::now();
    tracking.take_written(range, |_| {})?;
    let protect = begun.elapsed();
    let write = write(area, written, page);
    let begun = Instant::now();
    let mut found = 0;
    tracking.take_written(range, |run| found += run.pages(page).get())?;
    let look = begun.elapsed();
    ensure!(
        found == written.len() as u64,
        "PAGEMAP_SCAN found {found} written pages of {}",
        written.len()
    );
    Ok(Steps {
        protect,
        write,
        look,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_spread_and_differ() {
        assert_eq!(written(100, 10), [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]);
        assert_eq!(written(3, 1), [0]);
        assert!(written(512, 100).into_iter().eq(0..512));
    }
}
