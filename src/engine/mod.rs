//! The loops: they move bytes and ask the pure modules what to do. One module a flow, and what flows share.
//!
//! ```text
//! receive        socket (criu dump, or ferry)  -> image files
//! serve          image files                   -> socket (lazy clients)
//! forward        socket (criu dump)            -> ferry (to a receiving page-server)
//! forward_lazy   socket (lazy dump)            -> memory here -> CRIU's protocol or ferry (lazy clients)
//! restore        userfaultfd, and a source     -> pages of restored processes
//!
//! ferry          connections and sessions of ferry     shared by receive, forward, forward_lazy, restore
//! listening      listeners, sessions, stopping         shared by all servers
//! io             drivers, splice path, transports      shared by all
//! collapse       huge pages of restored processes
//! pending        dumps that would lack pages          shared by receive, forward, forward_lazy
//! service_manager  what systemd is told, and keeps     shared by all
//! schedules      tests of what threads share
//! ```

pub mod collapse;
pub mod ferry;
pub mod forward;
pub mod forward_lazy;
pub mod io;
pub mod listening;
pub mod pending;
pub mod receive;
pub mod restore;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;
pub mod serve;
pub mod service_manager;
mod smaps;
pub mod start_wait;
