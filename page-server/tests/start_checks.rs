//! Mistakes that a page server finds when it is started, not when a process tree is frozen already; and
//! connections that are no sessions.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/process_images.rs"]
mod process_images;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{FIRST_PAGE, Run, TARGET, write_target};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use pageferry::criu::header::{PageFlags, Wire};
use pageferry::image::proto::TASK_DEAD;
use process_images::{expect_error, images, whole, write_core, write_process};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};

/// Starts a server with `args` in `dir`.
fn start(dir: &Path, args: &[&str]) -> Spawned {
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command
        .current_dir(dir)
        .args([
            "--address",
            "127.0.0.1",
            "-v4",
            "-o",
            "log",
            "--port-file",
            "port",
        ])
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    Spawned::start("page-server", &mut command, Some(dir.join("log"))).unwrap()
}

/// A server that does not start with `args`, and says `word` and why.
fn expect_refused(dir: &Path, args: &[&str], words: &[&str]) {
    // Left by an earlier one.
    let _ = fs::remove_file(dir.join("port"));
    expect_error(start(dir, args), dir, words);
    assert!(!dir.join("port").exists(), "it has listened");
}

fn port_of(dir: &Path) -> u16 {
    let port = until("the port", GENEROUS, || {
        Ok(fs::read_to_string(dir.join("port")).ok())
    });
    port.unwrap().trim().parse().unwrap()
}

fn in_parent() -> Vec<Run> {
    vec![Run::absent(FIRST_PAGE, 4, PageFlags::PARENT)]
}

#[test]
fn images_that_cannot_be_served_are_refused() {
    let lazy = ["--lazy-pages"];
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 8] = [
        (
            |dir| fs::remove_file(dir.join("pages-1.img")).unwrap(),
            "missing",
        ),
        (
            |dir| fs::write(dir.join("pages-1.img"), "").unwrap(),
            "cut short",
        ),
        (
            |dir| {
                let file = File::options().write(true).open(dir.join("pages-1.img"));
                file.unwrap().set_len(3 << 12).unwrap();
            },
            "cut short",
        ),
        (
            |dir| fs::remove_file(dir.join("pagemap-7.img")).unwrap(),
            "pagemap-7.img",
        ),
        (
            |dir| fs::write(dir.join("pagemap-7.img"), "").unwrap(),
            "pagemap-7.img",
        ),
        (
            |dir| {
                let file = File::options().write(true).open(dir.join("pagemap-7.img"));
                let length = fs::metadata(dir.join("pagemap-7.img")).unwrap().len();
                file.unwrap().set_len(length - 1).unwrap();
            },
            "pagemap-7.img",
        ),
        (
            |dir| write_target(dir, TARGET, Wire::V2, 1, &[]),
            "names no page",
        ),
        (
            |dir| {
                let kept = Run::absent(FIRST_PAGE, 4, PageFlags::LAZY);
                write_target(dir, TARGET, Wire::V2, 1, &[kept]);
            },
            "--forward-lazy",
        ),
    ];
    for (damage, word) in cases {
        let dir = images(&whole());
        damage(dir.path());
        expect_refused(dir.path(), &lazy, &[word]);
    }
    let empty = tempfile::tempdir().unwrap();
    expect_refused(empty.path(), &lazy, &["pstree.img"]);
}

#[test]
fn a_zombie_and_images_without_the_rest_of_the_dump_are_served() {
    let zombie = images(&whole());
    write_core(zombie.path(), TASK_DEAD);
    fs::remove_file(zombie.path().join("pagemap-7.img")).unwrap();
    let received = tempfile::tempdir().unwrap();
    write_target(received.path(), TARGET, Wire::V2, 1, &whole());
    for dir in [zombie, received] {
        let mut server = start(dir.path(), &["--lazy-pages"]);
        port_of(dir.path());
        server.signal(Signal::SIGTERM).unwrap();
        server.fail(GENEROUS).unwrap();
    }
}

