//! The command line.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use ipnet::IpNet;
use pageferry::criu::header;
use pageferry::daemon::CommonArgs;
use pageferry::daemon::command_line::Action;
use pageferry::daemon::version::long_version;
use pageferry::engine::io;
use pageferry::engine::io::transport::Peer;
use pageferry::engine::receive::stores::Template;
use pageferry::engine::serve::LOCAL_TIMEOUT_DEFAULT;
use pageferry::error::{Error, Kind};
use pageferry::image::store;
use pageferry::limits::{
    DUMP_IDLE_TIMEOUT_S, FERRY_STREAMS_MAX, RECEIVE_SESSIONS_MAX, RESTORE_TIMEOUT_S, TIMEOUT_S_MAX,
};
use pageferry::tls::TlsArgs;
use pageferry::units::parse_bytes_or_none;

/// The words of CRIU's command line that name what to do.
pub(crate) const ACTIONS: &[Action] = &[
    Action {
        word: "page-server",
        operand_option: None,
    },
    Action {
        word: "swrk",
        operand_option: Some("swrk"),
    },
];

/// What stands at the end of `--help`.
const AT_THE_END: &str = "\
Exit codes:
  0  done, or help was asked for
  1  it failed, or the command line is wrong (1 as with CRIU)

Signals:
  SIGTERM, SIGINT  end page-server; incomplete images are removed

CRIU's configuration files are read too: docs/configuration.md.

Examples:
  page-server -d -D images --port 27000
  page-server -d --forward host:27000 --port 27001 --keep
  page-server -d -D images --forward-lazy 127.0.0.1:27000 --port 27001
  page-server -d -D images --lazy-pages --port 27000";

