//! CRIU's image files, read and written.
//!
//! `file`, `pagemap` and `proto` are codecs without descriptors; they build without the feature `engine`.

#[cfg(feature = "engine")]
pub mod blocks;
#[cfg(feature = "engine")]
pub mod chain;
#[cfg(feature = "engine")]
pub mod check;
#[cfg(feature = "engine")]
pub mod consume;
#[cfg(feature = "engine")]
pub mod dir;
#[cfg(feature = "engine")]
mod extents;
pub mod file;
#[cfg(feature = "engine")]
pub mod holes;
#[cfg(feature = "engine")]
mod locked;
#[cfg(feature = "engine")]
pub mod mm;
#[cfg(feature = "engine")]
mod open;
pub mod pagemap;
#[cfg(feature = "engine")]
pub mod pages;
#[cfg(feature = "engine")]
mod pages_part;
#[cfg(feature = "engine")]
mod parents;
pub mod proto;
#[cfg(feature = "engine")]
pub mod reach;
#[cfg(feature = "engine")]
pub mod readahead;
#[cfg(feature = "engine")]
pub mod rewrite;
#[cfg(feature = "engine")]
pub mod store;
#[cfg(feature = "engine")]
pub mod tree;
#[cfg(feature = "engine")]
pub mod working_set;
#[cfg(feature = "engine")]
pub mod writer;
