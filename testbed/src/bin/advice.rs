//! A process that forks, and gives other advice about its memory the moment that it goes on: see
//! `tests/criu_fork_advice.rs`.
//!
//! ```text
//! advice DIR   DIR/ready: it has its memory      DIR/go: it forks for each part of that, whose child looks at the part
//!              DIR/result.txt: "right", or what a child has found
//! ```
//!
//! | part | when it forks | right behind the fork | its child finds |
//! |---|---|---|---|
//! | even | ordinary | MADV_WIPEONFORK | the contents |
//! | odd | MADV_WIPEONFORK | MADV_KEEPONFORK | zeros |
//!
//! A last child lets a mapping grow to where its parent has memory under MADV_DONTFORK, and finds zeros there.
//!
//! It has so many mappings that to read /proc/PID/smaps takes much longer than to give advice.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::ForkResult;
use testbed::exchange;
use testbed::sys;
use testbed::sys::mappings;

const PAGE: usize = 4096;
const PARTS: usize = 64;
const PAGES_IN_PART: usize = 4;
const OTHER_MAPPINGS: usize = 4000;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 300;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    exchange::begin(LIFETIME_S)?;
    let private = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS;
    let others = mappings::map(2 * OTHER_MAPPINGS * PAGE, true, private, None)?;
    for n in 0..OTHER_MAPPINGS {
        mappings::protect(others + 2 * n * PAGE, PAGE, nix::libc::PROT_READ)?;
    }
    let memory = mappings::map(PARTS * PAGES_IN_PART * PAGE, true, private, None)?;
    for page in 0..PARTS * PAGES_IN_PART {
        mappings::write(memory + page * PAGE, &content(page))?;
    }
    for part in (1..PARTS).step_by(2) {
        advise(memory, part, nix::libc::MADV_WIPEONFORK)?;
    }
    let length = PAGES_IN_PART * PAGE;
    let beside = mappings::map(2 * length, true, private, None)?;
    for page in 0..2 * PAGES_IN_PART {
        mappings::write(beside + page * PAGE, &content(page))?;
    }
    mappings::advise(beside + length, length, nix::libc::MADV_DONTFORK)?;
    exchange::write(&dir.join("ready"), "")?;
    exchange::wait_for(&dir.join("go"));
    let result = (0..PARTS).try_for_each(|part| fork_for(memory, part));
    let result = result.and_then(|()| fork_to_grow(beside));
    exchange::write_result(&dir.join("result.txt"), result)?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn advise(memory: usize, part: usize, advice: i32) -> nix::Result<()> {
    let length = PAGES_IN_PART * PAGE;
    mappings::advise(memory + part * length, length, advice)
}

fn content(page: usize) -> [u8; 8] {
    (page as u64 + 1).to_ne_bytes()
}

fn fork_for(memory: usize, part: usize) -> Result<()> {
    let is_wiped = part % 2 == 1;
    let later = match is_wiped {
        true => nix::libc::MADV_KEEPONFORK,
        false => nix::libc::MADV_WIPEONFORK,
    };
    let child = match sys::fork()? {
        ForkResult::Child => sys::exit_now(i32::from(!is_right(memory, part, is_wiped))),
        ForkResult::Parent { child } => child,
    };
    advise(memory, part, later)?;
    let ended = waitpid(child, None)?;
    ensure!(
        matches!(ended, WaitStatus::Exited(_, 0)),
        "part {part}, which {} zero in the child, is not as it should be",
        if is_wiped { "is" } else { "is not" }
    );
    Ok(())
}

fn fork_to_grow(beside: usize) -> Result<()> {
    let child = match sys::fork()? {
        ForkResult::Child => sys::exit_now(i32::from(!grows_by_zeros(beside))),
        ForkResult::Parent { child } => child,
    };
    let ended = waitpid(child, None)?;
    ensure!(
        matches!(ended, WaitStatus::Exited(_, 0)),
        "a mapping has grown, and what is new is not zero"
    );
    Ok(())
}

fn grows_by_zeros(beside: usize) -> bool {
    let length = PAGES_IN_PART * PAGE;
    let grown = mappings::move_away(beside, length, 2 * length);
    grown == Ok(beside)
        && (PAGES_IN_PART..2 * PAGES_IN_PART).all(|page| {
            let mut read = [0xff; 8];
            mappings::read(beside + page * PAGE, &mut read).is_ok() && read == [0; 8]
        })
}

fn is_right(memory: usize, part: usize, is_wiped: bool) -> bool {
    let first = part * PAGES_IN_PART;
    (first..first + PAGES_IN_PART).all(|page| {
        let mut read = [0xff; 8];
        let expected = if is_wiped { [0; 8] } else { content(page) };
        mappings::read(memory + page * PAGE, &mut read).is_ok() && read == expected
    })
}
