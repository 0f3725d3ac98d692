//! Every kind of mapping times every transfer, judged by real CRIUs.
//!
//! One process holds all kinds and checks itself, in a child that it forks as well. What a stock CRIU without
//! any of our daemons can dump and restore must come through each of our transfers; what it cannot is judged in a
//! process of its own. The table in docs/compatibility.md is what these tests saw: they fail if it says
//! something else, and write it if `PAGEFERRY_WRITE_TABLES` is set (one version after the other). Every run of the
//! tests tries each transfer with some CRIU; the ignored ones try all with all (`MM_WAYS` and `MM_KINDS` name some).

#[path = "common/kinds_in_runs.rs"]
mod kinds_in_runs;
#[path = "common/kinds_table.rs"]
mod kinds_table;
#[path = "common/memory_table.rs"]
mod memory_table;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kinds_in_runs::{GUARDS, ODD};
use kinds_table::{Cell, SUSPECTS, Seen, Table, column, is_asked};
use memory_table::{TRANSFERS, Transfer};
use testbed::criu::{Crit, Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::hugepages::HugePages;
use testbed::images::{copy_without_lazy_pages, tell_uptime};
use testbed::kinds::{KINDS, Kind, KindResults, Kinds, kind};
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

/// A step that takes longer hangs: each takes seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// For all kinds that have some, in a dumped process and a restored one.
const HUGE_PAGES: u64 = 64;

/// Slow enough for the process to find its pages missing.
const LAZY_RATE: &str = "48M";

#[test]
fn criu_4_1_1() {
    with_criu(Suite::Trixie, judge_often);
}

#[test]
fn criu_4_2_1() {
    with_criu(Suite::Sid, judge_often);
}

#[test]
fn criu_4_3() {
    with_criu(Suite::Experimental, judge_often);
}

/// All transfers, for the table in the documentation.
mod whole {
    use super::{Suite, judge_whole, with_criu};

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_1_1() {
        with_criu(Suite::Trixie, judge_whole);
    }

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_2_1() {
        with_criu(Suite::Sid, judge_whole);
    }

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_3() {
        with_criu(Suite::Experimental, judge_whole);
    }
}

fn judge_often(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let column = column(criu)?;
    let kinds = asked(|kind| !ODD.contains(&kind.name));
    judge(test_dir, criu, &kinds, |transfer| {
        transfer.often.contains(&column)
    })
}

fn judge_whole(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    judge(test_dir, criu, &asked(|_| true), |_| true)
}

fn judge(
    test_dir: &TestDir,
    criu: &Criu,
    kinds: &[Kind],
    tried: impl Fn(&Transfer) -> bool,
) -> Result<()> {
    let _huge = HugePages::allow(HUGE_PAGES)?;
    let mut seen = Seen::new();
    let baseline = Baseline::judge(test_dir, criu, kinds)?;
    for (kind, why) in baseline.refused.iter().chain(&baseline.refused_lazily) {
        eprintln!("{}: CRIU {} alone: {why}", kind.name, criu.version);
    }
    let column = column(criu)?;
    let tried = |transfer: &&Transfer| tried(transfer) && is_asked("MM_WAYS", transfer.name);
    for transfer in TRANSFERS.iter().filter(tried) {
        let carried = baseline.carried_by(*transfer);
        let mut place = Place::new(test_dir, criu, transfer.name, &carried)?;
        let began = Instant::now();
        let lacking = |kind: &Kind| place.kinds.lacking.contains_key(kind.name);
        let mut present = kinds.to_vec();
        present.retain(|kind| !lacking(kind));
        let said = carry(&mut place, *transfer);
        eprintln!("{}: {:.1} s", transfer.title, began.elapsed().as_secs_f64());
        let refuses = transfer.refuses.contains(&column);
        let said = match &said {
            Ok(_) if refuses => None,
            Ok(said) => Some(said),
            Err(_) if refuses => {
                let refused = present
                    .into_iter()
                    .map(|kind| ((kind, transfer.name), Cell::Refused));
                seen.extend(refused);
                continue;
            }
            Err(error) => {
                // A transfer that fails as a whole is wrong for every kind.
                eprintln!("{}: {error:#}", transfer.title);
                None
            }
        };
        let known = |kind: &Kind| !baseline.lacking.contains_key(kind.name);
        for kind in present.into_iter().filter(known) {
            seen.insert((kind, transfer.name), baseline.cell(kind, *transfer, said));
        }
    }
    Table::committed(memory_table::layout())?.judge(column, &seen)
}

/// The kinds that are asked for: those that are `wanted`, but for a search.
fn asked(wanted: impl Fn(&Kind) -> bool) -> Vec<Kind> {
    let asked = |kind: &&Kind| wanted(kind) && is_asked("MM_KINDS", kind.name);
    let asked = KINDS.iter().filter(asked);
    asked.copied().collect()
}

/// What a CRIU does by itself, with files alone.
struct Baseline {
    /// Its name in the table.
    column: &'static str,
    /// Kinds that it dumps and restores right.
    carried: Vec<Kind>,
    /// Kinds that it refuses or gets wrong, and how.
    refused: Vec<(Kind, String)>,
    /// Kinds that it refuses or gets wrong when it restores lazily with its own daemon.
    refused_lazily: Vec<(Kind, String)>,
    /// Kinds that this kernel lacks.
    lacking: BTreeMap<String, String>,
}

/// What a CRIU cannot restore from images with a parent, not even from its own with a parent link put beside them.
const WITHOUT_PARENT: &[(&str, &str)] = &[("4.3", "memfd-private")];

/// Kinds that some version cannot restore lazily: each is judged in a process of its own, for a restore that fails
/// would take the others along.
const LAZY_SUSPECTS: &[&str] = &["memfd-private", "hugetlb-memfd-private"];

impl Baseline {
    fn judge(test_dir: &TestDir, criu: &Criu, kinds: &[Kind]) -> Result<Baseline> {
        let mut baseline = Baseline {
            column: column(criu)?,
            carried: Vec::new(),
            refused: Vec::new(),
            refused_lazily: Vec::new(),
            lacking: BTreeMap::new(),
        };
        let suspect = |kind: &Kind| SUSPECTS.contains(&kind.name);
        let (suspects, others): (Vec<Kind>, Vec<Kind>) = kinds.iter().copied().partition(suspect);
        let said = baseline.try_alone(test_dir, criu, "others", &others);
        let said = said.with_context(|| format!("CRIU {} alone", criu.version))?;
        baseline.sort(&others, &Ok(said));
        let (guards, mut alone): (Vec<Kind>, Vec<Kind>) = suspects
            .into_iter()
            .partition(|kind| GUARDS.contains(&kind.name));
        // One that fails takes the others along.
        match baseline.try_alone(test_dir, criu, "guards", &guards) {
            Ok(said) => baseline.sort(&guards, &Ok(said)),
            Err(_) => alone.extend(guards),
        }
        for suspected in alone {
            let said = baseline.try_alone(test_dir, criu, suspected.name, &[suspected]);
            baseline.sort(&[suspected], &said);
        }
        for name in LAZY_SUSPECTS
            .iter()
            .filter(|name| is_asked("MM_KINDS", name))
        {
            let kind = kind(name).context("no such kind")?;
            let wrong = match lazily_alone(test_dir, criu, kind) {
                Ok(said) => said.get(kind.name).cloned().flatten(),
                Err(error) => Some(first_line(&error)),
            };
            if let Some(wrong) = wrong {
                baseline
                    .refused_lazily
                    .push((kind, format!("lazily: {wrong}")));
            }
        }
        Ok(baseline)
    }

    /// The kinds that `transfer` must carry.
    fn carried_by(&self, transfer: Transfer) -> Vec<Kind> {
        let carried = self.carried.iter().copied();
        carried
            .filter(|kind| !self.refuses(*kind, transfer))
            .collect()
    }

    fn refuses(&self, kind: Kind, transfer: Transfer) -> bool {
        let names = |refused: &[(Kind, String)]| refused.iter().any(|(name, _)| *name == kind);
        names(&self.refused)
            || (transfer.lazy && names(&self.refused_lazily))
            || (transfer.has_parent() && WITHOUT_PARENT.contains(&(self.column, kind.name)))
    }

    /// What `said`, if it came that far, is for a kind.
    fn cell(&self, kind: Kind, transfer: Transfer, said: Option<&KindResults>) -> Cell {
        if self.refuses(kind, transfer) {
            return Cell::Criu;
        }
        match said.and_then(|said| said.get(kind.name)) {
            None => Cell::Wrong("the transfer failed".to_owned()),
            Some(None) => Cell::Right,
            Some(Some(wrong)) => Cell::Wrong(wrong.clone()),
        }
    }

    fn sort(&mut self, kinds: &[Kind], said: &Result<KindResults>) {
        for kind in kinds {
            let wrong = match said {
                Ok(said) => said.get(kind.name).cloned().flatten(),
                Err(error) => Some(first_line(error)),
            };
            match wrong {
                _ if self.lacking.contains_key(kind.name) => {}
                None => self.carried.push(*kind),
                Some(wrong) => self.refused.push((*kind, wrong)),
            }
        }
    }

    fn try_alone(
        &mut self,
        test_dir: &TestDir,
        criu: &Criu,
        name: &str,
        kinds: &[Kind],
    ) -> Result<KindResults> {
        if kinds.is_empty() {
            return Ok(KindResults::new());
        }
        let place = Place::new(test_dir, criu, &format!("stock-{name}"), kinds)?;
        self.lacking.extend(place.kinds.lacking.clone());
        if place.kinds.lacking.len() == kinds.len() {
            return Ok(KindResults::new());
        }
        let images = place.path("images");
        place.dump(&images).run()?;
        place.gone_and_restored(&images)
    }
}

fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}")
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// One kind, from CRIU's dump to CRIU's own lazy-pages daemon.
fn lazily_alone(test_dir: &TestDir, criu: &Criu, kind: Kind) -> Result<KindResults> {
    let place = Place::new(test_dir, criu, &format!("lazily-{}", kind.name), &[kind])?;
    let images = place.path("images");
    let (mut dump, address) = waiting(&place, &images)?;
    let said = place.lazily(&images, Make::Criu(criu), &[], Some(address), false)?;
    dump.succeed(LIMIT)?;
    Ok(said)
}

