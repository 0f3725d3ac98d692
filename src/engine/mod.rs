//! The loops: they move bytes and ask the pure rooms what to do.

pub mod batch;
mod counters;
pub mod driver;
mod epoll;
pub mod ferry;
pub mod forward;
pub mod forward_lazy;
mod host_activity;
pub mod ingest;
pub mod ingest_modes;
pub mod listen;
mod memory;
mod pending;
pub mod restore;
pub mod serve;
mod session_io;
pub mod sessions;
mod smaps;
mod splice_path;
pub mod stop;
pub mod stores;
pub mod transport;
mod uring;
mod writer;
