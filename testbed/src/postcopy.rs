//! A whole post-copy: the restored processes run while their memory is still on its way.
//!
//! ```text
//!   criu dump --lazy-pages  or  a page server on a finished dump  or  nothing: local images
//!       ^ our forwarder, if it is to take the dump's memory over
//!       ^ proxy, if a link is given
//!   lazy-pages daemon  <-- userfaultfds --  criu restore --lazy-pages
//! ```

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::criu::Criu;
use crate::daemons::{LazyDaemon, Make, Options, PageServer};
use crate::images;
use crate::load::Load;
use crate::load::report::Report;
use crate::load::scenarios::verifying;
use crate::load::spec::LoadSpec;
use crate::load::steps::Step;
use crate::migration::{Dump, Restore, Restored};
use crate::net::free_port;
use crate::process::Spawned;
use crate::proxy::{Direction, Impairment, Link, Proxy};
use crate::test_dir::{TestDir, warm_memory};
use crate::wait::{self, GENEROUS};

/// Who has the memory that is still missing.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// The dump itself: `criu dump --lazy-pages`.
    Dump,
    /// The dump itself, whose memory our `page-server --forward-lazy` takes over.
    Forwarder,
    /// A page server that serves a finished dump.
    PageServer(Make<'a>),
    /// Nobody else: the images are where the restore is.
    Local,
}

/// What is moved, and how.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The CRIU that dumps.
    pub dumps: &'a Criu,
    /// The CRIU that restores.
    pub restores: &'a Criu,
    /// Where memory comes from after the restore.
    pub source: Source<'a>,
    /// Who makes the forwarder, where there is one.
    pub forwarder: Make<'a>,
    /// Who makes the lazy-pages daemon.
    pub client: Make<'a>,
    /// Further options of the lazy-pages daemon.
    pub client_options: Vec<String>,
    /// Further options of the source; of the forwarder, where there is one.
    pub source_options: Vec<String>,
    /// What the restored images are to have as their parent, if anything.
    pub parent_of_restored: Option<PathBuf>,
    /// What lies between the source and the daemon (none: loopback without a proxy).
    pub link: Option<(Link, Option<Impairment>)>,
    /// How many connections are impaired if there is an impairment on the link, the first ones.
    pub impaired_connections: u64,
    /// The lazy-pages daemon is stopped (SIGSTOP) before the restore, which it does not see before it goes on.
    pub client_stops: bool,
    /// So much memory is used and freed just before the restore, bytes: see [`warm_memory`].
    pub warmed_bytes: u64,
}

impl<'a> Plan<'a> {
    /// One CRIU on both sides, and a direct connection.
    pub fn new(criu: &'a Criu, source: Source<'a>, client: Make<'a>) -> Plan<'a> {
        Plan {
            dumps: criu,
            restores: criu,
            source,
            forwarder: Make::Ours,
            client,
            client_options: Vec::new(),
            source_options: Vec::new(),
            parent_of_restored: None,
            link: None,
            impaired_connections: u64::MAX,
            client_stops: false,
            warmed_bytes: 0,
        }
    }

    /// The same with a lazy-client of ours that has these `options`.
    pub fn ours(criu: &'a Criu, source: Source<'a>, options: &[&str]) -> Plan<'a> {
        Plan {
            client_options: options.iter().map(ToString::to_string).collect(),
            ..Plan::new(criu, source, Make::Ours)
        }
    }

    /// With further options on both sides.
    pub fn with(mut self, extra: &[String]) -> Plan<'a> {
        self.client_options.extend_from_slice(extra);
        self.source_options.extend_from_slice(extra);
        self
    }

    /// Over a link.
    pub fn over(self, link: Link) -> Plan<'a> {
        Plan {
            link: Some((link, None)),
            ..self
        }
    }

    /// Over a link with an impairment on it.
    pub fn with_impairment(self, link: Link, impairment: Impairment) -> Plan<'a> {
        Plan {
            link: Some((link, Some(impairment))),
            ..self
        }
    }
}

/// A link slow enough for a test to find pages missing: 64 MiB take two seconds.
pub fn slow_link() -> Link {
    Link {
        round_trip: Duration::from_millis(1),
        bytes_per_s: Some(32 << 20),
        hides_resets: false,
    }
}

/// A source that serves memory.
#[derive(Debug)]
enum Running {
    Dump(Spawned),
    PageServer(PageServer),
    /// A dump and its forwarder.
    Forwarded(Spawned, Box<PageServer>),
    Nobody,
}

/// What a dump left to restore from.
#[derive(Debug)]
struct Dumped {
    source: Running,
    images: PathBuf,
    /// Of the source, if there is one to ask.
    address: Option<SocketAddr>,
}

