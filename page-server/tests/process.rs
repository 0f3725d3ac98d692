//! The page server as a process: what scripts, container runtimes and service managers rely on.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;
mod watch;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{FIRST_PAGE, Run};
use dump_bytes::{bare, bytes_of, frame};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry::criu::header::{PageFlags, Wire};
use place::{PID, Place, fail, open_frame, run, send_dump, succeed, whole_dump};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};
use watch::{expect_metrics, summaries};

#[test]
fn one_session_then_it_ends_by_itself() {
    for io in ["--io=epoll", "--sync=close", "--sync=always", "--wire=v2"] {
        let place = Place::new();
        let server = place.start(&[io]);
        send_dump(&mut place.connect());
        succeed(server);
        place.check_images();
        assert!(place.log().contains("100 pages"), "{}", place.log());
    }
}

#[test]
fn in_the_background_it_is_as_criu_is() {
    let place = Place::new();
    let status = place.root.path().join("status");
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    // The shell opens the descriptor that --status-fd names.
    let line = format!("exec \"$0\" \"$@\" 7>{}", status.display());
    let server = place.command(&["-d", "--pidfile", "pid", "--status-fd", "7"]);
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(line)
        .arg(server.get_program())
        .args(server.get_args());
    let output = testbed::process::run(&mut command).unwrap();
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
    // The first process has ended: everything is ready now, not soon.
    let pid: i32 = fs::read_to_string(place.work().join("pid"))
        .unwrap()
        .parse()
        .unwrap();
    let mut background = Background(Pid::from_raw(pid));
    assert_eq!(
        nix::unistd::getsid(Some(background.0)).unwrap(),
        background.0
    );
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
    assert_eq!(link("cwd"), place.work().canonicalize().unwrap());
    assert!((0..3).all(|fd| link(&format!("fd/{fd}")) == Path::new("/dev/null")));
    until("the status byte", GENEROUS, || {
        Ok((fs::read(&status)? == [0]).then_some(()))
    })
    .unwrap();
    assert_ne!(
        fs::read_link(format!("/proc/{pid}/fd/7")).ok(),
        Some(status)
    );
    send_dump(&mut place.connect());
    background.succeed();
    place.check_images();
}

/// A background process, which comes to this one when its parent ends; killed if a test fails.
struct Background(Pid);

impl Background {
    /// Waits for its end, which must be a success.
    fn succeed(&mut self) {
        let ended = until("the server's end", GENEROUS, || {
            let status = waitpid(self.0, Some(WaitPidFlag::WNOHANG))?;
            Ok((status != WaitStatus::StillAlive).then_some(status))
        });
        assert_eq!(ended.unwrap(), WaitStatus::Exited(self.0, 0));
        self.0 = Pid::from_raw(0);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.0.as_raw() > 0 {
            let _ = kill(self.0, Signal::SIGKILL);
        }
    }
}

#[test]
fn the_log_is_there_from_the_start_and_errors_are_on_stderr_too() {
    let place = Place::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = place.command(&["--port", &port]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains(&port) && place.log().contains(&port),
        "{error}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn command_lines_are_read_as_criu_reads_them() {
    let place = Place::new();
    let server = place.start(&["--ghost-limit", "1M", "--no-default-config", "-j"]);
    send_dump(&mut place.connect());
    succeed(server);
    for word in ["--ghost-limit", "--shell-job"] {
        assert!(place.log().contains(word), "{word}");
    }
    // It is understood, and not skipped.
    assert!(!place.log().contains("--no-default-config"));
    for (options, word) in [
        (&["--bogus"][..], "--bogus"),
        (&["lazy-pages"], "lazy-pages"),
        (&["--keep", "--max-sessions", "0"], "max-sessions"),
        (&["--max-sessions", "2"], "--keep"),
        (&["--idle-timeout", "-1"], "idle-timeout"),
        (
            &["--reconnect-timeout", "18446744073709551615"],
            "reconnect-timeout",
        ),
        (&["--delta-cache", "1M"], "--forward"),
        (&["--lazy-pages", "--sync", "close"], "--sync"),
        (&["--allow", "everybody"], "allow"),
        (&["--images-dir-template", "../x"], "images-dir-template"),
        (&["--ps-socket", "99"], "--ps-socket"),
        (&["--status-fd", "1", "--ps-socket", "1"], "two purposes"),
        (&["--prev-images-dir", "nowhere"], "nowhere"),
    ] {
        let output = place.command(options).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(word), "{error} lacks {word}");
    }
}

