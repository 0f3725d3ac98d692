//! What a container prints goes on in one log over a move: no line lost or doubled, whether it writes to a file or to a
//! pipe, with runc and crun, between hosts with control groups of version 2 alone.

use std::fs;

use anyhow::{Context, Result, ensure};
use testbed::container_pair::ContainerPair;
use testbed::criu::{Criu, Suite};
use testbed::runc;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Lines that are printed at a host before the test goes on.
const LINES: usize = 400;

/// How a container's output is kept at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kept {
    /// It has the log open.
    File,
    /// It writes to a pipe, whose reader writes the log.
    Pipe,
}

/// A container `c1` that prints at the first host.
struct Printing {
    hosts: ContainerPair,
}

impl Printing {
    /// Nothing without runtimes.
    fn start(
        test_dir: &TestDir,
        criu: &Criu,
        (runtime, name): (&'static str, &str),
        kept: Kept,
    ) -> Result<Option<Printing>> {
        let started = ContainerPair::start(test_dir, criu, (runtime, name), |bundle| {
            runc::make_root_of(&bundle.join("rootfs"), &binary("printer")?)?;
            let mut config = runc::config("");
            config["process"]["args"] = serde_json::json!(["/bin/printer"]);
            Ok(fs::write(bundle.join("config.json"), config.to_string())?)
        })?;
        let Some(hosts) = started else {
            return Ok(None);
        };
        let run = format!("{runtime} run -d --bundle /shared/bundle c1");
        hosts.pair.machines[0].script(&match kept {
            Kept::File => format!("{run} < /dev/null > /root/c.log 2>&1"),
            Kept::Pipe => {
                format!("({run} < /dev/null 2>&1 | cat >> /root/c.log) > /dev/null 2>&1 &")
            }
        })?;
        let printing = Printing { hosts };
        printing.wait_for(0, LINES)?;
        Ok(Some(printing))
    }

    /// The log at a host, without a last line that is not whole.
    fn log(&self, host: usize) -> Result<String> {
        let side = ["source", "destination"][host];
        let path = self.hosts.dir.join(side).join("c.log");
        let mut text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        Ok(text)
    }

    /// Waits until the log at a host has so many lines.
    fn wait_for(&self, host: usize, lines: usize) -> Result<()> {
        wait::until("lines of a log", GENEROUS, || {
            let found = self.log(host).unwrap_or_default().lines().count();
            Ok((found >= lines).then_some(()))
        })
    }
}

/// Each line is there once, in order.
fn expect_whole(log: &str) -> Result<usize> {
    for (line, number) in log.lines().zip(1..) {
        ensure!(
            line == format!("line {number}"),
            "{line:?} in place of line {number}"
        );
    }
    Ok(log.lines().count())
}

fn goes_on(
    test_dir: &TestDir,
    criu: &Criu,
    runtime: &'static str,
    kept: Kept,
    mode: &str,
) -> Result<()> {
    let name = format!("{runtime}-{kept:?}-{mode}").to_lowercase();
    let Some(printing) = Printing::start(test_dir, criu, (runtime, &name), kept)? else {
        return Ok(());
    };
    // A file is found by itself.
    let output = match kept {
        Kept::File => "",
        Kept::Pipe => "--output-log /root/c.log",
    };
    let moved = printing.hosts.migrate(
        "c1",
        "m1",
        &format!("--mode {mode} --max-rounds 2 {output}"),
    );
    let report = moved.map_err(anyhow::Error::msg)?;
    ensure!(report["result"] == "moved", "{report}");
    ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    let here = printing.log(0)?;
    let before = expect_whole(&here).context("the source's log")?;
    printing.wait_for(1, before + LINES)?;
    let there = printing.log(1)?;
    expect_whole(&there).context("the destination's log")?;
    ensure!(
        there.starts_with(&here),
        "the destination's log lacks the source's"
    );
    // Nobody writes at the source any more.
    ensure!(printing.log(0)? == here, "the source's log grows");
    Ok(())
}

/// A move that is refused, and one that is given up, leave both hosts' logs as they were, and the container prints on.
fn stays(test_dir: &TestDir, criu: &Criu, runtime: &'static str, kept: Kept) -> Result<()> {
    let name = format!("{runtime}-{kept:?}-stays").to_lowercase();
    let Some(printing) = Printing::start(test_dir, criu, (runtime, &name), kept)? else {
        return Ok(());
    };
    let [_, destination] = &printing.hosts.pair.machines;
    destination.script("echo another log > /root/c.log; echo another > /root/d.log")?;
    let expect_fails = |id: &str, options: &str, words: &str| -> Result<()> {
        match printing
            .hosts
            .migrate("c1", id, &format!("--mode cold {options}"))
        {
            Ok(report) => anyhow::bail!("{id}: {report}"),
            Err(said) => ensure!(said.contains(words), "{id}: {words:?} is not in {said}"),
        }
        let before = expect_whole(&printing.log(0)?)?;
        printing.wait_for(0, before + LINES)?;
        Ok(())
    };
    expect_fails(
        "another",
        "--output-log /root/c.log",
        "another log /root/c.log",
    )?;
    let there = destination.output("cat /root/c.log; ls /root")?;
    ensure!(
        there.starts_with("another log\n") && !there.contains("pageferry-"),
        "{there}"
    );
    // The runtime at the destination finds no CRIU: given up behind the freeze, with the log at its place.
    let program = destination.output(&format!("command -v {runtime}"))?;
    destination.script(&format!(
        "mv {program} {program}.real; printf '#!/bin/sh\\n\
         case \"$*\" in *restore*) exit 1;; esac\\nexec {program}.real \"$@\"\\n' > {program}; chmod +x {program}"
    ))?;
    expect_fails(
        "given-up",
        "--output-log /root/c.log:/root/new.log",
        "step restore failed at the destination",
    )?;
    let there = destination.output("ls /root")?;
    ensure!(!there.contains("new.log"), "{there}");
    destination.script(&format!("mv {program}.real {program}"))?;
    // Nothing of this was in the way of the move itself.
    let moved = printing.hosts.migrate(
        "c1",
        "at-last",
        "--mode cold --output-log /root/c.log:/root/new.log",
    );
    moved.map_err(anyhow::Error::msg)?;
    let before = expect_whole(&printing.log(0)?)?;
    destination.script("ln -f /root/new.log /root/c.log")?;
    printing.wait_for(1, before + LINES)?;
    expect_whole(&printing.log(1)?).map(drop)
}

#[test]
fn a_file_goes_on_with_crun() {
    with_criu(Suite::Sid, |test_dir, criu| {
        goes_on(test_dir, criu, "crun", Kept::File, "cold")
    });
}

#[test]
fn a_file_goes_on_with_runc() {
    with_criu(Suite::Sid, |test_dir, criu| {
        goes_on(test_dir, criu, "runc", Kept::File, "hybrid")
    });
}

#[test]
fn a_pipe_goes_on_with_crun() {
    with_criu(Suite::Sid, |test_dir, criu| {
        goes_on(test_dir, criu, "crun", Kept::Pipe, "hybrid")
    });
}

#[test]
fn a_pipe_goes_on_with_runc() {
    with_criu(Suite::Sid, |test_dir, criu| {
        goes_on(test_dir, criu, "runc", Kept::Pipe, "cold")
    });
}

#[test]
fn a_file_goes_on_by_a_newer_criu() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        goes_on(test_dir, criu, "runc", Kept::File, "cold")
    });
}

#[test]
fn a_move_that_is_given_up_leaves_the_logs() {
    with_criu(Suite::Sid, |test_dir, criu| {
        stays(test_dir, criu, "runc", Kept::File)
    });
}

#[test]
fn a_move_of_a_pipe_that_is_given_up_leaves_the_logs() {
    with_criu(Suite::Sid, |test_dir, criu| {
        stays(test_dir, criu, "crun", Kept::Pipe)
    });
}
