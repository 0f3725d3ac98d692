//! Locks and what threads wait at: those of std. With the feature `shuttle` they are those of the crate of that name,
//! which decides at each of them who runs next: tests of schedules (`schedules.rs` in `engine`) need them, and nothing else
//! runs with them.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool};