/// Receives the memory of a criu dump into image files, or serves it from there to a lazy restore.
///
/// Replaces `criu page-server`, and accepts its command line unchanged.
#[derive(Parser, Debug)]
#[command(name = "page-server", version, long_version = long_version(
    env!("CARGO_PKG_VERSION"), env!("PAGEFERRY_COMMIT"), env!("PAGEFERRY_RUSTLS")),
    after_long_help = AT_THE_END, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: CommonArgs,

    #[command(flatten)]
    pub(crate) tls: TlsArgs,

    #[command(flatten)]
    pub(crate) ferry: FerryArgs,

    /// Serve the images to lazy restores instead of receiving
    #[arg(help_heading = "Role", long)]
    pub(crate) lazy_pages: bool,

    /// The parent of the received images, relative to the images directory
    ///
    /// The `parent` link leads to it.
    #[arg(help_heading = "Images", long, value_name = "DIR")]
    pub(crate) prev_images_dir: Option<PathBuf>,

    /// Use the connected socket FD for one session instead of listening
    #[arg(help_heading = "Network", long, value_name = "FD", conflicts_with_all = ["unix", "keep"])]
    pub(crate) ps_socket: Option<RawFd>,

    /// Listen at the AF_UNIX socket PATH (in the work directory)
    #[arg(help_heading = "Network", long, value_name = "PATH")]
    pub(crate) unix: Option<PathBuf>,

    /// Write the TCP port to FILE (in the work directory) once page-server listens
    #[arg(help_heading = "Network", long, value_name = "FILE")]
    pub(crate) port_file: Option<PathBuf>,

    /// Stay for further sessions
    #[arg(help_heading = "Sessions", long)]
    pub(crate) keep: bool,

    /// The peer's header layout: v1 is CRIU up to 4.1.1, v2 from 4.2 on
    #[arg(help_heading = "Network", long, value_enum, default_value_t = Wire::Auto)]
    pub(crate) wire: Wire,

    /// Punch the received pages out of the parents' files, once all is stored
    #[arg(help_heading = "Images", long, conflicts_with = "lazy_pages")]
    pub(crate) auto_dedup: bool,

    /// Store pages that equal the parent's as holes to it, and no zero pages
    ///
    /// The dump may be a full one, because CRIU is not told of the parent. Zero pages take no space.
    #[arg(help_heading = "Images", long, conflicts_with = "lazy_pages")]
    pub(crate) dedup_content: bool,

    /// Store pages that several processes of a tree share only once
    ///
    /// Forks share most of their memory, but CRIU sends it for each of them. Shared pages are stored in the directory `tree`
    /// in the images directory, as its parent. The images directory must be empty. Each stored page needs 16 bytes of
    /// memory.
    #[arg(help_heading = "Images", long,
        conflicts_with_all = ["lazy_pages", "auto_dedup", "compress", "split_lazy", "forward", "forward_lazy"])]
    pub(crate) dedup_tree: bool,

    /// Store pages compressed
    ///
    /// Only CRIU 4.3 and later, built with LZ4, restores such images itself (4.2 hangs). Any CRIU restores them lazily
    /// from page-server or lazy-client.
    #[arg(help_heading = "Images", long, conflicts_with = "lazy_pages")]
    pub(crate) compress: bool,

    /// Store the pages that a lazy restore can fetch later in DIR
    ///
    /// DIR is created if it is missing. The images directory is small then: a lazy restore starts from it, while
    /// `page-server --lazy-pages -D DIR` serves the rest. With --compress only the pages in DIR are compressed, so any
    /// CRIU can send the dump and restore it lazily.
    #[arg(help_heading = "Images", long, value_name = "DIR",
        conflicts_with_all = ["lazy_pages", "prev_images_dir", "auto_dedup", "dedup_content", "forward", "forward_lazy"])]
    pub(crate) split_lazy: Option<PathBuf>,

    /// What has been flushed to the disk when the dump ends
    ///
    /// none: nothing in particular; close: the complete images; always: the same, and each write waits for the disk.
    #[arg(help_heading = "Images", long, value_enum, default_value_t = Sync::None,
        conflicts_with_all = ["lazy_pages", "forward", "forward_lazy"])]
    pub(crate) sync: Sync,

    /// The I/O driver for dumps [default: io_uring if the kernel has it, else epoll]
    #[arg(help_heading = "Running", long, value_enum)]
    pub(crate) io: Option<Io>,

    /// Accept only peers of this network, e.g. 10.0.0.0/8
    ///
    /// It may be given several times.
    #[arg(help_heading = "Network", long, value_name = "CIDR", value_parser = network)]
    pub(crate) allow: Vec<IpNet>,

    /// With --keep: how many dumps are received at once
    ///
    /// Further connections are reset.
    #[arg(help_heading = "Sessions", long, value_name = "COUNT", default_value_t = RECEIVE_SESSIONS_MAX, value_parser = max_sessions,
        requires = "keep", conflicts_with_all = ["lazy_pages", "forward_lazy"])]
    pub(crate) max_sessions: usize,

    /// Give each session its own directory below the images directory
    ///
    /// {peer} stands for the peer's address, {seq} for the number of the session.
    #[arg(
        help_heading = "Images",
        long,
        value_name = "TEMPLATE",
        conflicts_with = "lazy_pages"
    )]
    pub(crate) images_dir_template: Option<Template>,

    /// Write a summary of each session to FILE, a line of JSON each
    ///
    /// FILE is in the work directory.
    #[arg(help_heading = "Reports", long, value_name = "FILE")]
    pub(crate) summary_json: Option<PathBuf>,

    /// Serve metrics for Prometheus at http://ADDR/metrics
    ///
    /// ADDR is HOST:PORT or :PORT.
    #[arg(help_heading = "Reports", long, value_name = "ADDR")]
    pub(crate) metrics: Option<String>,

    /// Take one request of CRIU's remote procedure calls from the socket FD: the word `swrk FD`
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) swrk: Option<RawFd>,

    /// Answer one request alone, also if its client says that more follow
    #[arg(long, hide = true, requires = "swrk")]
    pub(crate) one_request: bool,

    /// End a session after SECONDS without a message of its peer; 0: never
    ///
    /// Until then the processes of a dump stay stopped. A restore may need no page for a long time. So with --lazy-pages
    /// and --forward-lazy a session ends only if its host has not requested a page yet, if a request is incomplete, or if
    /// the client does not accept answers. With --forward-lazy the dump is also abandoned if no client connects for
    /// SECONDS. [default: 300; with --forward-lazy 600; with --lazy-pages 0]
    #[arg(help_heading = "Sessions", long, value_name = "SECONDS",
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    pub(crate) idle_timeout: Option<u64>,

    /// With --lazy-pages: how long to retry reading an image
    #[arg(help_heading = "Sessions", long, value_name = "SECONDS", default_value_t = LOCAL_TIMEOUT_DEFAULT.as_secs(),
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    pub(crate) local_timeout: u64,
}