#[test]
fn other_sockets_work_too() {
    let place = Place::new();
    let server = place.start(&["--unix", "socket"]);
    let path = place.work().join("socket");
    let mut stream = until("the socket", GENEROUS, || {
        Ok(UnixStream::connect(&path).ok())
    })
    .unwrap();
    send_dump(&mut stream);
    drop(stream);
    succeed(server);
    assert!(!path.exists());
    place.check_images();

    let place = Place::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut command = place.command(&["--ps-socket", "1"]);
    command.stdout(OwnedFd::from(theirs));
    let server = Spawned::start("page-server", &mut command, None).unwrap();
    drop(command);
    send_dump(&mut ours);
    drop(ours);
    succeed(server);
    place.check_images();

    // systemd: a listening socket as descriptor 3, and LISTEN_PID naming the process.
    let place = Place::new();
    let path = place.work().join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    let server = place.command(&[]);
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&1 1>&2",
        ])
        .arg(server.get_program())
        .args(server.get_args())
        .stdout(OwnedFd::from(listener));
    let server = Spawned::start("page-server", &mut command, None).unwrap();
    drop(command);
    let mut stream = UnixStream::connect(&path).unwrap();
    send_dump(&mut stream);
    drop(stream);
    succeed(server);
    place.check_images();
}

#[test]
fn a_session_that_is_cut_fails_and_leaves_nothing() {
    let place = Place::new();
    let server = place.start(&[]);
    let dump = whole_dump();
    let mut stream = place.connect();
    stream.write_all(&dump[..dump.len() / 2]).unwrap();
    drop(stream);
    fail(server);
    assert_eq!(place.image_names(), [""; 0]);
    let log = place.log();
    assert!(
        log.contains("pid 7 at 0x1000000") && log.contains("127.0.0.1"),
        "{log}"
    );
}

#[test]
fn a_signal_ends_it_in_order_and_a_kill_is_cleaned_up_later() {
    let place = Place::new();
    let mut server = place.start(&[]);
    let mut stream = place.connect();
    stream.write_all(&open_frame()).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    assert_eq!(place.image_names().len(), 2, "two parts");
    server.signal(Signal::SIGTERM).unwrap();
    fail(server);
    assert_eq!(place.image_names(), [""; 0]);

    let mut server = place.start(&[]);
    let mut stream = place.connect();
    stream.write_all(&open_frame()).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    server.kill().unwrap();
    assert!(
        place
            .image_names()
            .iter()
            .all(|name| name.ends_with(".part"))
    );
    let server = place.start(&[]);
    place.wait_for("port");
    assert_eq!(place.image_names(), [""; 0]);
    send_dump(&mut place.connect());
    succeed(server);

    // Nothing is lost when it only waits.
    let place = Place::new();
    let mut server = place.start(&["--keep"]);
    place.wait_for("port");
    server.signal(Signal::SIGINT).unwrap();
    succeed(server);
}

