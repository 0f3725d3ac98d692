//! The post-copy brain, pure: which memory of which process is missing, what to fetch next, what to
//! do with what arrives. No descriptor, no clock, no payload.

pub mod answer;
pub mod batched_wakeup;
pub mod drain;
pub mod extents;
pub mod fault_prediction;
mod first_pages;
pub mod huge_pages;
pub mod pageset;
pub mod pattern;
pub mod planner;
pub mod policy;
pub mod simulation;
pub mod space;
pub mod window;
pub mod working_set;
