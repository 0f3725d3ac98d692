//! What a page server has moved so far, counted while it moves: for the progress display and for
//! metrics. Counters of all sessions together; they only grow, but for the running sessions.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

use super::ferried::ByKind;
use super::progress::Snapshot;

/// The counters of a page server.
#[derive(Debug, Default)]
pub struct Traffic {
    running: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    received: [AtomicU64; ReceivedKind::ALL.len()],
    wire_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    served_requests: AtomicU64,
    served_pages: AtomicU64,
    served_bytes: AtomicU64,
    forwarded_pages: [AtomicU64; ByKind::COUNT],
    forwarded_bytes: [AtomicU64; ByKind::COUNT],
    frame_bytes: AtomicU64,
}

/// Kinds of pages that a dump speaks of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReceivedKind {
    /// Their bytes came.
    Received,
    /// Of these, the ones that came compressed.
    Compressed,
    /// They are said to be in the parent.
    InParent,
    /// They stayed with the source.
    WithSource,
    /// Their bytes came, and were found in the parent.
    SameAsParent,
    /// Their bytes came, and were found in another process of the tree.
    SameInTree,
    /// Their bytes came, and were all zero.
    Zero,
}

impl ReceivedKind {
    const ALL: [ReceivedKind; 7] = [
        ReceivedKind::Received,
        ReceivedKind::Compressed,
        ReceivedKind::InParent,
        ReceivedKind::WithSource,
        ReceivedKind::SameAsParent,
        ReceivedKind::SameInTree,
        ReceivedKind::Zero,
    ];

    fn name(self) -> &'static str {
        match self {
            ReceivedKind::Received => "received",
            ReceivedKind::Compressed => "compressed",
            ReceivedKind::InParent => "in_parent",
            ReceivedKind::WithSource => "with_source",
            ReceivedKind::SameAsParent => "same_as_parent",
            ReceivedKind::SameInTree => "same_in_tree",
            ReceivedKind::Zero => "zero",
        }
    }
}

/// A session that is running, until this is dropped: as failed, unless it was said to have succeeded.
#[derive(Debug)]
pub struct RunningSession<'a> {
    traffic: &'a Traffic,
    succeeded: bool,
}

impl RunningSession<'_> {
    /// The session has succeeded.
    pub fn succeed(mut self) {
        self.succeeded = true;
    }
}

impl Drop for RunningSession<'_> {
    fn drop(&mut self) {
        self.traffic.running.fetch_sub(1, Ordering::Relaxed);
        let ended = match self.succeeded {
            true => &self.traffic.succeeded,
            false => &self.traffic.failed,
        };
        add(ended, 1);
    }
}

impl Traffic {
    /// A session begins.
    pub fn begin_session(&self) -> RunningSession<'_> {
        add(&self.running, 1);
        RunningSession {
            traffic: self,
            succeeded: false,
        }
    }

    /// A dump spoke of `pages` pages.
    pub fn received(&self, kind: ReceivedKind, pages: u64) {
        add(&self.received[kind as usize], pages);
    }

    /// `bytes` bytes came from a dump.
    pub fn came(&self, bytes: u64) {
        add(&self.wire_bytes, bytes);
    }

    /// `bytes` bytes went to pages files.
    pub fn stored(&self, bytes: u64) {
        add(&self.stored_bytes, bytes);
    }

    /// `requests` requests were answered with `pages` pages of `bytes` bytes in all.
    pub fn served(&self, requests: u64, pages: u64, bytes: u64) {
        add(&self.served_requests, requests);
        add(&self.served_pages, pages);
        add(&self.served_bytes, bytes);
    }

    /// Pages went to a far end.
    pub fn forwarded(&self, kinds: &ByKind) {
        let counters = self.forwarded_pages.iter().zip(&self.forwarded_bytes);
        for ((pages, bytes), (_, carried)) in counters.zip(kinds.named()) {
            add(pages, carried.pages);
            add(bytes, carried.bytes);
        }
    }

    /// A frame of `bytes` bytes is on its way to a far end.
    pub fn forwarded_frame(&self, bytes: u64) {
        add(&self.frame_bytes, bytes);
    }

    /// How far the server is, for people. Nobody knows how much is still to come.
    pub fn snapshot(&self) -> Snapshot {
        let received = get(&self.received[ReceivedKind::Received as usize]);
        Snapshot {
            done_pages: received + get(&self.served_pages) + sum(&self.forwarded_pages),
            total_pages: 0,
            bytes: get(&self.wire_bytes) + get(&self.served_bytes) + get(&self.frame_bytes),
            note: format!("{} sessions", get(&self.running)),
        }
    }

    /// The counters in the text format of Prometheus.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        gauge(
            &mut out,
            "sessions_running",
            "Sessions that run now.",
            get(&self.running),
        );
        let outcomes = [("succeeded", &self.succeeded), ("failed", &self.failed)];
        let outcomes = outcomes.map(|(name, counter)| (name, get(counter)));
        labelled(
            &mut out,
            "sessions_total",
            "Sessions that are over.",
            "outcome",
            &outcomes,
        );
        let kinds = ReceivedKind::ALL.map(|kind| (kind.name(), get(&self.received[kind as usize])));
        labelled(
            &mut out,
            "received_pages_total",
            "Pages that dumps announced.",
            "kind",
            &kinds,
        );
        self.prometheus_forwarded(&mut out);
        for (name, help, counter) in [
            (
                "received_wire_bytes_total",
                "Bytes that came from dumps.",
                &self.wire_bytes,
            ),
            (
                "stored_bytes_total",
                "Bytes that went to pages files.",
                &self.stored_bytes,
            ),
            (
                "served_requests_total",
                "Requests for pages answered.",
                &self.served_requests,
            ),
            (
                "served_pages_total",
                "Pages sent to lazy restores.",
                &self.served_pages,
            ),
            (
                "served_bytes_total",
                "Bytes of pages sent to lazy restores.",
                &self.served_bytes,
            ),
            (
                "forwarded_frame_bytes_total",
                "Bytes of frames for far ends.",
                &self.frame_bytes,
            ),
        ] {
            sample(&mut out, name, help, "counter", get(counter));
        }
        let cpu = cpu_time().as_secs_f64();
        sample(
            &mut out,
            "cpu_seconds_total",
            "CPU time of this process.",
            "counter",
            cpu,
        );
        out
    }
}