#[test]
fn kept_servers_take_sessions_from_whom_they_may() {
    let place = Place::new();
    let mut server = place.start(&[
        "--keep",
        "--images-dir-template",
        "{peer}/{seq}",
        "--allow",
        "127.0.0.1",
        "--allow",
        "10.0.0.0/8",
        "--max-sessions",
        "1",
    ]);
    let mut first = place.connect();
    first.write_all(&open_frame()).unwrap();
    first.read_exact(&mut [0]).unwrap();
    // One too many: the connection is reset.
    assert!(place.connect().read_exact(&mut [0]).is_err());
    drop(first);
    let ended = || Ok(place.log().contains("without CLOSE").then_some(()));
    until("the end of the first session", GENEROUS, ended).unwrap();
    send_dump(&mut place.connect());
    let dirs: Vec<_> = place
        .images()
        .join("127.0.0.1")
        .read_dir()
        .unwrap()
        .collect();
    assert_eq!(dirs.len(), 1);
    server.signal(Signal::SIGTERM).unwrap();
    server.wait(GENEROUS).unwrap();

    let place = Place::new();
    let mut server = place.start(&["--keep", "--allow", "10.0.0.0/8"]);
    assert!(place.connect().read_exact(&mut [0]).is_err());
    server.signal(Signal::SIGTERM).unwrap();
    succeed(server);
    assert!(place.log().contains("--allow"));
}

/// A small file system of its own, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf) -> SmallDisk {
        let options = Some("size=128k");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        SmallDisk(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    if testbed::gate::root().is_none() {
        return;
    }
    for (io, runs) in [
        // 100 pages as one large frame, or one by one.
        ("--io=epoll", vec![run()]),
        ("--io=uring", vec![run()]),
        (
            "--io=epoll",
            (0..100)
                .map(|at| Run::present(FIRST_PAGE + at, 1, PageFlags::LAZY, 3))
                .collect(),
        ),
        (
            "--io=uring",
            (0..100)
                .map(|at| Run::present(FIRST_PAGE + at, 1, PageFlags::LAZY, 3))
                .collect(),
        ),
    ] {
        let place = Place::new();
        let _disk = SmallDisk::mount(place.images());
        let server = place.start(&[io]);
        let mut stream = place.connect();
        stream.write_all(&open_frame()).unwrap();
        for run in &runs {
            // The server may hang up half way.
            if stream.write_all(&frame(PID, run, Wire::V2)).is_err() {
                break;
            }
        }
        let close = bytes_of(&bare(pageferry::criu::header::Op::Close, PID), Wire::V2);
        let _ = stream.write_all(&close);
        fail(server);
        let log = place.log();
        assert!(
            log.contains("pages-65537.img") && log.contains("make room"),
            "{log}"
        );
        assert!(log.contains("pid 7 at 0x"), "{log}");
        assert_eq!(place.image_names(), [""; 0]);
    }
}

#[test]
fn sessions_are_summed_up_in_json_and_metrics() {
    let place = Place::new();
    let options = [
        "--keep",
        "--summary-json",
        "sessions",
        "--metrics",
        "127.0.0.1:0",
    ];
    let mut server = place.start(&options);
    send_dump(&mut place.connect());
    let dump = whole_dump();
    let mut cut = place.connect();
    cut.write_all(&dump[..dump.len() / 2]).unwrap();
    drop(cut);
    let lines = summaries(&place.sessions(), 2);
    let (stored, cut): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["stored"] == true);
    assert_eq!(stored[0]["pages"]["received"], 100);
    assert_eq!(stored[0]["kept"]["stored_bytes"], 100 * 4096);
    assert_eq!(stored[0]["wire_bytes"], dump.len());
    assert_eq!(stored[0]["wire"], "v2");
    assert_eq!(cut[0]["targets"], 1);
    assert!(cut[0]["error"].as_str().unwrap().contains("pid 7"));

    let lines = [
        "pageferry_sessions_total{outcome=\"succeeded\"} 1",
        "pageferry_sessions_total{outcome=\"failed\"} 1",
        "pageferry_sessions_running 0",
        "pageferry_stored_bytes_total",
    ];
    expect_metrics(&place.log(), &lines);
    server.signal(Signal::SIGTERM).unwrap();
    succeed(server);
}

#[test]
fn a_summary_that_cannot_be_written_costs_no_dump() {
    let place = Place::new();
    let server = place.start(&["--summary-json", "/dev/full"]);
    send_dump(&mut place.connect());
    succeed(server);
    place.check_images();
    let log = place.log();
    assert!(log.contains("write the summary to /dev/full"), "{log}");
}
