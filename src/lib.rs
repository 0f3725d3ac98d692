//! pageferry carries the memory of CRIU dumps between hosts.
//!
//! Bytes come in at one end of a line of rooms and leave at the other, and no room reaches back:
//!
//! ```text
//! receive   socket -> criu::deframer -> criu::receive -> image::writer -> pages-*.img, pagemap-*.img
//! serve     images -> image::chain   -> criu::serve   -> socket
//! restore   uffd   -> lazy::planner  -> criu::fetch   -> socket (source)   fault path
//!           socket -> criu::fetch    -> lazy::planner -> sys::uffd (UFFDIO_COPY from the receive buffer)
//! forward   socket -> criu::receive  -> ferry::encode -> socket ... socket -> ferry::decode -> image::writer
//! ```
//!
//! `criu`, `lazy`, `ferry` and the pagemap codec of `image` are pure: they own no descriptor, read
//! no clock and make no system call. Time and bytes are arguments. The loops in `engine` move the
//! bytes and ask the pure rooms what to do. `sys` holds the only `unsafe` code.

pub mod criu;
pub mod daemon;
pub mod engine;
pub mod error;
pub mod ferry;
pub mod image;
pub mod lazy;
pub mod limits;
pub mod migration;
pub mod observe;
pub mod stream;
pub mod sys;
pub mod tls;
pub mod units;
