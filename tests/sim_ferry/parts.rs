//! What the two ends have in common, whichever of them dials: a part that pushes or takes.

use pageferry::ferry::frame::Kind;
use pageferry::ferry::hello::{Fail, Hello};

/// How a part stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    Going,
    /// All is well, and every connection was told.
    Done,
    Failed(String),
}

/// One end of a session, on top of its connections.
pub(crate) trait Part {
    fn stream_up(&mut self, stream: u16, peer: &Hello);
    fn stream_down(&mut self, stream: u16);
    /// A frame came. Tells whether the session has come forward.
    fn frame(&mut self, stream: u16, kind: Kind, number: u64, body: &[u8]) -> bool;
    /// The next frame to be written to `stream`.
    fn poll(&mut self, stream: u16) -> Option<Vec<u8>>;
    /// The session was given up, or refused.
    fn lost(&mut self, why: &str);
    /// What to say to whoever comes back to the session, if it has failed.
    fn failure(&self) -> Option<Fail>;
    fn standing(&self) -> Standing;
}
