//! Where pages rest: CRIU's image files, read and written.

pub mod blocks;
pub mod chain;
pub mod dir;
mod extents;
pub mod file;
pub mod mm;
pub mod pagemap;
pub mod pages;
mod parents;
pub mod proto;
pub mod readahead;
pub mod store;
pub mod writer;
