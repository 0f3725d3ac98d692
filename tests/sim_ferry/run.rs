//! Two hosts and the network between them, event by event, until both have come to an end.

use std::collections::BTreeMap;
use std::time::Duration;

use pageferry::ferry::frame::{Frame, FrameError, Split, split};

use crate::net::{Conn, Event, Net, Side};
use crate::parts::Part;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum LineState {
    Connecting,
    Greeting,
    Up,
}

/// A connection, as one of its sides has it.
pub(crate) struct Line<T> {
    pub(crate) state: LineState,
    /// What it is to its host.
    pub(crate) place: T,
    received: Vec<u8>,
}

impl<T> Line<T> {
    pub(crate) fn new(state: LineState, place: T) -> Line<T> {
        Line {
            state,
            place,
            received: Vec::new(),
        }
    }

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
pub(crate) type Lives = bool;

/// A process at one end.
pub(crate) trait Host {
    type Part: Part;
    type Place;
    const SIDE: Side;

    fn part(&mut self) -> &mut Self::Part;
    fn into_part(self) -> Self::Part;
    fn lines(&mut self) -> &mut BTreeMap<Conn, Line<Self::Place>>;
    fn connected(&mut self, net: &mut Net, conn: Conn);
    fn lost(&mut self, net: &mut Net, conn: Conn);
    fn frame(&mut self, net: &mut Net, conn: Conn, frame: &Frame, body: &[u8]) -> Lives;
    /// Writes what there is to write, dials what there is to dial.
    fn pump(&mut self, net: &mut Net);
    fn is_over(&self) -> bool;
    fn deadline(&self) -> Option<Duration>;
    /// Nobody has ever come to it.
    fn is_unvisited(&self) -> bool {
        false
    }

    fn received(&mut self, net: &mut Net, conn: Conn, bytes: &[u8]) {
        if let Some(line) = self.lines().get_mut(&conn) {
            line.received.extend_from_slice(bytes);
        }
        while let Some(line) = self.lines().get_mut(&conn) {
            let lives = match line.next_frame() {
                Ok(None) => return,
                Ok(Some((frame, body))) => {
                    if line.state == LineState::Up {
                        net.carried(conn);
                    }
                    self.frame(net, conn, &frame, &body)
                }
                Err(error) => {
                    assert!(error.is_damage(), "{error}");
                    false
                }
            };
            if !lives {
                net.close(conn, Self::SIDE);
                self.lost(net, conn);
            }
        }
    }

    /// The process ends, its connections with it.
    fn hang_up(&mut self, net: &mut Net) {
        for conn in std::mem::take(self.lines()).into_keys() {
            net.close(conn, Self::SIDE);
        }
    }
}

/// The process of `host` is killed.
pub(crate) fn crash<H: Host>(host: &mut Option<H>, net: &mut Net) -> Option<H::Part> {
    let mut host = host.take()?;
    net.crashed();
    host.hang_up(net);
    Some(host.into_part())
}

/// Something in the process of `host` fails for good.
pub(crate) fn abort<H: Host>(host: &mut Option<H>) {
    if let Some(host) = host {
        host.part().abort();
    }
}

/// Runs both hosts until each has come to an end. `disturb` is called before every step.
pub(crate) fn run<D: Host, L: Host>(
    net: &mut Net,
    dial: &mut Option<D>,
    listen: &mut Option<L>,
    mut disturb: impl FnMut(u64, &mut Net, &mut Option<D>, &mut Option<L>),
) {
    for step in 0.. {
        assert!(step < 1_000_000, "the session never ends");
        disturb(step, net, dial, listen);
        pump(net, dial);
        pump(net, listen);
        let dial_over = dial.as_ref().is_none_or(Host::is_over);
        let listen_over = listen.as_ref().is_none_or(Host::is_over);
        if dial_over && listen_over {
            return;
        }
        let deadlines = [
            dial.as_ref().and_then(Host::deadline),
            listen.as_ref().and_then(Host::deadline),
        ];
        let deadline = deadlines.into_iter().flatten().min();
        match (net.next_at(), deadline) {
            (Some(event), deadline) if deadline.is_none_or(|at| event <= at) => {
                if let Some(event) = net.pop() {
                    dispatch(net, dial, listen, event);
                }
            }
            (_, Some(deadline)) => net.now = net.now.max(deadline),
            (_, None) => {
                // A listening side that has never heard of a session waits for one.
                let waits = listen.as_ref().is_some_and(Host::is_unvisited);
                assert!(dial_over && waits, "both ends wait for each other");
                return;
            }
        }
    }
}

fn pump<H: Host>(net: &mut Net, host: &mut Option<H>) {
    if let Some(host) = host {
        host.pump(net);
        if host.is_over() {
            host.hang_up(net);
        }
    }
}

fn dispatch<D: Host, L: Host>(
    net: &mut Net,
    dial: &mut Option<D>,
    listen: &mut Option<L>,
    event: Event,
) {
    match event {
        Event::Connected(conn) => {
            match listen {
                Some(host) => host.connected(net, conn),
                None => net.close(conn, Side::Listening),
            }
            if let Some(host) = dial {
                host.connected(net, conn);
            }
        }
        Event::Refused(conn) | Event::Lost(conn, Side::Dialing) => {
            if let Some(host) = dial {
                host.lost(net, conn);
            }
        }
        Event::Lost(conn, Side::Listening) => {
            if let Some(host) = listen {
                host.lost(net, conn);
            }
        }
        Event::Bytes(conn, Side::Dialing, bytes) => {
            if let Some(host) = dial {
                host.received(net, conn, &bytes);
            }
        }
        Event::Bytes(conn, Side::Listening, bytes) => {
            if let Some(host) = listen {
                host.received(net, conn, &bytes);
            }
        }
    }
}
