//! Frames that are applied and wait for their acknowledgement: so the far end pushes no faster than a rate.
//!
//! ```text
//! applied ──> Backlog ── when the rate has earned its bytes ──> ACK ──> the far end's window moves on
//! ```
//!
//! Flow control of ferry's own: a sender has no more on its way than the window. What is held back is
//! the message alone. The pages are installed at once, and bytes are received as they come, so that
//! `arrived` tells a link that is throttled from one that is dead.
//!
//! Invariants: acknowledged in order; in any time the far end sends no more than the window, what the
//! rate earns in that time and what it saves up.

use std::collections::VecDeque;

use crate::ferry::hello::Window;
use crate::ferry::message::StateId;
use crate::lazy::window::RateLimit;

/// The window holds as many seconds' worth of a rate as one by this: more than any round trip, and less
/// than a silence that is taken for a dead link.
const WINDOWS_A_SECOND: u64 = 2;

/// The window of a receiver that takes at most `bytes_per_second`, no larger than `most`.
pub fn window_at(bytes_per_second: u64, most: Window) -> Window {
    Window {
        bytes: most.bytes.min(bytes_per_second / WINDOWS_A_SECOND),
        ..most
    }
}

/// A frame that is applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Applied {
    pub(super) number: u64,
    bytes: u64,
    /// What is answered, if it was a question.
    pub(super) answer: Option<(i32, StateId)>,
}

impl Applied {
    /// One of `bytes`, with pages.
    pub(super) fn pages(number: u64, bytes: u64) -> Applied {
        Applied {
            number,
            bytes,
            answer: None,
        }
    }

    /// A question, which is no load worth counting.
    pub(super) fn question(number: u64, value: i32, state: StateId) -> Applied {
        Applied {
            number,
            bytes: 0,
            answer: Some((value, state)),
        }
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    waiting: VecDeque<Applied>,
    /// Acknowledged before it was earned, bytes.
    owed: u64,
}

impl Backlog {
    /// `applied` is to be acknowledged behind all that wait already.
    pub(super) fn push(&mut self, applied: Applied) {
        self.waiting.push_back(applied);
    }

    /// What is to be acknowledged now, at `now_us` on the clock of `limit`.
    pub(super) fn next(&mut self, limit: &mut RateLimit, now_us: u64) -> Option<Applied> {
        limit.spend(std::mem::take(&mut self.owed));
        if self.waiting.is_empty() || limit.wait_until_us(now_us).is_some() {
            return None;
        }
        let applied = self.waiting.pop_front()?;
        limit.spend(applied.bytes);
        Some(applied)
    }

