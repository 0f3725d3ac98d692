//! The `criu` that stands before a real one: what it hands on, what it answers, and its pre-dumps.

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};
use pageferry::criu::rpc::{Options as RequestOptions, Request, Response, ServerInfo, kind};
use prost::Message;
use testbed::criu::Criu;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Step};
use testbed::migration::{Dump, Restore};
use testbed::orphan::Orphan;
use testbed::process::{Spawned, run};
use testbed::shim;
use testbed::swrk::Swrk;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    pre_dumps_store_what_has_changed,
    requests_are_answered_by_the_right_one,
    a_service_answers_as_criu_does,
);

const MIB: u32 = 32;

/// Kinds of requests that only the real CRIU knows.
const VERSION: i32 = 10;
const CHECK: i32 = 3;

fn shim_of(test_dir: &TestDir, criu: &Criu) -> Result<Criu> {
    shim::before(
        criu,
        &test_dir.path("shim"),
        "PAGEFERRY_EMULATE_PRE_DUMP=always",
    )
}

fn pages_bytes(images: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}

/// Two copies in PATH, each of which takes the other one for the real CRIU.
#[test]
fn copies_that_hand_to_each_other_are_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut dirs = Vec::new();
    for name in ["one", "other"] {
        let place = dir.path().join(name);
        fs::create_dir(&place)?;
        fs::copy(testbed::workspace::binary("criu")?, place.join("criu"))?;
        dirs.push(place);
    }
    let path = std::env::join_paths(&dirs)?;
    for (words, emulate) in [
        (&["check"][..], "never"),
        (&["pre-dump", "-t", "1", "-D", "images"], "always"),
        (&["dump", "-t", "1", "-D", "images"], "never"),
    ] {
        let mut command = Command::new(dirs[0].join("criu"));
        command
            .args(words)
            .current_dir(dir.path())
            .env("PATH", &path);
        command.env("PAGEFERRY_EMULATE_PRE_DUMP", emulate);
        command.env_remove("PAGEFERRY_CRIU");
        command.env("PAGEFERRY_SHIM_CONFIG", "/dev/null");
        let output = command.output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "{words:?} succeeds");
        ensure!(stderr.contains("hand to each other"), "{words:?}: {stderr}");
    }
    Ok(())
}

/// `pageferry` under other names, as packages install it: its links are no real CRIU, and the programs beside it are
/// found.
#[test]
fn one_file_is_all_programs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = |name: &str| dir.path().join(name);
    for name in ["bin", "first", "second", "real"] {
        fs::create_dir(place(name))?;
    }
    let installed = place("bin/pageferry");
    let built = testbed::workspace::binary("pageferry")?;
    fs::hard_link(&built, &installed).or_else(|_| fs::copy(&built, &installed).map(drop))?;
    for name in ["bin/page-server", "bin/lazy-client"] {
        symlink("pageferry", place(name))?;
    }
    for name in ["first/criu", "second/criu"] {
        symlink("../bin/pageferry", place(name))?;
    }
    let real = place("real/criu");
    fs::write(&real, "#!/bin/sh\necho real \"$@\"\n")?;
    fs::set_permissions(&real, Permissions::from_mode(0o755))?;
    let path = std::env::join_paths(["first", "second", "real"].map(place))?;
    let shim = || {
        let mut command = Command::new(place("first/criu"));
        command.current_dir(dir.path()).env("PATH", &path);
        for variable in ["PAGEFERRY_CRIU", "PAGEFERRY_BIN_DIR"] {
            command.env_remove(variable);
        }
        command.env("PAGEFERRY_SHIM_CONFIG", "/dev/null");
        command
    };
    let said = |words: &[&str]| -> Result<String> {
        Ok(String::from_utf8(run(shim().args(words))?.stdout)?)
    };
    let output = said(&["check", "--all"])?;
    ensure!(output == "real check --all\n", "{output}");
    let actions = [
        ("page-server", "page-server"),
        ("lazy-pages", "lazy-client"),
    ];
    for (word, program) in actions {
        let output = said(&[word, "--version"])?;
        ensure!(output.starts_with(program), "{output}");
    }
    let images = File::open(dir.path())?;
    let swrk = Swrk::start(shim())?;
    let started = swrk.ask(&request(kind::PAGE_SERVER_CHLD, Some(&images)))?;
    let pid = started.server.and_then(|server| server.pid);
    let pid = pid.context("no pid")?;
    let server = Orphan::new(pid)?;
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(program == installed, "{} serves", program.display());
    drop(server);
    swrk.finish()
}

/// Two pre-dumps and a dump on the command line, with and without a page server.
fn pre_dumps_store_what_has_changed(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let shim = shim_of(test_dir, criu)?;
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let round = |number: u32| test_dir.path(&number.to_string());
    let pre_dump = |load: &Load, number: u32, parent: &[&str]| {
        fs::create_dir_all(round(number))?;
        let mut command = Command::new(&shim.path);
        command.args(["pre-dump", "--track-mem", "-o", "pre-dump.log", "-v4", "-t"]);
        command
            .arg(load.pid().to_string())
            .arg("-D")
            .arg(round(number))
            .args(parent);
        run(&mut command).map(drop)
    };
    pre_dump(&load, 1, &[])?;
    load.expect_running()?;
    let order = Order::Ascending;
    load.run(0, &[Step::Write { every: 64, order }])?
        .expect_right()?;
    pre_dump(&load, 2, &["--prev-images-dir", "../1"])?;
    load.run(0, &[Step::Write { every: 64, order }])?
        .expect_right()?;
    let dump = Dump::new(&shim, load.pid(), round(3));
    dump.with(&["--track-mem", "--prev-images-dir", "../2"])
        .run()?;
    load.wait_until_gone()?;
    let [all, second, third] = [1, 2, 3].map(|number| pages_bytes(&round(number)));
    let (all, second, third) = (all?, second?, third?);
    ensure!(
        second < all / 4 && third < all / 4,
        "{all}, {second}, {third} bytes"
    );
    let _restored = Restore::new(criu, round(3)).run()?;
    load.steer_anybody();
    load.run(0, &[Step::Status])?.expect_right()
}

