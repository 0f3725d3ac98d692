//! A lazy-client that systemd has started, killed with its whole control group: systemd keeps the userfaultfds, the
//! restored processes wait, and the service that is started again goes on. A real systemd, real CRIUs.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::dumped_load;
use testbed::gate;
use testbed::images::copy_without_lazy_pages;
use testbed::load::Load;
use testbed::load::scenarios::{reshaping, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::migration::{Dump, Restore, Restored};
use testbed::net::free_port;
use testbed::postcopy::slow_link;
use testbed::process::tail;
use testbed::proxy::{Direction, Proxy};
use testbed::suite::with_criu;
use testbed::systemd::Systemd;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

const UNIT: &str = "lazy.service";
const MIB: u32 = 64;
/// About half of a post-copy of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;

/// What the unit says besides what all say.
const STARTED_AGAIN: &str = "Restart=on-abnormal\nRestartSec=0";
const STARTED_BY_HAND: &str = "FileDescriptorStorePreserve=yes";

/// A restored load whose memory a service brings. Parts are dropped in this order.
struct Moving<'a> {
    restored: Restored,
    systemd: &'a Systemd,
    log: PathBuf,
    load: Load,
    sent: Vec<u64>,
}

fn with_systemd(suite: Suite, test: impl FnOnce(&TestDir, &Criu, &Systemd) -> Result<()>) {
    let Some(usr) = gate::systemd() else {
        return;
    };
    with_criu(suite, |test_dir, criu| {
        let systemd = Systemd::start(&usr, test_dir.dir())?;
        test(test_dir, criu, &systemd)
    });
}

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn write_unit(systemd: &Systemd, images: &Path, options: &str, more: &str) -> Result<()> {
    let client = workspace::binary("lazy-client")?;
    let (client, images) = (client.display(), images.display());
    systemd.write_unit(
        UNIT,
        &format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nFileDescriptorStoreMax=4096\n{more}\n\
             ExecStart={client} -D {images} -o lazy.log -v4 {options}\n"
        ),
    )
}

impl<'a> Moving<'a> {
    /// Starts the service on `images`, whose processes are gone or frozen, and restores them.
    fn start(
        systemd: &'a Systemd,
        criu: &Criu,
        load: Load,
        images: &Path,
        unit: (&str, &str),
        steps: &[Step],
    ) -> Result<Moving<'a>> {
        let moving = Moving::start_restore(systemd, criu, load, images, unit, steps, false)?;
        // The test kills what goes on then, not the restore.
        wait::until("lazy-client to have all processes", GENEROUS, || {
            let all = fs::read_to_string(&moving.log)?.contains("the restore is finished");
            Ok(all.then_some(()))
        })?;
        Ok(moving)
    }

    /// The same, up to when CRIU has ended. The service may be `stopped` before CRIU begins, and has read nothing then.
    fn start_restore(
        systemd: &'a Systemd,
        criu: &Criu,
        load: Load,
        images: &Path,
        (options, more): (&str, &str),
        steps: &[Step],
        stopped: bool,
    ) -> Result<Moving<'a>> {
        write_unit(systemd, images, options, more)?;
        let log = images.join("lazy.log");
        let started = systemd.control(&["start", UNIT]);
        started.with_context(|| tail(&log))?;
        let sent = match steps {
            [] => Vec::new(),
            steps => vec![load.send(0, steps)?],
        };
        if stopped {
            systemd.control(&["kill", "--kill-whom=main", "--signal=STOP", UNIT])?;
        }
        let restored = Restore::new(criu, images).lazily().run();
        let restored = restored.with_context(|| tail(&log))?;
        if let Ok(init) = restored.init() {
            load.steer(init)?;
        }
        Ok(Moving {
            restored,
            systemd,
            log,
            load,
            sent,
        })
    }

    fn kill(&self) -> Result<()> {
        let kept = self.systemd.property(UNIT, "NFileDescriptorStore")?;
        ensure!(
            kept.parse::<u32>()? >= 3,
            "systemd keeps {kept} descriptors{}",
            tail(&self.log)
        );
        let whom = ["kill", "--kill-whom=all", "--signal=KILL", UNIT];
        self.systemd.control(&whom).map(drop)
    }

    fn reports(&self) -> Result<()> {
        for &seq in &self.sent {
            let report = self.load.receive(0, seq, GENEROUS);
            report.with_context(|| tail(&self.log))?.expect_right()?;
        }
        Ok(())
    }

    fn expect_all_brought(&self) -> Result<()> {
        let ended = self.systemd.wait_for(UNIT, "ActiveState", "inactive");
        ended.with_context(|| tail(&self.log))?;
        for (name, value) in [("Result", "success"), ("NFileDescriptorStore", "0")] {
            let found = self.systemd.property(UNIT, name)?;
            ensure!(found == value, "{name}={found}{}", tail(&self.log));
        }
        ensure!(
            fs::read_to_string(&self.log)?.contains("the service manager has kept"),
            "nothing was taken up{}",
            tail(&self.log)
        );
        Ok(())
    }
}

