//! Where sessions come from, how many there may be, and how a server stops: what all servers share.
//!
//! ```text
//! listen: a socket of some kind ──> sessions: accept, check, a thread each ──> receive, serve, forward ...
//!                                        ^
//!                                      stop: SIGTERM ends the wait and every session
//! ```

pub mod listen;
pub mod sessions;
pub mod stop;
