//! Memory that a process locks and lets grow (mremap) while pages are missing: the kernel brings the new pages before it tells
//! of the move, and lets nobody fill them until then. A real CRIU.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::migration::{Dump, Restore};
use testbed::process::Spawned;
use testbed::suite::{make, with_criu};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

fn locked_memory_grows(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (images, dir) = (test_dir.path("images"), test_dir.path("locked"));
    fs::create_dir_all(&dir)?;
    let mut command = Command::new(workspace::binary("locked")?);
    command
        .arg(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = Spawned::start_ungrouped("locked", &mut command, None)?;
    wait::until("memory", GENEROUS, || {
        ensure!(process.ended()?.is_none(), "the process has ended");
        Ok(dir.join("ready").exists().then_some(()))
    })?;
    Dump::new(criu, process.pid(), &images).run()?;
    process.wait(GENEROUS)?;
    let mut options = Options::new(&images).log_to("lazy.log");
    if matches!(make(criu), Make::Ours) {
        // Pages come when they are touched: memory is watched to the end.
        options = options.with(&["--on-demand"]);
    }
    let mut client = LazyDaemon::start(make(criu), &options, None)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    let path = dir.join("said.txt");
    let said = wait::until("memory that has grown", GENEROUS, || {
        Ok(path
            .exists()
            .then(|| fs::read_to_string(&path))
            .transpose()?)
    });
    let said = said.with_context(|| client.process().log_tail())?;
    ensure!(said == "right", "{said}{}", client.process().log_tail());
    Ok(())
}

#[test]
fn locked_memory_grows_while_pages_are_missing() {
    with_criu(Suite::Sid, locked_memory_grows);
}
