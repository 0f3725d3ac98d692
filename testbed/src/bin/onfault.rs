//! A process that locks memory as it is touched (MLOCK_ONFAULT), a child and a grandchild that have pages there which it
//! lacks: see `tests/criu_locked_children.rs`.
//!
//! ```text
//! onfault DIR   DIR/ready: all three have their memory      DIR/go: each compares it, and the first one forks once more
//!               DIR/said-0, DIR/said-1, DIR/said-2, DIR/said-3: "right", or what is wrong
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, alarm, getpid, getsid, setsid};
use testbed::sys::mappings;
use testbed::sys::{self, Backing, WINDOW};

const PAGE: usize = 4096;

/// Mappings by address and pages: one of a single page, and one that its child has only a part of.
const MAPPINGS: [(usize, usize); 3] = [
    (WINDOW.start, 64),
    (WINDOW.start + 128 * PAGE, 1),
    (WINDOW.start + 256 * PAGE, 32),
];

/// The mapping whose end the child unmaps, and how many pages it keeps.
const CUT: (usize, usize) = (2, 20);

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 120;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    if getsid(None)? != getpid() {
        setsid().context("setsid")?;
    }
    alarm::set(LIFETIME_S);
    for (at, pages) in MAPPINGS {
        sys::map(at, pages * PAGE, Backing::Private)?;
        mappings::lock(at, pages * PAGE, true).context("mlock2")?;
    }
    write_pages(0)?;
    if let ForkResult::Child = sys::fork()? {
        let _ = of_child(dir, 1);
        sys::exit_now(1);
    }
    wait_for(&dir.join("born-2"));
    fs::write(dir.join("ready"), "")?;
    wait_for(&dir.join("go"));
    say(dir, 0)?;
    if let ForkResult::Child = sys::fork()? {
        let _ = set_pdeathsig(Signal::SIGKILL);
        let _ = compared(0).map_or_else(
            |error| write(dir, 3, &format!("{error:#}")),
            |()| write(dir, 3, "right"),
        );
        sys::exit_now(0);
    }
    rest()
}

/// The child, or the child of it: dumped with the first one.
fn of_child(dir: &Path, generation: usize) -> Result<()> {
    let _ = set_pdeathsig(Signal::SIGKILL);
    alarm::set(LIFETIME_S);
    if generation == 1 {
        let (mapping, kept) = CUT;
        let (at, pages) = MAPPINGS[mapping];
        sys::unmap(at + kept * PAGE, (pages - kept) * PAGE)?;
    }
    write_pages(generation)?;
    if generation == 1
        && let ForkResult::Child = sys::fork()?
    {
        let _ = of_child(dir, 2);
        sys::exit_now(1);
    }
    fs::write(dir.join(format!("born-{generation}")), "")?;
    wait_for(&dir.join("go"));
    say(dir, generation)?;
    rest()
}

fn rest() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn wait_for(path: &Path) {
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Pages of the mapping of this number that a generation has.
fn pages_of(mapping: usize, generation: usize) -> usize {
    match mapping == CUT.0 && generation > 0 {
        true => CUT.1,
        false => MAPPINGS[mapping].1,
    }
}

/// Whether a generation writes a page: the first one does so to the lower halves, and to no mapping of one page.
fn writes(generation: usize, mapping: usize, page: usize) -> bool {
    match generation {
        0 => page < MAPPINGS[mapping].1 / 2,
        1 => page.is_multiple_of(2),
        _ => page.is_multiple_of(3),
    }
}

fn write_pages(generation: usize) -> Result<()> {
    for (mapping, (at, _)) in MAPPINGS.iter().enumerate() {
        for page in (0..pages_of(mapping, generation)).filter(|p| writes(generation, mapping, *p)) {
            mappings::write(at + page * PAGE, &[number(generation)])?;
        }
    }
    Ok(())
}

fn number(generation: usize) -> u8 {
    u8::try_from(generation).unwrap_or(u8::MAX) + 1
}

fn compared(generation: usize) -> Result<()> {
    let (mut zero, mut other) = (Vec::new(), Vec::new());
    for (mapping, (at, _)) in MAPPINGS.iter().enumerate() {
        for page in 0..pages_of(mapping, generation) {
            let last = (0..=generation)
                .rev()
                .find(|one| writes(*one, mapping, page));
            let expected = last.map_or(0, number);
            let found = mappings::load(at + page * PAGE);
            if found != expected {
                let wrong = if found == 0 { &mut zero } else { &mut other };
                wrong.push((mapping, page));
            }
        }
    }
    ensure!(
        zero.is_empty() && other.is_empty(),
        "zero (mapping, page): {zero:?}; another's: {other:?}"
    );
    Ok(())
}

fn say(dir: &Path, generation: usize) -> Result<()> {
    let said = compared(generation).map_or_else(|error| format!("{error:#}"), |()| "right".into());
    write(dir, generation, &said)
}

fn write(dir: &Path, generation: usize, said: &str) -> Result<()> {
    let path: PathBuf = dir.join(format!("said-{generation}"));
    let unfinished = dir.join(format!("new-{generation}"));
    fs::write(&unfinished, said)?;
    Ok(fs::rename(unfinished, path)?)
}
