//! Tries what a sandbox must refuse, and tells how each attempt ended: for tests (`--sandbox-check`).

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, parent_id};
use std::path::Path;
use std::process::Command;

use memmap2::MmapMut;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// A port of discarded bytes, which hardly anybody serves.
const DISCARD_PORT: u16 = 9;

/// Prints a line `NAME: done` or `NAME: ERROR` for each attempt. `images` is the images directory.
pub(in crate::daemon) fn print(images: &Path) {
    for (name, ended) in attempts(images) {
        match ended {
            Ok(()) => println!("{name}: done"),
            Err(error) => println!("{name}: {error}"),
        }
    }
}

fn attempts(images: &Path) -> Vec<(&'static str, io::Result<()>)> {
    let name = format!(".sandbox-check-{}", std::process::id());
    let parent = i32::try_from(parent_id()).unwrap_or_default();
    let nowhere = Command::new("/nonexistent/program").exec();
    vec![
        (
            "make a file in the images directory",
            make(&images.join(&name)),
        ),
        (
            "make a file elsewhere",
            make(&std::env::temp_dir().join(&name)),
        ),
        ("read a file elsewhere", File::open("/etc/passwd").map(drop)),
        (
            "look at another process",
            fs::read_link(format!("/proc/{parent}/exe")).map(drop),
        ),
        (
            "signal another process",
            kill(Pid::from_raw(parent), None).map_err(io::Error::from),
        ),
        (
            "start a program",
            Command::new("/bin/true").status().map(drop),
        ),
        // Without a sandbox it is missing.
        ("execute a missing program", Err(nowhere)),
        (
            "make a namespace",
            unshare(CloneFlags::CLONE_NEWUTS).map_err(io::Error::from),
        ),
        (
            "connect",
            TcpStream::connect((Ipv4Addr::LOCALHOST, DISCARD_PORT)).map(drop),
        ),
        (
            "listen",
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(drop),
        ),
        ("make memory executable", executable_memory()),
        (
            "start a thread",
            std::thread::Builder::new().spawn(|| ()).map(drop),
        ),
    ]
}

fn make(path: &Path) -> io::Result<()> {
    File::create_new(path)?;
    fs::remove_file(path)
}

fn executable_memory() -> io::Result<()> {
    MmapMut::map_anon(1)?.make_exec().map(drop)
}
