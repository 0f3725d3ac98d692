//! A policy for memory that is to be huge pages soon: a fault brings the whole region of 2 MiB around it, and the stream
//! completes the regions of the last faults before it goes through the addresses.
//!
//! ```text
//! cargo run --example whole_regions -- simulate         compares it with today's policy
//! cargo run --example whole_regions -- -D images        is a lazy-client with this policy
//! ```

mod support;

use std::process::ExitCode;

use pageferry::lazy::answer::FetchLimits;
use pageferry::lazy::fault_prediction::FaultPrediction;
use pageferry::lazy::pattern::{FaultAround, Pattern};
use pageferry::lazy::policy::{FaultPath, Policy, StreamFrom, StreamState};
use pageferry::units::PageSize;

/// A transparent huge page of x86_64, bytes.
const REGION_BYTES: u64 = 2 << 20;

#[derive(Debug)]
struct WholeRegions;

impl Policy for WholeRegions {
    /// With `on_demand` pages are asked for one by one: somebody wants as little as possible to come.
    fn fetch_limits(&self, _: FaultPath, page: PageSize, _: u64, on_demand: bool) -> FetchLimits {
        let bytes = if on_demand {
            page.bytes()
        } else {
            REGION_BYTES
        };
        FetchLimits {
            alone_bytes: bytes,
            sequential_bytes: bytes,
        }
    }

    /// Readers in order get their region as all others do.
    fn around(&self, history: &mut Pattern, page: u64) -> FaultAround {
        history.observe(page);
        FaultAround::Alone
    }

    fn reads_upwards(&self, history: &Pattern, page: u64) -> bool {
        history.reads_up_to(page)
    }

    fn stream_from(&self, state: &StreamState) -> StreamFrom {
        match (state.working_set, state.last_fault) {
            (Some(_), _) => StreamFrom::WorkingSet,
            (None, Some(_)) => StreamFrom::LastFault,
            (None, None) => StreamFrom::Address(state.stopped),
        }
    }

    fn yields_until_us(&self, faults: &FaultPrediction, now_us: u64) -> Option<u64> {
        faults.holds_until_us(now_us)
    }
}

fn main() -> ExitCode {
    support::run(&WholeRegions)
}
