//! A process that holds a robust lock in a shared file, and ends by SIGKILL when it is told to.
//!
//! ```text
//!   robust --dir DIR    DIR/lock: the lock's word first; DIR/ready: it holds it; DIR/go: it ends
//! ```
//!
//! The head of its robust futexes has a page to itself, which nothing in the process touches afterwards: only the
//! kernel reads it, at the end.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use testbed::exchange;
use testbed::sys::mappings;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 300;

/// Where the list's entry lies in the shared page, bytes behind the lock's word.
const ENTRY: usize = 64;

/// Bytes of the mapping in whose middle the list's head has the only page: no fault elsewhere brings it along.
const APART: usize = 8 << 20;

#[derive(Parser)]
struct Args {
    /// Where files are exchanged.
    #[arg(long)]
    dir: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    exchange::begin(LIFETIME_S)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(args.dir.join("lock"))?;
    file.set_len(4096)?;
    let shared = mappings::map(4096, true, libc::MAP_SHARED, Some(file.as_fd()))?;
    let apart = mappings::map(APART, true, libc::MAP_PRIVATE, None)?;
    mappings::advise(apart, APART, libc::MADV_NOHUGEPAGE)?;
    let head = apart + APART / 2;
    let entry = shared + ENTRY;
    let offset = 0usize.wrapping_sub(ENTRY);
    let words = |words: &[usize]| -> Vec<u8> {
        let bytes = words.iter().map(|word| word.to_le_bytes());
        bytes.flatten().collect()
    };
    mappings::write(shared, &getpid().as_raw().to_le_bytes())?;
    mappings::write(entry, &words(&[head]))?;
    mappings::write(head, &words(&[entry, offset, 0]))?;
    mappings::set_robust_list(head)?;
    exchange::write(&args.dir.join("ready"), "")?;
    exchange::wait_for(&args.dir.join("go"));
    kill(getpid(), Signal::SIGKILL)?;
    Ok(())
}
