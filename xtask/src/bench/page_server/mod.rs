//! `cargo xtask bench page-server`: page servers that receive a dump, and that serve one.
//!
//! ```text
//!   receive   recording --splice, or our TLS--> page-server | CRIU's | bare sink --> tmpfs, disk
//!   serve     clients   --GETs--> page-server | CRIU's           <-- warm image
//!   dump      criu dump --------> page-server | CRIU's
//!     |  medians, ratios round by round
//!     v
//!   table, JSON, bars (promises)
//! ```
//!
//! A recording is made once and sent to all contenders by the same code. What a run has stored or
//! served is compared with what was sent or with the image: a wrong run is an error, not a sample.

mod case;
mod connection;
mod dump;
mod pages;
mod promises;
mod receive;
mod recording;
mod run;
mod serve;

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use pageferry::sys::process::page_size;
use testbed::load::Load;
use testbed::test_dir::TestDir;
use testbed::workspace::target_dir;

use super::results::{CommonArgs, Results};
use super::rounds::Rounds;
use case::{Case, Contender, Feed, Link, RequestPattern, Target};
use run::{Bench, Metric, Run};

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which part.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    part: Vec<Part>,
    /// Memory to receive, MiB. The recording and the images on tmpfs take as much each.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [1024, 8192],
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: Vec<u32>,
    /// Pages of a frame, or of a request.
    #[arg(long, value_name = "PAGES", value_delimiter = ',', default_values_t = [1, 16, 1024],
          value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    frames: Vec<u32>,
    /// Who makes up what is received.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Source::ALL)]
    source: Vec<Source>,
    /// Where images go.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Target::ALL)]
    target: Vec<Target>,
    /// A directory on a disk [default: the target directory of the build]
    #[arg(long, value_name = "DIR")]
    disk_dir: Option<PathBuf>,
    /// What the connections run over.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Link::ALL)]
    link: Vec<Link>,
    /// Drivers of page-server that receive; io_uring is the one that promises are about.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Io::ALL)]
    io: Vec<Io>,
    /// What page-server has on the disk when it answers CLOSE; promises are about `none`.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Sync::ALL)]
    sync: Vec<Sync>,
    /// Size of the image that is served, MiB. The process that it is dumped from takes as much.
    #[arg(long, value_name = "MIB", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    image: u32,
    /// Pages that each run asks a serving server for, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(32..=1 << 20))]
    asked: u32,
    /// Clients that ask at the same time. CRIU's server has one alone.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_values_t = [1, 8],
          value_parser = clap::value_parser!(u32).range(1..=64))]
    clients: Vec<u32>,
    /// Memory of the process that CRIU dumps, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    dump: u32,
    /// Rounds of which the medians are taken, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Part {
    /// A recorded dump is received.
    Receive,
    /// A warm image is served.
    Serve,
    /// A process is dumped.
    Dump,
}

impl Part {
    const ALL: [Part; 3] = [Part::Receive, Part::Serve, Part::Dump];
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Source {
    /// Frames of one size.
    Generated,
    /// What a real dump sent.
    Captured,
}

impl Source {
    const ALL: [Source; 2] = [Source::Generated, Source::Captured];
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Io {
    Uring,
    Epoll,
}

impl Io {
    const ALL: [Io; 2] = [Io::Uring, Io::Epoll];
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Sync {
    None,
    Close,
}

impl Sync {
    const ALL: [Sync; 2] = [Sync::None, Sync::Close];
}

type CaseResult = Rounds<Case, Contender, Run>;

/// Who is compared with whom.
const PAIRS: [(Contender, Contender); 5] = [
    (Contender::Pageferry, Contender::Criu),
    (Contender::Pageferry, Contender::Sink),
    (Contender::Epoll, Contender::Criu),
    (Contender::Epoll, Contender::Pageferry),
    (Contender::SyncClose, Contender::Pageferry),
];

impl Args {
    fn feeds(&self) -> Vec<Feed> {
        let mut feeds = Vec::new();
        if self.source.contains(&Source::Generated) {
            feeds.extend(self.frames.iter().map(|&pages| Feed::Frames(pages)));
        }
        if self.source.contains(&Source::Captured) {
            feeds.push(Feed::Captured);
        }
        feeds
    }

