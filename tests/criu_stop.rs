//! However a lazy-client is told to end, and whatever it lacks then: no page reads as zero in place of one that
//! has not come.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::dumped_load;
use testbed::images::copy_without_lazy_pages;
use testbed::load::Load;
use testbed::load::report::Report;
use testbed::load::scenarios::verifying;
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::orphan::Orphan;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::process::{descendants, run};
use testbed::proxy::Link;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

const MIB: u32 = 64;
/// A part of a post-copy of [`MIB`], bytes.
const A_PART: u64 = 8 << 20;

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn wait_for_a_part(moving: &PostCopy) -> Result<()> {
    wait::until("a part of the memory", GENEROUS, || {
        Ok((moving.received() > A_PART).then_some(()))
    })
}

fn expect_no_zeros(report: &Report) -> Result<()> {
    let (wrong, zero) = (report.wrong(), report.wrong_zero());
    ensure!(wrong == 0, "{wrong} pages wrong, {zero} of them zero");
    Ok(())
}

/// The client and the process that stands by, if there is one.
fn both(moving: &mut PostCopy) -> Vec<Pid> {
    let client = moving.daemon.process().pid();
    let mut both = vec![client];
    both.extend(descendants(client));
    both
}

/// As service managers stop things, even those that hold: SIGTERM, and SIGKILL to all a moment later.
#[test]
fn ended_and_killed_a_moment_later() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::Dump, &["--on-loss", "hold"]).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        wait_for_a_part(&moving)?;
        let both = both(&mut moving);
        let standby = Orphan::new(both.get(1).context("who stands by")?.as_raw())?;
        for pid in &both {
            kill(*pid, Signal::SIGTERM)?;
        }
        // The case itself, not a wait for anything.
        std::thread::sleep(Duration::from_millis(200));
        for pid in &both {
            // They may have ended.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        moving.daemon.process().wait(GENEROUS)?;
        drop(standby);
        let report = moving.load.run(0, &verifying())?;
        ensure!(
            report.poisoned() > 0,
            "no page was lost: nothing was tested"
        );
        expect_no_zeros(&report)
    });
}

/// Local images alone, of which next to nothing has been installed when both processes hear the signal.
#[test]
fn signals_to_both_processes_lose_nothing() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let cases: [(&str, &[&str]); 3] = [
            ("HUP", &["--on-loss", "hold"]),
            ("QUIT", &["--on-loss", "kill", "--no-standby"]),
            ("64", &[]),
        ];
        for (signal, options) in cases {
            let test_dir = TestDir::new_in(test_dir.dir())?;
            let options: Vec<&str> = [options, &["--max-bandwidth", "16K"]].concat();
            let plan = Plan::ours(criu, Source::Local, &options);
            let mut moving = PostCopy::start(&test_dir, &plan, spec(&test_dir), &[])?;
            let both: Vec<String> = both(&mut moving).iter().map(Pid::to_string).collect();
            run(Command::new("kill").arg(format!("-{signal}")).args(&both))?;
            moving.daemon.process().wait(GENEROUS)?;
            let log = moving.daemon.process().log().context("a log")?;
            ensure!(
                fs::read_to_string(log)?.contains("stopped by SIG"),
                "{signal} was not heeded"
            );
            let report = moving.load.run(0, &verifying())?;
            expect_no_zeros(&report)?;
        }
        Ok(())
    });
}

/// Generations of children, and descriptors for a part of them, when the client is told to end. Returns what runs on and
/// the number of the command that it carries out.
fn told_to_end_without_descriptors(
    test_dir: &TestDir,
    criu: &Criu,
    policy: &str,
    (mib, depth): (u32, u32),
) -> Result<(PostCopy, u64)> {
    // So slow that most of it is missing.
    let link = Link {
        bytes_per_s: Some(u64::from(mib) << 17),
        ..slow_link()
    };
    let plan = Plan::ours(criu, Source::Dump, &["--on-loss", policy]).over(link);
    let spec = LoadSpec {
        on_lost_page: OnLostPage::Count,
        pin_own_memory: true,
        ..LoadSpec::mixed(test_dir.path("load"), mib)
    };
    let mut moving = PostCopy::start(test_dir, &plan, spec, &[])?;
    for pid in both(&mut moving) {
        let limit = ["--nofile=40:40", "--pid", &pid.to_string()];
        run(Command::new("prlimit").args(limit))?;
    }
    // Many of them, each with a few pages of its own to wait for or to lose.
    let pass = Pass::full(Order::Random).within(Duration::from_millis(20));
    let seq = moving.load.send(0, &[Step::Fork { depth, pass }])?;
    moving.wait_for_line("no descriptor for a child")?;
    moving.daemon.process().signal(Signal::SIGTERM)?;
    moving.daemon.process().fail(GENEROUS)?;
    Ok((moving, seq))
}

#[test]
fn processes_are_killed_for_want_of_descriptors_too() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let (moving, _) = told_to_end_without_descriptors(test_dir, criu, "kill", (MIB, 60))?;
        let pid = u32::try_from(moving.load.pid().as_raw())?;
        let end = moving.restored.wait_for_end(pid, GENEROUS)?;
        ensure!(end == "killed SIGKILL", "the restored process {end}");
        Ok(())
    });
}