/// A post-copy under way. Parts are dropped in this order.
#[derive(Debug)]
pub struct PostCopy {
    /// The restored processes.
    pub restored: Restored,
    /// The lazy-pages daemon.
    pub daemon: LazyDaemon,
    /// The link, if there is one between.
    pub proxy: Option<Proxy>,
    dumped: Dumped,
    /// Steers the processes.
    pub load: Load,
    before: Vec<Report>,
    sent: Vec<(u32, u64)>,
}

impl PostCopy {
    /// Dumps a new load and restores it, up to the moment when it runs again. Its processes carry
    /// out `steps` as soon as they do.
    ///
    /// # Errors
    /// A step of the migration fails; the error shows the logs.
    pub fn start(
        test_dir: &TestDir,
        plan: &Plan<'_>,
        spec: LoadSpec,
        steps: &[Step],
    ) -> Result<PostCopy> {
        PostCopy::of(test_dir, plan, Load::start(spec, None)?, steps)
    }

    /// The same with a load that runs already.
    ///
    /// # Errors
    /// A step of the migration fails; the error shows the logs.
    pub fn of(
        test_dir: &TestDir,
        plan: &Plan<'_>,
        mut load: Load,
        steps: &[Step],
    ) -> Result<PostCopy> {
        let before = load.run_everywhere(&[Step::Status])?;
        let dumped = dump(test_dir, plan, &mut load)?;
        PostCopy::restore(plan, load, before, dumped, steps)
    }

    /// Restores a load that was dumped into `images` and is gone, from there or from a `server`.
    ///
    /// # Errors
    /// A step of the migration fails; the error shows the logs.
    pub fn from_images(
        plan: &Plan<'_>,
        load: Load,
        before: Vec<Report>,
        images: PathBuf,
        server: Option<PageServer>,
        steps: &[Step],
    ) -> Result<PostCopy> {
        let address = server.as_ref().map(PageServer::address);
        let dumped = Dumped {
            source: server.map_or(Running::Nobody, Running::PageServer),
            images,
            address,
        };
        PostCopy::restore(plan, load, before, dumped, steps)
    }

    fn restore(
        plan: &Plan<'_>,
        load: Load,
        before: Vec<Report>,
        dumped: Dumped,
        steps: &[Step],
    ) -> Result<PostCopy> {
        let address = dumped.address;
        let images = &dumped.images;
        if let Some(parent) = &plan.parent_of_restored {
            symlink(parent, images.join("parent"))?;
        }
        let proxy = match (address, plan.link) {
            (Some(address), Some((link, None))) => Some(Proxy::start(address, link, None)?),
            (Some(address), Some((link, Some(impairment)))) => {
                let impaired = plan.impaired_connections;
                Some(Proxy::start_with_impaired(
                    address, link, impairment, impaired,
                )?)
            }
            _ => None,
        };
        let address = proxy.as_ref().map(Proxy::address).or(address);
        let mut options = Options::new(images).log_to("lazy.log");
        options.extra.clone_from(&plan.client_options);
        let mut daemon = LazyDaemon::start(plan.client, &options, address)?;
        if plan.client_stops {
            daemon.process().signal(Signal::SIGSTOP)?;
        }
        // The source is frozen or gone: only the restored processes can take the command.
        let sent = (0..load.spec().processes)
            .filter(|_| !steps.is_empty())
            .map(|process| Ok((process, load.send(process, steps)?)))
            .collect::<Result<_>>()?;
        warm_memory(images, plan.warmed_bytes)?;
        let restored = Restore::new(plan.restores, images).lazily().run();
        let restored = restored.with_context(|| daemon.process().log_tail())?;
        if let Ok(init) = restored.init() {
            // Unless they have ended already.
            load.steer(init)?;
        }
        Ok(PostCopy {
            restored,
            daemon,
            proxy,
            dumped,
            load,
            before,
            sent,
        })
    }

    /// Restores the same dump once more, from a source that has stayed, in place of what was restored
    /// before.
    ///
    /// # Errors
    /// A step of the migration fails; the error shows the logs.
    pub fn again(mut self, plan: &Plan<'_>, steps: &[Step]) -> Result<PostCopy> {
        self.restored.kill();
        self.load.steer_anybody();
        PostCopy::restore(plan, self.load, self.before, self.dumped, steps)
    }

    /// Compares all memory of all processes.
    ///
    /// # Errors
    /// Some of it is not what it should be.
    pub fn expect_all_right(&self) -> Result<()> {
        for report in self.load.run_everywhere(&verifying())? {
            report.expect_right()?;
        }
        Ok(())
    }

