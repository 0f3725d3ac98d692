//! A part and its connections, on the side that dials and on the side that listens.

use std::collections::BTreeMap;
use std::time::Duration;

use pageferry::ferry::frame::{Frame, Kind};
use pageferry::ferry::hello::{Fail, FailCode, Hello, Role, SessionId};
use pageferry::ferry::link::{Admission, ConnectionId, Dialer, RetryPolicy, SessionTable};

use crate::net::{Conn, Net, Side};
use crate::parts::{Part, Status, StreamKey};
use crate::run::{Host, Line, LineState, Lives};

/// A process that dials the streams of a session.
pub(crate) struct DialingHost<P: Part> {
    part: P,
    dialer: Dialer,
    lines: BTreeMap<Conn, Line<StreamKey>>,
}

impl<P: Part> DialingHost<P> {
    pub(crate) fn new(part: P, hello: Hello, retry: RetryPolicy) -> DialingHost<P> {
        DialingHost {
            part,
            dialer: Dialer::new(hello, retry, Duration::ZERO),
            lines: BTreeMap::new(),
        }
    }

    fn welcomed(&mut self, now: Duration, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = self.lines.get_mut(&conn).expect("it lives");
        if frame.kind == Kind::Fail {
            let fail = Fail::decode(body).expect("a listening side writes well");
            if fail.code != FailCode::Superseded {
                self.part.lost(&fail.text);
            }
            return false;
        }
        let greeting = Hello::decode(frame.kind, body).expect("a listening side writes well");
        let welcomed = self.dialer.handle_welcome(line.place.stream, greeting, now);
        let peer = welcomed.expect("the ends fit");
        line.state = LineState::Up;
        self.part.stream_up(line.place, &peer);
        true
    }
}

impl<P: Part> Host for DialingHost<P> {
    type Part = P;
    type Place = StreamKey;
    const SIDE: Side = Side::Dialing;

    fn part(&mut self) -> &mut P {
        &mut self.part
    }

    fn into_part(self) -> P {
        self.part
    }

    fn lines(&mut self) -> &mut BTreeMap<Conn, Line<StreamKey>> {
        &mut self.lines
    }

    fn connected(&mut self, net: &mut Net, conn: Conn) {
        greet(&mut self.lines, net, conn, |key| {
            self.dialer.handle_connected(key.stream)
        });
    }

    fn lost(&mut self, net: &mut Net, conn: Conn) {
        if let Some(line) = self.lines.remove(&conn) {
            if line.state == LineState::Up {
                self.part.stream_down(line.place);
            }
            self.dialer.handle_lost(line.place.stream, net.now);
        }
    }

    fn frame(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = &self.lines[&conn];
        if line.state == LineState::Greeting {
            return self.welcomed(net.now, conn, frame, body);
        }
        if self.part.frame(line.place, frame.kind, frame.number, body) {
            self.dialer.handle_progress();
        }
        true
    }

    fn pump(&mut self, net: &mut Net) {
        write_all(&mut self.part, &self.lines, net, Side::Dialing);
        if self.dialer.has_given_up(net.now) {
            self.part.lost("no connection for too long");
        }
        if self.is_over() || self.part.failure().is_some() {
            return;
        }
        while let Some(stream) = self.dialer.poll_dial(net.now) {
            let key = StreamKey::stream(stream);
            let line = Line::new(LineState::Connecting, key);
            self.lines.insert(net.dial(), line);
        }
    }

    fn is_over(&self) -> bool {
        self.part.status() != Status::Going
    }

    fn deadline(&self) -> Option<Duration> {
        let dials = !self.is_over() && self.part.failure().is_none();
        self.dialer.deadline().filter(|_| dials)
    }
}

/// The connection `conn` stands: says the hello that its line is to say.
pub(crate) fn greet(
    lines: &mut BTreeMap<Conn, Line<StreamKey>>,
    net: &mut Net,
    conn: Conn,
    hello: impl FnOnce(StreamKey) -> Hello,
) {
    if let Some(line) = lines.get_mut(&conn) {
        line.state = LineState::Greeting;
        let mut words = Vec::new();
        hello(line.place).encode(Kind::Hello, &mut words);
        net.write(conn, Side::Dialing, &words);
    }
}

/// Writes what `part` has to say to those of `lines` that take it.
pub(crate) fn write_all<P: Part, T: Copy + Into<StreamKey>>(
    part: &mut P,
    lines: &BTreeMap<Conn, Line<T>>,
    net: &mut Net,
    from: Side,
) {
    for (conn, line) in lines {
        while line.state == LineState::Up
            && net.can_write(*conn, from)
            && let Some(frame) = part.poll(line.place.into())
        {
            net.write(*conn, from, &frame);
        }
    }
}

