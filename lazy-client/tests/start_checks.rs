//! Mistakes that lazy-client finds when it is started, and what it waits for then.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/process_images.rs"]
mod process_images;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use common::{FIRST_PAGE, Run};
use nix::sys::signal::Signal;
use pageferry::criu::header::PageFlags;
use process_images::{expect_error, whole, write_process};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};

fn start(dir: &Path, args: &[&str]) -> Spawned {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-client"));
    command
        .current_dir(dir)
        .args(["-v4", "-o", "log"])
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    Spawned::start("lazy-client", &mut command, Some(dir.join("log"))).unwrap()
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log")).unwrap_or_default()
}

fn expect_log(dir: &Path, words: &str) {
    until(words, GENEROUS, || {
        Ok(log(dir).contains(words).then_some(()))
    })
    .unwrap_or_else(|_| panic!("{words:?} is not in {}", log(dir)));
}

fn expect_refused(dir: &Path, args: &[&str], words: &[&str]) {
    expect_error(start(dir, args), dir, words);
}

fn with_source() -> Vec<Run> {
    vec![Run::absent(FIRST_PAGE, 4, PageFlags::LAZY)]
}

fn in_parent() -> Vec<Run> {
    let flags = PageFlags::PARENT.with(PageFlags::LAZY);
    vec![Run::absent(FIRST_PAGE, 4, flags)]
}

#[test]
fn images_that_need_a_source_are_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    write_process(dir.path(), &with_source());
    expect_refused(dir.path(), &["--wait", "1000"], &["--page-server", "pid 7"]);
    let nowhere = [
        "--page-server",
        "--address",
        "no-such-host.invalid",
        "--port",
        "7",
    ];
    expect_refused(dir.path(), &nowhere, &["cannot be found"]);
    expect_refused(
        dir.path(),
        &["--page-server", "--address", "127.0.0.1:7", "--port", "7"],
        &[],
    );
}

#[test]
fn local_images_that_are_not_whole_are_refused() {
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 6] = [
        (
            |dir| fs::remove_file(dir.join("pages-1.img")).unwrap(),
            "missing",
        ),
        (
            |dir| fs::write(dir.join("pages-1.img"), "").unwrap(),
            "cut short",
        ),
        (
            |dir| fs::remove_file(dir.join("pagemap-7.img")).unwrap(),
            "pagemap of pid 7",
        ),
        (
            |dir| fs::write(dir.join("pagemap-7.img"), "").unwrap(),
            "pagemap-7.img",
        ),
        (
            |dir| fs::remove_file(dir.join("mm-7.img")).unwrap(),
            "mm-7.img",
        ),
        (
            |dir| fs::remove_file(dir.join("pstree.img")).unwrap(),
            "pstree.img",
        ),
    ];
    for (damage, word) in cases {
        let dir = tempfile::tempdir().unwrap();
        write_process(dir.path(), &whole());
        damage(dir.path());
        expect_refused(dir.path(), &["--wait", "0"], &[word]);
    }
}

#[test]
fn broken_chains_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let [first, second] = ["1", "2"].map(|name| root.path().join(name));
    for dir in [&first, &second] {
        fs::create_dir(dir).unwrap();
    }
    write_process(&first, &whole());
    write_process(&second, &in_parent());
    expect_refused(&second, &["--wait", "0"], &["parent"]);
    let link = second.join("parent");
    symlink("../2", &link).unwrap();
    // Whatever is waited for, this stays as it is.
    expect_refused(&second, &["--wait", "1000"], &["come back"]);
    let ferry = ["--ferry", "--page-server", "--port", "7", "--wait", "1000"];
    fs::remove_file(&link).unwrap();
    for name in [".", "../2", "../2/", second.to_str().unwrap()] {
        let args = [&ferry[..], &["--prev-images-dir", name]].concat();
        expect_refused(&second, &args, &["itself"]);
    }
    // Nobody but the parent has them.
    let at_once = ["--ferry", "--page-server", "--port", "7", "--wait", "0"];
    expect_refused(&second, &at_once, &["parent"]);
}

