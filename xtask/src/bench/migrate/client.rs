//! A client outside of the process that is moved: it asks both hosts each millisecond, and notes the longest time
//! without an answer.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};
use testbed::net::NetNs;

/// How often it asks.
const TURN: Duration = Duration::from_millis(1);

/// A client that asks until it is ended.
#[derive(Debug)]
pub(super) struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Client {
    /// Starts one in `net` that asks at all `addresses`.
    pub(super) fn start(net: &NetNs, addresses: Vec<SocketAddr>) -> Result<Client> {
        let socket = net.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        socket.set_read_timeout(Some(TURN))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            let mut last = None;
            let mut asked = SystemTime::UNIX_EPOCH;
            while !stopped.load(Ordering::Relaxed) {
                let now = SystemTime::now();
                if now.duration_since(asked).is_ok_and(|since| since >= TURN) {
                    for address in &addresses {
                        // Nobody may be there at the moment.
                        let _ = socket.send_to(b"?", address);
                    }
                    asked = now;
                }
                if socket.recv(&mut [0; 64]).is_ok() {
                    let now = SystemTime::now();
                    let pause = last.and_then(|last| now.duration_since(last).ok());
                    longest = longest.max(pause.unwrap_or_default());
                    last = Some(now);
                }
            }
            longest
        });
        Ok(Client { stop, thread })
    }

    /// Ends it and tells the longest time without an answer.
    pub(super) fn end(self) -> Result<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(longest) => Ok(longest),
            Err(_) => bail!("the client panicked"),
        }
    }
}
