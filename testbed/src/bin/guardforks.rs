//! A process that installs guard regions over memory that it may lack, moves them, and forks more children than anybody tells
//! apart: see `tests/criu_guards.rs`.
//!
//! ```text
//! guardforks DIR   DIR/ready: it has its memory      DIR/go: it installs guards, moves memory and forks
//!                  DIR/said.txt: "right", or what it or the first of its children has found wrong
//! ```

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, alarm, getpid, getsid, setsid};
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE, Remap};
use testbed::sys::{self, Backing, WINDOW};

const PAGE: usize = 4096;
const PAGES: usize = 256;

/// Where the memory is, and the places that parts of it are moved to.
const MEMORY: usize = WINDOW.start;
const PLACES: [usize; 3] = {
    let step = 512 * PAGE;
    [MEMORY + step, MEMORY + 2 * step, MEMORY + 3 * step]
};

/// lazy-client looks at 64 at most.
const CHILDREN: usize = 70;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 120;

/// What a page must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expected {
    /// Its number before the dump.
    Content(usize),
    Zero,
    Guard,
}

/// Pages by address.
type Pages = Vec<(usize, Expected)>;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    if getsid(None)? != getpid() {
        setsid().context("setsid")?;
    }
    alarm::set(LIFETIME_S);
    sys::map(MEMORY, PAGES * PAGE, Backing::Private)?;
    for page in 0..PAGES {
        mappings::write(MEMORY + page * PAGE, &content(page))?;
    }
    fs::write(dir.join("ready"), "")?;
    wait_for(&dir.join("go"));
    let said =
        changed_and_forked(dir).map_or_else(|error| format!("{error:#}"), |()| "right".into());
    fs::write(dir.join("said.new"), said)?;
    fs::rename(dir.join("said.new"), dir.join("said.txt"))?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn wait_for(path: &Path) {
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn content(page: usize) -> [u8; 8] {
    (page as u64 + 1).to_ne_bytes()
}

fn changed_and_forked(dir: &Path) -> Result<()> {
    let pages = change()?;
    let mut children = Vec::new();
    for number in 0..CHILDREN {
        match sys::fork()? {
            ForkResult::Child => {
                let _ = set_pdeathsig(Signal::SIGKILL);
                alarm::set(LIFETIME_S);
                // All of them live until the last one is there.
                wait_for(&dir.join("all"));
                let found = compare(&pages).and_then(|()| compare_without_guards(&pages));
                if let Err(error) = &found {
                    let _ = fs::write(dir.join(format!("child-{number}")), format!("{error:#}"));
                }
                sys::exit_now(i32::from(found.is_err()))
            }
            ForkResult::Parent { child } => children.push(child),
        }
    }
    fs::write(dir.join("all"), "")?;
    for (number, child) in children.into_iter().enumerate() {
        waitpid(child, None)?;
        let said = fs::read_to_string(dir.join(format!("child-{number}")));
        ensure!(
            said.is_err(),
            "child {number}: {}",
            said.unwrap_or_default()
        );
    }
    compare(&pages)
}

/// Installs guards, and moves parts of the memory with guards in them.
fn change() -> Result<Pages> {
    let mut pages: Vec<Option<Expected>> = (0..PAGES).map(|n| Some(Expected::Content(n))).collect();
    let mut moved = Pages::new();
    let guard = |pages: &mut Vec<Option<Expected>>, from: usize, to: usize| {
        pages[from..to].fill(Some(Expected::Guard));
        mappings::advise(MEMORY + from * PAGE, (to - from) * PAGE, MADV_GUARD_INSTALL)
    };
    guard(&mut pages, 64, 96)?;
    guard(&mut pages, 160, 168)?;
    guard(&mut pages, 200, 208)?;
    // The first guards in part, the others whole; what is moved second stays mapped, and is empty.
    let parts = [(80, 112, false), (152, 176, true), (196, 212, false)];
    for ((from, to, stays), place) in parts.into_iter().zip(PLACES) {
        let length = (to - from) * PAGE;
        let how = match stays {
            true => Remap::LeaveEmpty(place),
            false => Remap::MoveTo(place),
        };
        mappings::remap(MEMORY + from * PAGE, length, length, how).context("mremap")?;
        for (at, page) in (place..).step_by(PAGE).zip(&mut pages[from..to]) {
            moved.extend(page.map(|expected| (at, expected)));
            *page = stays.then_some(Expected::Zero);
        }
    }
    let unmoved = (MEMORY..).step_by(PAGE).zip(pages);
    let unmoved = unmoved.filter_map(|(at, expected)| Some((at, expected?)));
    Ok(unmoved.chain(moved).collect())
}

/// Reads everything, which brings what is beside guards as well, and looks whether they are guards still.
fn compare(pages: &Pages) -> Result<()> {
    for (at, expected) in pages {
        let wanted = match expected {
            Expected::Content(page) => content(*page),
            Expected::Zero => [0; 8],
            Expected::Guard => continue,
        };
        let found: [u8; 8] = std::array::from_fn(|byte| mappings::load(at + byte));
        ensure!(found == wanted, "{at:#x} is {found:?}, not {expected:?}");
    }
    for (at, _) in guards(pages) {
        let read = mappings::read(*at, &mut [0]);
        ensure!(read == Err(Errno::EFAULT), "{at:#x} is no guard: {read:?}");
    }
    Ok(())
}

fn compare_without_guards(pages: &Pages) -> Result<()> {
    for (at, _) in guards(pages) {
        mappings::advise(*at, PAGE, MADV_GUARD_REMOVE)?;
        let found = mappings::load(*at);
        ensure!(found == 0, "{at:#x} below a guard is {found}");
    }
    Ok(())
}

fn guards(pages: &Pages) -> impl Iterator<Item = &(usize, Expected)> {
    pages
        .iter()
        .filter(|(_, expected)| *expected == Expected::Guard)
}
