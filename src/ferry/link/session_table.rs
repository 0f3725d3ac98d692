//! The listening side: all sessions of a port.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::ferry::hello::{Fail, FailCode, Greeting, Hello, LOOK_ATTEMPT, Role, SessionId};
use crate::limits::{FERRY_ENDED_SESSIONS_MAX, FERRY_SESSIONS_MAX};

use super::check;

/// Names one connection of a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ConnectionId {
    /// The session.
    pub session: SessionId,
    /// Whether it is one of the connections for faults, which are counted by themselves.
    pub for_faults: bool,
    /// Which of the session's connections.
    pub stream: u16,
}

/// What becomes of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Admission {
    /// It begins a session. Say `welcome`.
    Opened {
        /// What the connecting side said, with the features that both have.
        peer: Hello,
        /// What is to be said on the connection.
        welcome: Hello,
    },
    /// It continues a session, in place of any older connection of the same id.
    Joined {
        /// What the connecting side said, with the features that both have.
        peer: Hello,
        /// What is to be said on the connection.
        welcome: Hello,
    },
    /// It is turned away with this.
    Refused(Fail),
}

#[derive(Clone, Debug, Default)]
struct SessionEntry {
    /// How many connections its first one said that there are at most.
    streams: u16,
    /// Attempt of the newest connection by its id, and whether it stands.
    connections: BTreeMap<ConnectionId, (u32, bool)>,
    alone_since: Option<Duration>,
}

/// The listening side: all sessions of a port.
#[derive(Clone, Debug)]
pub struct SessionTable {
    own: Hello,
    roles: Vec<Role>,
    give_up_after: Duration,
    sessions: BTreeMap<SessionId, SessionEntry>,
    failed: VecDeque<(SessionId, Fail)>,
    /// Sessions that have ended well, and how many connections they had at most.
    finished: VecDeque<(SessionId, u16)>,
}

impl SessionTable {
    /// A table that plays any of `roles`. The rest of its hello is `own`'s; sessions without a
    /// connection for `give_up_after` expire.
    pub fn new(own: Hello, roles: &[Role], give_up_after: Duration) -> SessionTable {
        SessionTable {
            own,
            roles: roles.to_vec(),
            give_up_after,
            sessions: BTreeMap::new(),
            failed: VecDeque::new(),
            finished: VecDeque::new(),
        }
    }

    /// Decides on a connection that begins with `greeting`. New sessions are accepted only with
    /// `open_to_new`.
    pub fn admit(&mut self, greeting: Greeting, open_to_new: bool) -> Admission {
        let peer = match check(greeting, &self.own, &self.roles) {
            Ok(peer) => peer,
            Err(fail) => return Admission::Refused(fail),
        };
        if peer.attempt == LOOK_ATTEMPT {
            let text = "a greeting of attempt 0 begins no session";
            return Admission::Refused(Fail::new(FailCode::UnknownSession, text));
        }
        if let Some((_, fail)) = self.failed.iter().find(|(id, _)| *id == peer.session) {
            return Admission::Refused(fail.clone());
        }
        let for_faults = peer.role == Role::Requester;
        let finished = self.finished.iter().find(|(id, _)| *id == peer.session);
        if let Some((_, streams)) = finished {
            return match for_faults || peer.streams == *streams {
                true => Admission::Joined {
                    peer,
                    welcome: self.welcome(&peer),
                },
                false => other_streams(peer.streams, *streams),
            };
        }
        let known = self.sessions.contains_key(&peer.session);
        if !known && (!peer.opening || for_faults) {
            let text = format!("session {} is not known here (any more)", peer.session);
            return Admission::Refused(Fail::new(FailCode::UnknownSession, text));
        }
        if !known && (!open_to_new || self.sessions.len() >= FERRY_SESSIONS_MAX) {
            let text = "no further session is accepted here";
            return Admission::Refused(Fail::new(FailCode::Busy, text));
        }
        let entry = self
            .sessions
            .entry(peer.session)
            .or_insert_with(|| SessionEntry {
                streams: peer.streams,
                ..SessionEntry::default()
            });
        if !for_faults && peer.streams != entry.streams {
            return other_streams(peer.streams, entry.streams);
        }
        let connection = ConnectionId {
            session: peer.session,
            for_faults,
            stream: peer.stream,
        };
        let (attempt, up) = entry.connections.entry(connection).or_insert((0, false));
        if peer.attempt <= *attempt {
            let text = "a newer connection has taken the place of this one";
            return Admission::Refused(Fail::new(FailCode::Superseded, text));
        }
        (*attempt, *up) = (peer.attempt, true);
        entry.alone_since = None;
        let welcome = self.welcome(&peer);
        if known {
            Admission::Joined { peer, welcome }
        } else {
            Admission::Opened { peer, welcome }
        }
    }

    fn welcome(&self, peer: &Hello) -> Hello {
        Hello {
            role: peer.role.opposite(),
            session: peer.session,
            stream: peer.stream,
            streams: peer.streams,
            attempt: peer.attempt,
            opening: false,
            ..self.own
        }
    }

    /// The `connection` that was dialled as `attempt` is gone.
    pub fn handle_lost(&mut self, connection: ConnectionId, attempt: u32, now: Duration) {
        let Some(entry) = self.sessions.get_mut(&connection.session) else {
            return;
        };
        if let Some((newest, up)) = entry.connections.get_mut(&connection)
            && *newest == attempt
        {
            *up = false;
        }
        if !entry.connections.values().any(|(_, up)| *up) {
            entry.alone_since.get_or_insert(now);
        }
    }

    /// Whether `session` has had no connection for too long. It stays until [`SessionTable::fail`] or [`SessionTable::finish`].
    pub fn has_expired(&self, session: SessionId, now: Duration) -> bool {
        let since = self
            .sessions
            .get(&session)
            .and_then(|entry| entry.alone_since);
        since.is_some_and(|since| now >= since + self.give_up_after)
    }

    /// When to ask for expired sessions again at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        let alone = self.sessions.values().filter_map(|entry| entry.alone_since);
        alone.min().map(|since| since + self.give_up_after)
    }

    /// The session is over and has failed. Who comes back to it gets `fail`.
    pub fn fail(&mut self, session: SessionId, fail: Fail) {
        self.sessions.remove(&session);
        if self.failed.len() >= FERRY_ENDED_SESSIONS_MAX {
            self.failed.pop_front();
        }
        self.failed.push_back((session, fail));
    }

    /// The session is over, and all is well. A peer that comes back to it is let in, to be told once more: the
    /// last message may have been lost with its connection. Names the session that is forgotten for this one.
    pub fn finish(&mut self, session: SessionId) -> Option<SessionId> {
        let entry = self.sessions.remove(&session)?;
        self.finished.push_back((session, entry.streams));
        if self.finished.len() <= FERRY_ENDED_SESSIONS_MAX {
            return None;
        }
        let (forgotten, _) = self.finished.pop_front()?;
        Some(forgotten)
    }
}

fn other_streams(said: u16, first: u16) -> Admission {
    let text = format!("a connection of {said} to a session with {first} connections");
    Admission::Refused(Fail::new(FailCode::Protocol, text))
}
