//! The loops: they move bytes and ask the pure rooms what to do.

mod asking;
pub mod batch;
pub mod driver;
mod epoll;
pub mod ferry;
pub mod forward;
pub mod forward_lazy;
pub mod ingest;
pub mod ingest_modes;
pub mod listen;
mod load;
mod memory;
mod mover;
pub mod restore;
pub mod serve;
pub mod sessions;
pub mod stop;
pub mod stores;
mod tally;
pub mod transport;
mod uring;
mod writer;