/// One process, and where its images go.
struct Place<'a> {
    criu: &'a Criu,
    dir: PathBuf,
    kinds: Kinds,
}

impl<'a> Place<'a> {
    fn new(test_dir: &TestDir, criu: &'a Criu, name: &str, kinds: &[Kind]) -> Result<Place<'a>> {
        let dir = test_dir.path(name);
        fs::create_dir_all(&dir)?;
        let kinds = Kinds::start(&dir.join("load"), kinds)?;
        Ok(Place { criu, dir, kinds })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn dump(&self, images: &Path) -> Dump<'a> {
        Dump::new(self.criu, self.kinds.pid(), images)
    }

    /// Restores from `images`, and lets the process check itself.
    fn restored(&self, images: &Path) -> Result<KindResults> {
        let mut restored = Restore::new(self.criu, images).start()?;
        restored.wait_until_resumed(LIMIT)?;
        self.kinds.ask(1)?;
        self.kinds.answer(1)
    }

    fn gone_and_restored(mut self, images: &Path) -> Result<KindResults> {
        self.kinds.wait_until_gone()?;
        self.restored(images)
    }

    /// Dumps to a page server with `options`, in `images`.
    fn dump_to_server(&self, images: &Path, options: &[&str], parent: Option<&Path>) -> Result<()> {
        let mut server = Options::new(images).with(options);
        let mut dump = self.dump(images).leave_running();
        if let Some(parent) = parent {
            server = server.on_parent(parent);
            if options.contains(&"--auto-dedup") {
                tell_uptime(parent)?;
                dump = dump.with(&["--prev-images-dir", &parent.to_string_lossy()]);
            }
        }
        let server = PageServer::receiving(Make::Ours, &server)?;
        dump.to(server.address()).run()?;
        server.finish(LIMIT).map(drop)
    }

    /// Restores lazily with `client` from `source`; the process checks itself while its pages come and once
    /// they are there. `checks_at_once` is false where a client is not ours and children may go wrong.
    fn lazily(
        &self,
        images: &Path,
        client: Make<'_>,
        options: &[&str],
        source: Option<SocketAddr>,
        checks_at_once: bool,
    ) -> Result<KindResults> {
        let (first, last) = if checks_at_once { (1, 2) } else { (0, 1) };
        if checks_at_once {
            self.kinds.ask(first)?;
        }
        let options = Options::new(images).with(options).log_to("lazy.log");
        let mut daemon = LazyDaemon::start(client, &options, source)?;
        let mut restored = Restore::new(self.criu, images).lazily().start()?;
        restored.wait_until_resumed(LIMIT)?;
        let at_once = match checks_at_once {
            true => self.kinds.answer(first)?,
            false => KindResults::new(),
        };
        daemon.process().succeed(LIMIT)?;
        self.kinds.ask(last)?;
        let mut said = self.kinds.answer(last)?;
        for (kind, wrong) in at_once {
            let wrong = wrong.map(|wrong| format!("while pages come: {wrong}"));
            let known = said.entry(kind).or_default();
            *known = known.take().or(wrong);
        }
        drop(restored);
        Ok(said)
    }
}

/// Carries a process by one transfer.
fn carry(place: &mut Place<'_>, transfer: Transfer) -> Result<KindResults> {
    let (first, images) = (place.path("first"), place.path("images"));
    match transfer.name {
        "plain" => place.dump_to_server(&images, &[], None)?,
        "dedup-content" | "auto-dedup" => {
            place.dump_to_server(&first, &[], None)?;
            let option = format!("--{}", transfer.name);
            place.dump_to_server(&images, &[&option], Some(&first))?;
        }
        "dedup-tree" => place.dump_to_server(&images, &["--dedup-tree"], None)?,
        "compress" => {
            place.dump_to_server(&images, &["--compress"], None)?;
            Crit::fetched()?.decompress(&images)?;
        }
        "forward" => forward(place, &images)?,
        _ => return lazily(place, transfer),
    }
    // What was dumped runs on, and would check itself as well.
    place.kinds.stop()?;
    place.restored(&images)
}

/// Through two page servers.
fn forward(place: &Place<'_>, images: &Path) -> Result<()> {
    let far = PageServer::receiving(Make::Ours, &Options::new(images).log_to("receive.log"))?;
    let dump = place.dump(images).leave_running();
    dump.forwarded_to(far, &place.path("forward"))
}

/// A dump that is over, in files, and a copy of it without the pages that come later.
fn in_files(place: &mut Place<'_>) -> Result<[PathBuf; 2]> {
    let [images, here] = ["images", "here"].map(|name| place.path(name));
    place.dump(&images).leave_running().run()?;
    place.kinds.stop()?;
    ensure!(
        copy_without_lazy_pages(&images, &here)? > 0,
        "nothing to be missing"
    );
    Ok([images, here])
}

/// A dump that waits to be asked for its pages, and its address.
fn waiting(place: &Place<'_>, images: &Path) -> Result<(Spawned, SocketAddr)> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
    Ok((place.dump(images).serve_lazily(address)?, address))
}

fn lazily(place: &mut Place<'_>, transfer: Transfer) -> Result<KindResults> {
    let slowly = ["--max-bandwidth", LAZY_RATE];
    let images = place.path("images");
    match transfer.name {
        "served" | "lazy-page-server" => {
            let [images, here] = in_files(place)?;
            let options = Options::new(&images).log_to("serve.log");
            let server = PageServer::serving(Make::Ours, &options)?;
            match transfer.name {
                "served" => {
                    let criu = Make::Criu(place.criu);
                    place.lazily(&here, criu, &[], Some(server.address()), false)
                }
                _ => place.lazily(&here, Make::Ours, &slowly, Some(server.address()), true),
            }
        }
        "lazy-local" => {
            let [images, _] = in_files(place)?;
            place.lazily(&images, Make::Ours, &slowly, None, true)
        }
        "split-lazy" => {
            let apart = place.path("apart");
            place.dump_to_server(&images, &["--split-lazy", &apart.to_string_lossy()], None)?;
            place.kinds.stop()?;
            let server = PageServer::serving(Make::Ours, &Options::new(&apart))?;
            place.lazily(&images, Make::Ours, &slowly, Some(server.address()), true)
        }
        "lazy-dump" => {
            let (mut dump, address) = waiting(place, &images)?;
            let said = place.lazily(&images, Make::Ours, &slowly, Some(address), true)?;
            dump.succeed(LIMIT)?;
            Ok(said)
        }
        _ => {
            let earlier = place.path("earlier");
            if transfer.name == "hybrid" {
                place.dump_to_server(&earlier, &[], None)?;
            }
            let (mut dump, address) = waiting(place, &images)?;
            let address = address.to_string();
            let options = Options::new(&images).with(&["--forward-lazy", &address]);
            let mut forwarder = PageServer::receiving(Make::Ours, &options.log_to("forward.log"))?;
            let earlier = earlier.to_string_lossy();
            let mut options = slowly.to_vec();
            match transfer.name {
                "forward-lazy" => {}
                "ferry" => options.push("--ferry"),
                _ => options.extend(["--ferry", "--prev-images-dir", &earlier]),
            }
            let source = Some(forwarder.address());
            let said = place.lazily(&images, Make::Ours, &options, source, true)?;
            dump.succeed(LIMIT)?;
            forwarder.process().succeed(LIMIT)?;
            Ok(said)
        }
    }
}
