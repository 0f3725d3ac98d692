//! The recorder's decision: which client's piece is passed to the service next.

use std::collections::VecDeque;

/// What may be on its way to the service at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Pieces of one connection: that of another is passed once an answer has come, or none within the wait. So the
    /// service reads all pieces in one order, which a replay can repeat.
    Total,
    /// Anything. The service chooses the order of pieces that no answer separates, and a replay may choose another.
    Causal,
}

/// Who is next. Every connection has at most one piece that waits.
#[derive(Debug)]
pub struct Sequencer {
    order: Order,
    queue: VecDeque<u32>,
    /// The connection whose last piece may not have been read by the service yet.
    in_flight: Option<u32>,
    /// The last piece was taken as read because of the wait alone.
    by_wait: bool,
    held: bool,
}

impl Sequencer {
    /// Nobody waits yet.
    pub fn new(order: Order) -> Sequencer {
        Sequencer {
            order,
            queue: VecDeque::new(),
            in_flight: None,
            by_wait: false,
            held: false,
        }
    }

    /// A piece of the connection waits to be passed.
    pub fn arrive(&mut self, connection: u32) {
        self.queue.push_back(connection);
    }

    /// Whose piece may be passed now.
    pub fn next(&self) -> Option<u32> {
        let first = *self.queue.front()?;
        let free = match (self.order, self.in_flight) {
            (Order::Causal, _) | (Order::Total, None) => true,
            // One connection keeps its own order.
            (Order::Total, Some(before)) => before == first,
        };
        (free && !self.held).then_some(first)
    }

    /// The piece that [`Sequencer::next`] named is passed. Returns whether that follows from the wait alone, which a
    /// replay must repeat ([`super::Entry::Settled`]).
    pub fn pass(&mut self) -> bool {
        let connection = self.queue.pop_front();
        if self.order == Order::Total {
            self.in_flight = connection;
        }
        std::mem::take(&mut self.by_wait)
    }

    /// Answers have come, or the service has ended the connection: it has read the connection's piece.
    pub fn answered(&mut self, connection: u32) {
        if self.in_flight == Some(connection) {
            self.in_flight = None;
        }
    }

    /// Whether somebody waits for an answer to a piece of another connection: then the wait is to be measured.
    pub fn is_blocked(&self) -> bool {
        !self.held && !self.queue.is_empty() && self.next().is_none()
    }

    /// Whether the service may not have read the last piece yet. In causal order that is not known.
    pub fn is_unread(&self) -> bool {
        self.order == Order::Causal || self.in_flight.is_some()
    }

    /// The wait is over since the last piece was passed.
    pub fn waited(&mut self) {
        if self.in_flight.take().is_some() {
            self.by_wait = true;
        }
    }

    /// Lets nothing pass, or lets it pass again.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// The connection is given up: what waits of it is not passed.
    pub fn forget(&mut self, connection: u32) {
        self.queue.retain(|&other| other != connection);
        self.answered(connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_at_a_time_until_it_is_answered_or_the_wait_is_over() {
        let mut sequencer = Sequencer::new(Order::Total);
        for connection in [1, 2, 3] {
            sequencer.arrive(connection);
        }
        assert_eq!(sequencer.next(), Some(1));
        assert!(!sequencer.pass());
        assert_eq!((sequencer.next(), sequencer.is_blocked()), (None, true));
        sequencer.answered(3);
        assert_eq!(sequencer.next(), None);
        sequencer.answered(1);
        assert_eq!(sequencer.next(), Some(2));
        assert!(!sequencer.pass());
        sequencer.waited();
        assert_eq!(sequencer.next(), Some(3));
        assert!(sequencer.pass());
        // Its own next piece needs no wait.
        sequencer.arrive(3);
        assert_eq!(sequencer.next(), Some(3));
        assert!(!sequencer.pass());
        sequencer.arrive(1);
        sequencer.forget(3);
        sequencer.hold(true);
        assert_eq!((sequencer.next(), sequencer.is_blocked()), (None, false));
        sequencer.hold(false);
        assert_eq!(sequencer.next(), Some(1));
    }

    #[test]
    fn causal_order_waits_for_nobody() {
        let mut sequencer = Sequencer::new(Order::Causal);
        sequencer.arrive(1);
        sequencer.arrive(2);
        assert_eq!(sequencer.next(), Some(1));
        assert!(!sequencer.pass());
        assert_eq!(sequencer.next(), Some(2));
        assert!(!sequencer.is_blocked());
        assert!(sequencer.is_unread());
    }

    #[test]
    fn the_last_piece_is_read_when_it_is_answered_or_the_wait_is_over() {
        let mut sequencer = Sequencer::new(Order::Total);
        assert!(!sequencer.is_unread());
        for answered in [true, false] {
            sequencer.arrive(1);
            sequencer.pass();
            assert!(sequencer.is_unread());
            match answered {
                true => sequencer.answered(1),
                false => sequencer.waited(),
            }
            assert!(!sequencer.is_unread());
        }
    }
}
