//! Random operations on memory before a dump and behind the restore, compared with a model: a real CRIU.
//!
//! A process and its children map, unmap, move, grow, protect, lock, advise and fork at random
//! (`testbed::mm_operations`). After a lazy restore they go on at once, while pages are missing; with odd seeds they are
//! dumped in the midst of it. Every run of the tests tries a few seeds. The ignored tests try each way with each CRIU,
//! and as many seeds as `SIM_SEEDS` says; `MM_WAYS` names some of the ways.

#[path = "common/seeds.rs"]
mod seeds;

use std::env;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::images::{copy_without_lazy_pages, tell_uptime};
use testbed::migration::{Dump, Restore};
use testbed::mm_operations::{MmOperations, Plan};
use testbed::net::free_port;
use testbed::process;
use testbed::shim;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

/// A step that takes longer hangs: each takes seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Steps of the first process before the dump, of each behind it, and between two rounds.
const BEFORE: u32 = 300;
const BEHIND: u32 = 150;
const BETWEEN: u32 = 60;

/// Rounds of a chain before the last dump.
const ROUNDS: usize = 2;

/// From a dump to a restore. The first two are CRIU alone: there to tell whose fault it is.
const WAYS: &[&str] = &[
    "criu",
    "criu-lazy",
    "received",
    "dedup-content",
    "auto-dedup",
    "chain-lazy",
    "shim",
    "shim-lazy",
    "forward",
    "lazy-local",
    "lazy-dump",
    "lazy-page-server",
    "forward-lazy",
    "ferry",
    "hybrid",
    "migrate-cold",
    "migrate-pre-copy",
    "migrate-post-copy",
    "migrate-hybrid",
];

#[test]
fn ways_of_a_run_4_1() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        usual(test_dir, criu, &["ferry"])
    });
}

#[test]
fn ways_of_a_run_4_2() {
    with_criu(Suite::Sid, |test_dir, criu| {
        usual(test_dir, criu, &["migrate-hybrid"])
    });
}

#[test]
fn ways_of_a_run_4_3() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        usual(test_dir, criu, &["dedup-content"])
    });
}

/// Each way, with as many seeds as are asked for.
mod whole {
    use super::{Suite, whole, with_criu};

    #[test]
    #[ignore = "long: seconds for each seed and way"]
    fn criu_4_1() {
        with_criu(Suite::Trixie, whole);
    }

    #[test]
    #[ignore = "long: seconds for each seed and way"]
    fn criu_4_2() {
        with_criu(Suite::Sid, whole);
    }

    #[test]
    #[ignore = "long: seconds for each seed and way"]
    fn criu_4_3() {
        with_criu(Suite::Experimental, whole);
    }
}

fn usual(test_dir: &TestDir, criu: &Criu, ways: &[&'static str]) -> Result<()> {
    for (seed, way) in (1..).zip(ways) {
        run(test_dir, criu, way, seed).with_context(|| format!("{way}, seed {seed}"))?;
    }
    Ok(())
}

fn whole(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let asked = env::var("MM_WAYS").unwrap_or_default();
    let asked: Vec<&str> = asked.split(',').filter(|way| !way.is_empty()).collect();
    let is_asked = |way: &&&'static str| asked.is_empty() || asked.contains(*way);
    let mut wrong = Vec::new();
    for way in WAYS.iter().filter(is_asked) {
        let (mut runs, mut failed) = (0, 0);
        for seed in seeds::seeds(8) {
            runs += 1;
            let began = Instant::now();
            let ran = run(test_dir, criu, way, seed);
            let took = began.elapsed().as_secs_f64();
            if let Err(error) = ran {
                failed += 1;
                eprintln!("{way}, seed {seed}: {took:.1} s: {error:#}");
                wrong.push(format!("{way}, seed {seed}"));
            }
        }
        eprintln!(
            "CRIU {}, {way}: {failed} of {runs} runs are wrong",
            criu.version
        );
    }
    ensure!(wrong.is_empty(), "wrong: {wrong:#?}");
    Ok(())
}

/// What a CRIU cannot carry by itself.
fn lacks(criu: &Criu) -> Result<Vec<&'static str>> {
    Ok(match criu.release()? {
        (..=3, _) | (4, ..=1) => vec!["guard", "wipe"],
        (4, 2) => vec![],
        // Neither lazily nor from images with a parent.
        _ => vec!["memfd-private"],
    })
}

/// One run.
struct Run<'a> {
    criu: &'a Criu,
    dir: PathBuf,
    operations: MmOperations,
    seed: u64,
    /// The part that the processes do next.
    part: u32,
    /// Whether a dump ends when all pages have come.
    dump_waits: bool,
    /// Whether the last dump of a chain is restored lazily.
    chain_is_lazy: bool,
}