#[test]
fn the_socket_of_a_living_process_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    write_process(dir.path(), &whole());
    let path = dir.path().join("lazy-pages.socket");
    let other = UnixListener::bind(&path).unwrap();
    other.set_nonblocking(true).unwrap();
    expect_refused(
        dir.path(),
        &[],
        &["another process listens", "lazy-pages.socket"],
    );
    // It was not even connected to, and is still found by its name.
    assert!(other.accept().is_err());
    drop(UnixStream::connect(&path).unwrap());
    other.accept().unwrap();
    drop(other);
    // A socket that was left behind is no obstacle.
    let mut client = start(dir.path(), &[]);
    restore_nothing(&path);
    client.succeed(GENEROUS).unwrap();
}

/// Connects as soon as somebody listens.
fn connect(socket: &Path) -> UnixStream {
    let connected = until("the socket", GENEROUS, || {
        Ok(UnixStream::connect(socket).ok())
    });
    connected.unwrap()
}

/// Says what a restore says that has no process with memory.
fn restore_nothing(socket: &Path) {
    connect(socket).write_all(b"FTSR").unwrap();
}

#[test]
fn who_connects_without_a_word_is_no_restore() {
    let dir = tempfile::tempdir().unwrap();
    write_process(dir.path(), &whole());
    let mut client = start(dir.path(), &[]);
    let socket = dir.path().join("lazy-pages.socket");
    drop(connect(&socket));
    let _silent = connect(&socket);
    connect(&socket).write_all(b"GET / HTTP/1.1").unwrap();
    expect_log(dir.path(), "ended without a message");
    expect_log(dir.path(), "is from no restore");
    restore_nothing(&socket);
    client.succeed(GENEROUS).unwrap();
}

#[test]
fn the_images_and_the_source_are_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let port = address.port().to_string();
    let args = ["--page-server", "--port", &port, "--wait", "1000"];
    let mut client = start(dir.path(), &args);
    expect_log(dir.path(), "warning: there is no");
    assert!(log(dir.path()).contains("pstree.img"));
    write_process(dir.path(), &with_source());
    expect_log(dir.path(), "images of 1 processes");
    let listener = TcpListener::bind(address).unwrap();
    drop(listener.accept().unwrap());
    expect_log(dir.path(), "connected to the source");
    client.signal(Signal::SIGTERM).unwrap();
    client.fail(GENEROUS).unwrap();

    // A signal ends the wait.
    drop(listener);
    fs::remove_file(dir.path().join("log")).unwrap();
    let mut client = start(dir.path(), &args);
    expect_log(dir.path(), "waiting for up to 1000 s");
    client.signal(Signal::SIGTERM).unwrap();
    client.fail(GENEROUS).unwrap();
    assert!(log(dir.path()).contains("signal"), "{}", log(dir.path()));
}

#[test]
fn a_trace_is_read_where_it_is_written() {
    let root = tempfile::tempdir().unwrap();
    let [images, work] = ["images", "work"].map(|name| root.path().join(name));
    for dir in [&images, &work] {
        fs::create_dir(dir).unwrap();
    }
    write_process(&images, &whole());
    let dirs = ["-D", "images", "-W", "work"];
    let mut client = start(root.path(), &[&dirs[..], &["--trace", "faults"]].concat());
    restore_nothing(&work.join("lazy-pages.socket"));
    client.succeed(GENEROUS).unwrap();
    assert!(work.join("faults").exists());
    let read = Command::new(env!("CARGO_BIN_EXE_lazy-client"))
        .current_dir(root.path())
        .args([&dirs[..], &["--read-trace", "faults"]].concat())
        .output()
        .unwrap();
    assert!(read.status.success(), "{read:?}");
    assert!(read.stdout.starts_with(b"time_us,pid"), "{read:?}");
}
