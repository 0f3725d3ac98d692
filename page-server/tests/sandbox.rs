//! What a page server cannot do any more once it serves, in each role; that it still does its work then; and what it says
//! where a kernel lacks a part.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{FIRST_PAGE, Images, page_content};
use dump_bytes::{bytes_of, header};
use nix::libc;
use nix::unistd::{Pid, geteuid};
use pageferry::criu::header::{Op, PageFlags, Wire};
use place::{PID, Place, fail, open_frame, run, send_dump, succeed};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use testbed::gate;
use testbed::process::Spawned;

/// A user who owns nothing, as on most systems.
const NOBODY: u32 = 65534;

/// What was tried, and how it ended.
type Attempts = BTreeMap<String, String>;

fn attempts(output: &Output) -> Attempts {
    let text = String::from_utf8_lossy(&output.stdout);
    let attempts: Attempts = text
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, ended)| (name.to_owned(), ended.to_owned()))
        .collect();
    assert_eq!(attempts.len(), 12, "{output:?}");
    attempts
}

/// Starts a page server with `args` in `dir` that tries what it should not be able to do.
fn tried(dir: &Path, args: &[&str]) -> Attempts {
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command.args(["--address", "127.0.0.1", "--sandbox-check", "-D"]);
    attempts(&command.arg(dir).args(args).output().unwrap())
}

/// Whether this kernel has all that is required.
fn complete() -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command.args(["--address", "127.0.0.1", "--sandbox-check"]);
    command.args(["--sandbox", "require", "-D"]).arg(dir.path());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    gate::need(
        "Landlock and seccomp",
        output.status.success().then_some(()).ok_or(stderr),
    )
}

#[track_caller]
fn expect(attempts: &Attempts, table: &[(&str, &str)]) {
    for (name, ended) in table {
        assert!(
            attempts[*name].contains(ended),
            "{name}: {}, not {ended}",
            attempts[*name]
        );
    }
}

/// What no role can do.
const NO_ROLE: [(&str, &str); 9] = [
    ("read a file elsewhere", "Permission denied"),
    ("look at another process", "Permission denied"),
    ("signal another process", "not implemented"),
    ("start a program", "not implemented"),
    ("execute a missing program", "not implemented"),
    ("make a namespace", "not implemented"),
    ("connect", "Permission denied"),
    ("listen", "Permission denied"),
    ("make memory executable", "not implemented"),
];

#[test]
fn each_role_has_what_it_needs_and_no_more() {
    let Some(()) = complete() else { return };
    let dir = tempfile::tempdir().unwrap();
    let receives = tried(dir.path(), &[]);
    expect(&receives, &NO_ROLE);
    expect(
        &receives,
        &[
            ("make a file in the images directory", "done"),
            ("make a file elsewhere", "Permission denied"),
            ("start a thread", "done"),
        ],
    );

    let writes_nothing = [
        (
            "make a file in the images directory",
            "Operation not permitted",
        ),
        ("make a file elsewhere", "Operation not permitted"),
        ("start a thread", "done"),
    ];
    let images = Images::of(&[vec![run()]], Wire::V2);
    let served = tried(&images.dirs[0], &["--lazy-pages"]);
    expect(&served, &NO_ROLE);
    expect(&served, &writes_nothing);

    // Nobody is there, of which it warns.
    let forwards = tried(dir.path(), &["--forward", "127.0.0.1:1"]);
    expect(&forwards, &NO_ROLE);
    expect(&forwards, &writes_nothing);
    // The port of the destination, which the attempt happens to use as well; and names are looked up.
    let forwards = tried(dir.path(), &["--forward", "localhost:9"]);
    expect(
        &forwards,
        &[("connect", "refused"), ("read a file elsewhere", "done")],
    );
}

#[test]
fn without_a_sandbox_all_of_it_can_be_done() {
    let dir = tempfile::tempdir().unwrap();
    let attempts = tried(dir.path(), &["--sandbox", "off"]);
    for (name, ended) in attempts {
        let expected = match name.as_str() {
            "execute a missing program" => "No such file",
            "connect" => "refused",
            "make a namespace" if !geteuid().is_root() => "not permitted",
            _ => "done",
        };
        assert!(ended.contains(expected), "{name}: {ended}");
    }
}

/// The fields `names` of the status of each thread of `pid`.
fn status(pid: Pid, names: &[&str]) -> Vec<Vec<String>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("status")));
    status
        .map(|status| {
            let status = status.unwrap();
            let field = |name: &&str| {
                let line = status.lines().find_map(|line| line.strip_prefix(*name));
                line.unwrap().trim_start_matches(':').trim().to_owned()
            };
            names.iter().map(field).collect()
        })
        .collect()
}

#[test]
fn every_thread_of_a_server_is_confined() {
    let (Some(()), Some(())) = (complete(), gate::root()) else {
        return;
    };
    let place = Place::new();
    let metrics = ["--keep", "--metrics", "127.0.0.1:0", "--sandbox", "require"];
    let server = place.start(&metrics);
    send_dump(&mut place.connect());
    // A session under way, beside the threads of the log, the display and the metrics.
    let mut peer = place.connect();
    peer.write_all(&open_frame()).unwrap();
    peer.read_exact(&mut [0]).unwrap();
    let threads = status(server.pid(), &["NoNewPrivs", "Seccomp", "CapPrm", "CapBnd"]);
    assert!(threads.len() >= 3, "{threads:?}");
    // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_IPC_LOCK, CAP_SYS_RESOURCE.
    let most = 1 << 1 | 1 << 2 | 1 << 14 | 1 << 24;
    for thread in &threads {
        assert_eq!(thread[..2], ["1", "2"], "{threads:?}");
        for set in &thread[2..] {
            let set = u64::from_str_radix(set, 16).unwrap();
            assert_eq!(set & !most, 0, "{threads:?}");
        }
    }
    let log = place.log();
    let images = place.images().canonicalize().unwrap();
    assert!(
        log.contains(&format!("writes {}", images.display())),
        "{log}"
    );
    drop(peer);
    drop(server);
}

