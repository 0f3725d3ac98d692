//! Tests of what threads share, under the crate shuttle (`src/sync.rs`): it decides at each lock who runs next, and finds it
//! if all wait. No time passes: a wait with a limit ends by a notification alone.
//!
//! ```sh
//! cargo test -p pageferry --lib --features shuttle schedules
//! ```
//!
//! `SCHEDULES=100000` tries as many instead of [`USUAL`].

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, Runner};

/// How many schedules of each test are tried.
const USUAL: usize = 2000;

/// The stack of each thread. shuttle's own 60 KiB are too few for unoptimised code: it ends by SIGSEGV.
const STACK_BYTES: usize = 512 << 10;

/// Runs `test` under many schedules: chosen at random.
pub(in crate::engine) fn each(test: impl Fn() + Send + Sync + 'static) {
    let asked = std::env::var("SCHEDULES").ok();
    let count = asked.map_or(USUAL, |text| text.parse().expect("SCHEDULES is a number"));
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    Runner::new(RandomScheduler::new(count), config).run(test);
}
