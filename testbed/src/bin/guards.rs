//! A process that installs guard regions over memory that it may lack, and a child of it that installs others. Both
//! look whether they stay: see `tests/criu_guards.rs`.
//!
//! ```text
//! guards DIR   DIR/ready: it has its memory      DIR/go: it forks, and both guard a part of theirs and look
//!              DIR/parent-1.txt, DIR/child-1.txt what each has found: "right", or what is wrong
//!              DIR/filled: all memory has come   DIR/parent-2.txt, DIR/child-2.txt: what is below the guards
//! ```

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use testbed::exchange;
use testbed::sys;
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};

const PAGE: usize = 4096;
const PAGES: usize = 1024;

/// Page numbers of the guards, from and to.
type Part = (usize, usize);
const OF_PARENT: [Part; 2] = [(400, 402), (600, 664)];
const OF_CHILD: [Part; 2] = [(500, 501), (512, 640)];

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
    let child = match sys::fork()? {
        ForkResult::Child => {
            let done = guard(dir, "child", memory, &OF_CHILD);
            sys::exit_now(i32::from(done.is_err()));
        }
        ForkResult::Parent { child } => child,
    };
    guard(dir, "parent", memory, &OF_PARENT)?;
    waitpid(child, None)?;
    Ok(())
}

fn guard(dir: &Path, who: &str, memory: usize, parts: &[Part]) -> Result<()> {
    let path = |look| dir.join(format!("{who}-{look}.txt"));
    exchange::write_result(&path(1), look(memory, parts))?;
    exchange::wait_for(&dir.join("filled"));
    exchange::write_result(&path(2), look_below(memory, parts))
}

fn content(page: usize) -> [u8; 8] {
    (page as u64 + 1).to_ne_bytes()
}

/// Guards `parts`, reads all else, which brings what is beside them, and looks whether they are guards still.
fn look(memory: usize, parts: &[Part]) -> Result<()> {
    for part in parts {
        advise(memory, part, MADV_GUARD_INSTALL).context("MADV_GUARD_INSTALL")?;
    }
    let guarded = |page: usize| parts.iter().any(|&(from, to)| (from..to).contains(&page));
    for page in (0..PAGES).filter(|page| !guarded(*page)) {
        let read = read(memory + page * PAGE);
        ensure!(read == content(page), "page {page} is {read:?}");
    }
    are_guards(memory, parts)
}

fn advise(memory: usize, &(from, to): &Part, advice: i32) -> nix::Result<()> {
    let length = (to - from) * PAGE;
    mappings::advise(memory + from * PAGE, length, advice)
}

fn are_guards(memory: usize, parts: &[Part]) -> Result<()> {
    for &(from, to) in parts {
        for page in [from, to - 1] {
            ensure!(
                raises(memory + page * PAGE)?,
                "page {page} is not a guard any more"
            );
        }
    }
    Ok(())
}

/// All memory has come: looks whether the guards have stayed, and what is there without them.
fn look_below(memory: usize, parts: &[Part]) -> Result<()> {
    are_guards(memory, parts)?;
    for part in parts {
        advise(memory, part, MADV_GUARD_REMOVE).context("MADV_GUARD_REMOVE")?;
        for page in part.0..part.1 {
            let read = read(memory + page * PAGE);
            ensure!(read == [0; 8], "page {page} below a guard is {read:?}");
        }
    }
    Ok(())
}

fn read(address: usize) -> [u8; 8] {
    std::array::from_fn(|at| mappings::load(address + at))
}

/// Whether reading `address` ends a process.
fn raises(address: usize) -> Result<bool> {
    let child: Pid = match sys::fork()? {
        ForkResult::Child => {
            mappings::load(address);
            sys::exit_now(0);
        }
        ForkResult::Parent { child } => child,
    };
    match waitpid(child, None)? {
        WaitStatus::Signaled(_, Signal::SIGSEGV, _) => Ok(true),
        WaitStatus::Exited(_, 0) => Ok(false),
        ended => bail!("a child that read {address:#x} ended by {ended:?}"),
    }
}