#[test]
fn chains_that_are_broken_are_refused_in_both_roles() {
    let root = tempfile::tempdir().unwrap();
    let [first, second] = ["1", "2"].map(|name| root.path().join(name));
    for dir in [&first, &second] {
        fs::create_dir(dir).unwrap();
    }
    write_process(&first, &whole());
    write_process(&second, &in_parent());
    let link = second.join("parent");
    let parent = |target: &str| {
        let _ = fs::remove_file(&link);
        symlink(target, &link).unwrap();
    };
    parent("../gone");
    expect_refused(&second, &["--lazy-pages"], &["parent"]);
    parent("../2");
    expect_refused(&second, &["--lazy-pages"], &["come back"]);
    expect_refused(&second, &[], &["come back"]);
    parent("../1");
    symlink("../2", first.join("parent")).unwrap();
    expect_refused(&second, &["--lazy-pages"], &["come back"]);
    expect_refused(&second, &[], &["come back"]);
    fs::remove_file(first.join("parent")).unwrap();
    fs::write(first.join("pages-1.img"), "").unwrap();
    expect_refused(&second, &["--lazy-pages"], &["cut short"]);

    // To be received on top of what is not whole.
    let third = root.path().join("3");
    fs::create_dir(&third).unwrap();
    expect_refused(
        &third,
        &["--prev-images-dir", "../1"],
        &["not whole", "cut short"],
    );
    expect_refused(
        &third,
        &["--prev-images-dir", "../2"],
        &["not whole", "cut short"],
    );
    expect_refused(&third, &["--prev-images-dir", "../gone"], &["gone"]);
}

#[test]
fn a_directory_is_no_difference_to_itself_by_any_name() {
    let root = tempfile::tempdir().unwrap();
    let [dir, bound] = ["images", "bound"].map(|name| root.path().join(name));
    for path in [&dir, &bound] {
        fs::create_dir(path).unwrap();
    }
    symlink("images", root.path().join("link")).unwrap();
    let none = None::<&str>;
    let is_root = mount(Some(&dir), &bound, none, MsFlags::MS_BIND, none).is_ok();
    let absolute = dir.to_str().unwrap();
    let trailing = format!("{absolute}/");
    let mut names = vec![
        ".",
        "./",
        "../images",
        "../images/.",
        "../link",
        absolute,
        &trailing,
    ];
    if is_root {
        names.push("../bound");
    }
    let refused = std::panic::catch_unwind(|| {
        for name in names {
            expect_refused(&dir, &["--prev-images-dir", name], &["itself"]);
            assert!(!dir.join("parent").exists(), "{name}");
        }
        expect_refused(
            &dir,
            &[
                "--keep",
                "--images-dir-template",
                "{seq}",
                "--prev-images-dir",
                ".",
            ],
            &["itself"],
        );
    });
    if is_root {
        umount2(&bound, MntFlags::MNT_DETACH).unwrap();
    }
    refused.unwrap();
}

#[test]
fn what_does_not_go_with_a_tree_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tree = |more: &[&'static str]| [&["--dedup-tree"][..], more].concat();
    for more in [
        &["--auto-dedup"][..],
        &["--compress"],
        &["--split-lazy", "lazy"],
        &["--lazy-pages"],
        &["--forward", "127.0.0.1:1"],
        &["--forward-lazy", "127.0.0.1:1"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
        let output = command.current_dir(dir.path()).args(tree(more)).output();
        let output = output.unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{more:?}");
        assert!(
            stderr.contains("--dedup-tree") && stderr.contains(more[0]),
            "{more:?}: {stderr}"
        );
    }
    let words = ["--keep", "--images-dir-template"];
    expect_refused(dir.path(), &tree(&["--keep"]), &words);
    let full = images(&whole());
    expect_refused(full.path(), &tree(&[]), &["--dedup-tree", "empty"]);
}

#[test]
fn pages_that_processes_share_are_not_taken_out_of_their_files() {
    let tmp = tempfile::tempdir().unwrap();
    let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
    fs::create_dir(&old).unwrap();
    fs::create_dir(&new).unwrap();
    write_process(&old, &whole());
    fs::copy(old.join("pagemap-7.img"), old.join("pagemap-8.img")).unwrap();
    let args = ["--auto-dedup", "--prev-images-dir", "../old"];
    expect_refused(&new, &args, &["--auto-dedup", "pagemap-8.img"]);
}

#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    // Nobody can make files there, not even root.
    for args in [
        &["-D", "/proc/self", "-W", "."][..],
        &[
            "-D",
            "/proc/self",
            "-W",
            ".",
            "--keep",
            "--images-dir-template",
            "{seq}",
        ],
    ] {
        let work = tempfile::tempdir().unwrap();
        expect_refused(work.path(), args, &["cannot write", "-D"]);
    }
}

