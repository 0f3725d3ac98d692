//! Files that move with a container or with processes: its root file system, and volumes.
//!
//! ```text
//! source       tree on disk ──> scan (what has changed) ──> planner ──> stream ──┐
//!                                  │ index: names, attributes, hashes            │ HTTP
//! destination  tree on disk <── writer <── stream <──────────────────────────────┘
//!              staging: TARGET.pageferry/tree ──> TARGET, once it is whole and on the disk
//! ```
//!
//! Of an overlay the writable layer is such a tree. The layers below are trees of their own, which have their digests as
//! names and are kept at the destination.
//!
//! Both ends keep the index of the destination's tree and change it by the operations of the stream. When a connection
//! breaks, the source asks for the index and sends the difference to it: what had arrived does not travel again. The
//! same difference is a round while the processes run, the last one inside the freeze, and what a tree lacks that was
//! sent ahead.

mod attributes;
mod hash;
mod index;
mod layer;
mod mapped;
mod operation;
mod overlay;
mod path;
mod planner;
mod receiver;
#[cfg(test)]
mod round_trip;
mod scan;
mod sender;
mod staging;
mod stream;
mod table;
mod tree_dir;
mod writer;

pub(crate) use layer::{LayerName, name as name_layer};
pub(crate) use overlay::{Lowers, overlays_are_possible};
pub(crate) use receiver::ReceivedTree;
#[cfg(test)]
pub(crate) use round_trip::SentBytes;
pub(crate) use sender::{FileRound, SentTree};
pub(crate) use staging::{Installed, Permitted, StagingDir};

/// Decodes an index on its way, and tells its digest.
pub(crate) fn index_digest(bytes: &[u8]) -> pageferry::error::Result<String> {
    let (_, index) = sender::unpack_index(bytes)?;
    Ok(table::digest(&index))
}
