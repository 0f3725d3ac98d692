//! How much may be on the way from the source at once, and how fast the background may go.
//!
//! A fault waits behind what was asked for before it, so the window is kept near one
//! bandwidth-delay product: enough to keep the link full, and no deep queue. Both factors are
//! measured from the traffic itself: the rate as the median of late, the delay as the shortest time
//! to the first byte of an answer. While the window is the bottleneck each round trip shows a
//! higher rate, so it grows by itself until the link is full.

use std::collections::VecDeque;

use super::fault_prediction::FaultPrediction;
use super::policy::{ADAPTIVE, Policy};

/// Smallest request of the background stream, bytes.
pub const CHUNK_BYTES_MIN: u64 = 16 << 10;

/// Largest request of the background stream, bytes. Beyond it a fault waits longer for no gain.
pub const CHUNK_BYTES_MAX: u64 = 256 << 10;

/// Largest window, bytes: 10 Gbit/s at 100 ms round trip.
const WINDOW_BYTES_MAX: u64 = 128 << 20;

/// A request of the background stream should keep the link busy about this long, µs.
const CHUNK_TIME_US: u64 = 250;

/// The same while faults share the link, µs: each waits for what is left of one request.
const CHUNK_TIME_FAULTING_US: u64 = 50;

/// What a request costs the source whatever its size, µs: measured with CRIU's dump.
const REQUEST_TIME_US: u64 = 20;

/// Faults share the link if the last one was asked for this recently, µs.
const FAULT_MEMORY_US: u64 = 2_000;

/// A source that answers sooner than this, µs, is on this host or beside it.
const NEAR_DELAY_US: u64 = 300;

/// How long a shortest delay stands, µs: a route may become longer.
const DELAY_MEMORY_US: u64 = 10_000_000;

/// How many rate samples are remembered.
const RATE_SAMPLES: usize = 32;

/// What was true when a request was sent; handed back with its answer.
#[derive(Clone, Copy, Debug)]
pub struct RequestTiming {
    sent_us: u64,
    received_then: u64,
}

/// Measures one connection to a source and bounds what is on the way over it.
#[derive(Debug)]
pub struct Window {
    in_flight: u64,
    received: u64,
    rates: VecDeque<u64>,
    /// Bytes a second that the link carries most of the time: when bytes come in bursts, the best
    /// sample says more than it can.
    steady_rate: u64,
    /// The best of `rates`.
    best_rate: u64,
    delay_us: Option<u64>,
    previous_delay_us: Option<u64>,
    delay_since_us: u64,
    /// The shortest delay ever, µs: whether the source is near does not change.
    nearest_us: Option<u64>,
    last_fault_us: Option<u64>,
    prediction: FaultPrediction,
    policy: &'static dyn Policy,
}

impl Default for Window {
    fn default() -> Window {
        Window::with_policy(&ADAPTIVE)
    }
}

impl Window {
    /// A window over a link of which nothing is known yet, for which `policy` decides when the stream yields.
    pub fn with_policy(policy: &'static dyn Policy) -> Window {
        Window {
            in_flight: 0,
            received: 0,
            rates: VecDeque::with_capacity(RATE_SAMPLES),
            steady_rate: 0,
            best_rate: 0,
            delay_us: None,
            previous_delay_us: None,
            delay_since_us: 0,
            nearest_us: None,
            last_fault_us: None,
            prediction: FaultPrediction::default(),
            policy,
        }
    }

    /// A request for `bytes` goes out at `now_us`.
    pub fn sent(&mut self, bytes: u64, now_us: u64) -> RequestTiming {
        self.in_flight += bytes;
        RequestTiming {
            sent_us: now_us,
            received_then: self.received,
        }
    }

    /// A fault is asked for over this link.
    pub fn faulted(&mut self, now_us: u64) {
        self.last_fault_us = Some(now_us);
        self.prediction.faulted(now_us);
    }

    /// A fault of a sequence is asked for over this link. The stream runs ahead of a sequence, so nearby,
    /// where queues are short, it does more good than harm; on a long link the queue is what counts.
    pub fn sequential_fault(&mut self, now_us: u64) {
        if !self.is_near() {
            self.last_fault_us = Some(now_us);
        }
    }

    /// The answer to a fault has come over this link.
    pub fn fault_answered(&mut self, now_us: u64) {
        self.prediction.answered(now_us);
    }

    /// A request of the background stream goes out.
    pub fn streamed(&mut self, now_us: u64) {
        self.prediction.streamed(now_us);
    }

    /// Whether lone faults share the link, or did a moment ago.
    pub fn is_faulting(&self, now_us: u64) -> bool {
        self.last_fault_us
            .is_some_and(|last| now_us.saturating_sub(last) < FAULT_MEMORY_US)
    }

