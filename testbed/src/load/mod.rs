//! The process that is dumped and restored, as both sides see it.
//!
//! `testload` (the binary) holds memory and knows what every page of it must contain, without a
//! second copy: a page's content follows from (seed, area, index, generation). The harness steers
//! it by files, because a process that CRIU dumps must hold neither sockets nor open files:
//!
//! ```text
//!   harness                     directory of the load                     testload, process k
//!   Load::run(k, steps)  --->   command-k.json   (renamed into place) --> read, removed, carried out
//!   waits for            <---   report-k-SEQ.json (renamed into place) <-- counts, wrong pages, latencies
//! ```
//!
//! Invariants: a command file and a report file are whole or absent; every page that a report
//! counts as checked was compared with what the process itself last wrote there.

pub mod content;
pub mod control;
mod handle;
pub mod report;
pub mod scenarios;
pub mod spec;
pub mod steps;

pub use handle::Load;

/// Words of a page of this machine.
///
/// # Panics
/// The system does not tell its page size, which every Linux does.
pub fn page_words() -> usize {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten();
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    bytes.expect("a page size") / crate::sys::WORD_BYTES
}
