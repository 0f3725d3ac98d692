//! Our daemons started the way others start CRIU's: in the background, with a criu command line.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::criu::{self, Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::load::Load;
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Proxy};
use testbed::suite::{make, with_criu};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::{for_each_criu, gate, process, test_dir, workspace};

for_each_criu!(
    page_server_in_the_background,
    lazy_client_in_the_background,
    a_restore_in_the_foreground_holds_nobody_up,
);

const MIB: u32 = 32;

/// A daemon that has left its starter: ended on drop.
struct Background {
    pid: Pid,
}

impl Background {
    /// Starts a daemon that goes to the background by itself, and takes its pid from the file.
    fn start(command: &mut Command, pidfile: &Path) -> Result<Background> {
        command.arg("--daemon").arg("--pidfile").arg(pidfile);
        process::run(command)?;
        // It is there as soon as the command line returns: scripts read it at once.
        let pid = pid_in(pidfile)?;
        Ok(Background { pid })
    }

    /// Kills it, and waits until the pidfile names the process that stood by.
    fn kill_for_standby(self, pidfile: &Path) -> Result<Background> {
        kill(self.pid, Signal::SIGKILL)?;
        let pid = wait::until("another pid", GENEROUS, || {
            // It may be half written.
            Ok(pid_in(pidfile).ok().filter(|pid| *pid != self.pid))
        });
        Ok(Background { pid: pid? })
    }

    fn wait_for_end(&self) -> Result<()> {
        wait::until("the end of the daemon", GENEROUS, || {
            match kill(self.pid, None) {
                Err(Errno::ESRCH) => Ok(Some(())),
                // It is a child of whoever reaps orphans, and may be dead without being reaped.
                _ => Ok(is_zombie(self.pid).then_some(())),
            }
        })
    }
}

fn pid_in(pidfile: &Path) -> Result<Pid> {
    let text = fs::read_to_string(pidfile).context("pidfile")?;
    Ok(Pid::from_raw(text.trim().parse()?))
}

impl Drop for Background {
    fn drop(&mut self) {
        if !is_zombie(self.pid) {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

fn is_zombie(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status
        .rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

fn expect_logged(log: &Path, words: &str) -> Result<()> {
    let text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
    ensure!(
        text.contains(words),
        "{} does not say {words:?}:\n{text}",
        log.display()
    );
    Ok(())
}

/// A criu command line as it stands: the action word in the middle, options that mean nothing here.
fn page_server_in_the_background(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let (images, work) = (test_dir.path("images"), test_dir.path("work"));
    fs::create_dir(&images)?;
    fs::create_dir(&work)?;
    let port = free_port()?;
    let mut command = Command::new(workspace::binary("page-server")?);
    command.args([
        "--no-default-config",
        "--tcp-close",
        "-v4",
        "page-server",
        "-o",
        "server.log",
    ]);
    command.args(["--address", "127.0.0.1", "--port", &port.to_string()]);
    command.arg("-D").arg(&images).arg("-W").arg(&work);
    let server = Background::start(&mut command, &test_dir.path("server.pid"))?;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    Dump::new(criu, load.pid(), &images).to(address).run()?;
    server.wait_for_end()?;
    load.wait_until_gone()?;
    expect_logged(&work.join("server.log"), "tcp-close")?;
    let _restored = Restore::new(criu, &images).run()?;
    load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
        .expect_right()
}

fn lazy_client_in_the_background(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let (images, work) = (test_dir.path("images"), test_dir.path("work"));
    fs::create_dir(&work)?;
    Dump::new(criu, load.pid(), &images).run()?;
    load.wait_until_gone()?;
    let mut command = Command::new(workspace::binary("lazy-client")?);
    command.args(["lazy-pages", "-v4", "-o", "lazy.log"]);
    command.arg("-D").arg(&images).arg("-W").arg(&work);
    let client = Background::start(&mut command, &test_dir.path("client.pid"))?;
    let restore = Restore::new(criu, &images).lazily();
    let _restored = restore.with(&["-W", &work.to_string_lossy()]).run()?;
    load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
        .expect_right()?;
    client.wait_for_end()?;
    expect_logged(&work.join("lazy.log"), "pages of 1 processes")
}

/// Whoever looks into the pidfile finds the process that serves, also when another did so before.
#[test]
fn the_pidfile_names_who_has_taken_over() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
        let (images, pidfile) = (test_dir.path("images"), test_dir.path("client.pid"));
        Dump::new(criu, load.pid(), &images).run()?;
        load.wait_until_gone()?;
        let mut command = Command::new(workspace::binary("lazy-client")?);
        // Nothing comes that is not asked for, until it is stopped.
        command.args(["-v4", "-o", "lazy.log", "--on-demand"]);
        command.arg("-D").arg(&images);
        let client = Background::start(&mut command, &pidfile)?;
        let _restored = Restore::new(criu, &images).lazily().run()?;
        let client = client.kill_for_standby(&pidfile)?;
        load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
            .expect_right()?;
        kill(client.pid, Signal::SIGTERM)?;
        client.wait_for_end()?;
        let log = images.join("lazy.log");
        expect_logged(&log, "stopped by SIGTERM")?;
        expect_logged(&log, " 0 missing")
    });
}

/// What is polled before the fork into the background does not wake the process that goes on there.
#[test]
fn signals_end_a_client_in_the_background() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
        let (images, pidfile) = (test_dir.path("images"), test_dir.path("client.pid"));
        Dump::new(criu, load.pid(), &images).run()?;
        load.wait_until_gone()?;
        for signal in [Signal::SIGTERM, Signal::SIGALRM] {
            let mut command = Command::new(workspace::binary("lazy-client")?);
            command.args([
                "-v4",
                "-o",
                "lazy.log",
                "--on-demand",
                "--trace",
                "faults.trace",
            ]);
            command.arg("-D").arg(&images);
            let client = Background::start(&mut command, &pidfile)?;
            let restored = Restore::new(criu, &images).lazily().run()?;
            load.steer(restored.init()?)?;
            kill(client.pid, Signal::SIGUSR1)?;
            let log = images.join("lazy.log");
            let is_logged =
                |words: &str| Ok(fs::read_to_string(&log)?.contains(words).then_some(()));
            wait::until("a word on the signal", GENEROUS, || {
                is_logged("SIGUSR1 is for processes that are held")
            })?;
            kill(client.pid, signal)?;
            client.wait_for_end()?;
            expect_logged(&log, &format!("stopped by {signal}"))?;
            load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
                .expect_right()?;
        }
        Ok(())
    });
}

