//! A part and its connections, on the side that dials and on the side that listens.

use std::collections::BTreeMap;
use std::time::Duration;

use pageferry::ferry::frame::{Frame, FrameError, Kind, Split, split};
use pageferry::ferry::hello::{Fail, FailCode, Greeting, Hello, SessionId};
use pageferry::ferry::link::{Admission, Berth, Dialer, Harbor, Patience};

use crate::net::{Conn, Net, Side};
use crate::parts::{Part, Standing};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    Greeting,
    Up,
}

struct Line {
    stage: Stage,
    stream: u16,
    attempt: u32,
    received: Vec<u8>,
}

impl Line {
    /// The next whole frame, taken out of the buffer.
    fn next_frame(&mut self) -> Result<Option<(Frame, Vec<u8>)>, FrameError> {
        match split(&self.received)? {
            Split::Need(_) => Ok(None),
            Split::Frame(frame) => {
                let body = self.received[frame.body.clone()].to_vec();
                self.received.drain(..frame.end());
                Ok(Some((frame, body)))
            }
        }
    }
}

/// Whether the line lives on.
type Lives = bool;

pub(crate) struct DialingHost<P: Part> {
    pub(crate) part: P,
    dialer: Dialer,
    lines: BTreeMap<Conn, Line>,
}

impl<P: Part> DialingHost<P> {
    pub(crate) fn new(part: P, hello: Hello, patience: Patience) -> DialingHost<P> {
        DialingHost {
            part,
            dialer: Dialer::new(hello, patience, Duration::ZERO),
            lines: BTreeMap::new(),
        }
    }

    pub(crate) fn connected(&mut self, net: &mut Net, conn: Conn) {
        let Some(line) = self.lines.get_mut(&conn) else {
            return;
        };
        line.stage = Stage::Greeting;
        let hello = self.dialer.handle_connected(line.stream);
        let mut frame = Vec::new();
        hello.encode(Kind::Hello, &mut frame);
        net.write(conn, Side::Dialing, &frame);
    }

    pub(crate) fn lost(&mut self, net: &Net, conn: Conn) {
        if let Some(line) = self.lines.remove(&conn) {
            if line.stage == Stage::Up {
                self.part.stream_down(line.stream);
            }
            self.dialer.handle_lost(line.stream, net.now);
        }
    }

    pub(crate) fn received(&mut self, net: &mut Net, conn: Conn, bytes: &[u8]) {
        let Some(line) = self.lines.get_mut(&conn) else {
            return;
        };
        line.received.extend_from_slice(bytes);
        loop {
            let line = self.lines.get_mut(&conn).expect("it lives");
            let lives = match line.next_frame() {
                Ok(None) => return,
                Ok(Some((frame, body))) => self.frame(net.now, conn, &frame, &body),
                Err(error) => {
                    assert!(error.is_damage(), "{error}");
                    false
                }
            };
            if !lives {
                net.close(conn, Side::Dialing);
                self.lost(net, conn);
                return;
            }
        }
    }

    fn frame(&mut self, now: Duration, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = self.lines.get_mut(&conn).expect("it lives");
        if line.stage == Stage::Greeting {
            if frame.kind == Kind::Fail {
                let fail = Fail::decode(body).expect("a listening side writes well");
                if fail.code != FailCode::Superseded {
                    self.part.lost(&fail.text);
                }
                return false;
            }
            let greeting = Hello::decode(frame.kind, body).expect("a listening side writes well");
            let welcomed = self.dialer.handle_welcome(line.stream, greeting, now);
            let peer = welcomed.expect("the ends fit");
            line.stage = Stage::Up;
            let stream = line.stream;
            self.part.stream_up(stream, &peer);
            return true;
        }
        if self.part.frame(line.stream, frame.kind, frame.number, body) {
            self.dialer.handle_progress();
        }
        true
    }

    /// Writes what there is to write, dials what there is to dial.
    pub(crate) fn pump(&mut self, net: &mut Net) {
        for (conn, line) in &self.lines {
            while line.stage == Stage::Up
                && net.can_write(*conn, Side::Dialing)
                && let Some(frame) = self.part.poll(line.stream)
            {
                net.write(*conn, Side::Dialing, &frame);
            }
        }
        if self.dialer.has_given_up(net.now) {
            self.part.lost("no connection for too long");
        }
        if self.is_over() || self.part.failure().is_some() {
            return;
        }
        while let Some(stream) = self.dialer.poll_dial(net.now) {
            let conn = net.dial();
            let line = Line {
                stage: Stage::Connecting,
                stream,
                attempt: 0,
                received: Vec::new(),
            };
            self.lines.insert(conn, line);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.part.standing() != Standing::Going
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        let dials = !self.is_over() && self.part.failure().is_none();
        self.dialer.deadline().filter(|_| dials)
    }

    /// The process ends, its connections with it.
    pub(crate) fn hang_up(&mut self, net: &mut Net) {
        for conn in std::mem::take(&mut self.lines).into_keys() {
            net.close(conn, Side::Dialing);
        }
    }
}

pub(crate) struct ListeningHost<P: Part> {
    pub(crate) part: P,
    pub(crate) harbor: Harbor,
    session: Option<SessionId>,
    lines: BTreeMap<Conn, Line>,
}

impl<P: Part> ListeningHost<P> {
    pub(crate) fn new(part: P, harbor: Harbor) -> ListeningHost<P> {
        ListeningHost {
            part,
            harbor,
            session: None,
            lines: BTreeMap::new(),
        }
    }