/// A connection that was admitted.
#[derive(Clone, Copy)]
pub(crate) struct Accepted {
    key: StreamKey,
    attempt: u32,
}

impl From<Accepted> for StreamKey {
    fn from(accepted: Accepted) -> StreamKey {
        accepted.key
    }
}

/// A process that listens, and takes part in one session.
pub(crate) struct ListeningHost<P: Part> {
    part: P,
    table: SessionTable,
    session: Option<SessionId>,
    lines: BTreeMap<Conn, Line<Accepted>>,
}

impl<P: Part> ListeningHost<P> {
    pub(crate) fn new(part: P, table: SessionTable) -> ListeningHost<P> {
        ListeningHost {
            part,
            table,
            session: None,
            lines: BTreeMap::new(),
        }
    }

    /// Decides on a connection that begins with this frame.
    fn admit(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let greeting = Hello::decode(frame.kind, body).expect("a dialing side writes well");
        let open_to_new = self.session.is_none();
        let mut answer = Vec::new();
        let (peer, welcome) = match self.table.admit(greeting, open_to_new) {
            Admission::Opened { peer, welcome } | Admission::Joined { peer, welcome } => {
                (peer, welcome)
            }
            Admission::Refused(fail) => {
                fail.encode(&mut answer);
                net.write(conn, Side::Listening, &answer);
                return false;
            }
        };
        self.session = Some(peer.session);
        let key = StreamKey {
            for_faults: peer.role == Role::Requester,
            stream: peer.stream,
        };
        let replaced = self
            .lines
            .iter()
            .find(|(_, line)| line.state == LineState::Up && line.place.key == key);
        if let Some(old) = replaced.map(|(old, _)| *old) {
            net.close(old, Side::Listening);
            self.lines.remove(&old);
        }
        let line = self.lines.get_mut(&conn).expect("it lives");
        line.state = LineState::Up;
        line.place = Accepted {
            key,
            attempt: peer.attempt,
        };
        welcome.encode(Kind::Welcome, &mut answer);
        net.write(conn, Side::Listening, &answer);
        self.part.stream_up(key, &peer);
        true
    }
}

impl<P: Part> Host for ListeningHost<P> {
    type Part = P;
    type Place = Accepted;
    const SIDE: Side = Side::Listening;

    fn part(&mut self) -> &mut P {
        &mut self.part
    }

    fn into_part(self) -> P {
        self.part
    }

    fn lines(&mut self) -> &mut BTreeMap<Conn, Line<Accepted>> {
        &mut self.lines
    }

    fn connected(&mut self, net: &mut Net, conn: Conn) {
        if self.is_over() {
            net.close(conn, Side::Listening);
            return;
        }
        let (key, attempt) = (StreamKey::stream(0), 0);
        let line = Line::new(LineState::Greeting, Accepted { key, attempt });
        self.lines.insert(conn, line);
    }

    fn lost(&mut self, net: &mut Net, conn: Conn) {
        let line = self.lines.remove(&conn);
        let Some(line) = line.filter(|line| line.state == LineState::Up) else {
            return;
        };
        let Accepted { key, attempt } = line.place;
        let others = self.lines.values();
        let mut newer = others.filter(|other| other.state == LineState::Up);
        if !newer.any(|other| other.place.key == key) {
            self.part.stream_down(key);
        }
        let connection = ConnectionId {
            session: self.session.expect("an admitted line"),
            for_faults: key.for_faults,
            stream: key.stream,
        };
        self.table.handle_lost(connection, attempt, net.now);
    }

    fn frame(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = &self.lines[&conn];
        if line.state == LineState::Greeting {
            return self.admit(net, conn, frame, body);
        }
        let key = line.place.key;
        self.part.frame(key, frame.kind, frame.number, body);
        true
    }

    fn pump(&mut self, net: &mut Net) {
        self.part.tick(net.now);
        write_all(&mut self.part, &self.lines, net, Side::Listening);
        if let Some(session) = self.session
            && self.table.has_expired(session, net.now)
        {
            self.part.lost("nobody came back");
            let fail = Fail::new(FailCode::UnknownSession, "the session was given up");
            self.table.fail(session, fail);
        }
        if let (Some(fail), Some(session)) = (self.part.failure(), self.session) {
            self.table.fail(session, fail);
        }
    }

    fn is_over(&self) -> bool {
        self.part.status() != Status::Going
    }

    fn deadline(&self) -> Option<Duration> {
        let deadlines = [self.table.deadline(), self.part.next_tick()];
        let first = deadlines.into_iter().flatten().min();
        first.filter(|_| !self.is_over())
    }

    fn is_unvisited(&self) -> bool {
        self.session.is_none()
    }
}