impl Args {
    /// Makes paths absolute that are taken from where the command was typed, before that changes.
    pub(crate) fn stay_where_typed(&mut self) {
        if let Some(dir) = &mut self.split_lazy
            && let Ok(absolute) = std::path::absolute(&*dir)
        {
            *dir = absolute;
        }
    }

    /// Refuses what does not go with `--split-lazy`, whoever asked for it: a request of CRIU's remote procedure
    /// calls is not checked with the command line.
    pub(crate) fn check_split(&self) -> Result<(), Error> {
        let other = match () {
            () if self.split_lazy.is_none() => return Ok(()),
            () if self.prev_images_dir.is_some() => "a parent (--prev-images-dir)",
            () if self.auto_dedup => "--auto-dedup",
            () => return Ok(()),
        };
        let text =
            format!("--split-lazy makes images that stand alone: {other} is not possible with it");
        Err(Error::new(Kind::Usage, text))
    }

    /// Refuses what does not go with `--dedup-tree`, whoever asked for it.
    pub(crate) fn check_tree(&self) -> Result<(), Error> {
        let problem = match () {
            () if !self.dedup_tree => return Ok(()),
            () if self.auto_dedup => {
                "--auto-dedup would take pages out of files that processes share with each other: it is not possible \
                 with --dedup-tree"
            }
            () if self.keep && self.images_dir_template.is_none() => {
                "--dedup-tree needs a directory for each dump: with --keep give --images-dir-template"
            }
            () => return Ok(()),
        };
        Err(Error::new(Kind::Usage, problem))
    }

    /// How long a peer may be silent where it may not be.
    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        let default = match () {
            () if self.lazy_pages => 0,
            () if self.ferry.forward_lazy.is_some() => RESTORE_TIMEOUT_S,
            () => DUMP_IDLE_TIMEOUT_S,
        };
        let seconds = self.idle_timeout.unwrap_or(default);
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }
}

/// How dumps travel between two of these.
#[derive(clap::Args, Debug)]
pub(crate) struct FerryArgs {
    /// Forward dumps to the page-server at HOST:PORT instead of storing them
    ///
    /// Only pages that have changed are sent, compressed and with checksums. page-server reconnects if a connection
    /// breaks. --tls secures these connections.
    #[arg(help_heading = "Role", long, value_name = "HOST:PORT", value_parser = Peer::parse,
        conflicts_with_all = ["lazy_pages", "prev_images_dir", "images_dir_template", "auto_dedup",
            "dedup_content", "compress"])]
    pub(crate) forward: Option<Peer>,

    /// Serve the memory of the `criu dump --lazy-pages` at HOST:PORT
    ///
    /// Any number of clients can fetch it. -D names the dump's images. --tls secures the clients' connections.
    #[arg(help_heading = "Role", long, value_name = "HOST:PORT", value_parser = Peer::parse,
        conflicts_with_all = ["forward", "ps_socket", "lazy_pages", "prev_images_dir",
            "images_dir_template", "auto_dedup", "dedup_content", "compress"])]
    pub(crate) forward_lazy: Option<Peer>,

    /// Keep the memory of a lazy dump in a file in DIR instead of in memory
    #[arg(
        help_heading = "Forwarding",
        long,
        value_name = "DIR",
        requires = "forward_lazy"
    )]
    pub(crate) spill: Option<PathBuf>,

    /// Seconds to wait at the start until the dump listens [default: 10]
    ///
    /// 0 does not wait.
    #[arg(help_heading = "Forwarding", long, value_name = "SECONDS", requires = "forward_lazy",
        value_parser = RangedU64ValueParser::<u64>::new().range(..=TIMEOUT_S_MAX))]
    pub(crate) wait: Option<u64>,

    /// How many connections to forward over
    #[arg(help_heading = "Forwarding", long, value_name = "COUNT", default_value_t = 1, requires = "forward",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(FERRY_STREAMS_MAX)))]
    pub(crate) streams: u16,

    /// Memory to remember what the destination has (K, M, G)
    ///
    /// It has a hash of 16 bytes for each page, and old contents of pages, for differences, as far as they fit.
    #[arg(help_heading = "Forwarding", long, value_name = "BYTES", default_value = "256M", value_parser = parse_bytes_or_none,
        requires = "forward")]
    pub(crate) delta_cache: u64,

    /// After each dump, write to FILE the hashes of what the destination has
    ///
    /// The post-copy that follows reads it by --known-hashes. Whoever can read the file can craft pages with the same
    /// hash, so only its owner can.
    #[arg(
        help_heading = "Forwarding",
        long,
        value_name = "FILE",
        requires = "forward"
    )]
    pub(crate) save_hashes: Option<PathBuf>,

    /// Read from FILE which pages the destination has of earlier dumps
    ///
    /// Clients are not asked for it then. --save-hashes of the pre-copy writes FILE. Clients with other images get all pages.
    #[arg(
        help_heading = "Forwarding",
        long,
        value_name = "FILE",
        requires = "forward_lazy"
    )]
    pub(crate) known_hashes: Option<PathBuf>,

    /// How long to wait for a broken connection to be restored
    ///
    /// With --forward: abandon a dump after SECONDS without progress. With --forward-lazy: abandon the lazy dump SECONDS
    /// after its last client has disconnected.
    #[arg(help_heading = "Forwarding", long, value_name = "SECONDS", default_value_t = 30, value_parser = seconds())]
    pub(crate) reconnect_timeout: u64,
}

