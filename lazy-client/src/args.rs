//! The command line, spelled as that of `criu lazy-pages` where both have an option.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use pageferry::criu::header::Wire;
use pageferry::daemon::CommonArgs;
use pageferry::daemon::version::long_version;
use pageferry::engine::io::transport::Peer;
use pageferry::engine::restore::{OnLoss, RestoreConfig};
use pageferry::error::{Error, Kind, Result};
use pageferry::lazy::huge_pages::HugePages;
use pageferry::lazy::policy::ADAPTIVE;
use pageferry::limits::{RESTORE_TIMEOUT_S, START_WAIT_DEFAULT, TIMEOUT_S_MAX};
use pageferry::tls::{Tls, TlsArgs};
use pageferry::units::parse_bytes;

/// CRIU's port, when nobody says another: none.
const PORT_DEFAULT: u16 = 0;

/// How long touches are recorded, unless the user says otherwise, seconds.
const RECORD_S_DEFAULT: u64 = 10;

/// What stands at the end of `--help`.
const AT_THE_END: &str = "\
Exit codes:
  0  all processes have their memory, or help was requested
  1  it failed, or the command line is wrong (1 as with CRIU)

Signals:
  SIGTERM, SIGINT  end lazy-client: missing pages of the source are lost, see --on-loss
  SIGUSR1          with --on-loss hold: try the source again
  SIGUSR2          with --on-loss hold: kill the processes

CRIU's configuration files are read too: docs/configuration.md.

Examples:
  lazy-client -d -D images --page-server --address host --port 27000
  lazy-client -d -D images --page-server --address host --port 27001 --ferry
  lazy-client -d -D images";