/// A page server in the background, and where it listens.
fn background_server(images: &Path, options: &[&str]) -> Result<(Background, SocketAddr)> {
    fs::create_dir_all(images)?;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let mut command = Command::new(workspace::binary("page-server")?);
    command.args(["-v4", "-o", "server.log", "--address", "127.0.0.1"]);
    command.args(["--port", &address.port().to_string(), "-D"]);
    command.arg(images).args(options);
    let server = Background::start(&mut command, &images.join("server.pid"))?;
    Ok((server, address))
}

fn end_server(server: &Background, images: &Path, signal: Signal) -> Result<()> {
    kill(server.pid, signal)?;
    server.wait_for_end()?;
    let words = format!("{signal}: ending all sessions");
    expect_logged(&images.join("server.log"), &words)
}

/// Every signal whose default ends a process, but for SIGKILL and those that servers ignore.
fn ending_signals() -> impl Iterator<Item = Signal> {
    let others = [
        Signal::SIGKILL,
        Signal::SIGSTOP,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGCHLD,
        Signal::SIGCONT,
        Signal::SIGURG,
        Signal::SIGWINCH,
        Signal::SIGPIPE,
        Signal::SIGXFSZ,
    ];
    Signal::iterator().filter(move |signal| !others.contains(signal))
}

/// Signals that people and service managers send, and those that no program expects.
const WHILE_RECEIVING: [Signal; 9] = [
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGALRM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGSEGV,
    Signal::SIGIO,
];

/// What is polled before the fork into the background does not wake the process that goes on there.
#[test]
fn every_signal_ends_an_idle_page_server_in_the_background() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for keep in [&["--keep"][..], &[]] {
        for signal in ending_signals() {
            let images = dir.path().join(format!("{signal}-{}", keep.len()));
            let (server, _) = background_server(&images, keep)?;
            end_server(&server, &images, signal)?;
        }
    }
    Ok(())
}

