//! What the examples have in common: the choice between a simulation and a lazy-client, and touches to simulate.

use std::process::ExitCode;

use pageferry::lazy::policy::{ADAPTIVE, Policy};
use pageferry::lazy::simulation::{Link, Outcome, Simulation, Touch};
use pageferry::units::{PageRange, PageSize, Vaddr};

/// The first argument `simulate` compares `policy` with today's. All else is a command line of lazy-client's, which
/// restores with `policy`.
pub(crate) fn run(policy: &'static dyn Policy) -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("simulate") {
        return lazy_client::run_program_with(policy);
    }
    println!("touches    policy     waits  waited ms  complete ms  requests");
    for (name, touches) in [("at random", at_random()), ("in order", in_order())] {
        for (who, policy) in [
            ("today's", &ADAPTIVE as &'static dyn Policy),
            ("this", policy),
        ] {
            let outcome = simulate(policy, &touches);
            println!(
                "{name:<10} {who:<9} {:>6} {:>10} {:>12} {:>9}",
                outcome.waits,
                outcome.waited_us / 1000,
                outcome.complete_us / 1000,
                outcome.sent.len()
            );
        }
    }
    ExitCode::SUCCESS
}

/// Pages of the simulated process: 64 MiB.
const PAGES: u64 = 16 << 10;
const START: u64 = 1 << 32;

fn simulate(policy: &'static dyn Policy, touches: &[Touch]) -> Outcome {
    let memory = [(1, vec![PageRange::new(START, START + (PAGES << 12))])];
    let link = Link {
        round_trip_us: 200,
        bytes_per_s: 110 << 20,
    };
    let mut simulation = Simulation::new(policy, PageSize::KIB_4, &memory, link);
    for touch in touches {
        simulation.touch(*touch);
    }
    simulation.finish()
}

fn touch(page: u64) -> Touch {
    Touch {
        after_us: 50,
        pid: 1,
        address: Vaddr(START + ((page % PAGES) << 12)),
    }
}

fn at_random() -> Vec<Touch> {
    let mut state = 1u64;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        touch(state >> 33)
    };
    std::iter::repeat_with(next).take(2000).collect()
}

fn in_order() -> Vec<Touch> {
    (PAGES / 2..PAGES).step_by(2).map(touch).collect()
}