fn request(kind: i32, images: Option<&File>) -> Request {
    let options = images.map(|dir| RequestOptions {
        images_dir_fd: dir.as_raw_fd(),
        log_file: Some("criu.log".to_owned()),
        server: Some(ServerInfo {
            address: Some("127.0.0.1".to_owned()),
            port: Some(0),
            ..ServerInfo::default()
        }),
        ..RequestOptions::default()
    });
    Request {
        kind,
        options,
        keep_open: Some(true),
        ..Request::default()
    }
}

/// Several requests over one connection: the version, two page servers, and how one of them ended.
fn requests_are_answered_by_the_right_one(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let shim = shim_of(test_dir, criu)?;
    let images = test_dir.path("images");
    fs::create_dir_all(&images)?;
    let dir = File::open(&images)?;
    let swrk = Swrk::start(Command::new(&shim.path))?;
    let version = swrk.ask(&request(VERSION, None))?;
    ensure!(version.success && version.kind == VERSION, "{version:?}");
    let started = swrk.ask(&request(kind::PAGE_SERVER_CHLD, Some(&dir)))?;
    ensure!(
        started.success && started.kind == kind::PAGE_SERVER,
        "{started:?}"
    );
    let pid = started
        .server
        .and_then(|server| server.pid)
        .context("no pid")?;
    let server = Orphan::new(pid)?;
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        program.ends_with("page-server"),
        "{} serves",
        program.display()
    );
    // It is no process of the client's, and was none of this CRIU's either.
    let nobody = swrk.ask(&Request {
        pid: Some(u32::MAX >> 1),
        ..request(kind::WAIT_PID, None)
    })?;
    ensure!(
        !nobody.success && nobody.kind == kind::WAIT_PID,
        "{nobody:?}"
    );
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let ended = swrk.ask(&Request {
        pid: Some(pid.cast_unsigned()),
        ..request(kind::WAIT_PID, None)
    })?;
    ensure!(ended.success && ended.status == Some(9), "{ended:?}");
    drop(server);
    swrk.finish()?;
    // The last request goes to the real one, which takes the shim's place.
    let swrk = Swrk::start(Command::new(&shim.path))?;
    let checked = swrk.ask(&Request {
        keep_open: None,
        ..request(CHECK, None)
    })?;
    // 4.1.1 answers no, with and without the shim, where its check on the command line says yes.
    let right = checked.success || criu.speaks_v1()?;
    ensure!(checked.kind == CHECK && right, "{checked:?}");
    swrk.finish().or_else(|error| match criu.speaks_v1()? {
        true => Ok(()),
        false => Err(error),
    })
}

fn ask(path: &Path, request: &Request) -> Result<Response> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    send(
        socket.as_raw_fd(),
        &request.encode_to_vec(),
        MsgFlags::MSG_NOSIGNAL,
    )?;
    let mut answer = [0; 4096];
    let bytes = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    ensure!(bytes > 0, "the service hung up");
    Ok(Response::decode(&answer[..bytes])?)
}

fn a_service_answers_as_criu_does(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let shim = shim_of(test_dir, criu)?;
    let images = test_dir.path("images");
    fs::create_dir_all(&images)?;
    let path = test_dir.path("service");
    let mut command = Command::new(&shim.path);
    command
        .args(["service", "-o", "service.log", "-v4", "--address"])
        .arg(&path);
    command.arg("-W").arg(test_dir.dir());
    let mut service = Spawned::start(
        "criu service",
        &mut command,
        Some(test_dir.path("service.log")),
    )?;
    wait::until("the service's socket", GENEROUS, || {
        ensure!(
            service.ended()?.is_none(),
            "the service ended{}",
            service.log_tail()
        );
        Ok(fs::metadata(&path)
            .is_ok_and(|file| file.file_type().is_socket())
            .then_some(()))
    })?;
    let version = wait::until("an answer", GENEROUS, || {
        Ok(ask(&path, &request(VERSION, None)).ok())
    })?;
    ensure!(version.success && version.kind == VERSION, "{version:?}");
    let dir = File::open(&images)?;
    let started = ask(&path, &request(kind::PAGE_SERVER, Some(&dir)))?;
    ensure!(started.success, "{started:?}");
    let pid = started
        .server
        .and_then(|server| server.pid)
        .context("no pid")?;
    let _server = Orphan::new(pid)?;
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        program.ends_with("page-server"),
        "{} serves",
        program.display()
    );
    // Whoever connects may not name descriptors of the service's.
    let mut named = request(kind::PAGE_SERVER, Some(&dir));
    if let Some(options) = &mut named.options {
        options.server = Some(ServerInfo {
            socket_fd: Some(0),
            ..ServerInfo::default()
        });
    }
    let refused = ask(&path, &named)?;
    ensure!(!refused.success, "{refused:?}");
    service.kill().map(drop)
}
