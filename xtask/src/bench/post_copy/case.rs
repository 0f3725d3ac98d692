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

/// How the pages lie in the address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Shape {
    /// One behind the other, in one mapping.
    Whole,
    /// Every second page of a mapping, so each is a run of its own.
    Holes,
    /// Each in a mapping of its own.
    Mappings,
}

impl Shape {
    pub(super) const ALL: [Shape; 3] = [Shape::Whole, Shape::Holes, Shape::Mappings];

    /// MiB of memory of this shape, where `mib` is what other shapes are measured with.
    fn mib(self, mib: u32) -> u32 {
        match self {
            Shape::Whole | Shape::Holes => mib,
            Shape::Mappings => MAPPINGS_MIB,
        }
    }
}

/// 100,096 pages of 4 KiB, each a mapping.
const MAPPINGS_MIB: u32 = 391;

/// Who has the memory that is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SourceKind {
    /// `criu dump --lazy-pages`: for pageferry and for CRIU.
    Dump,
    /// `page-server --lazy-pages` on a finished dump: for pageferry.
    PageServer,
    /// Local images: for pageferry and for CRIU.
    Local,
    /// `page-server --forward-lazy` in front of CRIU's dump, in CRIU's protocol: for pageferry.
    Forwarder,
    /// The same over ferry: for pageferry.
    Ferry,
}

impl SourceKind {
    pub(super) const ALL: [SourceKind; 5] = [
        SourceKind::Dump,
        SourceKind::PageServer,
        SourceKind::Local,
        SourceKind::Forwarder,
        SourceKind::Ferry,
    ];

    /// What whole memory is measured with, unless told otherwise.
    pub(super) const FOR_WHOLE: [SourceKind; 2] = [SourceKind::Dump, SourceKind::PageServer];

    fn serves_criu(self) -> bool {
        matches!(self, SourceKind::Dump | SourceKind::Local)
    }
}

/// Who makes a daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Side {
    /// lazy-client.
    Ours,
    /// lazy-client of another build, and its page server where the source is one.
    Baseline,
    /// CRIU's lazy-pages.
    Criu,
}

/// A daemon, its source, and the memory that it is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Contender {
    pub(super) side: Side,
    pub(super) source: SourceKind,
    pub(super) shape: Shape,
}

impl Contender {
    /// lazy-client with CRIU's dump.
    pub(super) const PAGEFERRY: Contender = Contender::whole(Side::Ours, SourceKind::Dump);
    /// CRIU's lazy-pages with CRIU's dump.
    pub(super) const CRIU: Contender = Contender::whole(Side::Criu, SourceKind::Dump);
    /// lazy-client with our page server.
    pub(super) const OWN_SOURCE: Contender = Contender::whole(Side::Ours, SourceKind::PageServer);

    const fn whole(side: Side, source: SourceKind) -> Contender {
        Contender {
            side,
            source,
            shape: Shape::Whole,
        }
    }

    /// Those who compete with `sources` over memory of `shape`, and over whole memory.
    pub(super) fn all_of(
        sources: &[SourceKind],
        shape: Shape,
        with_baseline: bool,
    ) -> Vec<Contender> {
        let mut all = Vec::new();
        for &source in sources {
            let sides = [
                (Side::Ours, true),
                (Side::Baseline, with_baseline),
                (Side::Criu, source.serves_criu()),
            ];
            for (side, _) in sides.into_iter().filter(|(_, competes)| *competes) {
                let whole = Contender::whole(side, source);
                all.push(Contender { shape, ..whole });
                // What it takes without gaps is of interest of ours alone.
                if shape != Shape::Whole && side == Side::Ours {
                    all.push(whole);
                }
            }
        }
        all
    }

    /// Whom it is compared with: CRIU, another build, itself over whole memory.
    pub(super) fn rivals(self) -> Vec<Contender> {
        if self.side != Side::Ours {
            return Vec::new();
        }
        let source = match self.source {
            SourceKind::Local => SourceKind::Local,
            _ => SourceKind::Dump,
        };
        let criu = Contender {
            side: Side::Criu,
            source,
            ..self
        };
        let baseline = Contender {
            side: Side::Baseline,
            ..self
        };
        let mut rivals = vec![criu, baseline];
        if self.shape != Shape::Whole {
            rivals.push(self.over_whole());
        }
        rivals
    }