    /// Waits for the reports of the steps given at the start, and checks that the processes are
    /// the ones that were dumped, and all their pages right.
    ///
    /// # Errors
    /// They are not; or a report does not come.
    pub fn reports(&mut self) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for &(process, seq) in &self.sent {
            let report = self.load.receive(process, seq, GENEROUS);
            let report = report.with_context(|| self.daemon.process().log_tail())?;
            let before = &self.before[process as usize];
            ensure!(
                report.nonce == before.nonce,
                "not the process that was dumped"
            );
            ensure!(report.pid == before.pid, "its pid has changed");
            ensure!(report.counter >= before.counter, "its counter went back");
            report.expect_right()?;
            reports.push(report);
        }
        Ok(reports)
    }

    /// Whether the reports of the steps given at the start are all there.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn reported(&self) -> Result<bool> {
        for &(process, seq) in &self.sent {
            if self.load.report(process, seq)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Payload bytes that came over the link so far.
    pub fn received(&self) -> u64 {
        self.carried(Direction::ToClient)
    }

    /// Payload bytes that went over the link in one direction so far.
    pub fn carried(&self, direction: Direction) -> u64 {
        self.proxy
            .as_ref()
            .map_or(0, |proxy| proxy.carried(direction))
    }

    /// The source's process, if there is a source.
    pub fn source(&mut self) -> Option<&mut Spawned> {
        match &mut self.dumped.source {
            Running::Dump(dump) | Running::Forwarded(dump, _) => Some(dump),
            Running::PageServer(server) => Some(server.process()),
            Running::Nobody => None,
        }
    }

    /// The forwarder's process, if there is a forwarder.
    pub fn forwarder(&mut self) -> Option<&mut Spawned> {
        match &mut self.dumped.source {
            Running::Forwarded(_, forwarder) => Some(forwarder.process()),
            _ => None,
        }
    }

    /// Waits until the daemon's log has these words.
    ///
    /// # Errors
    /// It ends without having said them; the error shows its log.
    pub fn wait_for_line(&mut self, words: &str) -> Result<()> {
        let daemon = self.daemon.process();
        let log = daemon.log().context("a log")?.to_owned();
        wait::until(words, GENEROUS, || {
            let over = daemon.ended()?.is_some();
            let is_logged = fs::read_to_string(&log)?.contains(words);
            ensure!(
                is_logged || !over,
                "the daemon is over{}",
                daemon.log_tail()
            );
            Ok(is_logged.then_some(()))
        })
    }

    /// Waits for a success of everyone: the daemon has filled all memory, the source has let the
    /// dumped processes go.
    ///
    /// # Errors
    /// The daemon or the source fails or runs on.
    pub fn finish(&mut self) -> Result<()> {
        self.daemon.process().succeed(GENEROUS)?;
        if let Some(source) = self.source() {
            source.succeed(GENEROUS)?;
        }
        if let Some(forwarder) = self.forwarder() {
            forwarder.succeed(GENEROUS)?;
        }
        self.load.wait_until_gone()
    }
}

/// Dumps the load as the plan says.
fn dump(test_dir: &TestDir, plan: &Plan<'_>, load: &mut Load) -> Result<Dumped> {
    let images = test_dir.path("dumped");
    let dump = Dump::new(plan.dumps, load.pid(), &images);
    let source_options: Vec<&str> = plan.source_options.iter().map(String::as_str).collect();
    let (source, images, address) = match plan.source {
        Source::Dump => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            let dump = dump.with(&source_options).serve_lazily(address)?;
            (Running::Dump(dump), images, Some(address))
        }
        Source::Forwarder => {
            let kept = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            let dump = dump.serve_lazily(kept)?;
            let kept = kept.to_string();
            let options = Options::new(&images).with(&["--forward-lazy", &kept]);
            let options = options.with(&source_options).log_to("forward.log");
            let forwarder = PageServer::receiving(plan.forwarder, &options)?;
            let address = forwarder.address();
            let running = Running::Forwarded(dump, Box::new(forwarder));
            (running, images, Some(address))
        }
        Source::PageServer(make) => {
            dump.run()?;
            load.wait_until_gone()?;
            let here = test_dir.path("restored");
            let missing = images::copy_without_lazy_pages(&images, &here)?;
            ensure!(missing > 0, "a test without missing pages");
            let options = Options::new(&images).with(&source_options);
            let server = PageServer::serving(make, &options.log_to("serve.log"))?;
            let address = server.address();
            (Running::PageServer(server), here, Some(address))
        }
        Source::Local => {
            dump.run()?;
            load.wait_until_gone()?;
            (Running::Nobody, images, None)
        }
    };
    Ok(Dumped {
        source,
        images,
        address,
    })
}
