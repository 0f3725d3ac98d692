//! A network that delays, cuts, chops and damages, all out of one seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use fastrand::Rng;

/// The side of a connection that dialled, and the one that listened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Side {
    Dialing,
    Listening,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Dialing => Side::Listening,
            Side::Listening => Side::Dialing,
        }
    }
}

pub(crate) type Conn = u32;

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Event {
    Connected(Conn),
    Refused(Conn),
    Bytes(Conn, Side, Vec<u8>),
    /// The side learns that the connection is gone.
    Lost(Conn, Side),
}

/// What goes wrong, each as one in so many; 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NetworkConditions {
    /// Writes that cut their connection.
    pub(crate) cut_one_in: u32,
    /// Writes that cut all connections, for a while.
    pub(crate) outage_one_in: u32,
    /// Writes in which a bit flips.
    pub(crate) flip_one_in: u32,
    /// Longest time on the way, milliseconds.
    pub(crate) delay_millis: u64,
    /// Longest outage, milliseconds.
    pub(crate) outage_millis: u64,
}

#[derive(Default)]
struct Pipe {
    last_arrival: Duration,
    in_flight: usize,
}

#[derive(Default)]
struct Line {
    cut: bool,
    /// Toward the dialing and the listening side.
    pipes: [Pipe; 2],
}

pub(crate) struct Net {
    pub(crate) rng: Rng,
    pub(crate) now: Duration,
    pub(crate) conditions: NetworkConditions,
    pub(crate) cuts: u64,
    pub(crate) flips: u64,
    /// Cuts and crashes before the recovery from an earlier one was over.
    pub(crate) cuts_in_recovery: u64,
    pub(crate) crashes_in_recovery: u64,
    /// This connection and those before it are lost, and no newer one has carried a frame since.
    lost: Option<Conn>,
    /// A checksum over all that arrived anywhere, and when: two runs of one seed have the same.
    pub(crate) trace: u32,
    lines: BTreeMap<Conn, Line>,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    queued: u64,
    next_conn: Conn,
    out_until: Duration,
}

/// More than this is not written to a connection before some of it has arrived.
const IN_FLIGHT_MAX: usize = 24 << 10;

impl Net {
    pub(crate) fn new(rng: Rng, conditions: NetworkConditions) -> Net {
        Net {
            rng,
            now: Duration::ZERO,
            conditions,
            cuts: 0,
            flips: 0,
            cuts_in_recovery: 0,
            crashes_in_recovery: 0,
            lost: None,
            trace: 0,
            lines: BTreeMap::new(),
            queue: BinaryHeap::new(),
            queued: 0,
            next_conn: 0,
            out_until: Duration::ZERO,
        }
    }

    /// Begins to make a connection: `Connected` or `Refused` will follow.
    pub(crate) fn dial(&mut self) -> Conn {
        self.next_conn += 1;
        let conn = self.next_conn;
        let at = self.now + self.delay();
        if self.now < self.out_until {
            self.push(at, Event::Refused(conn));
        } else {
            self.lines.insert(conn, Line::default());
            self.push(at, Event::Connected(conn));
        }
        conn
    }

    pub(crate) fn can_write(&self, conn: Conn, from: Side) -> bool {
        let line = self.lines.get(&conn);
        line.is_some_and(|line| line.pipes[from.other() as usize].in_flight < IN_FLIGHT_MAX)
    }

    /// Writes to the connection; what comes of it is the choice of the conditions.
    pub(crate) fn write(&mut self, conn: Conn, from: Side, bytes: &[u8]) {
        let to = from.other();
        let mut rest = bytes;
        while !rest.is_empty() {
            let most = rest.len().min(if self.rng.bool() { 40 } else { 20_000 });
            let (piece, behind) = rest.split_at(self.rng.usize(1..=most));
            rest = behind;
            let mut piece = piece.to_vec();
            if self.one_in(self.conditions.flip_one_in) {
                let bit = self.rng.usize(0..piece.len() * 8);
                piece[bit / 8] ^= 1 << (bit % 8);
                self.flips += 1;
            }
            let at = self.now + self.delay();
            let Some(line) = self.lines.get_mut(&conn).filter(|line| !line.cut) else {
                return;
            };
            let pipe = &mut line.pipes[to as usize];
            pipe.last_arrival = pipe.last_arrival.max(at);
            pipe.in_flight += piece.len();
            let at = pipe.last_arrival;
            self.push(at, Event::Bytes(conn, to, piece));
            if self.one_in(self.conditions.cut_one_in) {
                self.cut(conn);
            }
            if self.one_in(self.conditions.outage_one_in) {
                let longest = self.conditions.outage_millis;
                self.out_until = self.now + Duration::from_millis(self.rng.u64(0..longest));
                for conn in self.lines.keys().copied().collect::<Vec<_>>() {
                    self.cut(conn);
                }
            }
        }
    }

    /// One side closes the connection: the other learns of it behind all bytes.
    pub(crate) fn close(&mut self, conn: Conn, from: Side) {
        if let Some(line) = self.lines.get(&conn).filter(|line| !line.cut) {
            let at = line.pipes[from.other() as usize].last_arrival.max(self.now);
            self.push(at, Event::Lost(conn, from.other()));
        }
    }

    /// Drops all that is on its way; both sides learn of it, each in its time.
    pub(crate) fn cut(&mut self, conn: Conn) {
        let Some(line) = self.lines.get_mut(&conn).filter(|line| !line.cut) else {
            return;
        };
        line.cut = true;
        self.cuts += 1;
        // All connections that an outage cuts are cut at once.
        self.cuts_in_recovery += u64::from(self.lost.is_some_and(|lost| conn > lost));
        self.lost = self.lost.max(Some(conn));
        for side in [Side::Dialing, Side::Listening] {
            let at = self.now + Duration::from_millis(self.rng.u64(0..600));
            self.push(at, Event::Lost(conn, side));
        }
    }

    /// A process at one end is killed.
    pub(crate) fn crashed(&mut self) {
        self.crashes_in_recovery += u64::from(self.lost.is_some());
        self.lost = Some(self.next_conn);
    }

    /// A frame has come over a connection that stands.
    pub(crate) fn carried(&mut self, conn: Conn) {
        self.lost = self.lost.filter(|lost| conn <= *lost);
    }

    /// When the next event is due.
    pub(crate) fn next_at(&self) -> Option<Duration> {
        self.queue.peek().map(|Reverse((at, ..))| *at)
    }

    /// The next event, which is due now.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let Reverse((at, _, event)) = self.queue.pop()?;
        self.now = self.now.max(at);
        self.record(&event);
        if let Event::Bytes(conn, to, bytes) = &event {
            let line = self.lines.get_mut(conn)?;
            line.pipes[*to as usize].in_flight -= bytes.len();
            if line.cut {
                return None;
            }
        }
        Some(event)
    }

    fn record(&mut self, event: &Event) {
        let mut crc = crc32fast::Hasher::new_with_initial(self.trace);
        crc.update(&self.now.as_nanos().to_le_bytes());
        crc.update(format!("{event:?}").as_bytes());
        self.trace = crc.finalize();
    }

    pub(crate) fn one_in(&mut self, chance: u32) -> bool {
        chance > 0 && self.rng.u32(0..chance) == 0
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(self.rng.u64(0..self.conditions.delay_millis * 1000))
    }

    fn push(&mut self, at: Duration, event: Event) {
        // Events of the same moment keep the order in which they were made.
        self.queued += 1;
        self.queue.push(Reverse((at, self.queued, event)));
    }
}
