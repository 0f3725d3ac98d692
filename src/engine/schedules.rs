//! Tests of what threads share, under the crate shuttle (`src/sync.rs`): it decides at each lock who runs next, and finds it
//! if all wait. No time passes: a wait with a limit ends by a notification alone.
//!
//! ```sh
//! cargo test -p pageferry --lib --features shuttle schedules
//! ```
//!
//! `SCHEDULES=100000` tries as many instead of [`USUAL`].

/// How many schedules of each test are tried.
const USUAL: usize = 2000;

/// Runs `test` under many schedules: chosen at random.
pub(in crate::engine) fn each(test: impl Fn() + Send + Sync + 'static) {
    let asked = std::env::var("SCHEDULES").ok();
    let count = asked.map_or(USUAL, |text| text.parse().expect("SCHEDULES is a number"));
    shuttle::check_random(test, count);
}