/// Images without their pages, and a server of ours that has them behind a slow link.
fn served(test_dir: &TestDir, criu: &Criu) -> Result<(Load, PathBuf, PageServer, Proxy)> {
    let images = test_dir.path("dumped");
    let load = dumped_load::dump(criu, spec(test_dir), &images)?;
    let here = test_dir.path("restored");
    copy_without_lazy_pages(&images, &here)?;
    let options = Options::new(&images).with(&["--keep"]);
    let server = PageServer::serving(Make::Ours, &options.log_to("serve.log"))?;
    let proxy = Proxy::start(server.address(), slow_link(), None)?;
    Ok((load, here, server, proxy))
}

fn source_options(address: SocketAddr) -> String {
    format!(
        "--page-server --address {} --port {}",
        address.ip(),
        address.port()
    )
}

fn wait_for_half(proxy: &Proxy, log: &Path) -> Result<()> {
    let half = wait::until("half of the memory", GENEROUS, || {
        Ok((proxy.carried(Direction::ToClient) > HALF_WAY).then_some(()))
    });
    half.with_context(|| tail(log))
}

fn killed_half_way(suite: Suite, more: &str, steps: &[Step]) {
    with_systemd(suite, |test_dir, criu, systemd| {
        let (load, images, _server, proxy) = served(test_dir, criu)?;
        let options = source_options(proxy.address());
        let unit = (options.as_str(), more);
        let moving = Moving::start(systemd, criu, load, &images, unit, steps)?;
        wait_for_half(&proxy, &moving.log)?;
        moving.kill()?;
        moving.reports()?;
        moving.expect_all_brought()
    });
}

#[test]
fn a_page_server_is_gone_on_with() {
    killed_half_way(Suite::Sid, STARTED_AGAIN, &verifying());
}

#[test]
fn memory_is_reshaped_and_forked_meanwhile() {
    killed_half_way(Suite::Experimental, STARTED_AGAIN, &reshaping());
}

/// CRIU has ended, and nothing of what it handed over was read.
#[test]
fn a_restore_that_nobody_has_heard_is_gone_on_with() {
    with_systemd(Suite::Sid, |test_dir, criu, systemd| {
        let (load, images, _server, proxy) = served(test_dir, criu)?;
        let options = source_options(proxy.address());
        let unit = (options.as_str(), STARTED_AGAIN);
        let steps = verifying();
        let moving = Moving::start_restore(systemd, criu, load, &images, unit, &steps, true)?;
        moving.kill()?;
        moving.reports()?;
        moving.expect_all_brought()
    });
}

/// What the installed unit forbids by capabilities and system calls is not needed, before the outage and after it.
#[test]
fn the_installed_unit_allows_what_is_needed() {
    let unit = include_str!("../packaging/systemd/lazy-client@.service");
    let begins = unit.find("UMask=").expect("the switches");
    // Those that are made by mounts are not to be had here: a manager of a user in namespaces cannot start a service
    // with them.
    let by_mounts = |line: &&str| line.starts_with("Protect") || line.starts_with("Private");
    let switches = unit[begins..].lines().filter(|line| !by_mounts(line));
    let switches: Vec<&str> = switches.collect();
    let more = format!("{STARTED_AGAIN}\n{}", switches.join("\n"));
    killed_half_way(Suite::Trixie, &more, &reshaping());
}

/// Whether a thread of the process `pid` sleeps without being in a system call.
fn waits_for_page(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let at = fs::read_to_string(thread.path().join("syscall"));
        at.is_ok_and(|at| at.starts_with("-1 "))
    })
}

/// Killed twice, and started by hand: whoever touches missing memory while nobody is there waits, and is served.
#[test]
fn who_waits_during_the_outage_is_served_afterwards() {
    with_systemd(Suite::Trixie, |test_dir, criu, systemd| {
        let images = test_dir.path("dumped");
        let load = dumped_load::dump(criu, spec(test_dir), &images)?;
        let slow = ("--max-bandwidth 16K", STARTED_BY_HAND);
        let mut moving = Moving::start(systemd, criu, load, &images, slow, &[])?;
        for _ in 0..2 {
            moving.kill()?;
            systemd.wait_for(UNIT, "ActiveState", "failed")?;
            if moving.sent.is_empty() {
                moving.sent.push(moving.load.send(0, &verifying())?);
            }
            let pids = moving.restored.pids();
            wait::until("a thread that waits for a page", GENEROUS, || {
                Ok(pids.iter().any(|pid| waits_for_page(*pid)).then_some(()))
            })?;
            ensure!(
                moving.load.report(0, moving.sent[0])?.is_none(),
                "missing pages were read"
            );
            systemd.control(&["start", UNIT])?;
        }
        moving.reports()?;
        // Nothing is left but what nobody has asked for.
        write_unit(systemd, &images, "", STARTED_BY_HAND)?;
        moving.kill()?;
        systemd.wait_for(UNIT, "ActiveState", "failed")?;
        systemd.control(&["start", UNIT])?;
        moving.expect_all_brought()
    });
}

