//! Guard regions that processes install after the restore over memory that they lack: in the restored process, in a child
//! that it forks, and where lazy-client is in another PID namespace. A real CRIU.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::exchange;
use testbed::migration::Restore;
use testbed::process::{Spawned, tail};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

/// So slow that guards are there before what they are installed over comes.
const SLOWLY: [&str; 2] = ["--max-bandwidth", "256K"];

/// A lazy-client, started by `prefix`.
fn client(images: &Path, prefix: &[&str], options: &[&str]) -> Result<Spawned> {
    let binary = workspace::binary("lazy-client")?;
    let log = images.join("lazy.log");
    let mut words = prefix.iter().map(|word| (*word).into()).collect::<Vec<_>>();
    words.push(binary.into_os_string());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg("-D").arg(images);
    command.args(["-o", "lazy.log", "-v4"]).args(options);
    Spawned::start_ready("lazy-client", &mut command, log)
}

/// Waits for what both processes have found in the `n`th look.
fn expect_right(dir: &Path, n: u32) -> Result<()> {
    for who in ["parent", "child"] {
        let path = dir.join(format!("{who}-{n}.txt"));
        exchange::expect_right(&path).with_context(|| format!("{who}, look {n}"))?;
    }
    Ok(())
}

fn guards_stay(test_dir: &TestDir, criu: &Criu, prefix: &[&str]) -> Result<()> {
    let (images, dir) = exchange::dump(test_dir, criu, "guards")?;
    let mut client = client(&images, prefix, &SLOWLY)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    expect_right(&dir, 1).with_context(|| client.log_tail())?;
    client.succeed(GENEROUS)?;
    fs::write(dir.join("filled"), "")?;
    expect_right(&dir, 2).with_context(|| client.log_tail())?;
    let log = fs::read_to_string(client.log().context("a log")?)?;
    for words in ["keeps the guard region", "or a child of it, is process"] {
        ensure!(
            log.contains(words),
            "no \"{words}\": nothing was tested{}",
            tail(client.log().context("a log")?)
        );
    }
    Ok(())
}

#[test]
fn guards_of_a_process_and_of_its_child_stay() {
    with_criu(Suite::Sid, |test_dir, criu| {
        guards_stay(test_dir, criu, &[])
    });
}

#[test]
fn guards_stay_where_the_client_is_in_another_pid_namespace() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let unshare = ["unshare", "--pid", "--fork", "--kill-child"];
        guards_stay(test_dir, criu, &unshare)
    });
}

/// More children than anybody tells apart inherit guards over missing pages, some of which have been moved.
fn inherited_guards_stay(test_dir: &TestDir, criu: &Criu, prefix: &[&str]) -> Result<()> {
    let (images, dir) = exchange::dump(test_dir, criu, "guardforks")?;
    let client = client(&images, prefix, &["--on-demand"])?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    let path = dir.join("said.txt");
    exchange::expect_right(&path).with_context(|| client.log_tail())
}

#[test]
fn guards_that_were_moved_stay_in_all_children() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        inherited_guards_stay(test_dir, criu, &[])
    });
}
