//! A policy that learns nothing: a fault brings its page alone, and the stream goes through the addresses.
//!
//! ```text
//! cargo run --example in_order -- simulate              compares it with today's policy
//! cargo run --example in_order -- -D images             is a lazy-client with this policy
//! ```

mod support;

use std::process::ExitCode;

use pageferry::lazy::answer::FetchLimits;
use pageferry::lazy::fault_prediction::FaultPrediction;
use pageferry::lazy::pattern::{FaultAround, Pattern};
use pageferry::lazy::policy::{FaultPath, Policy, StreamFrom, StreamState};
use pageferry::units::PageSize;

#[derive(Debug)]
struct InOrder;

impl Policy for InOrder {
    fn fetch_limits(&self, _: FaultPath, page: PageSize, _: u64, _: bool) -> FetchLimits {
        FetchLimits {
            alone_bytes: page.bytes(),
            sequential_bytes: page.bytes(),
        }
    }

    fn around(&self, _: &mut Pattern, _: u64) -> FaultAround {
        FaultAround::Alone
    }

    fn reads_upwards(&self, _: &Pattern, _: u64) -> bool {
        false
    }

    fn stream_from(&self, state: &StreamState) -> StreamFrom {
        StreamFrom::Address(state.stopped)
    }

    /// Never: faults wait for what is on the way.
    fn yields_until_us(&self, _: &FaultPrediction, _: u64) -> Option<u64> {
        None
    }
}

fn main() -> ExitCode {
    support::run(&InOrder)
}