#[test]
fn a_destination_that_takes_no_dumps_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let refused = |far_end: &str, words: &[&str]| {
        expect_refused(work.path(), &["--forward", far_end], words);
    };
    refused(
        "no-such-host.invalid:7",
        &["no-such-host.invalid", "cannot be found"],
    );

    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    for host in ["127.0.0.1", "localhost"] {
        let own = format!("{host}:{free}");
        let args = ["--forward", &own, "--port", &free.to_string()];
        expect_refused(work.path(), &args, &["itself"]);
    }

    // Who hangs up, who says something else, and servers of ours with another role.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let others = std::thread::spawn(move || {
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"SSH-2.0-OpenSSH_9.6\r\n or another greeting\r\n")
            .unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    for _ in 0..2 {
        refused(&address, &["no page-server that receives dumps"]);
    }
    others.join().unwrap();

    let served = images(&whole());
    let mut server = start(served.path(), &["--lazy-pages", "--keep"]);
    let address = format!("127.0.0.1:{}", port_of(served.path()));
    refused(&address, &["no page-server that receives dumps"]);
    until("the mistake to be named", GENEROUS, || {
        let log = fs::read_to_string(served.path().join("log"))?;
        Ok((log.contains("speaks ferry") && log.contains("--forward-lazy")).then_some(()))
    })
    .unwrap();
    server.signal(Signal::SIGTERM).unwrap();
    server.succeed(GENEROUS).unwrap();
}

#[test]
fn a_destination_does_not_end_when_it_is_looked_at_and_may_come_later() {
    let (far, near) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut destination = start(far.path(), &[]);
    let address = format!("127.0.0.1:{}", port_of(far.path()));
    for _ in 0..2 {
        let _ = fs::remove_file(near.path().join("port"));
        let mut forwarder = start(near.path(), &["--forward", &address]);
        port_of(near.path());
        forwarder.signal(Signal::SIGTERM).unwrap();
        forwarder.fail(GENEROUS).unwrap();
    }
    assert!(destination.ended().unwrap().is_none());
    destination.signal(Signal::SIGTERM).unwrap();
    destination.fail(GENEROUS).unwrap();

    let _ = fs::remove_file(near.path().join("port"));
    let mut early = start(near.path(), &["--forward", &address]);
    port_of(near.path());
    let log = fs::read_to_string(near.path().join("log")).unwrap();
    assert!(log.contains("warning: cannot connect"), "{log}");
    early.signal(Signal::SIGTERM).unwrap();
    early.fail(GENEROUS).unwrap();
}

#[test]
fn a_finished_dump_is_not_waited_for() {
    let dir = images(&whole());
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let args = ["--forward-lazy", &free.to_string(), "--wait", "1000"];
    expect_refused(dir.path(), &args, &["no page stayed"]);
    let nowhere = ["--forward-lazy", "no-such-host.invalid:7", "--wait", "1000"];
    expect_refused(dir.path(), &nowhere, &["cannot be found"]);
    // One that may come.
    write_target(
        dir.path(),
        TARGET,
        Wire::V2,
        1,
        &[Run::absent(FIRST_PAGE, 4, PageFlags::LAZY)],
    );
    let args = ["--forward-lazy", &free.to_string(), "--wait", "1"];
    expect_refused(dir.path(), &args, &["gave up after 1 s"]);
}

#[test]
fn a_living_process_keeps_its_pidfile() {
    let dir = tempfile::tempdir().unwrap();
    let pid = std::process::id().to_string();
    fs::write(dir.path().join("pid"), &pid).unwrap();
    start(dir.path(), &["-d", "--pidfile", "pid"])
        .fail(GENEROUS)
        .unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("pid")).unwrap(), pid);
    assert!(!dir.path().join("port").exists());
}

#[test]
fn a_probe_of_the_port_ends_no_server() {
    let far = tempfile::tempdir().unwrap();
    let mut destination = start(far.path(), &["--keep"]);
    let address = format!("127.0.0.1:{}", port_of(far.path()));
    let received = tempfile::tempdir().unwrap();
    let forwards = tempfile::tempdir().unwrap();
    let served = images(&whole());
    for (dir, args) in [
        (received, &[][..]),
        (forwards, &["--forward", &address]),
        (served, &["--lazy-pages"]),
    ] {
        let mut server = start(dir.path(), args);
        let port = port_of(dir.path());
        let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
        for lingers in [false, true, false] {
            let probe = socket2::Socket::from(connect());
            if lingers {
                // Ended by a reset.
                probe.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            }
        }
        until("the probes to be told", GENEROUS, || {
            let log = fs::read_to_string(dir.path().join("log"))?;
            Ok((log.matches("without a byte").count() == 3).then_some(()))
        })
        .unwrap();
        assert!(server.ended().unwrap().is_none(), "{args:?}");
        // One that stays silent does not keep a server whose session is over. A lazy restore may have nothing
        // to ask for as long as it likes.
        let silent = (!args.contains(&"--lazy-pages")).then(connect);
        // A session that fails is one.
        connect().write_all(&[0x55; 64]).unwrap();
        server.fail(GENEROUS).unwrap();
        drop(silent);
    }
    destination.signal(Signal::SIGTERM).unwrap();
    destination.succeed(GENEROUS).unwrap();
}
