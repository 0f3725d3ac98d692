//! Both ends of ferry in one process, with a page server that takes one session.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::criu::header::PageFlags;
use pageferry::engine::forward::SenderConfig;
use pageferry::engine::forward::{ForwardContext, forward_client};
use pageferry::engine::io::Io;
use pageferry::engine::io::transport::Peer;
use pageferry::engine::listening::sessions::{EndPolicy, Rules, run_sessions};
use pageferry::engine::listening::stop::Stop;
use pageferry::engine::receive::ReceiveContext;
use pageferry::engine::receive::ingest_modes::IngestOptions;
use pageferry::engine::receive::precopy_listener::{Handled, PrecopyListener};
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::frame;
use pageferry::observe::ferried::Forwarded;
use pageferry::observe::received::Received;
use pageferry::stream::Stream;
use pageferry::tls::Tls;
use socket2::Socket;

use crate::common::{FIRST_PAGE, PAGE, Run, naive_memory};
use crate::dump_bytes::send;

/// Time limit of both ends in tests of what cannot be repaired.
pub(crate) const SHORT: Duration = Duration::from_secs(2);
/// Time limit of both ends in all others.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A page server that takes one session.
pub(crate) struct FarEnd {
    pub(crate) address: SocketAddr,
    pub(crate) stop: Stop,
    thread: JoinHandle<Result<Received>>,
}

pub(crate) fn far_end(dir: &Path, previous: Option<&str>, time_limit: Duration) -> FarEnd {
    far_end_at((Ipv4Addr::LOCALHOST, 0).into(), dir, previous, time_limit)
}

pub(crate) fn far_end_at(
    address: SocketAddr,
    dir: &Path,
    previous: Option<&str>,
    time_limit: Duration,
) -> FarEnd {
    start(address, &store(dir, previous), time_limit, None, false)
}

/// As [`far_end`], with the directory opened as `options` says, and pages stored compressed.
pub(crate) fn far_end_with(options: &StoreOptions, compress: bool) -> FarEnd {
    start(
        (Ipv4Addr::LOCALHOST, 0).into(),
        options,
        LONG,
        None,
        compress,
    )
}

/// How `dir` is opened.
pub(crate) fn store(dir: &Path, previous: Option<&str>) -> StoreOptions {
    StoreOptions {
        previous: previous.map(PathBuf::from),
        ..StoreOptions::new(dir, PAGE)
    }
}

pub(crate) fn far_end_over_tls(dir: &Path, tls: Option<Tls>) -> FarEnd {
    start(
        (Ipv4Addr::LOCALHOST, 0).into(),
        &store(dir, None),
        LONG,
        tls,
        false,
    )
}

fn start(
    address: SocketAddr,
    options: &StoreOptions,
    time_limit: Duration,
    tls: Option<Tls>,
    compress: bool,
) -> FarEnd {
    std::fs::create_dir_all(&options.dir).unwrap();
    let stores = Stores::open(options.clone(), None).unwrap();
    let context = ReceiveContext {
        ingest: IngestOptions {
            compress,
            dedup_tree: options.dedup_tree,
            ..IngestOptions::default()
        },
        ..ReceiveContext::new(stores, Io::Epoll)
    };
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = Stop::default();
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        let listener = Socket::from(listener);
        let port = PrecopyListener::new(&context, &stop, time_limit, true)?;
        let rules = Rules {
            ends: EndPolicy::UntilShutDown,
            most: 100,
            allowed: Vec::new(),
        };
        let session = std::sync::Mutex::new(None);
        let ran = run_sessions(&listener, &rules, &stop, |stream, watched| {
            let Ok(mut stream) = stream.secure(tls.as_ref()) else {
                return Ok(());
            };
            if !stream.begins_with(frame::MAGIC).unwrap_or(false) {
                // It broke before it said anything.
                return Ok(());
            }
            let handled = port.handle(stream, watched, true);
            if !matches!(handled, Ok(Handled::Joined)) {
                // Gone already if the session is not the first.
                let _ = listener.shutdown(Shutdown::Both);
            }
            match handled? {
                Handled::Joined => Ok(()),
                Handled::Session(received, ended) => {
                    *session.lock().unwrap() = Some(*received);
                    ended
                }
            }
        });
        ran?;
        let received = session.into_inner().unwrap();
        received.ok_or_else(|| Error::new(Kind::PeerLost, "no session came"))
    });
    FarEnd {
        address,
        stop: stopped,
        thread,
    }
}

impl FarEnd {
    pub(crate) fn finish(self) -> Result<Received> {
        self.thread.join().unwrap()
    }
}

pub(crate) fn context(
    far_end: SocketAddr,
    streams: u16,
    cache: u64,
    time_limit: Duration,
) -> ForwardContext {
    let sender = SenderConfig {
        peer: Peer::parse(&far_end.to_string()).unwrap(),
        streams,
        reconnect_timeout: time_limit,
        delta_cache_bytes: cache,
        tls: None,
        stop: Stop::default(),
        traffic: Arc::default(),
    };
    ForwardContext::new(sender, None, PAGE, false)
}

/// Sends `bytes` as a dump through `context`; returns the answers as well.
pub(crate) fn forward(
    context: &ForwardContext,
    bytes: &[u8],
    piece: usize,
) -> (Result<Forwarded>, Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let dump = send(theirs, bytes.to_vec(), piece);
    let (forwarded, ended) = forward_client(Stream::plain(ours), context);
    (ended.map(|()| forwarded), dump.join().unwrap())
}

/// Pages enough for several batches, of all kinds.
pub(crate) fn many_pages(first_seed: u32) -> Vec<Run> {
    let lazy = PageFlags::LAZY;
    vec![
        Run::present(FIRST_PAGE, 40, lazy, first_seed),
        Run::present(FIRST_PAGE + 50, 200, PageFlags::default(), first_seed + 40),
        Run::absent(FIRST_PAGE + 300, 1000, lazy),
        Run::present(FIRST_PAGE + 2000, 300, lazy, first_seed + 300),
    ]
}

pub(crate) fn expected(levels: &[Vec<Run>]) -> BTreeMap<u64, Option<u32>> {
    naive_memory(levels)
}
