//! Recording what clients told a service, and telling it another one in an order with the same effect. Pure: no
//! descriptor, clock or system call.
//!
//! ```text
//! record   clients ── pieces ──> sequencer ──> service        log: entries, in one order for all connections
//!          clients <── answers ────────────── service
//! replay   log ──> player ── pieces ──> other service         a piece is sent when the answers before it have come
//!                    player <── answers ── other service      and agree with the recorded ones
//! ```
//!
//! A log is one list of entries for all connections. An entry `Answers` stands before the first piece that may
//! depend on these answers, whichever connection that piece is for: so one position in the list says how many bytes
//! of answers had been seen on every connection.
//!
//! Invariants, which `tests/sim_replay.rs` checks with seeds: with [`Order::Total`], a service that is deterministic
//! in the order of what it reads gives the same answers and ends in the same state; a replay that gives other
//! answers ends with a [`Difference`].

mod entry;
mod player;
mod sequencer;

pub use entry::{ENTRY_HEAD_BYTES, Entry, Header, ReadEntry, decode, encode};
pub use player::{Difference, Player, Step, WaitReason};
pub use sequencer::{Order, Sequencer};