impl Traffic {
    fn prometheus_forwarded(&self, out: &mut String) {
        let names = ByKind::default().named().map(|(name, _)| name);
        for (name, help, counters) in [
            (
                "forwarded_pages_total",
                "Pages sent to far ends, by the way they went.",
                &self.forwarded_pages,
            ),
            (
                "forwarded_bytes_total",
                "Bytes of these pages on the wire.",
                &self.forwarded_bytes,
            ),
        ] {
            let values: Vec<_> = names.into_iter().zip(counters.iter().map(get)).collect();
            labelled(out, name, help, "kind", &values);
        }
    }
}

/// CPU time that this process has used, all threads together, in user and kernel mode.
pub fn cpu_time() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return Duration::ZERO;
    };
    let micros = |time: nix::sys::time::TimeVal| {
        let micros = time.tv_sec() * 1_000_000 + time.tv_usec();
        Duration::from_micros(micros.unsigned_abs())
    };
    micros(usage.user_time()) + micros(usage.system_time())
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn sum(counters: &[AtomicU64]) -> u64 {
    counters.iter().map(get).sum()
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn gauge(out: &mut String, name: &str, help: &str, value: u64) {
    sample(out, name, help, "gauge", value);
}

fn sample(out: &mut String, name: &str, help: &str, kind: &str, value: impl std::fmt::Display) {
    head(out, name, help, kind);
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(out, "pageferry_{name} {value}");
}

fn labelled(out: &mut String, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
    head(out, name, help, "counter");
    for (which, value) in values {
        let _ = writeln!(out, "pageferry_{name}{{{label}=\"{which}\"}} {value}");
    }
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(
        out,
        "# HELP pageferry_{name} {help}\n# TYPE pageferry_{name} {kind}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_to_prometheus_and_people() {
        let traffic = Traffic::default();
        let first = traffic.begin_session();
        traffic.begin_session().succeed();
        drop(traffic.begin_session());
        traffic.received(ReceivedKind::Received, 7);
        traffic.received(ReceivedKind::Zero, 2);
        traffic.came(7 * 4096);
        traffic.served(1, 3, 3 * 4096);
        let mut kinds = ByKind::default();
        (kinds.delta.pages, kinds.delta.bytes) = (5, 99);
        traffic.forwarded(&kinds);
        traffic.forwarded_frame(130);
        let text = traffic.prometheus();
        for line in [
            "# TYPE pageferry_sessions_running gauge",
            "pageferry_sessions_running 1",
            "pageferry_sessions_total{outcome=\"succeeded\"} 1",
            "pageferry_sessions_total{outcome=\"failed\"} 1",
            "# TYPE pageferry_received_pages_total counter",
            "pageferry_received_pages_total{kind=\"received\"} 7",
            "pageferry_received_pages_total{kind=\"zero\"} 2",
            "pageferry_received_wire_bytes_total 28672",
            "pageferry_served_pages_total 3",
            "pageferry_forwarded_pages_total{kind=\"delta\"} 5",
            "pageferry_forwarded_bytes_total{kind=\"delta\"} 99",
            "pageferry_forwarded_bytes_total{kind=\"raw\"} 0",
            "pageferry_forwarded_frame_bytes_total 130",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert_eq!(traffic.snapshot().done_pages, 15);
        assert_eq!(traffic.snapshot().note, "1 sessions");
        first.succeed();
        assert_eq!(traffic.snapshot().note, "0 sessions");
    }

    #[test]
    fn cpu_time_grows() {
        let before = cpu_time();
        let mut sum = 0u64;
        while cpu_time() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_time() > before);
    }
}
