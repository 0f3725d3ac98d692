//! `cargo xtask bench`: pageferry and CRIU, measured in turn on the same machine.
//!
//! ```text
//!   post_copy, page_server, stream   what is measured and judged
//!   rounds   runs of all contenders, compared      stats   medians and ratios of samples and bounds
//!   bars     promises, kept or not                 table   text
//! ```
//!
//! Invariants: contenders take turns, so that a machine that gets slower meets all of them; the
//! first round warms up and is thrown away; a ratio compares runs of the same round.

mod bars;
mod page_server;
mod post_copy;
mod rounds;
mod stats;
mod stream;
mod table;

use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::criu::Criu;
use testbed::workspace::use_binaries;

use crate::setup;

/// Where tmpfs is on every Linux with POSIX shared memory.
const TMPFS: &str = "/dev/shm";

/// Which benchmark.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// Page servers that receive a dump or serve it: page-server, CRIU's, and a bare sink.
    PageServer(page_server::Args),
    /// Restored processes that run while their memory is on its way: lazy-client and CRIU's
    /// lazy-pages.
    PostCopy(post_copy::Args),
    /// Processes dumped to another host, round after round: ferry, page-server and CRIU's page-server.
    Stream(stream::Args),
}

/// Builds what is measured, measures and judges it.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    use_binaries(setup::release_binaries()?);
    match &args.bench {
        Bench::PageServer(args) => page_server::run(args),
        Bench::PostCopy(args) => post_copy::run(args),
        Bench::Stream(args) => stream::run(args),
    }
}

/// What a result depends on besides the programs.
#[derive(Clone, Debug, Serialize)]
struct Machine {
    kernel: String,
    cpus: usize,
    criu: String,
    pageferry: &'static str,
}

impl Machine {
    fn here(criu: &Criu) -> Result<Machine> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
        Ok(Machine {
            kernel: kernel.trim().to_owned(),
            cpus: available_parallelism()?.get(),
            criu: criu.version.clone(),
            pageferry: env!("CARGO_PKG_VERSION"),
        })
    }

    fn describe(&self) -> String {
        let Machine {
            kernel,
            cpus,
            criu,
            pageferry,
        } = self;
        format!("pageferry {pageferry}, CRIU {criu}, Linux {kernel}, {cpus} CPUs")
    }
}

/// Lets all contenders run `rounds` times in turn, after a round that is thrown away. Each round begins
/// with another one, for what a run leaves behind (dirty pages, memory to be freed) is the next one's
/// matter. Tells the runs of each round, in the order of the contenders.
fn alternate<C, R>(
    contenders: &[C],
    rounds: u32,
    mut run: impl FnMut(&C) -> Result<R>,
) -> Result<Vec<Vec<R>>> {
    let mut round = |first: usize| -> Result<Vec<R>> {
        let (late, early) = contenders.split_at(first % contenders.len().max(1));
        let mut runs = early
            .iter()
            .chain(late)
            .map(&mut run)
            .collect::<Result<Vec<R>>>()?;
        runs.rotate_right(late.len());
        Ok(runs)
    };
    round(0).context("warming up")?;
    (0..rounds as usize).map(round).collect()
}

/// Writes `results` so that the file is whole or absent.
fn write_json(path: &Path, results: &impl Serialize) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, serde_json::to_vec_pretty(results)?)
        .with_context(|| unfinished.display().to_string())?;
    fs::rename(&unfinished, path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_take_turns_and_each_round_begins_with_another() {
        let mut turns = String::new();
        let rounds = alternate(&['a', 'b', 'c'], 3, |&name| {
            turns.push(name);
            Ok((name, turns.len()))
        });
        let expected = [
            [('a', 4), ('b', 5), ('c', 6)],
            [('a', 9), ('b', 7), ('c', 8)],
            [('a', 11), ('b', 12), ('c', 10)],
        ];
        assert_eq!(rounds.unwrap(), expected);
        assert_eq!(turns, "abcabcbcacab");
    }
}