/// Fills the memory of processes that CRIU restores lazily.
///
/// Replaces `criu lazy-pages`, and accepts its command line unchanged. It holds the userfaultfd of every restored
/// process, answers its page faults from local images or from a page server, and fetches the rest of the memory in the
/// background.
#[derive(Parser, Debug)]
#[command(name = "lazy-client", version, long_version = long_version(
    env!("CARGO_PKG_VERSION"), env!("PAGEFERRY_COMMIT"), env!("PAGEFERRY_RUSTLS")),
    after_long_help = AT_THE_END)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: CommonArgs,

    #[command(flatten)]
    tls: TlsArgs,

    /// Fetch pages from the page server at --address and --port
    #[arg(help_heading = "Source", long)]
    page_server: bool,

    /// Fetch pages from the page server at the AF_UNIX socket PATH
    ///
    /// PATH is in the work directory.
    #[arg(help_heading = "Source", long, value_name = "PATH", conflicts_with_all = ["address", "port"])]
    unix: Option<PathBuf>,

    /// The page server is a `page-server --forward-lazy`
    ///
    /// It pushes pages, compressed and with checksums. lazy-client reconnects if the connection breaks.
    #[arg(help_heading = "Source", long, conflicts_with = "wire")]
    ferry: bool,

    /// With --ferry: images of an earlier round [default: the images' parent]
    ///
    /// They must be of the same processes; the path is relative to the images directory. Pages that have not changed
    /// since are read from there and not sent.
    #[arg(help_heading = "Images", long, value_name = "DIR", requires = "ferry")]
    prev_images_dir: Option<PathBuf>,

    /// Header layout of the page server; auto: as in the images
    ///
    /// v1: CRIU up to 4.1.1; v2: from 4.2 on.
    #[arg(help_heading = "Source", long, value_enum, default_value_t = WireArg::Auto)]
    wire: WireArg,

    /// Fetch a page only when a thread waits for it, never in the background
    #[arg(help_heading = "Restore", long)]
    on_demand: bool,

    /// Remove pages from the local images once no process needs them there
    ///
    /// Then images on tmpfs do not take memory twice. These images cannot be restored again.
    #[arg(help_heading = "Images", long)]
    auto_dedup: bool,

    /// Limit of the background stream, bytes a second (K, M, G)
    ///
    /// Faults are not limited.
    #[arg(help_heading = "Restore", long, value_name = "RATE", value_parser = parse_bytes)]
    max_bandwidth: Option<u64>,

    /// Fetch the pages listed in FILE first [default: working-set.img of the images]
    ///
    /// FILE is in the work directory; --record-working-set writes it. Without one of these files the order follows
    /// the faults and the addresses.
    #[arg(help_heading = "Restore", long, value_name = "FILE")]
    working_set: Option<PathBuf>,

    /// Record which pages are accessed first, and add them to FILE
    ///
    /// FILE is in the work directory. While it records, lazy-client fetches a page only when a thread waits for it.
    #[arg(
        help_heading = "Restore",
        long,
        value_name = "FILE",
        conflicts_with = "working_set"
    )]
    record_working_set: Option<PathBuf>,

    /// With --record-working-set: for how long after the restore
    #[arg(help_heading = "Restore", long, value_name = "SECONDS", default_value_t = RECORD_S_DEFAULT,
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    record_seconds: u64,

    /// Which memory to collapse into huge pages again after it has arrived
    ///
    /// This needs Linux 6.1 and CAP_SYS_NICE. Without them it is left to the kernel's khugepaged.
    #[arg(help_heading = "Restore", long, value_enum, default_value_t = HugePagesArg::AsBefore, value_name = "WHICH")]
    huge_pages: HugePagesArg,

    /// What happens to processes whose pages are lost with the source
    #[arg(help_heading = "Restore", long, value_enum, default_value_t = OnLossArg::Poison)]
    on_loss: OnLossArg,

    /// How long to reconnect to a lost source [default: 30 for a page-server, else 0]
    #[arg(help_heading = "Source", long, value_name = "SECONDS",
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    reconnect_timeout: Option<u64>,

    /// How long to retry what fails on this host: images, a full control group
    ///
    /// After that the pages concerned are lost: --on-loss says what follows.
    #[arg(help_heading = "Restore", long, value_name = "SECONDS", default_value_t = 30,
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    local_timeout: u64,

    /// Abandon the source after SECONDS without a restore; 0: never
    ///
    /// The same limit applies between two messages of a restore. Until then the dumped processes stay stopped.
    #[arg(help_heading = "Restore", long, value_name = "SECONDS", default_value_t = RESTORE_TIMEOUT_S,
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    restore_timeout: u64,

    /// How long to wait at the start for the images and the source [default: 10]
    ///
    /// 0 does not wait.
    #[arg(help_heading = "Source", long, value_name = "SECONDS",
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    wait: Option<u64>,

    /// Do not start a standby process that takes over if this one is killed
    #[arg(help_heading = "Restore", long)]
    pub(crate) no_standby: bool,

    /// Write a summary to FILE (in the work directory) at the end
    #[arg(help_heading = "Reports", long, value_name = "FILE")]
    pub(crate) summary_json: Option<PathBuf>,

    /// Record every fault in FILE (in the work directory)
    #[arg(help_heading = "Reports", long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Print the faults recorded in FILE as CSV, and exit
    ///
    /// FILE is in the work directory.
    #[arg(help_heading = "Reports", long, value_name = "FILE")]
    pub(crate) read_trace: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum, Debug)]
enum WireArg {
    Auto,
    V1,
    V2,
}

#[derive(Clone, Copy, ValueEnum, Debug)]
enum HugePagesArg {
    /// What was huge before the dump, as far as that is known
    AsBefore,
    /// All private memory that was used whole
    Always,
    /// Nothing
    Never,
}

#[derive(Clone, Copy, ValueEnum, Debug)]
enum OnLossArg {
    /// A thread that touches a lost page gets SIGBUS
    Poison,
    /// Such threads wait for an operator: SIGTERM poisons, SIGUSR1 tries again, SIGUSR2 kills
    Hold,
    /// The processes are killed
    Kill,
}

