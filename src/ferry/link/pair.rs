//! The connecting side of a post-copy: a stream and a connection for faults, made one after the other.

use crate::ferry::frame::{FrameError, Kind};
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Fail, FailCode, Features, Greeting, Hello, Role, VERSION};

use super::both_are;

/// The connecting side of a post-copy's session.
#[derive(Clone, Debug)]
pub struct PairDialer {
    hello: Hello,
    attempt: u32,
    opened: bool,
    known_key: Option<HashKey>,
}

/// A connection that was not welcomed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The far end says no, or is not the one that is looked for.
    Fail(Fail),
    /// It does not speak ferry.
    Foreign(FrameError),
}

impl Refusal {
    /// Whether the answer to another attempt would be the same.
    pub fn is_final(&self) -> bool {
        match self {
            Refusal::Fail(fail) => !matches!(fail.code, FailCode::Superseded | FailCode::Busy),
            Refusal::Foreign(_) => false,
        }
    }
}

impl PairDialer {
    /// Dials for the session of `hello`, of which each connection has its own role and attempt.
    pub fn new(hello: Hello) -> PairDialer {
        let (stream, streams) = (0, 1);
        PairDialer {
            hello: Hello {
                stream,
                streams,
                ..hello
            },
            attempt: 0,
            opened: false,
            known_key: None,
        }
    }

    /// Begins to dial: first as [`Role::Receiver`], then as [`Role::Requester`]. The pair takes the place of all
    /// older ones.
    pub fn begin(&mut self) -> u32 {
        self.attempt += 1;
        self.attempt
    }

    /// What is to be said on the connection of `role` of the pair `attempt`.
    pub fn hello(&self, role: Role, attempt: u32) -> Hello {
        Hello {
            role,
            attempt,
            opening: role == Role::Receiver && !self.opened,
            ..self.hello
        }
    }

    /// The key of the hashes of an earlier round, if the far end knows them.
    pub fn known_key(&self) -> Option<HashKey> {
        self.known_key
    }

    /// What was answered on the connection of `role`.
    pub fn handle_answer(&mut self, role: Role, kind: Kind, body: &[u8]) -> Result<(), Refusal> {
        if kind == Kind::Fail {
            let fail = Fail::decode(body).map_err(Refusal::Foreign)?;
            return Err(Refusal::Fail(fail));
        }
        let refused = |code, text| Err(Refusal::Fail(Fail::new(code, text)));
        match Hello::decode(kind, body).map_err(Refusal::Foreign)? {
            Greeting::OtherVersion(version) => {
                let text = format!("it speaks version {version} of ferry, not {VERSION}");
                refused(FailCode::Version, text)
            }
            Greeting::Hello(peer) if peer.role != role.opposite() => {
                refused(FailCode::Role, both_are(role).to_owned())
            }
            Greeting::Hello(peer) if peer.session != self.hello.session => {
                let text = "the welcome is for another session".to_owned();
                refused(FailCode::Protocol, text)
            }
            Greeting::Hello(peer)
                if self.hello.features.has(Features::ON_DEMAND)
                    && !peer.features.has(Features::ON_DEMAND) =>
            {
                let text = "it is an older page-server, which would push everything: --on-demand needs \
                            one that knows it, or no --ferry";
                refused(FailCode::Version, text.to_owned())
            }
            Greeting::Hello(peer) => {
                self.opened = true;
                let features = peer.features.common(self.hello.features);
                self.known_key = features.has(Features::KNOWN).then_some(peer.hash_key);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ferry::frame::{Split, split};
    use crate::ferry::hello::{SessionId, Window};
    use crate::units::PageSize;

    const OLDER: Features = Features::FAULTS.with(Features::HASHES);

    fn hello(role: Role, features: Features) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: PageSize::KIB_4,
            features,
            session: SessionId([2; 16]),
            stream: 0,
            streams: 1,
            attempt: 1,
            opening: false,
            window: Window {
                frames: 8,
                bytes: 1 << 20,
            },
            hash_key: HashKey::default(),
        }
    }

    /// What a receiver with `features` makes of the welcome of a sender with `theirs`.
    fn welcomed(features: Features, theirs: Features) -> Result<(), Refusal> {
        let mut welcome = Vec::new();
        hello(Role::Sender, theirs).encode(Kind::Welcome, &mut welcome);
        let Ok(Split::Frame(frame)) = split(&welcome) else {
            panic!("a frame");
        };
        let mut dialer = PairDialer::new(hello(Role::Receiver, features));
        dialer.begin();
        dialer.handle_answer(Role::Receiver, frame.kind, &welcome[frame.body])
    }

    #[test]
    fn a_sender_that_would_push_is_not_used_on_demand() {
        let on_demand = OLDER.with(Features::ON_DEMAND);
        match welcomed(on_demand, OLDER) {
            Err(refusal @ Refusal::Fail(_)) => assert!(refusal.is_final()),
            other => panic!("{other:?}"),
        }
        assert_eq!(welcomed(on_demand, on_demand), Ok(()));
        assert_eq!(welcomed(OLDER, on_demand), Ok(()));
    }
}
