//! `page-server swrk FD`: what go-criu and P.Haul ask CRIU.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use common::{FIRST_PAGE, Run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::criu::rpc::{Options, Request, ServerInfo, kind};
use testbed::orphan::Orphan;
use testbed::swrk::{Swrk, parent_of};
use testbed::wait::GENEROUS;

fn start() -> Swrk {
    Swrk::start(Command::new(env!("CARGO_BIN_EXE_page-server"))).unwrap()
}

/// A request for a server that writes to `dir`.
fn request(kind: i32, dir: &fs::File) -> Request {
    Request {
        kind,
        options: Some(Options {
            images_dir_fd: dir.as_raw_fd(),
            log_level: Some(4),
            log_file: Some("server.log".to_owned()),
            server: Some(ServerInfo {
                address: Some("127.0.0.1".to_owned()),
                port: Some(0),
                ..ServerInfo::default()
            }),
            ..Options::default()
        }),
        ..Request::default()
    }
}

fn send_dump(server: &ServerInfo) {
    let port = u16::try_from(server.port.unwrap()).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let runs = vec![Run::present(FIRST_PAGE, 4, PageFlags::LAZY, 3)];
    let bytes = dump_bytes::dump(&[(Target::Process(7), runs)], Wire::V2);
    stream.write_all(&bytes).unwrap();
    let mut answers = [9; 5];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, [0; 5]);
}

#[test]
fn a_server_in_the_background_is_named_with_port_and_pid() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fs::File::open(tmp.path()).unwrap();
    let mut swrk = start();
    let answer = swrk.ask(&request(kind::PAGE_SERVER, &dir)).unwrap();
    assert!(
        answer.success && answer.kind == kind::PAGE_SERVER,
        "{answer:?}"
    );
    swrk.process.succeed(GENEROUS).unwrap();
    let server = answer.server.unwrap();
    let pid = server.pid.unwrap();
    let orphan = Orphan::new(pid).unwrap();
    assert_eq!(parent_of(pid).unwrap(), std::process::id() as i32);
    assert_eq!(
        nix::unistd::getsid(Some(Pid::from_raw(pid)))
            .unwrap()
            .as_raw(),
        pid
    );
    send_dump(&server);
    orphan.succeed().unwrap();
    assert!(tmp.path().join("pagemap-7.img").exists());
    let log = fs::read_to_string(tmp.path().join("server.log")).unwrap();
    assert!(log.contains(&format!(":{}", server.port.unwrap())), "{log}");
}

#[test]
fn a_child_server_can_be_waited_for() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fs::File::open(tmp.path()).unwrap();
    for how in ["a dump", "a signal"] {
        let swrk = start();
        let answer = swrk.ask(&Request {
            keep_open: Some(true),
            ..request(kind::PAGE_SERVER_CHLD, &dir)
        });
        let answer = answer.unwrap();
        assert!(
            answer.success && answer.kind == kind::PAGE_SERVER,
            "{answer:?}"
        );
        let server = answer.server.unwrap();
        let pid = server.pid.unwrap();
        assert_eq!(parent_of(pid).unwrap(), swrk.process.pid().as_raw());
        if how == "a dump" {
            send_dump(&server);
        } else {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        let ended = swrk.ask(&Request {
            kind: kind::WAIT_PID,
            pid: Some(pid.cast_unsigned()),
            ..Request::default()
        });
        let ended = ended.unwrap();
        assert!(ended.success && ended.kind == kind::WAIT_PID);
        let expected = if how == "a dump" { 0 } else { 9 };
        assert_eq!(ended.status, Some(expected), "after {how}");
        let other = swrk.ask(&Request {
            kind: kind::WAIT_PID,
            pid: Some(1),
            ..Request::default()
        });
        assert!(!other.unwrap().success);
        swrk.finish().unwrap();
    }
    assert!(tmp.path().join("pagemap-7.img").exists());
}

#[test]
fn what_cannot_be_done_is_answered() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fs::File::open(tmp.path()).unwrap();
    let good = request(kind::PAGE_SERVER_CHLD, &dir);
    let with = |change: &dyn Fn(&mut Options)| {
        let mut request = good.clone();
        change(request.options.as_mut().unwrap());
        request
    };
    let server = |change: &dyn Fn(&mut ServerInfo)| {
        with(&|options| change(options.server.as_mut().unwrap()))
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let cases = [
        (
            Request {
                kind: 1,
                ..good.clone()
            },
            "request 1",
        ),
        (
            with(&|options| options.images_dir_fd = -1),
            "images directory",
        ),
        (with(&|options| options.images_dir_fd = 99), "fd/99"),
        (
            with(&|options| options.log_file = Some("../x".into())),
            "../x",
        ),
        (
            with(&|options| options.parent_img = Some("gone".into())),
            "gone",
        ),
        (server(&|server| server.port = Some(70_000)), "70000"),
        (server(&|server| server.port = Some(port.into())), "in use"),
    ];
    for (request, word) in cases {
        let mut swrk = start();
        let answer = swrk.ask(&request).unwrap();
        let error = answer.error.unwrap_or_default();
        assert!(
            !answer.success && error.contains(word),
            "{error} lacks {word}"
        );
        swrk.process.fail(GENEROUS).unwrap();
    }
    let mut swrk = start();
    swrk.send(&[0xff; 100]).unwrap();
    swrk.process.fail(GENEROUS).unwrap();
    assert!(!Path::new(&tmp.path().join("pagemap-7.img")).exists());
}