/// Only the dump had the pages, and its one connection is gone: they are poisoned, and the source goes on.
#[test]
fn what_a_dump_had_is_poisoned() {
    with_systemd(Suite::Sid, |test_dir, criu, systemd| {
        let load = Load::start(spec(test_dir), None)?;
        let images = test_dir.path("dumped");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let mut dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
        let proxy = Proxy::start(address, slow_link(), None)?;
        let options = source_options(proxy.address());
        let unit = (options.as_str(), STARTED_AGAIN);
        let mut moving = Moving::start(systemd, criu, load, &images, unit, &[])?;
        wait_for_half(&proxy, &moving.log)?;
        moving.kill()?;
        systemd.wait_for(UNIT, "ExecMainStatus", "1")?;
        dump.fail(GENEROUS)?;
        let report = moving.load.run(0, &verifying())?;
        ensure!(
            report.poisoned() > 0,
            "no page was lost: nothing was tested"
        );
        ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
        moving.restored.kill();
        moving.load.expect_running()
    });
}

/// The images are others when the service is started again: nothing of them must come into the processes.
#[test]
fn with_other_images_the_processes_are_killed() {
    with_systemd(Suite::Sid, |test_dir, criu, systemd| {
        let (load, images, _server, proxy) = served(test_dir, criu)?;
        let options = source_options(proxy.address());
        let unit = (options.as_str(), STARTED_BY_HAND);
        let moving = Moving::start(systemd, criu, load, &images, unit, &[])?;
        moving.kill()?;
        systemd.wait_for(UNIT, "ActiveState", "failed")?;
        let other = Load::start(LoadSpec::mixed(test_dir.path("other"), 4), None)?;
        let others = test_dir.path("others");
        Dump::new(criu, other.pid(), &others).run()?;
        write_unit(systemd, &others, "", STARTED_BY_HAND)?;
        ensure!(
            systemd.control(&["start", UNIT]).is_err(),
            "other images were taken"
        );
        let pid = u32::try_from(moving.load.pid().as_raw())?;
        let end = moving.restored.wait_for_end(pid, GENEROUS)?;
        ensure!(end == "killed SIGKILL", "the restored process {end}");
        let log = fs::read_to_string(others.join("lazy.log"))?;
        ensure!(
            log.contains("a restore of other images than those in"),
            "{log}"
        );
        Ok(())
    });
}

/// The images cannot be read when the service is started again, which is told to hold: nobody is killed, whoever needs a
/// page waits, and an operator has it tried again.
#[test]
fn with_images_that_are_away_the_processes_are_held() {
    with_systemd(Suite::Experimental, |test_dir, criu, systemd| {
        let images = test_dir.path("dumped");
        let load = dumped_load::dump(criu, spec(test_dir), &images)?;
        let slow = ("--max-bandwidth 16K", STARTED_BY_HAND);
        let mut moving = Moving::start(systemd, criu, load, &images, slow, &[])?;
        moving.kill()?;
        systemd.wait_for(UNIT, "ActiveState", "failed")?;
        let (tree, away) = (images.join("pstree.img"), test_dir.path("pstree.img"));
        fs::rename(&tree, &away)?;
        write_unit(systemd, &images, "--on-loss hold --wait 0", STARTED_BY_HAND)?;
        // It says that it is there, or systemd would kill it.
        systemd.control(&["start", UNIT])?;
        let log = fs::read_to_string(&moving.log)?;
        let held = log.contains("holding the processes");
        ensure!(held, "they are not held{}", tail(&moving.log));
        moving.sent.push(moving.load.send(0, &verifying())?);
        let pids = moving.restored.pids();
        wait::until("a thread that waits for a page", GENEROUS, || {
            Ok(pids.iter().any(|pid| waits_for_page(*pid)).then_some(()))
        })?;
        let report = moving.load.report(0, moving.sent[0])?;
        ensure!(report.is_none(), "missing pages were read");
        fs::rename(&away, &tree)?;
        systemd.control(&["kill", "--kill-whom=main", "--signal=USR1", UNIT])?;
        moving.reports()?;
        moving.expect_all_brought()
    });
}
