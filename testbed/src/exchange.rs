//! Files by which a small program and its test wait for each other, also after the program was dumped and restored.
//!
//! ```text
//! program                                 test
//! begin                                   start
//! write "ready"                   ──>
//! wait_for "go"                   <──     writes "go"
//! write_result "result.txt"       ──>     expect_right
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{alarm, getpid, getsid, setsid};

use crate::criu::Criu;
use crate::migration::Dump;
use crate::process::Spawned;
use crate::test_dir::TestDir;
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// What a program writes whose memory is as it should be.
pub const RIGHT: &str = "right";

/// Where a program writes why it ends before it is ready.
pub const FAILURE: &str = "failure.txt";

const PAUSE: Duration = Duration::from_millis(2);

/// Makes the calling program the leader of a session, which a dump needs, and lets the kernel end it after
/// `lifetime_s` seconds, whatever became of the test.
///
/// # Errors
/// That of [`lead_session`].
pub fn begin(lifetime_s: u32) -> Result<()> {
    lead_session()?;
    alarm::set(lifetime_s);
    Ok(())
}

/// Makes the calling program the leader of a session. Process 1 of a container is one from the start.
///
/// # Errors
/// It leads a group already.
pub fn lead_session() -> Result<()> {
    if getsid(None)? != getpid() {
        setsid().context("setsid")?;
    }
    Ok(())
}

/// Waits in a program until its test has made the file at `path`.
pub fn wait_for(path: &Path) {
    while !path.exists() {
        sleep(PAUSE);
    }
}

/// Writes a file that is whole or absent.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension(format!("new-{}", getpid()));
    fs::write(&unfinished, text)?;
    Ok(fs::rename(&unfinished, path)?)
}

/// Writes what a program has found: [`RIGHT`], or what is wrong.
///
/// # Errors
/// It cannot be written.
pub fn write_result(path: &Path, found: Result<()>) -> Result<()> {
    let text = found.map_or_else(|error| format!("{error:#}"), |()| RIGHT.to_owned());
    write(path, &text)
}

/// Starts the program `name` of this package by a test. It exchanges files in `dir`; the test waits until `ready` is
/// there.
///
/// # Errors
/// It ends before.
pub fn start(name: &str, args: &[&str], dir: &Path, ready: &str) -> Result<Spawned> {
    fs::create_dir_all(dir)?;
    let mut command = Command::new(workspace::binary(name)?);
    command
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    start_command(name, &mut command, dir, ready)
}

/// The same for a `command` that runs the program.
///
/// # Errors
/// It ends before.
pub fn start_command(
    name: &str,
    command: &mut Command,
    dir: &Path,
    ready: &str,
) -> Result<Spawned> {
    let mut process = Spawned::start_ungrouped(name, command, None)?;
    let ready = dir.join(ready);
    wait::until(&format!("{name}, ready"), GENEROUS, || {
        if let Some(ended) = process.ended()? {
            let why = fs::read_to_string(dir.join(FAILURE)).unwrap_or_default();
            bail!("{name} has ended: {}: {why}", ended.status);
        }
        Ok(ready.exists().then_some(()))
    })?;
    Ok(process)
}

/// Starts the program `name`, whose argument is the directory where it exchanges files, and dumps it once it is ready.
/// Returns its images and that directory.
///
/// # Errors
/// It ends before, or CRIU fails.
pub fn dump(test_dir: &TestDir, criu: &Criu, name: &str) -> Result<(PathBuf, PathBuf)> {
    let (images, dir) = (test_dir.path("images"), test_dir.path(name));
    let place = dir.to_str().context("a directory that is no UTF-8")?;
    let mut process = start(name, &[place], &dir, "ready")?;
    Dump::new(criu, process.pid(), &images).run()?;
    process.wait(GENEROUS)?;
    Ok((images, dir))
}

/// Waits for what a program has found, and fails unless that is [`RIGHT`].
///
/// # Errors
/// It is something else, or never comes.
pub fn expect_right(path: &Path) -> Result<()> {
    wait::until(&path.display().to_string(), GENEROUS, || {
        Ok(path.exists().then_some(()))
    })?;
    let found = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    ensure!(found == RIGHT, "{found}");
    Ok(())
}
