//! Three generations whose memory has different protections, and who tell which it has: see
//! `tests/criu_migrate_protections.rs`.
//!
//! ```text
//! protections DIR   DIR/ready: all have set theirs     DIR/go: each says which it finds
//!                   DIR/pids, DIR/said-0, -1, -2: pid, or place and protection, of the process, its child and grandchild
//! ```

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, alarm, getpid};
use testbed::exchange;
use testbed::sys::mappings;
use testbed::sys::{self, Backing, WINDOW};

const PAGE: usize = 4096;
const PAGES: usize = 4;
const HUGE_BYTES: usize = 2 << 20;

const NONE: i32 = libc::PROT_NONE;
const READ: i32 = libc::PROT_READ;
const DATA: i32 = libc::PROT_READ | libc::PROT_WRITE;
const CODE: i32 = libc::PROT_READ | libc::PROT_EXEC;
const BOTH: i32 = DATA | libc::PROT_EXEC;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 120;

/// A mapping that all generations have.
struct Place {
    name: &'static str,
    backing: &'static str,
    /// How much of it changes its protection, bytes.
    changed: usize,
    /// Of each generation.
    protections: [i32; 3],
}

const fn place(name: &'static str, backing: &'static str, protections: [i32; 3]) -> Place {
    Place {
        name,
        backing,
        changed: match backing.as_bytes() {
            b"huge" => HUGE_BYTES,
            _ => PAGES * PAGE,
        },
        protections,
    }
}

const PLACES: &[Place] = &[
    place("code", "private", [DATA, BOTH, BOTH]),
    place("hidden", "private", [NONE, DATA, DATA]),
    place("between", "private", [DATA, CODE, BOTH]),
    place("more", "private", [BOTH, DATA, DATA]),
    place("same", "private", [DATA, DATA, DATA]),
    place("read", "private", [READ, DATA, DATA]),
    place("unwritable", "private", [DATA, CODE, READ]),
    place("untouched", "untouched", [DATA, BOTH, DATA]),
    Place {
        changed: 2 * PAGE,
        ..place("part", "private", [DATA, BOTH, BOTH])
    },
    place("file", "file", [DATA, BOTH, DATA]),
    place("huge", "huge", [DATA, BOTH, BOTH]),
];

fn address(number: usize) -> usize {
    WINDOW.start + number * (HUGE_BYTES << 1)
}

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).context("a directory")?;
    let dir = Path::new(&dir);
    exchange::begin(LIFETIME_S)?;
    let file = dir.join("file");
    fs::write(&file, [7; PAGES * PAGE])?;
    let file = File::options().read(true).write(true).open(&file)?;
    for (number, place) in PLACES.iter().enumerate() {
        let (at, backing) = match place.backing {
            "file" => (address(number), Backing::PrivateFile(file.as_fd())),
            "huge" => (address(number), Backing::PrivateHuge),
            _ => (address(number), Backing::Private),
        };
        let length = place.changed.max(PAGES * PAGE);
        sys::map(at, length, backing).with_context(|| place.name)?;
        if place.backing != "untouched" {
            mappings::write(at, &[1; 64])?;
        }
    }
    live(dir, 0)
}

/// Forks the next generation, and then sets the protections of this one.
fn live(dir: &Path, generation: usize) -> Result<()> {
    let last = generation + 1 == PLACES[0].protections.len();
    if !last && matches!(sys::fork()?, ForkResult::Child) {
        let _ = set_pdeathsig(Signal::SIGKILL);
        alarm::set(LIFETIME_S);
        let lived = live(dir, generation + 1);
        let _ = exchange::write(&dir.join(exchange::FAILURE), &format!("{lived:?}"));
        sys::exit_now(1);
    }
    for (number, place) in PLACES.iter().enumerate() {
        let protection = place.protections[generation];
        mappings::protect(address(number), place.changed, protection)
            .with_context(|| place.name)?;
    }
    exchange::write(
        &dir.join(format!("pid-{generation}")),
        &getpid().to_string(),
    )?;
    if !last {
        exchange::wait_for(&dir.join(format!("pid-{}", generation + 1)));
    }
    if generation == 0 {
        exchange::write(&dir.join("ready"), "")?;
    }
    exchange::wait_for(&dir.join("go"));
    let maps = fs::read_to_string("/proc/self/maps")?;
    let said = PLACES.iter().enumerate().map(|(number, place)| {
        let begin = format!("{:x}-", address(number));
        let line = maps.lines().find(|line| line.starts_with(&begin));
        let found = line.and_then(|line| line.split_whitespace().nth(1));
        format!("{} {begin} {}\n", place.name, found.unwrap_or("nothing"))
    });
    let said: String = said.collect();
    exchange::write(&dir.join(format!("said-{generation}")), &said)?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
