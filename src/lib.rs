//! pageferry carries the memory of CRIU dumps between hosts.
//!
//! Bytes come in at one end of a line of modules and leave at the other, and no module reaches back:
//!
//! ```text
//! receive       socket -> criu::deframer -> criu::receive -> image::writer -> pages-*.img, pagemap-*.img
//!               socket -> pipe -> pages-*.img   (large frames)
//! serve         images -> image::chain -> criu::serve -> socket
//! forward       socket -> criu::receive -> ferry::{gather, delta, encode, sender} -> socket
//!               socket -> ferry::{receiver, batch, unpack} -> image::writer
//! forward_lazy  socket (lazy dump) -> criu::fetch -> lazy::drain -> memfd or spill file
//!               memfd or spill file -> criu::serve -> socket   (clients that speak CRIU's protocol)
//!               memfd or spill file -> ferry::{push_planner, encode, sender} -> socket   (lazy-client --ferry)
//! restore       uffd -> lazy::planner -> criu::fetch or ferry::postcopy_receiver -> socket   (faults)
//!               socket -> criu::fetch or ferry::postcopy_receiver -> lazy::planner -> uffd   (UFFDIO_COPY)
//! ```
//!
//! `units`, `limits`, `criu`, `lazy`, `ferry`, `migration`, `replay`, `watch` and the pagemap codec of `image` are
//! pure: they own no descriptor, read no clock and make no system call. Time and bytes are arguments. They build
//! alone, without the default feature `engine`. The loops in `engine` move the bytes and ask the pure modules what to do.
//! What a fault brings, and in what order the rest follows, is decided in [`lazy::policy`]. `sys` holds the
//! only `unsafe` code.

pub mod criu;
#[cfg(feature = "engine")]
pub mod daemon;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
pub mod error;
pub mod ferry;
pub mod image;
pub mod lazy;
pub mod limits;
pub mod migration;
#[cfg(feature = "engine")]
pub mod observe;
pub mod replay;
#[cfg(feature = "engine")]
pub mod stream;
#[cfg(feature = "engine")]
pub mod sys;
#[cfg(feature = "engine")]
pub mod tls;
pub mod units;
pub mod watch;
