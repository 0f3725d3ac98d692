//! hack
use super::Restore;
use crate::lazy::planner::SpaceId;
use crate::lazy::space::Served;

pub(super) fn env(name: &'static str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[derive(Debug)]
pub(super) struct Held {
    threads: Vec<(SpaceId, Served)>,
    bytes: u64,
    until_us: u64,
    pub(super) max_bytes: u64,
    max_us: u64,
    pub(super) n: [u64; 8],
    pub(super) quiet: Option<(SpaceId, u64, u64)>,
    pub(super) wq: u64,
}

impl Held {
    pub(super) fn new() -> Held {
        Held { threads: Vec::new(), bytes: 0, until_us: 0, max_bytes: env("P_WB", 1 << 20), max_us: env("P_WU", 1000), n: [0; 8], quiet: None, wq: env("P_WQ", 1) }
    }
    pub(super) fn until_us(&self) -> Option<u64> {
        (!self.threads.is_empty()).then_some(self.until_us)
    }
}

impl Restore {
    pub(super) fn hold(&mut self, id: SpaceId, served: Served, now_us: u64) {
        if self.held.threads.is_empty() {
            self.held.until_us = now_us + self.held.max_us;
            self.held.bytes = 0;
        }
        self.held.threads.push((id, served));
    }
    pub(super) fn held_filled(&mut self, bytes: u64) {
        self.held.bytes += bytes;
        if !self.held.threads.is_empty() && self.held.bytes >= self.held.max_bytes {
            self.held.n[0] += 1;
            self.release();
        }
    }
    pub(super) fn release_due(&mut self) {
        if self.held.threads.is_empty() { return; }
        if { let d = self.clock.now_us() >= self.held.until_us; if d { self.held.n[1] += 1 } else if self.links.in_flight() == 0 { self.held.n[2] += 1 }; d } || self.links.in_flight() == 0 {
            self.release();
        }
    }
    pub(super) fn release(&mut self) {
        let now_us = self.clock.now_us();
        for (id, thread) in std::mem::take(&mut self.held.threads) {
            let pid = self.processes.get(&id).map_or(0, |process| process.pid);
            self.observer.served(pid, &thread, now_us);
            self.wake(id, &[thread]);
        }
    }

    pub(super) fn held_n(&mut self, later: bool) { self.held.n[if later {3} else {4}] += 1; }

    pub(super) fn quieted(&mut self, id: SpaceId, start: u64, end: u64) {
        self.held.quiet = match self.held.quiet {
            Some((other, first, last)) if other == id && last == start => Some((id, first, end)),
            _ => Some((id, start, end)),
        };
    }
    pub(super) fn was_quieted(&self, id: SpaceId, page: u64) -> bool {
        self.held.quiet.is_some_and(|(other, start, end)| other == id && (start..end).contains(&page))
    }
}
