//! What a case is made of: memory, accesses, a link, and who competes.

use std::path::Path;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use testbed::load::content::Content;
use testbed::load::page_words;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Pass, Step};
use testbed::proxy::Link;
use testbed::sys::WORD_BYTES;

use super::super::rounds::Contend;

/// Bytes a second of [`LinkKind::Gigabit`].
const GIGABIT_BYTES_PER_S: u32 = 125_000_000;
const GIGABIT_ROUND_TRIP: Duration = Duration::from_millis(1);

/// Who touches which page when.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Access {
    /// One thread, in order.
    Ascending,
    /// One thread, each page once, shuffled.
    Random,
    /// One thread, 90 % of the accesses in 10 % of the memory.
    HotCold,
    /// Four threads, each a quarter of the pages, shuffled.
    FourThreads,
    /// Four processes with a quarter of the memory each, shuffled.
    FourProcesses,
}

impl Access {
    pub(super) const ALL: [Access; 5] = [
        Access::Ascending,
        Access::Random,
        Access::HotCold,
        Access::FourThreads,
        Access::FourProcesses,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Access::Ascending => "in order",
            Access::Random => "at random",
            Access::HotCold => "90 % in 10 %",
            Access::FourThreads => "four threads at random",
            Access::FourProcesses => "four processes at random",
        }
    }

    fn processes(self) -> u32 {
        if self == Access::FourProcesses { 4 } else { 1 }
    }

    /// What every process does as soon as it is restored.
    /// One pass, ended after `limit`.
    pub(super) fn step(self, limit: Duration) -> Step {
        // Quick: checking every byte would take longer than moving it.
        let pass = match self {
            Access::Ascending => Pass::quick(Order::Ascending),
            Access::HotCold => Pass::quick(Order::HotCold),
            Access::FourThreads => Pass::quick(Order::Random).threads(4),
            Access::Random | Access::FourProcesses => Pass::quick(Order::Random),
        };
        Step::Verify(pass.within(limit))
    }
}

/// What lies between the source and the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LinkKind {
    /// Nothing: loopback.
    Loopback,
    /// A round trip of 1 ms, 1 Gbit/s.
    Gigabit,
}

impl LinkKind {
    pub(super) const ALL: [LinkKind; 2] = [LinkKind::Loopback, LinkKind::Gigabit];

    pub(super) fn name(self) -> &'static str {
        match self {
            LinkKind::Loopback => "loopback",
            LinkKind::Gigabit => "1 ms and 1 Gbit/s",
        }
    }

    pub(super) fn link(self) -> Option<Link> {
        match self {
            LinkKind::Loopback => None,
            LinkKind::Gigabit => Some(Link {
                round_trip: GIGABIT_ROUND_TRIP,
                bytes_per_s: Some(GIGABIT_BYTES_PER_S.into()),
                hides_resets: false,
            }),
        }
    }

    /// Seconds that `bytes` take at least; none where the machine is the limit.
    pub(super) fn least_s(self, bytes: f64) -> Option<f64> {
        match self {
            LinkKind::Loopback => None,
            LinkKind::Gigabit => Some(bytes / f64::from(GIGABIT_BYTES_PER_S)),
        }
    }
}

/// Who has the memory that is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SourceKind {
    /// `criu dump --lazy-pages`: for pageferry and for CRIU.
    Dump,
    /// `page-server --lazy-pages` on a finished dump: for pageferry.
    PageServer,
}

impl SourceKind {
    pub(super) const ALL: [SourceKind; 2] = [SourceKind::Dump, SourceKind::PageServer];
}

/// A daemon and its source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// lazy-client with CRIU's dump.
    Pageferry,
    /// CRIU's lazy-pages with CRIU's dump.
    Criu,
    /// lazy-client with our page server.
    PageferryOwnSource,
}

impl Contender {
    /// Those who compete with `sources`.
    pub(super) fn all_of(sources: &[SourceKind]) -> Vec<Contender> {
        let mut all = Vec::new();
        if sources.contains(&SourceKind::Dump) {
            all.extend([Contender::Pageferry, Contender::Criu]);
        }
        if sources.contains(&SourceKind::PageServer) {
            all.push(Contender::PageferryOwnSource);
        }
        all
    }
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::Pageferry => "pageferry",
            Contender::Criu => "CRIU",
            Contender::PageferryOwnSource => "pageferry, own source",
        }
    }
}

/// What is moved and how it is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    pub(super) mib: u32,
    pub(super) access: Access,
    pub(super) link: LinkKind,
}

impl Case {
    /// All combinations, small memory first.
    pub(super) fn all_of(sizes: &[u32], accesses: &[Access], links: &[LinkKind]) -> Vec<Case> {
        let mut all = Vec::new();
        for &link in links {
            for &mib in sizes {
                all.extend(accesses.iter().map(|&access| Case { mib, access, link }));
            }
        }
        all
    }

    pub(super) fn bytes(self) -> u64 {
        u64::from(self.mib) << 20
    }

    /// Pages of each process. A MiB has at least one page for each of four.
    fn pages_each(self) -> u32 {
        let page_bytes = u32::try_from(page_words() * WORD_BYTES).expect("pages are below 4 GiB");
        self.mib * ((1 << 20) / page_bytes) / self.access.processes()
    }

    pub(super) fn pages(self) -> u32 {
        self.pages_each() * self.access.processes()
    }

    pub(super) fn describe(self) -> String {
        let (pages, access, link) = (self.pages(), self.access.name(), self.link.name());
        format!("{} MiB ({pages} pages) {access}, {link}", self.mib)
    }

    /// The processes of the case, exchanging files in `dir`, alive for at most `lifetime_s`.
    pub(super) fn load(self, dir: &Path, lifetime_s: u32) -> LoadSpec {
        let area = AreaSpec::new(Mapping::Private, self.pages_each(), Content::Random);
        LoadSpec {
            processes: self.access.processes(),
            // What is measured is the area alone.
            pin_own_memory: true,
            lifetime_s,
            ..LoadSpec::new(dir, vec![area])
        }
    }
}
