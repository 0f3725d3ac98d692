//! Pageferry's own stream between two pageferries: pure.
//!
//! CRIU's protocol carries raw memory over one connection, unchecked, and a broken link ends the
//! migration. Where both ends are ours, pages travel as numbered, compressed, checked and
//! acknowledged batches, unchanged pages as nothing but a byte, and connections may break.
//!
//! ```text
//!                     delta        encode       sender          link
//! plain pages ──────> same? ─────> pack ──────> number, keep ─> dial ══╗
//!                     hash         level <control  until safe             ║ frames
//! plain pages <────── batch <───── receiver <── admit <════════════════╝
//!                     check,       put in order,
//!                     unpack       acknowledge
//! ```
//!
//! In a post-copy `postcopy_receiver` is the end that takes: pushed pages, and questions and their answers.
//!
//! The layout of every byte is drawn in docs/ferry.md.
//!
//! Invariants: nothing here owns a descriptor, reads a clock or makes a system call; a page leaves
//! `batch` only after every checksum and hash that covers it was verified.

pub mod batch;
pub mod delta;
pub mod encode;
mod fields;
pub mod frame;
pub mod gather;
pub mod hash;
pub mod hello;
mod kind;
pub mod known_hashes;
pub mod level_control;
pub mod link;
pub mod message;
pub mod postcopy_receiver;
mod probe;
pub mod push_planner;
pub mod receiver;
pub mod sender;
pub mod session;
pub mod unpack;
