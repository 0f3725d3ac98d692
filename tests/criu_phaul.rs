//! go-criu's own test of its migration, unmodified: pre-dumps and a dump over one `criu swrk`, a page server for
//! each over others, and a restore while the dump waits.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_child_subreaper;
use nix::unistd::Pid;
use testbed::criu::Criu;
use testbed::gocriu::Phaul;
use testbed::process::{descendants, kill_and_reap};
use testbed::test_dir::TestDir;
use testbed::{for_each_criu, gate, shim};

for_each_criu!(phaul_migrates_by_the_shim);

/// Ends what a test has left, all of which comes to this process.
struct KillDescendants;

impl Drop for KillDescendants {
    fn drop(&mut self) {
        kill_and_reap(&descendants(Pid::this()));
    }
}

fn phaul(phaul: &Phaul, criu: &Criu, dir: &Path) -> Result<Output> {
    fs::create_dir_all(dir)?;
    let started = Command::new(&phaul.process)
        .arg("/dev/null")
        .stderr(Stdio::null())
        .output()?;
    let pid = String::from_utf8(started.stdout)?;
    let mut path = criu
        .path
        .parent()
        .context("criu without a directory")?
        .as_os_str()
        .to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let log = fs::File::create(dir.join("log"))?;
    let mut command = Command::new(&phaul.program);
    command.arg(pid.trim()).current_dir(dir).env("PATH", path);
    // The restored process keeps what it is started with.
    let status = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    Ok(Output {
        status,
        stdout: fs::read(dir.join("log"))?,
        stderr: Vec::new(),
    })
}

fn phaul_migrates_by_the_shim(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(test) = gate::need("go-criu", Phaul::built()) else {
        return Ok(());
    };
    set_child_subreaper(true)?;
    let _leftovers = KillDescendants;
    let shim = shim::before(criu, &test_dir.path("shim"), "")?;
    let migrated = phaul(&test, &shim, &test_dir.path("by-shim"))?;
    let stdout = String::from_utf8_lossy(&migrated.stdout);
    ensure!(
        migrated.status.success() && stdout.contains("SUCCESS!"),
        "{}: {stdout}",
        migrated.status
    );
    let server = test_dir.path("by-shim/image/remote/1");
    ensure!(
        server.join("parent").exists(),
        "the second round has no parent"
    );
    // Where the kernel does not track dirty pages, CRIU alone cannot do that.
    let check = Command::new(&criu.path)
        .args(["check", "--feature", "mem_dirty_track"])
        .output()?;
    if !check.status.success() {
        let alone = phaul(&test, criu, &test_dir.path("alone"))?;
        let stdout = String::from_utf8_lossy(&alone.stdout);
        ensure!(!stdout.contains("SUCCESS!"), "CRIU does it alone: {stdout}");
        let log = fs::read_to_string(server.join("ps.log"))?;
        ensure!(
            log.contains("same as parent") && !log.contains(" 0 same as parent"),
            "{log}"
        );
    }
    Ok(())
}
