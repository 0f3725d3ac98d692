//! What tells how long a process stood still: from inside, and to a client outside.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// How often the thread wakes.
const TURN: Duration = Duration::from_millis(1);

/// Longest datagram that is answered.
const DATAGRAM_BYTES: usize = 64;

/// The longest pause so far, µs.
#[derive(Debug)]
pub(crate) struct Probe(Arc<AtomicU64>);

impl Probe {
    /// Starts both threads.
    pub(crate) fn start(port: u16) -> Result<Probe> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).context("the probe's port")?;
        std::thread::spawn(move || {
            let mut datagram = [0; DATAGRAM_BYTES];
            loop {
                if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                    // Who asks may be gone.
                    let _ = socket.send_to(&datagram[..length], from);
                }
            }
        });
        let longest = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&longest);
        std::thread::spawn(move || {
            // A restored process's CLOCK_MONOTONIC goes on where it stopped: it shows no pause.
            let mut last = SystemTime::now();
            loop {
                std::thread::sleep(TURN);
                let now = SystemTime::now();
                let pause = now.duration_since(last).unwrap_or_default();
                let pause = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
                shared.fetch_max(pause, Ordering::Relaxed);
                last = now;
            }
        });
        Ok(Probe(longest))
    }

    /// The longest pause since the last time that it was asked for, µs.
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}