    /// The first byte of the answer to a request has come.
    pub fn answered(&mut self, timing: RequestTiming, now_us: u64) {
        let delay = now_us.saturating_sub(timing.sent_us).max(1);
        if now_us.saturating_sub(self.delay_since_us) > DELAY_MEMORY_US / 2 {
            self.previous_delay_us = self.delay_us.take();
            self.delay_since_us = now_us;
        }
        self.delay_us = Some(self.delay_us.map_or(delay, |known| known.min(delay)));
        self.nearest_us = Some(self.nearest_us.map_or(delay, |known| known.min(delay)));
    }

    /// The answer to a request for `asked` bytes is complete, with `got` bytes.
    pub fn completed(&mut self, timing: RequestTiming, asked: u64, got: u64, now_us: u64) {
        self.in_flight = self.in_flight.saturating_sub(asked);
        self.received += got;
        let took = now_us.saturating_sub(timing.sent_us).max(1);
        let rate = (self.received - timing.received_then).saturating_mul(1_000_000) / took;
        if self.rates.len() == RATE_SAMPLES {
            self.rates.pop_front();
        }
        self.rates.push_back(rate);
        self.best_rate = self.rates.iter().copied().max().unwrap_or(0);
        let mut rates = [0; RATE_SAMPLES];
        let samples = &mut rates[..self.rates.len()];
        samples.copy_from_slice(self.rates.make_contiguous());
        let (_, median, _) = samples.select_nth_unstable(samples.len() / 2);
        self.steady_rate = *median;
    }

    /// Nothing is on the way any more: the connection is gone.
    pub fn reset(&mut self) {
        *self = Window {
            received: self.received,
            ..Window::with_policy(self.policy)
        };
    }

    /// Bytes a second that the link was last seen to carry, 0 before the first answer.
    pub fn rate(&self) -> u64 {
        self.best_rate
    }

    fn delay(&self) -> Option<u64> {
        [self.delay_us, self.previous_delay_us]
            .into_iter()
            .flatten()
            .min()
    }

    /// What the link holds: rate times shortest delay, bytes.
    pub fn product(&self) -> u64 {
        let delay = self.delay().unwrap_or(0);
        let product = u128::from(self.steady_rate) * u128::from(delay) / 1_000_000;
        u64::try_from(product)
            .unwrap_or(u64::MAX)
            .min(WINDOW_BYTES_MAX)
    }

    /// How large a request of the background stream should be, bytes.
    pub fn chunk_bytes(&self, now_us: u64) -> u64 {
        let time = if self.is_faulting(now_us) {
            CHUNK_TIME_FAULTING_US
        } else {
            CHUNK_TIME_US
        };
        let bytes = self.rate().saturating_mul(time) / 1_000_000;
        bytes
            .clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
            .next_power_of_two()
    }

    /// Bytes that are better fetched once more than asked around: what the link carries while the
    /// source looks at one more request.
    pub fn gap_bytes(&self) -> u64 {
        self.rate().saturating_mul(REQUEST_TIME_US) / 1_000_000
    }

    /// Whether the source is on this host or beside it.
    pub fn is_near(&self) -> bool {
        self.nearest_us.is_none_or(|delay| delay < NEAR_DELAY_US)
    }

    /// Until when the background stream holds back for a fault that is likely to come, µs.
    pub fn holds_until_us(&self, now_us: u64) -> Option<u64> {
        if self.is_near() {
            self.policy.yields_until_us(&self.prediction, now_us)
        } else {
            None
        }
    }

    /// Whether the answer to a fault is due from a source nearby, or the next fault after one.
    pub fn is_fault_due(&self, now_us: u64) -> bool {
        self.is_near() && self.prediction.is_fault_due(now_us)
    }

    /// Whether one more request of the background stream may go out.
    pub fn has_room(&self, now_us: u64) -> bool {
        if self.holds_until_us(now_us).is_some() {
            return false;
        }
        let (product, chunk) = (self.product(), self.chunk_bytes(now_us));
        match (self.is_near(), self.is_faulting(now_us)) {
            // What a fault waits for is the source's own work: it may run dry for a moment between
            // two requests, but no fault waits for two.
            (true, true) => self.in_flight < product.max(1),
            // Enough that the source always has the next request at hand.
            (true, false) => self.in_flight + chunk <= (product + chunk).max(3 * chunk),
            // What a fault waits for is the queue on the way: one request beyond the product finds
            // out whether the link carries more.
            (false, true) => self.in_flight < product + product / 16 + chunk,
            (false, false) => self.in_flight < product + product / 4 + chunk,
        }
    }

    /// Bytes asked for and not yet received.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }
}