    /// The same over whole memory.
    pub(super) fn over_whole(self) -> Contender {
        Contender::whole(self.side, self.source)
    }
}

/// A contender's name with the shape of its memory.
macro_rules! shaped {
    ($shape:expr, $name:literal) => {
        match $shape {
            Shape::Whole => $name,
            Shape::Holes => concat!($name, ", every second page"),
            Shape::Mappings => concat!($name, ", each page mapped apart"),
        }
    };
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        let shape = self.shape;
        match (self.side, self.source) {
            (Side::Ours, SourceKind::Dump) => shaped!(shape, "pageferry"),
            (Side::Ours, SourceKind::PageServer) => shaped!(shape, "pageferry, own source"),
            (Side::Ours, SourceKind::Local) => shaped!(shape, "pageferry, local"),
            (Side::Ours, SourceKind::Forwarder) => shaped!(shape, "pageferry, forwarder"),
            (Side::Ours, SourceKind::Ferry) => shaped!(shape, "pageferry, ferry"),
            (Side::Baseline, SourceKind::Dump) => shaped!(shape, "baseline"),
            (Side::Baseline, SourceKind::PageServer) => shaped!(shape, "baseline, own source"),
            (Side::Baseline, SourceKind::Local) => shaped!(shape, "baseline, local"),
            (Side::Baseline, SourceKind::Forwarder) => shaped!(shape, "baseline, forwarder"),
            (Side::Baseline, SourceKind::Ferry) => shaped!(shape, "baseline, ferry"),
            (Side::Criu, SourceKind::Local) => shaped!(shape, "CRIU, local"),
            (Side::Criu, _) => shaped!(shape, "CRIU"),
        }
    }
}

/// What is moved and how it is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    pub(super) mib: u32,
    pub(super) access: Access,
    pub(super) link: LinkKind,
    /// What is compared with whole memory, if anything else than that is measured.
    pub(super) shape: Shape,
}

impl Case {
    /// All combinations, small memory first; other shapes than whole memory only of the smallest size, in order and
    /// at random, without a link.
    pub(super) fn all_of(
        sizes: &[u32],
        accesses: &[Access],
        links: &[LinkKind],
        shapes: &[Shape],
    ) -> Vec<Case> {
        let mut all = Vec::new();
        for &shape in shapes {
            let small = sizes.iter().min().copied().into_iter();
            let (sizes, links): (Vec<u32>, &[LinkKind]) = match shape {
                Shape::Whole => (sizes.to_vec(), links),
                Shape::Holes | Shape::Mappings => (
                    small.map(|mib| shape.mib(mib)).collect(),
                    &[LinkKind::Loopback],
                ),
            };
            let fits = |access: &&Access| {
                shape == Shape::Whole || matches!(access, Access::Ascending | Access::Random)
            };
            for &link in links {
                for &mib in &sizes {
                    let accesses = accesses.iter().filter(fits);
                    all.extend(accesses.map(|&access| Case {
                        mib,
                        access,
                        link,
                        shape,
                    }));
                }
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
        let shape = match self.shape {
            Shape::Whole => "",
            Shape::Holes => ", every second page of a mapping",
            Shape::Mappings => ", each page in a mapping of its own",
        };
        format!("{} MiB ({pages} pages) {access}, {link}{shape}", self.mib)
    }

    /// The processes of the case, whose memory has this `shape`, exchanging files in `dir`, alive for at most
    /// `lifetime_s`.
    pub(super) fn load(self, shape: Shape, dir: &Path, lifetime_s: u32) -> LoadSpec {
        let area = AreaSpec::new(Mapping::Private, self.pages_each(), Content::Random);
        let area = match shape {
            Shape::Whole => area,
            Shape::Holes => area.scattered_over(2),
            Shape::Mappings => area.each_apart(),
        };
        LoadSpec {
            processes: self.access.processes(),
            // What is measured is the area alone.
            pin_own_memory: true,
            lifetime_s,
            ..LoadSpec::new(dir, vec![area])
        }
    }
}