/// Each way in which a page server may be busy, and each kind of signal.
#[test]
fn signals_end_a_page_server_in_the_background() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
        for signal in WHILE_RECEIVING {
            let images = test_dir.path(&format!("received-{signal}"));
            let (server, address) = background_server(&images, &[])?;
            let link = Proxy::start(address, slow_link(), None)?;
            let to_link = Dump::new(criu, load.pid(), test_dir.path("dump")).to(link.address());
            let mut dump = to_link.start()?;
            wait::until("a part of the dump", GENEROUS, || {
                Ok((link.carried(Direction::ToServer) > 2 << 20).then_some(()))
            })?;
            end_server(&server, &images, signal)?;
            dump.fail(GENEROUS)?;
            let names = fs::read_dir(&images)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<Result<Vec<_>>>()?;
            let image = names.iter().find(|name| name.ends_with(".img"));
            ensure!(image.is_none(), "{names:?}");
            load.expect_running()?;
        }

        let lazily = test_dir.path("lazily");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let mut dump = Dump::new(criu, load.pid(), &lazily).serve_lazily(address)?;
        let dump_address = address.to_string();
        let (server, _) = background_server(&lazily, &["--forward-lazy", &dump_address])?;
        end_server(&server, &lazily, Signal::SIGALRM)?;
        dump.fail(GENEROUS)?;
        load.expect_running()?;

        let served = test_dir.path("served");
        Dump::new(criu, load.pid(), &served).leave_running().run()?;
        let (server, _) = background_server(&served, &["--lazy-pages"])?;
        end_server(&server, &served, Signal::SIGINT)?;
        load.run(0, &[Step::Verify(Pass::full(Order::Random))])?
            .expect_right()
    });
}

/// Such a restore keeps its connection to the daemon until the restored processes end.
fn a_restore_in_the_foreground_holds_nobody_up(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let images = test_dir.path("images");
    Dump::new(criu, load.pid(), &images).run()?;
    load.wait_until_gone()?;
    let options = Options::new(&images).log_to("lazy.log");
    let daemon = LazyDaemon::start(make(criu), &options, None)?;
    let restore = Restore::new(criu, &images).lazily().in_the_foreground();
    let restored = restore.start()?;
    load.expect_first_memory()?;
    daemon.finish(GENEROUS)?;
    ensure!(restored.how_ended("restore").is_none(), "criu did not stay");
    load.run(0, &[Step::Status]).map(drop)
}

/// By default a process that reads a lost page dies of it.
#[test]
fn a_lost_page_kills_its_reader() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let impairment = Impairment {
            direction: Direction::ToClient,
            after_bytes: 8 << 20,
            kind: ImpairmentKind::Reset,
        };
        let plan =
            Plan::new(criu, Source::Dump, Make::Ours).with_impairment(slow_link(), impairment);
        let spec = LoadSpec {
            pin_own_memory: true,
            ..LoadSpec::mixed(test_dir.path("load"), MIB)
        };
        let mut moving = PostCopy::start(test_dir, &plan, spec, &[])?;
        moving.daemon.process().fail(GENEROUS)?;
        moving
            .load
            .send(0, &[Step::Verify(Pass::full(Order::Ascending))])?;
        let pid = u32::try_from(moving.load.pid().as_raw())?;
        let ended = moving.restored.wait_for_end(pid, GENEROUS)?;
        ensure!(
            ended == "killed SIGBUS",
            "the reader of a lost page {ended}"
        );
        Ok(())
    });
}

/// The CRIU that the machine itself has, where it has one that works.
#[test]
fn the_machines_own_criu() {
    let Some(()) = gate::root() else { return };
    let Some(criu) = criu::of_machine() else {
        eprintln!("skipped: this machine has no CRIU of its own that passes criu check");
        return;
    };
    test_dir::with_test_dir(|test_dir| {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
        let mut load = Load::start(spec, None)?;
        let images = test_dir.path("images");
        let server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
        Dump::new(&criu, load.pid(), &images)
            .to(server.address())
            .leave_running()
            .run()?;
        server.finish(GENEROUS)?;
        load.expect_running()?;
        drop(load);
        let plan = Plan::new(&criu, Source::Dump, Make::Ours).over(slow_link());
        let spec = LoadSpec::mixed(test_dir.path("load-again"), MIB);
        let mut moved = PostCopy::start(test_dir, &plan, spec, &reading())?;
        moved.reports()?;
        moved.finish()
    });
}
