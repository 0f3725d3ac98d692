//! A forwarder between a dump, played by a page server on images, and clients, over loopback.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::criu::header::{PageFlags, Wire};
use pageferry::engine::forward_lazy::{ForwardLazy, ForwardLazyConfig};
use pageferry::engine::io::transport::Peer;
use pageferry::engine::listening::listen::{Place, Source};
use pageferry::engine::listening::sessions::{EndPolicy, Rules, run_sessions};
use pageferry::engine::listening::stop::Stop;
use pageferry::engine::serve::{ServeContext, serve_client};
use pageferry::error::Result;
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::proto::PstreeEntry;
use pageferry::limits::CLIENTS_MAX;

use crate::common::{FIRST_PAGE, PAGE, Run, TARGET, write_target};

pub(crate) const PID: u32 = 7;
/// Longer than any of these tests lasts on a busy machine: an answer that never comes fails here.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const PAGES: u64 = 3000;

pub(crate) fn loopback() -> Source {
    let address = Some("127.0.0.1".to_owned());
    Source::open(&Place::Tcp { address, port: 0 }).unwrap()
}

pub(crate) fn write_pstree(dir: &Path) {
    let file = File::create(dir.join("pstree.img")).unwrap();
    let mut writer = MessageWriter::new(file, Magic::Pstree).unwrap();
    writer
        .write(&PstreeEntry {
            pid: PID,
            ..PstreeEntry::default()
        })
        .unwrap();
}

/// A dump that keeps its pages for one client: what its session ended with.
pub(crate) fn dump(dir: &Path) -> (u16, thread::JoinHandle<Result<()>>) {
    let seeded = Run::present(FIRST_PAGE, PAGES, PageFlags::LAZY, 1);
    write_target(dir, TARGET, Wire::V2, 1, &[seeded]);
    let context = ServeContext::new(ImageDir::open(dir, PAGE).unwrap(), Some(Wire::V2));
    let source = loopback();
    let port = source.port().unwrap();
    let thread = thread::spawn(move || {
        let rules = Rules {
            ends: EndPolicy::UntilShutDown,
            most: 1,
            allowed: Vec::new(),
        };
        run_sessions(
            &source.socket,
            &rules,
            &Stop::default(),
            |stream, _watched| {
                source.socket.shutdown(std::net::Shutdown::Both).unwrap();
                serve_client(stream, &context).map(drop)
            },
        )
    });
    (port, thread)
}

/// Starts a forwarder of the dump at `port`; gives where it listens and what it ends with.
pub(crate) fn forwarder(
    dir: &Path,
    port: u16,
    reconnect_timeout: Duration,
) -> (SocketAddr, thread::JoinHandle<Result<()>>) {
    forwarder_with(dir, port, reconnect_timeout, None)
}

/// The same with an `idle_timeout`.
pub(crate) fn forwarder_with(
    dir: &Path,
    port: u16,
    reconnect_timeout: Duration,
    idle_timeout: Option<Duration>,
) -> (SocketAddr, thread::JoinHandle<Result<()>>) {
    write_pstree(dir);
    let lazy = Run::absent(FIRST_PAGE, PAGES, PageFlags::LAZY);
    write_target(dir, TARGET, Wire::V2, 1, &[lazy]);
    let config = ForwardLazyConfig {
        dump: Peer::Tcp {
            host: "127.0.0.1".to_owned(),
            port,
        },
        spill: None,
        wire: Some(Wire::V2),
        keep: false,
        reconnect_timeout,
        idle_timeout,
        wait: Duration::from_secs(10),
        traffic: Arc::default(),
        known_hashes: None,
    };
    let images = ImageDir::open(dir, PAGE).unwrap();
    let forward = ForwardLazy::connect(config, &images, None).unwrap();
    let source = loopback();
    let address = source.socket.local_addr().unwrap().as_socket().unwrap();
    let thread = thread::spawn(move || {
        let rules = Rules {
            ends: EndPolicy::UntilShutDown,
            most: CLIENTS_MAX,
            allowed: Vec::new(),
        };
        forward.run(&source, &rules, &Stop::default(), Ok, |_| {})
    });
    (address, thread)
}