/// Holds the background to a rate: a bucket that fills with time.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    /// Bytes that may be asked for now; below zero after a request larger than what was there.
    allowance: i128,
    filled_us: u64,
    /// It does not count for now.
    lifted: bool,
}

impl RateLimit {
    /// A limit of `bytes_per_second`, at least 1.
    pub fn new(bytes_per_second: u64) -> RateLimit {
        RateLimit {
            bytes_per_second: bytes_per_second.max(1),
            allowance: 0,
            filled_us: 0,
            lifted: false,
        }
    }

    /// Lets everything go at once, or returns to the limit.
    pub fn lift(&mut self, lifted: bool) {
        self.lifted = lifted;
    }

    /// Until when to wait before the next request, or `None` if it may go now.
    pub fn wait_until_us(&mut self, now_us: u64) -> Option<u64> {
        if self.lifted {
            return None;
        }
        let rate = i128::from(self.bytes_per_second);
        let passed = i128::from(now_us.saturating_sub(self.filled_us));
        let earned = passed * rate / 1_000_000;
        if earned > 0 {
            // A tenth of a second's worth at most is saved up.
            self.allowance = (self.allowance + earned).min(rate / 10 + 1);
            self.filled_us = now_us;
        }
        if self.allowance >= 0 {
            return None;
        }
        let wait = (-self.allowance * 1_000_000 + rate - 1) / rate;
        Some(now_us.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX).max(1)))
    }

    /// How much should be asked for at once, bytes: what is earned in a tenth of a second.
    pub fn chunk_bytes(&self) -> u64 {
        self.bytes_per_second / 10
    }

    /// `bytes` were asked for.
    pub fn spend(&mut self, bytes: u64) {
        if !self.lifted {
            self.allowance -= i128::from(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `rate` bytes a second and `delay_us` round trip, kept as full as the window allows
    /// for `requests` answers; returns the window at the end.
    fn drive(rate: u64, delay_us: u64, faulting: bool, requests: usize) -> Window {
        let mut window = Window::default();
        let mut on_the_way = VecDeque::new();
        let (mut now, mut link_free_at) = (0_u64, 0_u64);
        for _ in 0..requests {
            if faulting {
                window.faulted(now);
            }
            while window.has_room(now) {
                let bytes = window.chunk_bytes(now);
                let timing = window.sent(bytes, now);
                let starts = (now + delay_us).max(link_free_at);
                link_free_at = starts + bytes * 1_000_000 / rate;
                on_the_way.push_back((timing, bytes, starts, link_free_at));
            }
            let (timing, bytes, first, last) = on_the_way.pop_front().unwrap();
            window.answered(timing, first.max(now));
            now = last;
            window.completed(timing, bytes, bytes, now);
        }
        window
    }

    #[test]
    fn grows_to_the_bandwidth_delay_product_and_not_far_beyond() {
        for (rate, delay_us) in [
            (125_000_000, 1_000),
            (1 << 30, 100),
            (1_250_000_000, 100_000),
        ] {
            let window = drive(rate, delay_us, false, 20_000);
            let product = rate * delay_us / 1_000_000;
            assert!(
                window.rate() > rate * 8 / 10,
                "{rate} {delay_us}: rate {}",
                window.rate()
            );
            let most = product + product / 2 + 3 * CHUNK_BYTES_MAX;
            assert!(
                window.in_flight() <= most,
                "{rate} {delay_us}: {}",
                window.in_flight()
            );
        }
    }

    #[test]
    fn a_long_link_stays_full_while_faults_are_about_and_its_queue_short() {
        let (rate, delay_us) = (125_000_000, 1_000);
        let window = drive(rate, delay_us, true, 20_000);
        let product = rate * delay_us / 1_000_000;
        assert!(window.rate() > rate * 9 / 10, "rate {}", window.rate());
        assert!(
            window.in_flight() <= product + product / 8 + 2 * CHUNK_BYTES_MIN,
            "{}",
            window.in_flight()
        );
    }

    #[test]
    fn a_rate_limit_holds_on_average() {
        let mut limit = RateLimit::new(10 << 20);
        let (mut now, mut sent) = (0, 0_u64);
        while now < 10_000_000 {
            match limit.wait_until_us(now) {
                Some(later) => {
                    assert!(later > now);
                    now = later;
                }
                None => {
                    limit.spend(64 << 10);
                    sent += 64 << 10;
                }
            }
        }
        let expected = 100 << 20;
        assert!(sent.abs_diff(expected) < 2 << 20, "{sent}");
        limit.spend(1 << 30);
        assert!(limit.wait_until_us(now).is_some());
        limit.lift(true);
        assert_eq!(limit.wait_until_us(now), None);
        limit.spend(1 << 30);
        limit.lift(false);
        let later = limit.wait_until_us(now);
        assert!(later.is_some_and(|later| later < now + 110_000_000));
    }
}
