//! A process whose calls fail on memory that it may lack, since they meet a sealed page: see `tests/criu_sealed.rs`.
//!
//! ```text
//! sealed DIR   DIR/ready: it has its memory      DIR/go: it seals a page, and tries to unmap and to replace what is there
//!              DIR/said.txt: "right", or what is wrong with its memory afterwards
//! ```

use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use testbed::exchange;
use testbed::sys::mappings;

const PAGE: usize = 4096;
const PAGES: usize = 1024;

/// Sealed: the middle of the first half. The second half is unmapped for good later.
const SEALED: usize = PAGES / 4;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 300;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    exchange::begin(LIFETIME_S)?;
    let private = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS;
    let memory = mappings::map(PAGES * PAGE, true, private, None)?;
    for page in 0..PAGES {
        mappings::write(memory + page * PAGE, &content(page))?;
    }
    exchange::write(&dir.join("ready"), "")?;
    exchange::wait_for(&dir.join("go"));
    exchange::write_result(&dir.join("said.txt"), try_to_lose(memory))
}

fn content(page: usize) -> [u8; 8] {
    (page as u64 + 1).to_ne_bytes()
}

fn try_to_lose(memory: usize) -> Result<()> {
    mappings::seal(memory + SEALED * PAGE, PAGE).context("mseal")?;
    let half = PAGES / 2 * PAGE;
    ensure!(
        mappings::unmap(memory, half) == Err(Errno::EPERM),
        "munmap does not fail"
    );
    // What can be unmapped is gone, sealed memory below it or not.
    mappings::unmap(memory + half, half).context("munmap")?;
    mappings::map_at(memory + half, half)?;
    for page in 0..PAGES {
        let read: [u8; 8] = std::array::from_fn(|at| mappings::load(memory + page * PAGE + at));
        let wanted = if page < PAGES / 2 {
            content(page)
        } else {
            [0; 8]
        };
        ensure!(read == wanted, "page {page} is {read:?} and not {wanted:?}");
    }
    Ok(())
}
