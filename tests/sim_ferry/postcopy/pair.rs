//! The client and its two connections, which live and die together.

use std::collections::BTreeMap;
use std::time::Duration;

use pageferry::ferry::frame::Frame;
use pageferry::ferry::hello::{Hello, Role};
use pageferry::ferry::link::{PairDialer, Refusal};

use super::client::Client;
use crate::hosts::{greet, write_all};
use crate::net::{Conn, Net, Side};
use crate::parts::{Part, Status, StreamKey};
use crate::run::{Host, Line, LineState, Lives};

/// Between two attempts to reach a lost source.
const PAUSE: Duration = Duration::from_millis(200);

const STREAM: StreamKey = StreamKey {
    for_faults: false,
    stream: 0,
};
const FAULTS: StreamKey = StreamKey {
    for_faults: true,
    stream: 0,
};

pub(super) struct PairHost {
    part: Client,
    dialer: PairDialer,
    attempt: u32,
    lines: BTreeMap<Conn, Line<StreamKey>>,
    /// Both connections stand.
    attached: bool,
    /// What came on the stream before.
    early: Vec<(Frame, Vec<u8>)>,
    retry_at: Duration,
    down_since: Option<Duration>,
    give_up_after: Duration,
}

impl PairHost {
    pub(super) fn new(part: Client, hello: Hello, give_up_after: Duration) -> PairHost {
        PairHost {
            part,
            dialer: PairDialer::new(hello),
            attempt: 0,
            lines: BTreeMap::new(),
            attached: false,
            early: Vec::new(),
            retry_at: Duration::ZERO,
            down_since: Some(Duration::ZERO),
            give_up_after,
        }
    }

    fn gives_up_at(&self) -> Option<Duration> {
        Some(self.down_since? + self.give_up_after).filter(|_| !self.attached)
    }

    fn dial(&mut self, net: &mut Net, key: StreamKey) {
        let line = Line::new(LineState::Connecting, key);
        self.lines.insert(net.dial(), line);
    }

    fn welcomed(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = self.lines.get_mut(&conn).expect("it lives");
        let key = line.place;
        match self.dialer.handle_answer(role(key), frame.kind, body) {
            Ok(()) => line.state = LineState::Up,
            Err(refusal) => {
                if refusal.is_final() {
                    self.part.lost(&format!("{refusal:?}"));
                }
                assert!(matches!(refusal, Refusal::Fail(_)), "{refusal:?}");
                return false;
            }
        }
        if !key.for_faults {
            self.dial(net, FAULTS);
            return true;
        }
        self.attached = true;
        self.part.stream_up_both();
        for (frame, body) in std::mem::take(&mut self.early) {
            self.down_since = None;
            self.part.frame(STREAM, frame.kind, frame.number, &body);
        }
        true
    }
}

fn role(key: StreamKey) -> Role {
    match key.for_faults {
        true => Role::Requester,
        false => Role::Receiver,
    }
}

impl Host for PairHost {
    type Part = Client;
    type Place = StreamKey;
    const SIDE: Side = Side::Dialing;

    fn part(&mut self) -> &mut Client {
        &mut self.part
    }

    fn into_part(self) -> Client {
        self.part
    }

    fn lines(&mut self) -> &mut BTreeMap<Conn, Line<StreamKey>> {
        &mut self.lines
    }

    fn connected(&mut self, net: &mut Net, conn: Conn) {
        greet(&mut self.lines, net, conn, |key| {
            self.dialer.hello(role(key), self.attempt)
        });
    }

    fn lost(&mut self, net: &mut Net, conn: Conn) {
        let Some(line) = self.lines.remove(&conn) else {
            return;
        };
        if self.attached && line.place.for_faults && self.part.is_through() {
            // The last word comes on the stream.
            return;
        }
        self.hang_up(net);
        self.early.clear();
        self.retry_at = match self.attached {
            true => net.now,
            false => net.now + PAUSE,
        };
        self.attached = false;
        self.part.stream_down(STREAM);
        self.down_since.get_or_insert(net.now);
    }

    fn frame(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives {
        let line = &self.lines[&conn];
        if line.state == LineState::Greeting {
            return self.welcomed(net, conn, frame, body);
        }
        if !self.attached {
            self.early.push((frame.clone(), body.to_vec()));
            return true;
        }
        self.down_since = None;
        let key = line.place;
        self.part.frame(key, frame.kind, frame.number, body);
        true
    }

    fn pump(&mut self, net: &mut Net) {
        self.part.tick(net.now);
        if self.attached {
            write_all(&mut self.part, &self.lines, net, Side::Dialing);
        }
        if self.gives_up_at().is_some_and(|at| at <= net.now) {
            self.part.lost("the source could not be reached again");
        }
        if self.lines.is_empty() && !self.is_over() && self.retry_at <= net.now {
            self.attempt = self.dialer.begin();
            self.dial(net, STREAM);
        }
    }

    fn is_over(&self) -> bool {
        self.part.status() != Status::Going
    }

    fn deadline(&self) -> Option<Duration> {
        let retry = self.lines.is_empty().then_some(self.retry_at);
        let deadlines = [retry, self.gives_up_at(), self.part.next_tick()];
        let first = deadlines.into_iter().flatten().min();
        first.filter(|_| !self.is_over())
    }
}
