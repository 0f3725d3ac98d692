//! How a peer can break the rules of a session.

use thiserror::Error;

use crate::criu::header::Target;
use crate::limits::SESSION_TARGETS_MAX;
use crate::units::Vaddr;

use super::batch::BatchError;
use super::frame::{FrameError, Kind};

/// A peer that does not keep to the session's rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SessionError {
    /// A frame cannot be understood.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame of a kind that this side never gets.
    #[error("a {0} frame has no place here")]
    Unexpected(Kind),
    /// Something is acknowledged that was never sent.
    #[error("frame {safe} is acknowledged, but {last} was the last one")]
    NeverSent {
        /// What is acknowledged or answered.
        safe: u64,
        /// The last number.
        last: u64,
    },
    /// More is sent than the window allows.
    #[error("frame {number} is beyond the window: {safe} was the last that is safe")]
    BeyondWindow {
        /// Number of the frame.
        number: u64,
        /// The last frame that is safe.
        safe: u64,
    },
    /// Hashes that nobody asked for.
    #[error("hashes of {0} came that were not asked for")]
    UnaskedHashes(Target),
    /// Pages of a target that is not open.
    #[error("pages of {0} came, but that is not open")]
    NotOpen(Target),
    /// A target is opened a second time: its images would be written twice.
    #[error("{0} is opened a second time in one session")]
    Reopened(Target),
    /// More targets than any process tree has.
    #[error("more than {SESSION_TARGETS_MAX} processes and shared memory segments in one session")]
    TooManyTargets,
    /// A batch begins before the end of the one before it.
    #[error(
        "a batch of {target} begins at {vaddr}, but pages up to {previous_end} have come: pages must \
         come in the order of their addresses"
    )]
    Order {
        /// Whose pages.
        target: Target,
        /// Where the batch begins.
        vaddr: Vaddr,
        /// Where the one before it ends.
        previous_end: Vaddr,
    },
    /// A frame behind CLOSE.
    #[error("a {0} frame came behind CLOSE")]
    Closed(Kind),
    /// CLOSE names another number of pages.
    #[error("the peer has sent {announced} pages, it says, but {came} have come")]
    PageCount {
        /// What CLOSE says.
        announced: u64,
        /// What has come.
        came: u64,
    },
}

/// A numbered frame that cannot be applied.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It breaks the session's rules.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It is a batch that is not well-formed.
    #[error(transparent)]
    Batch(#[from] BatchError),
}