#[test]
fn processes_are_poisoned_for_want_of_descriptors_too() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let depth = 100;
        let (moving, seq) = told_to_end_without_descriptors(test_dir, criu, "poison", (8, depth))?;
        let report = moving.load.receive(0, seq, GENEROUS)?;
        expect_no_zeros(&report)?;
        let failed = report.every_step().find_map(|step| step.failure.as_ref());
        ensure!(failed.is_none(), "{failed:?}");
        let lost = report.every_step().filter(|step| step.poisoned > 0);
        let (lost, all) = (lost.count(), report.every_step().count());
        // On a busy machine some come to no page in their time.
        ensure!(
            all == 1 + depth as usize && lost > all / 2,
            "{lost} of {all} processes have lost pages"
        );
        Ok(())
    });
}

/// What stands by for the client that works in the directory `dir`.
fn who_stands_by(dir: &Path) -> Result<Vec<Pid>> {
    let all = descendants(Pid::this()).into_iter();
    let found = all.filter(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        let works_in = fs::read_link(format!("/proc/{pid}/cwd"));
        name.is_ok_and(|name| name.trim() == "lazy-standby")
            && works_in.is_ok_and(|works_in| works_in == dir)
    });
    Ok(found.collect())
}

/// A process restored once more from `images` with a page server at `source`, and both processes of its client told to
/// end by `signal` before most of its memory has come.
fn stopped_by(
    (criu, load): (&Criu, &Load),
    (images, source): (&Path, SocketAddr),
    (policy, stands_by, background): (&str, bool, bool),
    signal: &str,
) -> Result<()> {
    let mut options = Options::new(images).log_to("lazy.log");
    options = options.with(&["--on-loss", policy, "--max-bandwidth", "16K"]);
    if !stands_by {
        options = options.with(&["--no-standby"]);
    }
    if background {
        options = options.with(&["--daemon", "--pidfile", "lazy.pid"]);
    }
    // Another run's may be there.
    let pidfile = images.join("lazy.pid");
    let _ = fs::remove_file(&pidfile);
    load.steer_anybody();
    let mut daemon = LazyDaemon::start(Make::Ours, &options, Some(source))?;
    let mut restored = Restore::new(criu, images).lazily().run()?;
    load.steer(restored.init()?)?;
    let client = match background {
        false => daemon.process().pid(),
        true => Pid::from_raw(fs::read_to_string(&pidfile)?.trim().parse()?),
    };
    let standby = who_stands_by(&images.canonicalize()?)?;
    ensure!(
        standby.len() == usize::from(stands_by),
        "{standby:?} stand by"
    );
    let both: Vec<String> = [client]
        .iter()
        .chain(&standby)
        .map(Pid::to_string)
        .collect();
    run(Command::new("kill").arg(format!("-{signal}")).args(&both))?;
    match background {
        false => drop(daemon.process().fail(GENEROUS)?),
        true => Orphan::new(client.as_raw())?.fail()?,
    }
    if policy == "kill" {
        let pid = u32::try_from(load.pid().as_raw())?;
        let end = restored.wait_for_end(pid, GENEROUS)?;
        ensure!(end == "killed SIGKILL", "the restored process {end}");
    } else {
        let report = load.run(0, &verifying())?;
        expect_no_zeros(&report)?;
        ensure!(
            report.poisoned() > 0,
            "no page was lost: nothing was tested"
        );
    }
    restored.kill();
    Ok(())
}

/// Each way to be ended, each policy, with and without a process that stands by, in the background or not. A few
/// signals stand for all, of which [`every_signal_that_ends_a_process_ends_in_order`] has each.
#[test]
fn every_policy_holds_for_every_end() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec {
            on_lost_page: OnLostPage::Count,
            pin_own_memory: true,
            ..LoadSpec::mixed(test_dir.path("load"), 4)
        };
        let images = test_dir.path("dumped");
        let load = dumped_load::dump(criu, spec, &images)?;
        let here = test_dir.path("restored");
        copy_without_lazy_pages(&images, &here)?;
        let options = Options::new(&images).with(&["--keep"]);
        let server = PageServer::serving(Make::Ours, &options.log_to("serve.log"))?;
        for policy in ["poison", "kill", "hold"] {
            for (stands_by, background) in
                [(true, true), (true, false), (false, true), (false, false)]
            {
                for signal in ["TERM", "HUP", "QUIT", "64"] {
                    let way = (policy, stands_by, background);
                    let ended = stopped_by((criu, &load), (&here, server.address()), way, signal);
                    ended.with_context(|| {
                        format!("SIG{signal}, {policy}, standby: {stands_by}, -d: {background}")
                    })?;
                }
            }
        }
        Ok(())
    });
}

/// Numbers as `kill -l` counts: all but SIGKILL, what stops or does nothing, and what failed writes raise.
const LEFT_OUT: [i32; 11] = [9, 13, 17, 18, 19, 20, 21, 22, 23, 25, 28];

/// All of them, the real-time ones and the two of the C library too.
#[test]
fn every_signal_that_ends_a_process_ends_in_order() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let load = Load::start(LoadSpec::mixed(test_dir.path("load"), 4), None)?;
        let images = test_dir.path("images");
        Dump::new(criu, load.pid(), &images).run()?;
        for number in (1..=64).filter(|number| !LEFT_OUT.contains(number)) {
            let options = Options::new(&images).log_to("lazy.log");
            let mut daemon = LazyDaemon::start(Make::Ours, &options, None)?;
            let pid = daemon.process().pid().to_string();
            // Words to a process that is held, and the C library's own: no orders to end, and no ends.
            let ends = ![10, 12, 32, 33].contains(&number);
            run(Command::new("kill").args([&format!("-{number}"), &pid]))?;
            if !ends {
                run(Command::new("kill").args(["-TERM", &pid]))?;
            }
            let ended = daemon.process().fail(GENEROUS);
            ended.with_context(|| format!("signal {number}"))?;
        }
        Ok(())
    });
}
