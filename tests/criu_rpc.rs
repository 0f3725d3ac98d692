//! A page server that was asked for over CRIU's remote procedure calls, as go-criu and P.Haul do it,
//! and a real dump into the port that the answer names.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pageferry::criu::rpc::{Options, Request, ServerInfo, kind};
use testbed::criu::Criu;
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::orphan::Orphan;
use testbed::suite::make;
use testbed::swrk::{Swrk, parent_of};
use testbed::test_dir::TestDir;
use testbed::workspace::binary;

for_each_criu!(
    a_server_in_the_background_receives_a_dump,
    a_child_server_receives_a_dump,
    a_file_of_the_request_has_the_last_word,
);

const MIB: u32 = 32;

fn start(make: Make<'_>) -> Result<Swrk> {
    Swrk::start(Command::new(match make {
        Make::Ours | Make::Build(_) => binary("page-server")?,
        Make::Criu(criu) => criu.path.clone(),
    }))
}

/// Asks for a page server of this kind that stores what comes in `images`; tells where it listens
/// and its pid.
fn ask(swrk: &Swrk, kind: i32, images: &Path) -> Result<(SocketAddr, i32)> {
    fs::create_dir_all(images)?;
    let dir = File::open(images)?;
    let address = Ipv4Addr::LOCALHOST;
    let answer = swrk.ask(&Request {
        kind,
        keep_open: Some(kind == kind::PAGE_SERVER_CHLD),
        options: Some(Options {
            images_dir_fd: dir.as_raw_fd(),
            log_level: Some(4),
            log_file: Some("server.log".to_owned()),
            server: Some(ServerInfo {
                address: Some(address.to_string()),
                port: Some(0),
                ..ServerInfo::default()
            }),
            ..Options::default()
        }),
        ..Request::default()
    })?;
    ensure!(
        answer.success && answer.kind == kind::PAGE_SERVER,
        "{answer:?}"
    );
    let server = answer.server.context("the answer names no server")?;
    let port = server.port.context("the answer names no port")?;
    let pid = server.pid.context("the answer names no pid")?;
    Ok((SocketAddr::from((address, u16::try_from(port)?)), pid))
}

/// Dumps a load to `server`, lets `wait` wait for the server's end, and restores.
fn dump_and_restore(
    test_dir: &TestDir,
    criu: &Criu,
    images: &Path,
    server: SocketAddr,
    wait: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    Dump::new(criu, load.pid(), images).to(server).run()?;
    wait()?;
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, images).run()?;
    load.expect_first_memory().map(drop)
}

/// CRIU itself answers with pid 0 here.
fn a_server_in_the_background_receives_a_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let images = test_dir.path("images");
    let swrk = start(Make::Ours)?;
    let (address, pid) = ask(&swrk, kind::PAGE_SERVER, &images)?;
    let server = Orphan::new(pid)?;
    swrk.finish()?;
    let parent = parent_of(pid)?;
    ensure!(
        parent == std::process::id().cast_signed(),
        "{pid} is a child of {parent}"
    );
    dump_and_restore(test_dir, criu, &images, address, || server.succeed())
}

fn a_child_server_receives_a_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let images = test_dir.path("images");
    let swrk = start(make(criu))?;
    let (address, pid) = ask(&swrk, kind::PAGE_SERVER_CHLD, &images)?;
    let parent = parent_of(pid)?;
    ensure!(
        parent == swrk.process.pid().as_raw(),
        "{pid} is a child of {parent}"
    );
    dump_and_restore(test_dir, criu, &images, address, || {
        let ended = swrk.ask(&Request {
            kind: kind::WAIT_PID,
            pid: Some(pid.cast_unsigned()),
            ..Request::default()
        })?;
        ensure!(ended.success && ended.status == Some(0), "{ended:?}");
        swrk.finish()
    })
}

/// What runc and crun do with /etc/criu/runc.conf and crun.conf. CRIU is asked the same.
fn a_file_of_the_request_has_the_last_word(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for (name, make) in [("ours", Make::Ours), ("criu", Make::Criu(criu))] {
        let path = |suffix: &str| test_dir.path(&format!("{name}-{suffix}"));
        let (asked, obeyed, file) = (path("asked"), path("obeyed"), path("runc.conf"));
        fs::create_dir_all(&asked)?;
        fs::create_dir_all(&obeyed)?;
        let text = "address 127.0.0.1\nlog-file obeyed.log\nno-auto-dedup";
        // (4.1.1 refuses any images-dir here.)
        fs::write(&file, format!("work-dir {}\n{text}\n", obeyed.display()))?;
        let dir = File::open(&asked)?;
        let swrk = start(make)?;
        let answer = swrk.ask(&Request {
            kind: kind::PAGE_SERVER_CHLD,
            keep_open: Some(true),
            options: Some(Options {
                images_dir_fd: dir.as_raw_fd(),
                auto_dedup: Some(true),
                log_file: Some("asked.log".to_owned()),
                config_file: Some(file.display().to_string()),
                server: Some(ServerInfo {
                    // No address of this host.
                    address: Some("192.0.2.1".to_owned()),
                    port: Some(0),
                    ..ServerInfo::default()
                }),
                ..Options::default()
            }),
            ..Request::default()
        })?;
        ensure!(answer.success, "{name}: {answer:?}");
        let pid = answer
            .server
            .and_then(|server| server.pid)
            .context("no pid")?;
        let server = Orphan::new(pid)?;
        ensure!(obeyed.join("obeyed.log").exists(), "{name} logs elsewhere");
        drop(server);
    }
    Ok(())
}