    /// Who receives over `link`. Under TLS bytes pass through page-server, whatever its driver, and
    /// the bare sink knows none.
    fn receivers(&self, link: Link) -> Vec<Contender> {
        let plain = link == Link::Plain;
        let all = [
            (Contender::Pageferry, !plain || self.io.contains(&Io::Uring)),
            (Contender::Epoll, plain && self.io.contains(&Io::Epoll)),
            (
                Contender::SyncClose,
                plain && self.sync.contains(&Sync::Close),
            ),
            (Contender::Criu, true),
            (Contender::Sink, plain),
        ];
        let wanted = all.into_iter().filter(|(_, wanted)| *wanted);
        wanted.map(|(who, _)| who).collect()
    }

    fn pattern(&self) -> Vec<RequestPattern> {
        let mut all = Vec::new();
        for &clients in &self.clients {
            let ahead = |&pages| RequestPattern::Ahead { pages, clients };
            all.extend(self.frames.iter().map(ahead));
        }
        all.push(RequestPattern::OneByOne);
        all
    }
}

/// Cases as they are done.
struct Progress<'a> {
    args: &'a Args,
    results: Results<'a, CaseResult>,
}

impl Progress<'_> {
    /// Measures a case.
    fn measure(
        &mut self,
        case: Case,
        contenders: Vec<Contender>,
        run: impl FnMut(&Case, Contender) -> Result<Run>,
    ) -> Result<()> {
        let result = Rounds::take(case, contenders, self.args.runs, run)?;
        let table = result.table(&Metric::ALL, &PAIRS);
        let record = result.record(&case.describe(), &Metric::ALL)?;
        self.results.add(table, record, result)
    }
}

/// Measures all cases asked for, prints each as it is done, and the bars at the end.
pub(crate) fn run(args: &Args) -> Result<()> {
    let criu = args.common.criu()?;
    let how = format!(
        "medians of {}; ratios are taken round by round; a smaller ratio is better but for GiB/s",
        args.runs
    );
    let results = Results::begin("page-server", &args.common, &criu, promises::judge, &how)?;
    let disk = args.disk_dir.clone().unwrap_or_else(target_dir);
    let bench = Bench::new(&criu, page_size()?, &disk, args.asked)?;
    let mut progress = Progress { args, results };
    if args.part.contains(&Part::Receive) {
        receive(&bench, &mut progress)?;
    }
    if args.part.contains(&Part::Serve) {
        serve(&bench, &mut progress)?;
    }
    if args.part.contains(&Part::Dump) {
        dump(&bench, &mut progress)?;
    }
    progress.results.end();
    Ok(())
}

fn receive(bench: &Bench<'_>, progress: &mut Progress<'_>) -> Result<()> {
    let args = progress.args;
    for &mib in &args.size {
        for feed in args.feeds() {
            let recording = bench.record(mib, feed)?;
            for &target in &args.target {
                for &link in &args.link {
                    let case = Case::Receive {
                        mib,
                        feed,
                        target,
                        link,
                    };
                    progress.measure(case, args.receivers(link), |_, who| {
                        bench.receive(&recording, target, link, who)
                    })?;
                }
            }
        }
    }
    // Recordings take much memory, which what follows needs.
    bench.forget_recording()
}

fn serve(bench: &Bench<'_>, progress: &mut Progress<'_>) -> Result<()> {
    let args = progress.args;
    let image = bench.image(args.image)?;
    for &link in &args.link {
        for pattern in args.pattern() {
            let case = Case::Serve {
                image_mib: args.image,
                pattern,
                link,
            };
            let several = matches!(pattern, RequestPattern::Ahead { clients: 2.., .. });
            let contenders = match several {
                true => vec![Contender::Pageferry],
                false => vec![Contender::Pageferry, Contender::Criu],
            };
            progress.measure(case, contenders, |_, who| {
                bench.serve(&image, pattern, link, who)
            })?;
        }
    }
    image.forget()
}

fn dump(bench: &Bench<'_>, progress: &mut Progress<'_>) -> Result<()> {
    let args = progress.args;
    let test_dir = TestDir::new()?;
    let load = Load::start(bench.load(&test_dir, args.dump), None)?;
    for &target in &args.target {
        for &link in &args.link {
            let case = Case::Dump {
                mib: args.dump,
                target,
                link,
            };
            let contenders = vec![Contender::Pageferry, Contender::Criu];
            progress.measure(case, contenders, |_, who| {
                bench.dump(&load, u64::from(args.dump) << 20, target, link, who)
            })?;
        }
    }
    Ok(())
}
