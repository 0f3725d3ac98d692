//! Processes and threads of Python that write memory by a rule; the clients compute what each page must hold.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::client::{ServiceClient, connect, send};
use crate::net::NetNs;

const PROGRAM: &str = include_str!("workers.py");

/// Pages of each worker.
const PAGES: u64 = 1024;

/// Clients.
const CLIENTS: u64 = 2;

/// As in the program.
const FACTOR: u64 = 6_364_136_223_846_793_005;
const SUMMAND: u64 = 1_442_695_040_888_963_407;

/// Workers of a kind: the first is the server itself.
fn workers(kind: &str) -> u64 {
    match kind {
        "threads" => 16,
        "forks" => 6,
        _ => 1,
    }
}

pub(super) fn prepare(shared: &Path, kind: &str, port: u16) -> Result<String> {
    fs::write(shared.join("workers.py"), PROGRAM)?;
    Ok(format!(
        "exec setsid python3 -B /shared/workers.py {kind} {port} {} {PAGES}",
        workers(kind)
    ))
}

pub(super) fn talks(
    net: &NetNs,
    at: SocketAddr,
    kind: &str,
) -> Result<Vec<Box<dyn ServiceClient>>> {
    let workers = workers(kind);
    (0..CLIENTS)
        .map(|number| {
            Ok(Box::new(WorkerClient {
                stream: connect(net, at)?,
                turn: number,
                steps: vec![0; usize::try_from(workers)?],
            }) as Box<dyn ServiceClient>)
        })
        .collect()
}

/// One client.
struct WorkerClient {
    stream: BufReader<TcpStream>,
    turn: u64,
    /// What each worker had reached when it was last asked.
    steps: Vec<u64>,
}

impl WorkerClient {
    fn look(&mut self, worker: usize, page: u64) -> Result<()> {
        send(&mut self.stream, format!("{worker} {page}").as_bytes())?;
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .context("waiting for the service")?;
        let numbers: Result<Vec<u64>, _> = line.split_whitespace().map(str::parse).collect();
        let numbers = numbers.with_context(|| format!("{line:?}"))?;
        let [step, state, first, last] = numbers[..] else {
            anyhow::bail!("{line:?} of worker {worker}: the connection has ended");
        };
        ensure!(
            step >= self.steps[worker],
            "worker {worker} went back from step {} to {step}",
            self.steps[worker]
        );
        self.steps[worker] = step;
        let seed = u64::try_from(worker)? + 1;
        let written = last_write(step, page).map_or(0, |step| state_at(seed, step));
        ensure!(
            (state, first, last) == (state_at(seed, step), written, written),
            "page {page} of worker {worker} at step {step}: {line}"
        );
        Ok(())
    }
}

impl ServiceClient for WorkerClient {
    fn ask(&mut self) -> Result<bool> {
        self.turn += 1;
        let count = u64::try_from(self.steps.len())?;
        let worker = usize::try_from(self.turn % count)?;
        self.look(worker, self.turn * 7919 % PAGES)?;
        Ok(true)
    }

    fn finish(&mut self) -> Result<()> {
        for worker in 0..self.steps.len() {
            for page in 0..PAGES {
                self.look(worker, page)?;
            }
        }
        // None has stopped: each gets further.
        let before = self.steps.clone();
        for (worker, before) in before.into_iter().enumerate() {
            crate::wait::until("a worker's next step", crate::wait::GENEROUS, || {
                self.look(worker, 0)?;
                Ok((self.steps[worker] > before).then_some(()))
            })?;
        }
        Ok(())
    }
}

/// The step not after `step` that wrote `page` last.
fn last_write(step: u64, page: u64) -> Option<u64> {
    let turns = step.checked_sub(page)?;
    let last = page + turns / PAGES * PAGES;
    (last > 0).then_some(last)
}

/// A worker's state after `step` steps: the rule as a map, squared for each bit.
fn state_at(seed: u64, mut step: u64) -> u64 {
    let (mut factor, mut summand) = (FACTOR, SUMMAND);
    let mut state = seed;
    while step > 0 {
        if step & 1 == 1 {
            state = state.wrapping_mul(factor).wrapping_add(summand);
        }
        summand = factor.wrapping_mul(summand).wrapping_add(summand);
        factor = factor.wrapping_mul(factor);
        step >>= 1;
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_of_single_steps() {
        let mut state = 5_u64;
        for step in 0..300 {
            assert_eq!(state_at(5, step), state);
            state = state.wrapping_mul(FACTOR).wrapping_add(SUMMAND);
        }
    }

    #[test]
    fn pages_are_written_in_turn() {
        assert_eq!(last_write(0, 0), None);
        assert_eq!(last_write(5, 5), Some(5));
        assert_eq!(last_write(5, 6), None);
        assert_eq!(last_write(PAGES + 4, 5), Some(5));
        assert_eq!(last_write(PAGES, 0), Some(PAGES));
    }
}
