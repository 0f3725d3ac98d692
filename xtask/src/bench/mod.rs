//! `cargo xtask bench`: pageferry and CRIU, measured in turn on the same machine.
//!
//! ```text
//!   files, migrate, post_copy, page_server, replay, stream   what is measured and judged
//!   kernel   mechanisms of userfaultfd, each for itself
//!   instructions   counts of pure hot paths against another revision
//!   results  cases as they are done, saved
//!   rounds   runs of all contenders, compared      stats   medians and ratios of samples and bounds
//!   bars     promises, kept or not                 table   text
//! ```
//!
//! Invariants: contenders take turns, so that a machine that gets slower meets all of them; the
//! first round warms up and is thrown away; a ratio compares runs of the same round.

mod bars;
pub(crate) mod document;
mod figure;
mod files;
mod instructions;
mod kernel;
mod migrate;
mod page_server;
mod post_copy;
mod replay;
mod report;
mod results;
mod rounds;
mod stats;
mod stream;
mod table;

use anyhow::{Context, Result};
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
    /// Instructions of the pure hot paths, counted by valgrind, in this tree and in another revision.
    Instructions(instructions::Args),
    /// This kernel's mechanisms around userfaultfd, each for itself: `cargo bench --bench uffd`.
    Kernel(kernel::Args),
    /// The README's figure and the plots of docs/performance.md, from results.
    Figure(figure::Args),
    /// The last difference of a directory that moves with a process, and the same by rsync over ssh.
    Files(files::Args),
    /// Whole migrations: `pageferry migrate` in its modes, and the same done by CRIU alone.
    Migrate(migrate::Args),
    /// Page servers that receive a dump or serve it: page-server, CRIU's, and a bare sink.
    PageServer(page_server::Args),
    /// Restored processes that run while their memory is on its way: lazy-client and CRIU's
    /// lazy-pages.
    PostCopy(post_copy::Args),
    /// A Redis that moves as its log while clients write, and the same one moved with its memory.
    Replay(replay::Args),
    /// Results of benchmarks as a page with plots.
    Report(report::Args),
    /// Processes dumped to another host, round after round: ferry, page-server and CRIU's page-server.
    Stream(stream::Args),
}

/// Builds what is measured, measures and judges it.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.bench {
        Bench::Instructions(args) => return instructions::run(args),
        Bench::Kernel(args) => return kernel::run(args),
        Bench::Figure(args) => return figure::run(args),
        Bench::Report(args) => return report::run(args),
        _ => {}
    }
    setup::require_root()?;
    use_binaries(setup::release_binaries()?);
    match &args.bench {
        Bench::Instructions(args) => instructions::run(args),
        Bench::Kernel(args) => kernel::run(args),
        Bench::Files(args) => files::run(args),
        Bench::Migrate(args) => migrate::run(args),
        Bench::PageServer(args) => page_server::run(args),
        Bench::PostCopy(args) => post_copy::run(args),
        Bench::Figure(args) => figure::run(args),
        Bench::Replay(args) => replay::run(args),
        Bench::Report(args) => report::run(args),
        Bench::Stream(args) => stream::run(args),
    }
}

/// Lets all contenders run `rounds` times in turn, after a round that is thrown away. What a run leaves behind
/// (dirty pages, memory to be freed) is the next one's matter, so they follow each other in [`order`].
/// Tells the runs of each round, in the order of the contenders.
fn alternate<C, R>(
    contenders: &[C],
    rounds: u32,
    mut run: impl FnMut(&C) -> Result<R>,
) -> Result<Vec<Vec<R>>> {
    let mut round = |number: usize| -> Result<Vec<R>> {
        let mut runs = Vec::new();
        for at in order(contenders.len(), number) {
            runs.push((at, run(&contenders[at])?));
        }
        runs.sort_by_key(|(at, _)| *at);
        Ok(runs.into_iter().map(|(_, run)| run).collect())
    };
    round(0).context("warming up")?;
    (0..rounds as usize).map(round).collect()
}

/// Which of `count` contenders runs when in a round: over `count` rounds, or twice as many where that is odd, each
/// runs as often at each place, and right behind each other one (a Williams design).
fn order(count: usize, round: usize) -> Vec<usize> {
    let (turned, mirrored) = match count % 2 {
        0 => (round, false),
        _ => (round / 2, round % 2 == 1),
    };
    // 0, 1, -1, 2, -2, ...
    let zigzag = (0..count).map(|place| match place % 2 {
        0 => count - place / 2,
        _ => place / 2 + 1,
    });
    let mut order: Vec<usize> = zigzag.map(|at| (at + turned) % count).collect();
    if mirrored {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_runs_of_a_round_are_told_in_the_order_of_the_contenders() {
        let mut turns = String::new();
        let rounds = alternate(&['a', 'b', 'c'], 2, |&name| {
            turns.push(name);
            Ok((name, turns.len()))
        });
        let expected = [
            [('a', 4), ('b', 5), ('c', 6)],
            [('a', 9), ('b', 8), ('c', 7)],
        ];
        assert_eq!(rounds.unwrap(), expected);
        assert_eq!(turns, "abcabccba");
    }

    #[test]
    fn everybody_follows_everybody_else_as_often() {
        for count in 2..=5 {
            let rounds = count * (1 + count % 2);
            let mut follows = BTreeMap::new();
            for round in 0..rounds {
                let order = order(count, round);
                let mut all = order.clone();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..count), "{order:?}");
                for pair in order.windows(2) {
                    *follows.entry((pair[0], pair[1])).or_insert(0) += 1;
                }
            }
            assert_eq!(follows.len(), count * (count - 1));
            let often = rounds / count;
            assert!(follows.values().all(|times| *times == often), "{follows:?}");
        }
    }
}
