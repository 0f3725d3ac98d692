//! What a run shows of itself: latencies, traces, progress, summaries.

pub mod ferried;
pub mod latency;
pub mod metrics;
pub mod progress;
pub mod received;
pub mod schema;
pub mod trace;
pub mod traffic;