/// A network, or a single address.
fn network(text: &str) -> Result<IpNet, String> {
    let Some((address, prefix)) = text.split_once('/') else {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        return address.map_err(|_| format!("{text:?} is neither an IP address nor a network"));
    };
    let address: IpAddr = address
        .parse()
        .map_err(|_| format!("{address:?} is not an IP address"))?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let bits = prefix.parse().ok().filter(|bits| *bits <= most);
    bits.and_then(|bits| IpNet::new(address, bits).ok())
        .ok_or_else(|| {
            format!("the prefix of {address} is a number from 0 to {most}, not {prefix:?}")
        })
}

/// A time that something can be waited for: not none at all, which would end everything at once.
fn seconds() -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(1..=TIMEOUT_S_MAX)
}

fn max_sessions(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=RECEIVE_SESSIONS_MAX) => Ok(count),
        _ => Err(format!("must be a number from 1 to {RECEIVE_SESSIONS_MAX}")),
    }
}

/// Values of `--wire`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Wire {
    Auto,
    V1,
    V2,
}

impl Wire {
    /// The layout that is forced, if one is.
    pub(crate) fn forced(self) -> Option<header::Wire> {
        match self {
            Wire::Auto => None,
            Wire::V1 => Some(header::Wire::V1),
            Wire::V2 => Some(header::Wire::V2),
        }
    }
}

/// Values of `--io`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Io {
    Uring,
    Epoll,
}

impl From<Io> for io::Io {
    fn from(io: Io) -> io::Io {
        match io {
            Io::Uring => io::Io::Uring,
            Io::Epoll => io::Io::Epoll,
        }
    }
}

/// Values of `--sync`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Sync {
    None,
    Close,
    Always,
}

impl From<Sync> for store::Sync {
    fn from(sync: Sync) -> store::Sync {
        match sync {
            Sync::None => store::Sync::None,
            Sync::Close => store::Sync::Close,
            Sync::Always => store::Sync::Always,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_mistakes_named() {
        for (text, net) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("::1", "::1/128"),
            ("1.2.3.4", "1.2.3.4/32"),
        ] {
            assert_eq!(network(text), Ok(net.parse().unwrap()));
        }
        for (text, word) in [
            ("10.0.0.0/40", "from 0 to 32"),
            ("fe80::/129", "from 0 to 128"),
            ("10.0.0.0/", "from 0 to 32"),
            ("10.0.0/8", "10.0.0"),
            ("host", "host"),
        ] {
            let problem = network(text).unwrap_err();
            assert!(problem.contains(word), "{text}: {problem}");
        }
    }

    #[test]
    fn what_is_split_stands_alone() {
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        for other in [
            "--prev-images-dir p",
            "--auto-dedup",
            "--dedup-content",
            "--lazy-pages",
            "--forward h:1",
        ] {
            let error = parse(&format!("page-server --split-lazy d {other}")).unwrap_err();
            assert!(
                error.to_string().contains("--split-lazy"),
                "{other}: {error}"
            );
        }
        let mut args = parse("page-server --split-lazy d --compress").unwrap();
        args.stay_where_typed();
        assert!(
            args.split_lazy
                .as_ref()
                .is_some_and(|dir| dir.is_absolute())
        );
        args.check_split().unwrap();
        // As a remote procedure call sets it.
        args.auto_dedup = true;
        assert_eq!(args.check_split().unwrap_err().kind(), Kind::Usage);
    }
}
