//! The seeds of a simulation: so many from 0 on, or those that `SIM_SEEDS` asks for: `20000`, or `7..8`.

#![allow(dead_code, reason = "each simulation uses a part of it")]

use std::ops::Range;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseResult, TestRng, TestRunner};

/// The seeds to run, `usual` of them unless others are asked for.
pub(crate) fn seeds(usual: u64) -> Range<u64> {
    let Ok(text) = std::env::var("SIM_SEEDS") else {
        return 0..usual;
    };
    let number = |text: &str| text.parse().expect("SIM_SEEDS is a number, or FROM..TO");
    match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => 0..number(&text),
    }
}

/// Whether as many seeds run as usual: then all that a simulation is about must have been met with.
pub(crate) fn are_usual(seeds: &Range<u64>, usual: u64) -> bool {
    seeds.end.saturating_sub(seeds.start) >= usual
}

/// Names the seed of a run that panics.
pub(crate) struct Seed(pub(crate) u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this run again: SIM_SEEDS={}..{}", self.0, self.0 + 1);
        }
    }
}

/// Gives `test` what the strategy makes of each seed. What fails is made smaller first.
pub(crate) fn for_each<S: Strategy>(
    usual: u64,
    strategy: &S,
    test: impl Fn(S::Value) -> TestCaseResult,
) {
    for seed in seeds(usual) {
        let _named = Seed(seed);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            cases: 1,
            failure_persistence: None,
            ..Config::default()
        };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        if let Err(error) = TestRunner::new_with_rng(config, rng).run(strategy, &test) {
            panic!("seed {seed}: {error}");
        }
    }
}
