//! A parent that fills its memory and forks: see `testbed::forks`.
//!
//! ```text
//! forks DIR NAME CHILDREN MIB EVERY MIXED    DIR/ready-NAMEk: process k has its memory (0 is the parent)
//!                                            DIR/look holds a number: each looks at its memory again
//!                                            DIR/said-NAMEk: that number, and "bad N" of its pages
//! ```

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::alarm;
use testbed::exchange;
use testbed::sys;
use testbed::sys::mappings;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 600;

/// What one process has where, in the same order for all.
struct Memory {
    start: usize,
    pages: usize,
    /// Each so-manieth page is changed by a child (0: none).
    every: usize,
    mixed: bool,
    /// Which process this is: 0 is the parent.
    process: usize,
}

#[allow(
    clippy::zombie_processes,
    reason = "the other program ends with the tree"
)]
fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    ensure!(args.len() == 6, "DIR NAME CHILDREN MIB EVERY MIXED");
    let number = |at: usize| args[at].parse::<usize>().context("a number");
    let (dir, name) = (Path::new(&args[0]), &args[1]);
    let (children, mib, every, mixed) = (number(2)?, number(3)?, number(4)?, number(5)? == 1);
    if name == "f" {
        exchange::lead_session()?;
    }
    alarm::set(LIFETIME_S);
    let private = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS;
    let mut memory = Memory {
        start: mappings::map(mib << 20, true, private, None)?,
        pages: (mib << 20) / PAGE,
        every,
        mixed,
        process: 0,
    };
    for page in 0..memory.pages {
        mappings::write(memory.at(page), &content(page as u64, 0))?;
    }
    for child in 1..=children {
        if sys::fork()?.is_child() {
            alarm::set(LIFETIME_S);
            memory.process = child;
            memory.change()?;
            break;
        }
    }
    if mixed && memory.process == 0 {
        // Another program, with memory of its own, and children of its own.
        let mut other = Command::new(std::env::current_exe()?);
        other.arg(dir).args(["x", "2", "8", "50", "0"]);
        other.stdin(Stdio::null()).stdout(Stdio::null());
        drop(other.stderr(Stdio::null()).spawn()?);
    }
    answer(dir, &format!("{name}{}", memory.process), &memory)
}

impl Memory {
    fn at(&self, page: usize) -> usize {
        self.start + page * PAGE
    }

    /// The pages of the eighth number `eighth`.
    fn eighth(&self, eighth: usize) -> std::ops::Range<usize> {
        let pages = self.pages / 8;
        eighth * pages..(eighth + 1) * pages
    }

    fn is_changed(&self, page: usize) -> bool {
        self.every > 0 && self.process > 0 && page % self.every == self.process
    }

    /// Does what this child does to the memory that it has inherited.
    fn change(&self) -> Result<()> {
        for page in (0..self.pages).filter(|page| self.is_changed(*page)) {
            mappings::write(self.at(page), &content(page as u64, self.process))?;
        }
        if !self.mixed {
            return Ok(());
        }
        let part = |eighth| (self.at(self.eighth(eighth).start), self.pages / 8 * PAGE);
        match self.process {
            1 => {
                let (at, length) = part(0);
                mappings::advise(at, length, nix::libc::MADV_DONTNEED)?;
            }
            2 => {
                let (at, length) = part(7);
                mappings::lock(at, length, false)?;
            }
            3 => {
                let (at, length) = part(1);
                mappings::unmap(at, length)?;
                mappings::map_at(at, length)?;
                for page in self.eighth(1).step_by(2) {
                    mappings::write(self.at(page), &content(page as u64, 1000))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What page `page` must be.
    fn expected(&self, page: usize) -> [u8; PAGE] {
        let within = |eighth| self.eighth(eighth).contains(&page);
        match self.process {
            1 if self.mixed && within(0) => [0; PAGE],
            3 if self.mixed && within(1) && page % 2 == self.eighth(1).start % 2 => {
                content(page as u64, 1000)
            }
            3 if self.mixed && within(1) => [0; PAGE],
            process if self.is_changed(page) => content(page as u64, process),
            _ => content(page as u64, 0),
        }
    }

    fn bad_pages(&self) -> Result<usize> {
        let mut bad = 0;
        let mut read = [0; PAGE];
        for page in 0..self.pages {
            mappings::read(self.at(page), &mut read)?;
            bad += usize::from(read != self.expected(page));
        }
        Ok(bad)
    }
}

/// Words that do not compress, for a page as process `process` has written it.
fn content(page: u64, process: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let seed = (page * 31 + 5) ^ ((process as u64) << 40);
    for word in 0..WORDS {
        let mut mixed = seed.wrapping_add((word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let mixed = mixed ^ (mixed >> 31);
        bytes[word * 8..word * 8 + 8].copy_from_slice(&mixed.to_ne_bytes());
    }
    bytes
}

/// Looks at its memory whenever it is asked to, for ever.
fn answer(dir: &Path, name: &str, memory: &Memory) -> Result<()> {
    exchange::write(&dir.join(format!("ready-{name}")), "")?;
    let mut seen = 0;
    loop {
        let asked = fs::read_to_string(dir.join("look")).unwrap_or_default();
        let asked = asked.trim().parse::<u32>().unwrap_or(0);
        if asked > seen {
            seen = asked;
            let found = match memory.bad_pages() {
                Ok(bad) => format!("bad {bad}"),
                Err(error) => format!("{error:#}"),
            };
            exchange::write(
                &dir.join(format!("said-{name}")),
                &format!("{asked} {found}"),
            )?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