impl Args {
    /// What the restore is to do, from the images in `images_dir`.
    pub(crate) fn config(&self, images_dir: PathBuf) -> Result<RestoreConfig> {
        Ok(RestoreConfig {
            images_dir,
            source: self.source()?,
            tls: Tls::load(&self.tls)?,
            ferry: self.ferry,
            prev_images_dir: self.prev_images_dir.clone(),
            wire: match self.wire {
                WireArg::Auto => None,
                WireArg::V1 => Some(Wire::V1),
                WireArg::V2 => Some(Wire::V2),
            },
            on_demand: self.on_demand,
            max_bandwidth: self.max_bandwidth,
            on_loss: match self.on_loss {
                OnLossArg::Poison => OnLoss::Poison,
                OnLossArg::Hold => OnLoss::Hold,
                OnLossArg::Kill => OnLoss::Kill,
            },
            reconnect_timeout: self.reconnect_timeout.map(Duration::from_secs),
            local_timeout: Duration::from_secs(self.local_timeout),
            restore_timeout: match self.restore_timeout {
                0 => None,
                seconds => Some(Duration::from_secs(seconds)),
            },
            trace: self.trace.clone(),
            policy: &ADAPTIVE,
            working_set: self.working_set.clone(),
            record_working_set: self.record_working_set.clone(),
            record_time: Duration::from_secs(self.record_seconds),
            wait: self.wait.map_or(START_WAIT_DEFAULT, Duration::from_secs),
            auto_dedup: self.auto_dedup,
            huge_pages: match self.huge_pages {
                HugePagesArg::AsBefore => HugePages::AsBefore,
                HugePagesArg::Always => HugePages::Always,
                HugePagesArg::Never => HugePages::Never,
            },
        })
    }

    fn source(&self) -> Result<Option<Peer>> {
        if let Some(path) = &self.unix {
            return Ok(Some(Peer::Unix(path.clone())));
        }
        if !self.page_server && self.ferry {
            let text = "--ferry needs to know where the pages come from: give --page-server with \
                        --address and --port, or --unix PATH";
            return Err(Error::new(Kind::Usage, text));
        }
        if !self.page_server {
            if self.common.address.is_some() || self.common.port.is_some() {
                tracing::warn!(
                    "all pages come from local images: without --page-server --address and --port are \
                     not used"
                );
            }
            return Ok(None);
        }
        let port = self.common.port.unwrap_or(PORT_DEFAULT);
        if port == PORT_DEFAULT {
            let text = "--page-server needs the --port that the source listens on (or --unix PATH)";
            return Err(Error::new(Kind::Usage, text));
        }
        let host = self
            .common
            .address
            .clone()
            .unwrap_or_else(|| "127.0.0.1".into());
        Ok(Some(Peer::Tcp { host, port }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(words: &[&str]) -> Result<Option<Peer>> {
        let words = ["lazy-client"].iter().chain(words);
        Args::try_parse_from(words).expect("known options").source()
    }

    #[test]
    fn the_source_is_what_the_options_name() {
        let tcp = |host: &str| Peer::Tcp {
            host: host.to_owned(),
            port: 7,
        };
        let words = ["--page-server", "--address", "far", "--port", "7"];
        assert_eq!(source(&words).unwrap(), Some(tcp("far")));
        assert_eq!(
            source(&["--page-server", "--port", "7"]).unwrap(),
            Some(tcp("127.0.0.1"))
        );
        let unix = Peer::Unix("socket".into());
        assert_eq!(source(&["--unix", "socket"]).unwrap(), Some(unix));
        assert_eq!(source(&["--port", "7"]).unwrap(), None);
    }

    #[test]
    fn a_source_that_is_missing_is_asked_for() {
        for (words, option) in [
            (&["--page-server"][..], "--port"),
            (&["--ferry", "--port", "7"], "--page-server"),
        ] {
            let error = source(words).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.to_string().contains(option), "{error}");
        }
    }
}
