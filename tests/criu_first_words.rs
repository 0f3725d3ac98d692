//! Dumps whose first words, or whose only ones, are unusual: the first System V segment of an IPC
//! namespace, whose id is 0, and a dump that fails before its first page.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::migration::{Dump, Restore};
use testbed::process::Spawned;
use testbed::suite::make;
use testbed::sys::undumpable_descriptor;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(
    system_v_segments_are_received,
    system_v_segments_are_forwarded,
    a_dump_that_fails_early_is_answered,
);

fn segments(test_dir: &TestDir) -> LoadSpec {
    let area = AreaSpec::new;
    LoadSpec {
        processes: 2,
        ..LoadSpec::new(
            test_dir.path("load"),
            vec![
                area(Mapping::SysV, 16, Content::Random),
                area(Mapping::Private, 200, Content::Mixed),
                area(Mapping::SysV, 700, Content::Mixed).untouched_every(3),
            ],
        )
    }
}

/// Restores what is in `images`, after a look whether segment 0 is among it.
fn restore_with_segments(criu: &Criu, images: &Path, load: &mut Load) -> Result<()> {
    load.wait_until_gone()?;
    for id in 0..2 {
        let name = format!("pagemap-shmem-{id}.img");
        ensure!(images.join(&name).exists(), "{name} is missing");
    }
    let _restored = Restore::new(criu, images).run()?;
    load.expect_first_memory().map(drop)
}

fn system_v_segments_are_received(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(segments(test_dir), None)?;
    let images = test_dir.path("images");
    let server = PageServer::receiving(make(criu), &Options::new(&images))?;
    Dump::new(criu, load.pid(), &images).received_by(server)?;
    restore_with_segments(criu, &images, &mut load)
}

fn system_v_segments_are_forwarded(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(segments(test_dir), None)?;
    let images = test_dir.path("images");
    let options = Options::new(&images).log_to("receiver.log");
    let receiver = PageServer::receiving(Make::Ours, &options)?;
    Dump::new(criu, load.pid(), &images).forwarded_to(receiver, &test_dir.path("sender"))?;
    restore_with_segments(criu, &images, &mut load)
}

/// A dump connects to the page server before it looks at the processes. If it then finds something that
/// it cannot dump, all it says is CLOSE, and it waits for the answer while the processes stand still.
fn a_dump_that_fails_early_is_answered(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut process = undumpable()?;
    for forced in [None, Some(if criu.speaks_v1()? { "v1" } else { "v2" })] {
        let wire = forced.map(|wire| ["--wire", wire]);
        let options = Options::new(test_dir.path(forced.unwrap_or("auto")));
        let options = options.with(wire.as_ref().map_or(&[][..], |wire| &wire[..]));
        let server = PageServer::receiving(Make::Ours, &options)?;
        let mut dump = Dump::new(criu, process.pid(), test_dir.path("dump"))
            .to(server.address())
            .start()?;
        let ended = dump.wait(GENEROUS)?;
        ensure!(!ended.status.success(), "what cannot be dumped was");
        server.finish(GENEROUS)?;
        ensure!(process.ended()?.is_none(), "the process has ended");
        ensure!(runs(process.pid())?, "the process stands still");
    }
    process.kill().map(drop)
}

/// A process that has inherited an open file of a kind that no CRIU knows.
fn undumpable() -> Result<Spawned> {
    let descriptor = undumpable_descriptor().context("a userfaultfd")?;
    let mut command = Command::new("setsid");
    command
        .args(["sleep", "1000"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let process = Spawned::start_ungrouped("sleep", &mut command, None);
    drop(descriptor);
    process
}

/// Whether nothing holds a process: it is not traced and not stopped.
fn runs(pid: Pid) -> Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default().to_owned()
    };
    Ok(field("TracerPid:") == "0" && !field("State:").starts_with(['t', 'T']))
}