#[test]
fn an_ordinary_user_receives_and_serves() {
    let (Some(()), Some(())) = (complete(), gate::root()) else {
        return;
    };
    let place = Place::new();
    // It need not be allowed to go where this program lies.
    let program = place.root.path().join("page-server");
    fs::copy(env!("CARGO_BIN_EXE_page-server"), &program).unwrap();
    for dir in [place.root.path(), &place.images(), &place.work()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let start = |options: &[&str]| {
        let as_root = place.command(options);
        let mut command = Command::new(&program);
        command.args(as_root.get_args()).uid(NOBODY).gid(NOBODY);
        command
            .args(["--sandbox", "require"])
            .env("HOME", place.root.path());
        let log = place.work().join("log");
        Spawned::start("page-server", &mut command, Some(log)).unwrap()
    };
    let server = start(&[]);
    let mut peer = place.connect();
    let fields = status(server.pid(), &["CapEff", "NoNewPrivs", "Uid"]);
    assert_eq!(fields[0][..2], ["0000000000000000", "1"]);
    assert!(fields[0][2].starts_with("65534"));
    send_dump(&mut peer);
    drop(peer);
    succeed(server);
    place.check_images();

    fs::remove_file(place.work().join("port")).unwrap();
    let runs = [vec![run()]];
    let images = Images::of(&runs, Wire::V2);
    for entry in fs::read_dir(&images.dirs[0]).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.images().join(entry.file_name())).unwrap();
    }
    let server = start(&["--lazy-pages"]);
    let mut peer = place.connect();
    ask_for_a_page(&mut peer);
    drop(peer);
    drop(server);
}

/// Asks a server for the first page of [`run`].
fn ask_for_a_page(peer: &mut TcpStream) {
    let mut request = header(Op::Get, PageFlags::default(), 1, FIRST_PAGE << 12, PID);
    // Requests name the pid alone.
    request.dst_id = 7;
    let request = bytes_of(&request, Wire::V2);
    peer.write_all(&request).unwrap();
    let mut answer = vec![0; request.len() + 4096];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(answer[request.len()..], page_content(3));
}

/// Starts a page server as `start` says on a kernel that lacks the system `call`.
fn on_a_kernel_without(call: i64, start: impl FnOnce() -> Spawned + Send) -> Spawned {
    let lacks = SeccompFilter::new(
        [(call, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = lacks.unwrap().try_into().unwrap();
    // The thread's children have its filter.
    let started = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            apply_filter(&program).unwrap();
            start()
        });
        thread.join()
    });
    started.unwrap()
}

#[test]
fn a_kernel_without_a_part_is_told_of_or_refused() {
    // Who has no capabilities drops none.
    let Some(()) = gate::root() else { return };
    for (call, text) in [
        (
            libc::SYS_landlock_create_ruleset,
            "files are not confined (Landlock)",
        ),
        (libc::SYS_capset, "capabilities are not dropped"),
        (libc::SYS_seccomp, "system calls are not filtered (seccomp)"),
    ] {
        let place = Place::new();
        let server = on_a_kernel_without(call, || place.start(&[]));
        send_dump(&mut place.connect());
        succeed(server);
        place.check_images();
        assert!(place.log().contains(text), "{}", place.log());

        let place = Place::new();
        fail(on_a_kernel_without(call, || {
            place.start(&["--sandbox", "require"])
        }));
        let log = place.log();
        assert!(
            log.contains(&format!("error: --sandbox require: {text}")),
            "{log}"
        );
    }
}

#[test]
fn parents_and_links_that_are_there_at_the_start_are_read() {
    let Some(()) = complete() else { return };
    let place = Place::new();
    let images = Images::of(&[vec![run()]], Wire::V2);
    let store = tempfile::tempdir().unwrap();
    // Images of a parent somewhere else, whose pages are somewhere else again.
    let pages = images.dirs[0].join("pages-1.img");
    let moved = store.path().join("pages");
    fs::copy(&pages, &moved).unwrap();
    fs::remove_file(&pages).unwrap();
    std::os::unix::fs::symlink(&moved, &pages).unwrap();
    let parent = images.dirs[0].to_str().unwrap();
    let dedup = [
        "--dedup-content",
        "--sandbox",
        "require",
        "--prev-images-dir",
        parent,
    ];
    let server = place.start(&dedup);
    send_dump(&mut place.connect());
    succeed(server);
    place.check_images();
    let log = place.log();
    assert!(
        log.contains(&moved.canonicalize().unwrap().display().to_string()),
        "{log}"
    );
    // All of it is the parent's.
    let pages = place
        .image_names()
        .into_iter()
        .filter(|name| name.starts_with("pages-"));
    let bytes = pages.map(|name| fs::metadata(place.images().join(name)).unwrap().len());
    assert_eq!(bytes.sum::<u64>(), 0);
}
