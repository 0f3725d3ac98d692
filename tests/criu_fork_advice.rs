//! Memory that a fork leaves zero in the child (MADV_WIPEONFORK), while it is missing, and a parent that gives other
//! advice right behind the fork: what counts is the advice at the fork. And memory that a child does not have at all
//! (MADV_DONTFORK), where another mapping grows to in the child. A real CRIU.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::migration::{Dump, Restore};
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

fn advice_at_the_fork_counts(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (images, dir) = (test_dir.path("images"), test_dir.path("advice"));
    fs::create_dir_all(&dir)?;
    let mut command = Command::new(workspace::binary("advice")?);
    command
        .arg(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = Spawned::start_ungrouped("advice", &mut command, None)?;
    wait::until("memory", GENEROUS, || {
        ensure!(process.ended()?.is_none(), "the process has ended");
        Ok(dir.join("ready").exists().then_some(()))
    })?;
    Dump::new(criu, process.pid(), &images).run()?;
    process.wait(GENEROUS)?;
    // Pages come when they are touched: a part is missing when its turn comes.
    let options = Options::new(&images)
        .with(&["--on-demand"])
        .log_to("lazy.log");
    let mut client = LazyDaemon::start(Make::Ours, &options, None)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    let path = dir.join("result.txt");
    let result = wait::until("what the children found", GENEROUS, || {
        Ok(path
            .exists()
            .then(|| fs::read_to_string(&path))
            .transpose()?)
    });
    let result = result.with_context(|| client.process().log_tail())?;
    ensure!(result == "right", "{result}{}", client.process().log_tail());
    Ok(())
}

#[test]
fn advice_at_the_fork_counts_4_2() {
    with_criu(Suite::Sid, advice_at_the_fork_counts);
}

#[test]
fn advice_at_the_fork_counts_4_3() {
    with_criu(Suite::Experimental, advice_at_the_fork_counts);
}