    /// What is to be acknowledged next, earned or not: it is paid for later.
    pub(super) fn next_at_once(&mut self) -> Option<Applied> {
        let applied = self.waiting.pop_front()?;
        self.owed += applied.bytes;
        Some(applied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ferry::frame::{FRAME_BYTES_MAX, HEADER_BYTES, Kind, Split, split};
    use crate::ferry::receiver::{Arrival, Receiver};
    use crate::ferry::sender::Sender;
    use crate::units::PageSize;

    const PAGE: PageSize = PageSize::KIB_4;
    const BODY_BYTES: u64 = 65_000;
    const FRAME_BYTES: u64 = BODY_BYTES + HEADER_BYTES as u64;

    const MOST: Window = Window {
        frames: 1024,
        bytes: 24 << 20,
    };

    /// A sender that sends whatever the window takes to a receiver with a limit, on a link that takes no
    /// time. Looks up each time the limit says so.
    struct Ends {
        sender: Sender,
        receiver: Receiver,
        backlog: Backlog,
        limit: RateLimit,
        sent: u64,
    }

    impl Ends {
        fn new(rate: u64) -> Ends {
            let window = window_at(rate, MOST);
            let mut ends = Ends {
                sender: Sender::new(PAGE, 1, window),
                receiver: Receiver::new(PAGE, 1, window),
                backlog: Backlog::default(),
                limit: RateLimit::new(rate),
                sent: 0,
            };
            ends.reconnect();
            ends
        }

        fn reconnect(&mut self) {
            self.sender.stream_up(0);
            self.receiver.stream_up(0);
            self.deliver_replies();
        }

        fn push(&mut self) {
            while self.sender.has_room_for(FRAME_BYTES) {
                let number = self.sender.submit(Kind::Pages, FRAME_BYTES);
                let came = self.receiver.handle_numbered(number, BODY_BYTES);
                assert_eq!(came, Ok(Arrival::Next));
                self.backlog.push(Applied::pages(number, FRAME_BYTES));
                self.sent += FRAME_BYTES;
            }
        }

        fn acknowledge(&mut self, now_us: u64) {
            while let Some(applied) = self.backlog.next(&mut self.limit, now_us) {
                self.receiver.applied(applied.number);
            }
            self.deliver_replies();
        }

        fn deliver_replies(&mut self) {
            while let Some(reply) = self.receiver.poll(0, 0) {
                let mut words = Vec::new();
                reply.encode(&mut words);
                let Ok(Split::Frame(frame)) = split(&words) else {
                    panic!("a frame");
                };
                let handled = self.sender.handle(0, frame.kind, &words[frame.body]);
                handled.unwrap();
            }
        }

        /// No more than the window, what the rate has earned and saved up, and the frame that it pays for
        /// later.
        fn check(&self, rate: u64, now_us: u64) {
            let earned = u64::try_from(u128::from(rate) * u128::from(now_us) / 1_000_000).unwrap();
            let most = earned + window_at(rate, MOST).bytes + rate / 10 + 2 * FRAME_BYTES;
            assert!(self.sent <= most, "{} of {most} at {now_us} µs", self.sent);
        }
    }

    #[test]
    fn a_sender_sends_at_the_rate_however_eager_it_is() {
        for rate in [1_000, 64 << 10, 10 << 20, 1 << 30] {
            let mut ends = Ends::new(rate);
            let end_us = 1_000 * FRAME_BYTES * 1_000_000 / rate;
            let mut now_us = 0;
            while now_us < end_us {
                ends.push();
                ends.acknowledge(now_us);
                ends.check(rate, now_us);
                let limit = &mut ends.limit;
                now_us = limit.wait_until_us(now_us).unwrap_or(now_us + 1);
            }
            let earned = u128::from(rate) * u128::from(end_us) / 1_000_000;
            assert!(
                u128::from(ends.sent) >= earned * 9 / 10,
                "{rate}: {}",
                ends.sent
            );
        }
    }

    #[test]
    fn connections_that_break_are_no_way_around_the_rate() {
        let rate = 1 << 20;
        let mut ends = Ends::new(rate);
        for now_us in (0..20_000_000).step_by(10_000) {
            ends.push();
            ends.acknowledge(now_us);
            if now_us % 500_000 == 0 {
                // What is applied is safe on the next connection, and paid for all the same.
                while let Some(applied) = ends.backlog.next_at_once() {
                    ends.receiver.applied(applied.number);
                }
                ends.reconnect();
            }
        }
        // A window each time: that much had been sent before the connection broke.
        let most = 20 * rate + 41 * (window_at(rate, MOST).bytes + FRAME_BYTES);
        assert!(ends.sent <= most, "{} of {most}", ends.sent);
        assert!(
            ends.limit.wait_until_us(20_000_000).is_some(),
            "nothing is owed"
        );
    }

    #[test]
    fn answers_keep_their_turn() {
        let (mut backlog, mut limit) = (Backlog::default(), RateLimit::new(1000));
        let answer = Applied::question(3, 0, StateId::NONE);
        let all = [Applied::pages(1, 500), Applied::pages(2, 500), answer];
        all.into_iter().for_each(|applied| backlog.push(applied));
        assert_eq!(backlog.next(&mut limit, 0), Some(all[0]));
        assert_eq!(backlog.next(&mut limit, 400_000), None);
        assert_eq!(backlog.next(&mut limit, 500_000), Some(all[1]));
        assert_eq!(backlog.next(&mut limit, 999_000), None);
        assert_eq!(backlog.next(&mut limit, 1_000_000), Some(answer));
    }

    #[test]
    fn a_window_takes_one_frame_at_least_and_no_more_than_others() {
        assert_eq!(window_at(u64::MAX, MOST), MOST);
        assert!(window_at(1, MOST).bytes < FRAME_BYTES_MAX as u64);
        let sender = Sender::new(PAGE, 1, window_at(1, MOST));
        assert!(sender.has_room_for(FRAME_BYTES_MAX as u64));
    }
}
