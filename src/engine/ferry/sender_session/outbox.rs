//! What a sender has given to its connections and cannot forget yet.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::observe::ferried::Sent;

/// Numbered frames until they are safe, and what was sent of them.
///
/// Invariant: there is a frame for each number that is not safe, without a gap; `unsent` counts those above `carried`.
#[derive(Default)]
pub(super) struct Outbox {
    /// Frames that are not safe yet, in the order of their numbers.
    frames: VecDeque<Arc<Vec<u8>>>,
    /// The highest number that a connection has taken.
    carried: u64,
    /// Bytes of the frames with higher ones.
    pub(super) unsent: u64,
    pub(super) sent: Sent,
}

impl Outbox {
    /// The frame of the next number.
    pub(super) fn put(&mut self, frame: Vec<u8>) {
        let bytes = frame.len() as u64;
        self.sent.frame_bytes += bytes;
        self.unsent += bytes;
        self.frames.push_back(Arc::new(frame));
    }

    /// The frame of `number`, where `last` is the highest one, for a connection. Returns whether it is the first one
    /// that carries it.
    pub(super) fn take(&mut self, number: u64, last: u64) -> (Arc<Vec<u8>>, bool) {
        let from_back = usize::try_from(last - number).expect("within the window");
        let frame = Arc::clone(&self.frames[self.frames.len() - 1 - from_back]);
        let (bytes, is_first) = (frame.len() as u64, number > self.carried);
        if is_first {
            self.carried = number;
            self.unsent -= bytes;
        } else {
            self.sent.repeated_bytes += bytes;
        }
        (frame, is_first)
    }

    /// Takes out the frames that are safe: all but the last `outstanding` ones.
    pub(super) fn keep(&mut self, outstanding: usize) -> Vec<Arc<Vec<u8>>> {
        let released = self.frames.len().saturating_sub(outstanding);
        self.frames.drain(..released).collect()
    }
}
