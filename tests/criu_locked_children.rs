//! Memory that is locked as it is touched (MLOCK_ONFAULT), and children that have pages there which their parent lacks. CRIU
//! fills a parent's locked memory with zeros before it forks the children, which a lazy restore then leaves there. A real
//! CRIU.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::images::copy_without_lazy_pages;
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace;

/// The processes that say what they have found; the last one is forked behind the restore.
const GENERATIONS: usize = 4;

/// The processes, dumped or restored.
struct Family {
    process: Spawned,
    dir: PathBuf,
}

impl Family {
    fn start(dir: PathBuf) -> Result<Family> {
        fs::create_dir_all(&dir)?;
        let mut command = Command::new(workspace::binary("onfault")?);
        command
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Spawned::start_ungrouped("onfault", &mut command, None)?;
        wait::until("memory", GENEROUS, || {
            ensure!(process.ended()?.is_none(), "the process has ended");
            Ok(dir.join("ready").exists().then_some(()))
        })?;
        Ok(Family { process, dir })
    }

    fn expect_right(&self) -> Result<()> {
        fs::write(self.dir.join("go"), "")?;
        for generation in 0..GENERATIONS {
            let path = self.dir.join(format!("said-{generation}"));
            let said = wait::until("what a process has found", GENEROUS, || {
                Ok(path
                    .exists()
                    .then(|| fs::read_to_string(&path))
                    .transpose()?)
            })?;
            ensure!(said == "right", "process {generation}: {said}");
        }
        Ok(())
    }
}

/// One way from a dump to a lazy restore.
fn carry(test_dir: &TestDir, criu: &Criu, way: &str) -> Result<()> {
    let path = |name: &str| test_dir.path(&format!("{way}-{name}"));
    let mut family = Family::start(path("load"))?;
    let images = path("images");
    let dump = Dump::new(criu, family.process.pid(), &images);
    let plain = |family: &mut Family| -> Result<()> {
        dump.run()?;
        family.process.wait(GENEROUS).map(drop)
    };
    match way {
        "local" => {
            plain(&mut family)?;
            restore(&family, criu, &images, &[], None)
        }
        "page-server" => {
            plain(&mut family)?;
            let here = path("here");
            copy_without_lazy_pages(&images, &here)?;
            let server = PageServer::serving(Make::Ours, &Options::new(&images))?;
            restore(&family, criu, &here, &[], Some(server.address()))
        }
        "migrate" => {
            let agent = Agent::start(&criu.path, &path("agent"), None, &[])?;
            let moves = Move::new(criu, path("source"), "locked").with(&["--mode", "post-copy"]);
            let pid = family.process.pid().to_string();
            let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
            command.succeed(GENEROUS).with_context(|| agent.log())?;
            family.process.wait(GENEROUS)?;
            family.expect_right()
        }
        _ => {
            let earlier = path("earlier");
            if way == "hybrid" {
                let server = PageServer::receiving(Make::Ours, &Options::new(&earlier))?;
                let round = Dump::new(criu, family.process.pid(), &earlier).leave_running();
                round.received_by(server)?;
            }
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            let mut dump = dump.serve_lazily(address)?;
            if way == "dump" {
                restore(&family, criu, &images, &[], Some(address))?;
                return dump.succeed(GENEROUS).map(drop);
            }
            let address = address.to_string();
            let options = Options::new(&images).with(&["--forward-lazy", &address]);
            let forwarder = options.log_to("forward.log");
            let mut forwarder = PageServer::receiving(Make::Ours, &forwarder)?;
            let source = Some(forwarder.address());
            let earlier = earlier.to_string_lossy();
            let options: &[&str] = match way {
                "forward-lazy" => &[],
                "ferry" => &["--ferry"],
                _ => &["--ferry", "--prev-images-dir", &earlier],
            };
            restore(&family, criu, &images, options, source)?;
            dump.succeed(GENEROUS)?;
            forwarder.process().succeed(GENEROUS).map(drop)
        }
    }
}

fn restore(
    family: &Family,
    criu: &Criu,
    images: &Path,
    options: &[&str],
    source: Option<SocketAddr>,
) -> Result<()> {
    let options = Options::new(images).with(options).log_to("lazy.log");
    let mut client = LazyDaemon::start(Make::Ours, &options, source)?;
    let _restored = Restore::new(criu, images).lazily().run()?;
    let found = family.expect_right();
    found.with_context(|| client.process().log_tail())?;
    let log = fs::read_to_string(images.join("lazy.log"))?;
    let added = "pages of zeros were added to locked memory";
    ensure!(log.contains(added), "no \"{added}\": nothing was tested");
    client.finish(GENEROUS).map(drop)
}

fn each(test_dir: &TestDir, criu: &Criu, ways: &[&str]) -> Result<()> {
    ways.iter()
        .try_for_each(|way| carry(test_dir, criu, way).with_context(|| (*way).to_owned()))
}

#[test]
fn children_of_locked_memory_have_their_pages_4_1() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        each(test_dir, criu, &["local", "page-server", "ferry"])
    });
}

#[test]
fn children_of_locked_memory_have_their_pages_4_2() {
    with_criu(Suite::Sid, |test_dir, criu| {
        each(test_dir, criu, &["local", "dump", "hybrid"])
    });
}

#[test]
fn children_of_locked_memory_have_their_pages_4_3() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        each(test_dir, criu, &["local", "forward-lazy", "migrate"])
    });
}