fn run(test_dir: &TestDir, criu: &Criu, way: &'static str, seed: u64) -> Result<()> {
    let dir = test_dir.path(&format!("{way}-{seed}"));
    let plan = Plan {
        seed,
        before: BEFORE,
        without: lacks(criu)?,
    };
    let operations = MmOperations::start(&dir.join("load"), &plan)?;
    let mut run = Run {
        criu,
        dir: dir.clone(),
        operations,
        seed,
        part: 1,
        dump_waits: false,
        chain_is_lazy: matches!(way, "chain-lazy" | "shim-lazy"),
    };
    run.carry(way)?;
    // Of a run that is wrong everything stays, for whoever keeps the directories of tests.
    Ok(fs::remove_dir_all(dir)?)
}

impl<'a> Run<'a> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn dump(&self, images: &Path) -> Dump<'a> {
        Dump::new(self.criu, self.operations.pid(), images)
    }

    fn carry(&mut self, way: &'static str) -> Result<()> {
        let images = self.path("images");
        match way {
            "criu" => {
                self.begin_last_dump(false)?;
                self.dump(&images).run()?;
                self.restored(&images)
            }
            "received" => {
                self.receive(&images, None, &[])?;
                self.restored(&images)
            }
            "dedup-content" | "auto-dedup" => {
                self.chain(&images, &format!("--{way}"))?;
                self.restored(&images)
            }
            "chain-lazy" => {
                self.chain(&images, "--dedup-content")?;
                self.operations.wait_until_gone()?;
                self.lazily(&images, Make::Ours, &[], None)
            }
            "shim" | "shim-lazy" => {
                self.chain_by_shim(&images)?;
                if way == "shim" {
                    return self.restored(&images);
                }
                self.operations.wait_until_gone()?;
                self.lazily(&images, Make::Ours, &[], None)
            }
            "forward" => {
                let far = Options::new(&images).log_to("receive.log");
                let far = PageServer::receiving(Make::Ours, &far)?;
                self.begin_last_dump(false)?;
                self.dump(&images)
                    .forwarded_to(far, &self.path("forward"))?;
                self.restored(&images)
            }
            "criu-lazy" | "lazy-local" | "lazy-page-server" => {
                self.begin_last_dump(true)?;
                self.dump(&images).run()?;
                self.operations.wait_until_gone()?;
                self.restore_files(way, &images)
            }
            _ => match way.strip_prefix("migrate-") {
                Some(mode) => self.migrate(mode),
                None => self.restore_dump(way, &images),
            },
        }
    }

    /// With odd seeds the processes are dumped while they do a part, which they finish when they are restored.
    fn begin_last_dump(&mut self, lazily: bool) -> Result<()> {
        if self.seed % 2 == 1 {
            self.operations.go(self.part, BEHIND, lazily)?;
            self.part += 1;
        }
        Ok(())
    }

    /// The part that the processes do when they are restored, and those before it.
    fn expect_right(&mut self, lazily: bool) -> Result<()> {
        for part in 1..=self.part {
            self.operations.expect_right(part)?;
        }
        if !lazily {
            return Ok(());
        }
        self.part += 1;
        self.operations.go(self.part, 0, true)?;
        self.operations.expect_right(self.part)
    }

    /// The last dump, to a page server.
    fn receive(&mut self, images: &Path, parent: Option<&Path>, options: &[&str]) -> Result<()> {
        self.begin_last_dump(self.chain_is_lazy)?;
        let dump = self.dump(images);
        self.receive_one(dump, images, parent, options)
    }

    fn receive_one(
        &self,
        mut dump: Dump<'a>,
        images: &Path,
        parent: Option<&Path>,
        options: &[&str],
    ) -> Result<()> {
        let mut server = Options::new(images);
        if let Some(parent) = parent {
            server = server.with(options).on_parent(parent);
            if options.contains(&"--auto-dedup") {
                tell_uptime(parent)?;
                dump = dump.with(&["--prev-images-dir", &parent.to_string_lossy()]);
            }
        }
        dump.received_by(PageServer::receiving(Make::Ours, &server)?)
    }

    /// Rounds, and a last dump on top of them.
    fn chain(&mut self, images: &Path, option: &str) -> Result<()> {
        let mut parent: Option<PathBuf> = None;
        for round in 0..ROUNDS {
            let dir = self.path(&format!("round-{round}"));
            let dump = self.dump(&dir).leave_running();
            self.receive_one(dump, &dir, parent.as_deref(), &[option])?;
            self.between_rounds()?;
            parent = Some(dir);
        }
        self.receive(images, parent.as_deref(), &[option])
    }

    fn between_rounds(&mut self) -> Result<()> {
        self.operations.go(self.part, BETWEEN, false)?;
        self.operations.expect_right(self.part)?;
        self.part += 1;
        Ok(())
    }

    /// The same by pre-dumps of the `criu` that stands before the real one.
    fn chain_by_shim(&mut self, images: &Path) -> Result<()> {
        let settings = "PAGEFERRY_EMULATE_PRE_DUMP=always";
        let shim = shim::before(self.criu, &self.path("shim"), settings)?;
        let mut parent: Vec<String> = Vec::new();
        for round in 0..ROUNDS {
            let dir = self.path(&format!("round-{round}"));
            fs::create_dir_all(&dir)?;
            let mut command = Command::new(&shim.path);
            command.args(["pre-dump", "--track-mem", "-o", "pre-dump.log", "-v4", "-t"]);
            command.arg(self.operations.pid().to_string());
            command.arg("-D").arg(&dir).args(&parent);
            process::run(&mut command)?;
            self.between_rounds()?;
            parent = vec!["--prev-images-dir".into(), format!("../round-{round}")];
        }
        self.begin_last_dump(self.chain_is_lazy)?;
        let parent: Vec<&str> = parent.iter().map(String::as_str).collect();
        let dump = Dump::new(&shim, self.operations.pid(), images).with(&["--track-mem"]);
        dump.with(&parent).run().map(drop)
    }

    /// By a plain restore.
    fn restored(&mut self, images: &Path) -> Result<()> {
        self.operations.wait_until_gone()?;
        self.operations.go(self.part, BEHIND, false)?;
        let _restored = Restore::new(self.criu, images).run()?;
        self.expect_right(false)
    }

    fn restore_files(&mut self, way: &str, images: &Path) -> Result<()> {
        if way != "lazy-page-server" {
            let make = match way {
                "criu-lazy" => Make::Criu(self.criu),
                _ => Make::Ours,
            };
            return self.lazily(images, make, &[], None);
        }
        let here = self.path("here");
        copy_without_lazy_pages(images, &here)?;
        let options = Options::new(images).log_to("serve.log");
        let server = PageServer::serving(Make::Ours, &options)?;
        self.lazily(&here, Make::Ours, &[], Some(server.address()))
    }

    fn restore_dump(&mut self, way: &str, images: &Path) -> Result<()> {
        let earlier = self.path("earlier");
        if way == "hybrid" {
            let dump = self.dump(&earlier).leave_running();
            self.receive_one(dump, &earlier, None, &[])?;
            self.between_rounds()?;
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        self.begin_last_dump(true)?;
        let mut dump = self.dump(images).serve_lazily(address)?;
        self.dump_waits = true;
        if way == "lazy-dump" {
            self.lazily(images, Make::Ours, &[], Some(address))?;
            return dump.succeed(LIMIT).map(drop);
        }
        let address = address.to_string();
        let options = Options::new(images).with(&["--forward-lazy", &address]);
        let mut forwarder = PageServer::receiving(Make::Ours, &options.log_to("forward.log"))?;
        let source = Some(forwarder.address());
        let earlier = earlier.to_string_lossy();
        let options: &[&str] = match way {
            "forward-lazy" => &[],
            "ferry" => &["--ferry"],
            _ => &["--ferry", "--prev-images-dir", &earlier],
        };
        self.lazily(images, Make::Ours, options, source)?;
        dump.succeed(LIMIT)?;
        forwarder.process().succeed(LIMIT).map(drop)
    }

    /// The processes go on while their pages come: at a rate, when they are touched, or as fast as it goes.
    fn lazily(
        &mut self,
        images: &Path,
        client: Make<'_>,
        options: &[&str],
        source: Option<SocketAddr>,
    ) -> Result<()> {
        let is_ours = matches!(client, Make::Ours);
        // A dump waits until all has come, which may be never.
        let on_demand = is_ours && self.seed % 4 == 2 && !self.dump_waits;
        let options = Options::new(images).with(options).log_to("lazy.log");
        let options = match self.seed % 4 {
            0 | 1 if is_ours => options.with(&["--max-bandwidth", "2M"]),
            _ if on_demand => options.with(&["--on-demand"]),
            _ => options,
        };
        self.operations.go(self.part, BEHIND, true)?;
        let mut daemon = LazyDaemon::start(client, &options, source)?;
        let _restored = Restore::new(self.criu, images).lazily().run()?;
        let said = self.expect_right(true);
        said.with_context(|| daemon.process().log_tail())?;
        if !on_demand {
            daemon.process().succeed(LIMIT)?;
            self.part += 1;
            self.operations.go(self.part, BEHIND, true)?;
            self.operations.expect_right(self.part)?;
        }
        Ok(())
    }

    /// By one command, while the processes go on with what they do.
    fn migrate(&mut self, mode: &'static str) -> Result<()> {
        let agent = Agent::start(&self.criu.path, &self.path("agent"), None, &[])?;
        let moves = Move::new(self.criu, self.path("source"), mode).with(&["--mode", mode]);
        self.operations.go(self.part, 2 * BEHIND, true)?;
        let pid = self.operations.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
        command.succeed(LIMIT).with_context(|| agent.log())?;
        self.operations.wait_until_gone()?;
        self.part += 1;
        self.operations.go(self.part, BEHIND, true)?;
        self.expect_right(true)
    }
}