    pub(crate) fn connected(&mut self, net: &mut Net, conn: Conn) {
        if self.is_over() {
            net.close(conn, Side::Listening);
            return;
        }
        let line = Line {
            stage: Stage::Greeting,
            stream: 0,
            attempt: 0,
            received: Vec::new(),
        };
        self.lines.insert(conn, line);
    }

    pub(crate) fn lost(&mut self, net: &Net, conn: Conn) {
        let Some(line) = self
            .lines
            .remove(&conn)
            .filter(|line| line.stage == Stage::Up)
        else {
            return;
        };
        let others = self.lines.values();
        let mut newer = others.filter(|other| other.stage == Stage::Up);
        if !newer.any(|other| other.stream == line.stream) {
            self.part.stream_down(line.stream);
        }
        let berth = Berth {
            session: self.session.expect("an admitted line"),
            for_faults: false,
            stream: line.stream,
        };
        self.harbor.handle_lost(berth, line.attempt, net.now);
    }

    pub(crate) fn received(&mut self, net: &mut Net, conn: Conn, bytes: &[u8]) {
        let Some(line) = self.lines.get_mut(&conn) else {
            return;
        };
        line.received.extend_from_slice(bytes);
        loop {
            let Some(line) = self.lines.get_mut(&conn) else {
                return;
            };
            let lives = match line.next_frame() {
                Ok(None) => return,
                Ok(Some((frame, body))) => self.frame(net, conn, &frame, &body),
                Err(error) => {
                    assert!(error.is_damage(), "{error}");
                    false
                }
            };
            if !lives {
                net.close(conn, Side::Listening);
                self.lost(net, conn);
                return;
            }
        }
    }

    fn frame(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = self.lines.get_mut(&conn).expect("it lives");
        if line.stage == Stage::Up {
            self.part.frame(line.stream, frame.kind, frame.number, body);
            return true;
        }
        let greeting = Hello::decode(frame.kind, body).expect("a dialing side writes well");
        let mut answer = Vec::new();
        let (peer, welcome) = match self.admit(greeting) {
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
        let replaced = self
            .lines
            .iter()
            .find(|(_, line)| line.stage == Stage::Up && line.stream == peer.stream);
        if let Some(old) = replaced.map(|(old, _)| *old) {
            net.close(old, Side::Listening);
            self.lines.remove(&old);
        }
        let line = self.lines.get_mut(&conn).expect("it lives");
        (line.stage, line.stream, line.attempt) = (Stage::Up, peer.stream, peer.attempt);
        welcome.encode(Kind::Welcome, &mut answer);
        net.write(conn, Side::Listening, &answer);
        self.part.stream_up(peer.stream, &peer);
        true
    }

    fn admit(&mut self, greeting: Greeting) -> Admission {
        let open_to_new = self.session.is_none();
        self.harbor.admit(greeting, open_to_new)
    }

    pub(crate) fn has_session(&self) -> bool {
        self.session.is_some()
    }

    pub(crate) fn pump(&mut self, net: &mut Net) {
        for (conn, line) in &self.lines {
            while line.stage == Stage::Up
                && net.can_write(*conn, Side::Listening)
                && let Some(frame) = self.part.poll(line.stream)
            {
                net.write(*conn, Side::Listening, &frame);
            }
        }
        if let Some(session) = self.session
            && self.harbor.has_expired(session, net.now)
        {
            self.part.lost("nobody came back");
            let fail = Fail::new(FailCode::UnknownSession, "the session was given up");
            self.harbor.fail(session, fail);
        }
        if let (Some(fail), Some(session)) = (self.part.failure(), self.session) {
            self.harbor.fail(session, fail);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.part.standing() != Standing::Going
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.harbor.deadline().filter(|_| !self.is_over())
    }

    /// The process ends, its connections with it.
    pub(crate) fn hang_up(&mut self, net: &mut Net) {
        for conn in std::mem::take(&mut self.lines).into_keys() {
            net.close(conn, Side::Listening);
        }
    }
}
