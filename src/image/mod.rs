//! Where pages rest: CRIU's image files, read and written.

pub mod file;
pub mod pagemap;
pub mod proto;
