//! What the two ends have in common, whichever of them dials: a part that gives or takes.

use std::time::Duration;

use pageferry::ferry::frame::Kind;
use pageferry::ferry::hello::{Fail, Hello};

/// How a part stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Status {
    Going,
    /// All is well, and every connection was told.
    Done,
    Failed(String),
}

/// One of a session's connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StreamKey {
    /// It carries faults and their answers, not the stream.
    pub(crate) for_faults: bool,
    pub(crate) stream: u16,
}

impl StreamKey {
    pub(crate) fn stream(stream: u16) -> StreamKey {
        StreamKey {
            for_faults: false,
            stream,
        }
    }
}

/// One end of a session, on top of its connections.
pub(crate) trait Part {
    fn stream_up(&mut self, key: StreamKey, peer: &Hello);
    fn stream_down(&mut self, key: StreamKey);
    /// A frame came. Returns whether the session has come forward.
    fn frame(&mut self, key: StreamKey, kind: Kind, number: u64, body: &[u8]) -> bool;
    /// The next frame to be written to `key`.
    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>>;
    /// The session was given up, or refused.
    fn lost(&mut self, why: &str);
    /// Something here fails for good, which the far end is told.
    fn abort(&mut self);
    /// What to say to whoever comes back to the session, if it has failed.
    fn failure(&self) -> Option<Fail>;
    fn status(&self) -> Status;

    /// Does what is done without a frame; called again at [`Part::next_tick`] at the latest.
    fn tick(&mut self, _now: Duration) {}
    fn next_tick(&self) -> Option<Duration> {
        None
    }
}
