//! Peers that never come to have a session: a server in either role says who they were and what was
//! wrong with them, in the log, in the summary and to whoever watches its metrics.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod watch;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use common::{FIRST_PAGE, Run, TARGET, write_target};
use nix::sys::signal::Signal;
use pageferry::criu::header::{PageFlags, Wire};
use testbed::pki::{Authority, Host};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};
use watch::{expect_metrics, summaries};

/// Starts a server of `dir` that secures its connections.
fn start(dir: &Path, role: &[&str]) -> Spawned {
    let pki = dir.join("pki");
    fs::create_dir(&pki).unwrap();
    let authority = Authority::new(&pki, "ca").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command
        .args(["--address", "127.0.0.1", "--keep", "-v4", "-o", "log", "-D"])
        .arg(dir)
        .args(["--port-file", "port", "--summary-json", "sessions"])
        .args(["--metrics", "127.0.0.1:0"])
        .args(authority.issue(&Host::LOOPBACK).unwrap().options())
        .args(role)
        .stdin(Stdio::null());
    Spawned::start("page-server", &mut command, Some(dir.join("log"))).unwrap()
}

fn expect_logged(role: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::present(FIRST_PAGE, 1, PageFlags::LAZY, 1);
    write_target(dir.path(), TARGET, Wire::V2, 1, &[run]);
    let mut server = start(dir.path(), role);
    let read = |name: &str| fs::read_to_string(dir.path().join(name));
    let port = until("the port", GENEROUS, || Ok(read("port").ok())).unwrap();
    let port: u16 = port.trim().parse().unwrap();

    let cases: [(&[u8], &str); 2] = [
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak TLS"),
        (b"\x16", "hangs up"),
    ];
    for (number, (sent, reason)) in cases.into_iter().enumerate() {
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let peer = client.local_addr().unwrap().to_string();
        client.write_all(sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        // However it is ended.
        let _ = client.read_to_end(&mut Vec::new());
        let lines = summaries(&dir.path().join("sessions"), number + 1);
        let line = &lines[number];
        assert_eq!(line["peer"], peer);
        let error = line["error"].as_str().unwrap();
        assert!(error.contains(reason) && error.contains(&peer), "{error}");
        until("the error in the log", GENEROUS, || {
            Ok(read("log")?.contains(error).then_some(()))
        })
        .unwrap();
    }
    let failed = "pageferry_sessions_total{outcome=\"failed\"} 2";
    expect_metrics(&read("log").unwrap(), &[failed]);
    server.signal(Signal::SIGTERM).unwrap();
    server.succeed(GENEROUS).unwrap();
}

#[test]
fn a_receiving_server_tells_of_failed_handshakes() {
    expect_logged(&[]);
}

#[test]
fn a_serving_server_tells_of_failed_handshakes() {
    expect_logged(&["--lazy-pages"]);
}
