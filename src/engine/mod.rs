//! The loops: they move bytes and ask the pure rooms what to do.

pub mod restore;
pub mod serve;
pub mod sessions;
pub mod transport;
