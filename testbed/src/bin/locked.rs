//! A process that locks its memory and lets it grow: see `tests/criu_locked_growth.rs`.
//!
//! ```text
//! locked DIR   DIR/ready: it has its memory      DIR/go: it locks that, moves it and lets it grow, and a child does so too
//!              DIR/result.txt: "right", or what is wrong
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, alarm};
use testbed::exchange;
use testbed::sys::mappings::{self, Remap};
use testbed::sys::{self, Backing, WINDOW};

const PAGE: usize = 4096;
const PAGES: usize = 16;

/// Where the memory is, one place behind the other: each has room for what grows there.
const PLACES: [usize; 4] = {
    let step = 64 * PAGE;
    let first = WINDOW.start;
    [first, first + step, first + 2 * step, first + 3 * step]
};

/// Other memory, which is missing all the time.
const OTHER: usize = WINDOW.start + (64 << 20);
const OTHER_PAGES: usize = 1024;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 120;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    exchange::begin(LIFETIME_S)?;
    sys::map(OTHER, OTHER_PAGES * PAGE, Backing::Private)?;
    sys::map(PLACES[0], PAGES * PAGE, Backing::Private)?;
    for page in 0..OTHER_PAGES {
        mappings::write(OTHER + page * PAGE, &content(page + PAGES))?;
    }
    for page in 0..PAGES {
        mappings::write(PLACES[0] + page * PAGE, &content(page))?;
    }
    exchange::write(&dir.join("ready"), "")?;
    exchange::wait_for(&dir.join("go"));
    exchange::write_result(&dir.join("result.txt"), of_both())?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn of_both() -> Result<()> {
    let child = match sys::fork()? {
        ForkResult::Child => sys::exit_now(i32::from(grow().is_err())),
        ForkResult::Parent { child } => child,
    };
    grow()?;
    let ended = waitpid(child, None)?;
    ensure!(
        matches!(ended, WaitStatus::Exited(_, 0)),
        "the child: {ended:?}"
    );
    Ok(())
}

/// Locks the memory, and moves it twice to where it grows, as realloc does; then lets it grow in place.
fn grow() -> Result<()> {
    alarm::set(LIFETIME_S);
    mappings::lock(PLACES[0], PAGES * PAGE, false)?;
    let mut pages = PAGES;
    for places in PLACES.windows(2).take(2) {
        let (from, to) = (places[0], places[1]);
        let more = pages + 8;
        mappings::remap(from, pages * PAGE, more * PAGE, Remap::MoveTo(to))
            .with_context(|| format!("from {pages} pages to {more}"))?;
        pages = more;
        expect_right(to, pages)?;
    }
    let at = PLACES[2];
    mappings::remap(at, pages * PAGE, (pages + 4) * PAGE, Remap::InPlace)?;
    expect_right(at, pages + 4)?;
    // What was missing all the time.
    for page in 0..OTHER_PAGES {
        expect(OTHER + page * PAGE, content(page + PAGES))?;
    }
    Ok(())
}

fn expect_right(at: usize, pages: usize) -> Result<()> {
    for page in 0..pages {
        let expected = if page < PAGES { content(page) } else { [0; 8] };
        expect(at + page * PAGE, expected)?;
    }
    Ok(())
}

fn expect(at: usize, expected: [u8; 8]) -> Result<()> {
    let read = sys::read_word(at).to_ne_bytes();
    ensure!(read == expected, "{at:#x}: {read:x?}, not {expected:x?}");
    Ok(())
}

fn content(page: usize) -> [u8; 8] {
    (page as u64 + 1).to_ne_bytes()
}
