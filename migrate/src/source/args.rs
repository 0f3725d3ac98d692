//! The command line of `pageferry migrate`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::engine::io::transport::Peer;
use pageferry::limits::MIGRATION_ROUNDS_MAX;
use pageferry::migration::messages::{ContainerId, MigrationId, ServiceAddress, TcpConnections};
use pageferry::migration::{Limits, Mode, OnMissed};
use pageferry::tls::TlsArgs;
use pageferry::units::parse_bytes;

use super::files_args::FilesArgs;
use super::hooks::Hooks;
use super::log_replay_args::LogReplayArgs;
use super::outputs::{OutputArg, output_arg};
use super::probe::Probe;
use super::stateless_args::StatelessArgs;
use crate::agent::address;
use crate::programs::ProgramArgs;
use crate::rounds::Track;
use crate::route::Route;
use crate::runtime::RuntimeArg;
use crate::times::duration;

/// Moves a running process tree to the host of a `pageferry agent`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) subject: Subject,

    #[command(flatten)]
    pub(super) target: Target,

    #[command(flatten)]
    pub(super) stateless: StatelessArgs,

    #[command(flatten)]
    pub(super) log_replay: LogReplayArgs,

    /// How memory is moved
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    pub(super) mode: ModeArg,

    /// Freeze when the predicted downtime is under this: 300ms, 2s
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) max_downtime: Option<Duration>,

    /// Maximum number of rounds before the freeze
    #[arg(long, value_name = "COUNT", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MIGRATION_ROUNDS_MAX)))]
    pub(super) max_rounds: u32,

    /// What to do when rounds end and the predicted downtime is over --max-downtime [default: cancel
    /// with --mode pre-copy, else post-copy]
    #[arg(long, value_enum)]
    pub(super) on_missed: Option<OnMissedArg>,

    /// If rounds do not get smaller, reduce the processes' CPU time by this share until the freeze: 1 to 99
    /// [default: they are not slowed]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    pub(super) throttle: Option<u8>,

    /// Abort after this time, and let the processes continue here: 90s, 10m
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub(super) timeout: Duration,

    /// Established TCP connections: keep them (the address must move too), or close them at the
    /// destination [default: a tree that has one is not moved]
    #[arg(long, value_enum)]
    pub(super) tcp: Option<TcpArg>,

    /// An address that moves with the processes: off DEV here and onto DEV (or THERE) at the destination, which
    /// announces it. May be given several times
    #[arg(long, value_name = "CIDR@DEV[:THERE]", value_parser = service_address)]
    pub(super) address: Vec<AddressArg>,

    /// A route to switch to the destination, so that clients find the service: address:, nft:, haproxy: or exec:
    /// (docs/routes.md). May be given several times
    #[arg(long, value_name = "ADAPTER", value_parser = route)]
    pub(super) route: Vec<RouteArg>,

    /// Probe the service until it answers, and report when that was: a shell command that succeeds then, or a TCP
    /// port that accepts a connection
    #[arg(long, value_name = "COMMAND|tcp:PORT")]
    pub(super) probe: Option<Probe>,

    /// Run by a shell before the freeze; if it fails, the processes stay here
    #[arg(long, value_name = "COMMAND")]
    pub(super) pre_freeze: Option<String>,

    /// Run by a shell once the processes run at the destination
    #[arg(long, value_name = "COMMAND")]
    pub(super) post_resume: Option<String>,

    /// Run by a shell after the migration was aborted and the processes run here
    #[arg(long, value_name = "COMMAND")]
    pub(super) on_failure: Option<String>,

    /// How long each of these commands may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(super) hook_limit: Duration,

    #[command(flatten)]
    pub(super) files: FilesArgs,

    /// The log of the container's output, to be continued at the destination as THERE: the file that the reader of its
    /// pipe writes, or that it has open [default: the file that it has open, at the same path]
    #[arg(long, value_name = "FILE[:THERE]", value_parser = output_arg, requires = "container")]
    pub(super) output_log: Option<OutputArg>,

    /// How many bytes a second rounds may read from the running processes (K, M, G)
    #[arg(long, value_name = "RATE", default_value = "400M", value_parser = parse_bytes)]
    pub(super) round_rate: u64,

    /// Write a report of the migration to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,

    /// Append what happens on both sides to FILE, a line of JSON for each event
    #[arg(long, value_name = "FILE")]
    pub(super) events: Option<PathBuf>,

    /// Name of the migration [default: generated]
    #[arg(long, value_name = "NAME")]
    pub(super) id: Option<MigrationId>,

    /// Finish the migration of this name, whose command was killed
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pid", "container", "id", "mode", "report", "events"])]
    pub(super) resume: Option<MigrationId>,

    /// How rounds find what has changed
    #[arg(long, value_enum, default_value = "auto", value_name = "WAY")]
    pub(super) track: Track,

    /// The address at which the destination fetches memory from this host [default: all addresses with
    /// TLS, loopback without]
    #[arg(long, value_name = "ADDR")]
    pub(super) serve_on: Option<String>,
}

/// What is moved.
#[derive(clap::Args, Debug)]
pub(super) struct Subject {
    /// Root of the process tree
    #[arg(long, value_name = "PID", conflicts_with = "container")]
    pub(super) pid: Option<i32>,

    /// Name of the container, instead of --pid
    #[arg(long, value_name = "NAME")]
    pub(super) container: Option<ContainerId>,

    /// The container's runtime, on PATH of both hosts
    #[arg(long, value_enum, default_value_t = RuntimeArg::Runc)]
    pub(super) runtime: RuntimeArg,

    /// Directory of the runtime's state here (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR", requires = "container")]
    pub(super) runtime_root: Option<PathBuf>,

    /// The container's bundle at the destination [default: the agent's --bundles, else the path that it
    /// has here]
    #[arg(long, value_name = "DIR", requires = "container")]
    pub(super) bundle: Option<PathBuf>,
}

/// Where to, and with what.
#[derive(clap::Args, Debug)]
pub(super) struct Target {
    /// The agent: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(super) to: Peer,

    /// Directory of the source's records and images
    #[arg(long, value_name = "DIR", default_value = "/var/lib/pageferry/source")]
    pub(super) state_dir: PathBuf,

    #[command(flatten)]
    pub(super) tls: TlsArgs,

    #[command(flatten)]
    pub(super) programs: ProgramArgs,
}

/// Values of `--mode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum ModeArg {
    /// Choose by predicted downtime, and by the destination's memory
    Auto,
    /// Freeze, dump, send, restore
    Cold,
    /// Rounds while it runs, then freeze, send what changed, restore
    PreCopy,
    /// Freeze, send the execution state, resume at the destination; memory follows
    PostCopy,
    /// Rounds, then post-copy of the rest
    Hybrid,
    /// With --stateless: start at the destination, switch routes, then stop here
    Live,
    /// Start the service at the destination, and replay what clients have sent here
    LogReplay,
}

impl ModeArg {
    pub(super) fn chosen(self) -> Option<Mode> {
        match self {
            ModeArg::Auto | ModeArg::Live | ModeArg::LogReplay => None,
            ModeArg::Cold => Some(Mode::Cold),
            ModeArg::PreCopy => Some(Mode::PreCopy),
            ModeArg::PostCopy => Some(Mode::PostCopy),
            ModeArg::Hybrid => Some(Mode::Hybrid),
        }
    }
}

/// Values of `--on-missed`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum OnMissedArg {
    /// Freeze anyway
    Proceed,
    /// Resume at the destination before all memory is there
    PostCopy,
    /// Leave the processes here
    Cancel,
}

/// Values of `--tcp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum TcpArg {
    Established,
    Close,
}

impl Args {
    /// Addresses that move along, by either option.
    pub(super) fn addresses(&self) -> Vec<AddressArg> {
        let routes = self.route.iter().filter_map(|route| match route {
            RouteArg::Address(address) => Some(address),
            RouteArg::Other(_) => None,
        });
        self.address.iter().chain(routes).cloned().collect()
    }

    /// The same, on the destination's devices.
    pub(super) fn addresses_there(&self) -> Vec<ServiceAddress> {
        let addresses = self.addresses().into_iter();
        addresses.map(|address| address.there).collect()
    }

    /// All other routes.
    pub(super) fn routes(&self) -> Vec<Route> {
        let routes = self.route.iter().filter_map(|route| match route {
            RouteArg::Address(_) => None,
            RouteArg::Other(route) => Some(route.clone()),
        });
        routes.collect()
    }

    /// What the user allows in `mode`.
    pub(super) fn limits(&self, mode: Mode) -> Limits {
        let on_missed = match self.on_missed {
            Some(OnMissedArg::Proceed) => OnMissed::Proceed,
            Some(OnMissedArg::PostCopy) => OnMissed::PostCopy,
            Some(OnMissedArg::Cancel) => OnMissed::Cancel,
            None if mode == Mode::PreCopy => OnMissed::Cancel,
            None => OnMissed::PostCopy,
        };
        Limits {
            max_downtime: self.max_downtime,
            max_rounds: self.max_rounds,
            on_missed,
            throttles: self.throttle.is_some(),
        }
    }

    /// The user's file of events, as whoever finishes the migration finds it.
    pub(super) fn events(&self) -> Option<PathBuf> {
        let path = self.events.as_ref()?;
        Some(std::path::absolute(path).unwrap_or_else(|_| path.clone()))
    }

    /// The user's commands.
    pub(super) fn hooks(&self) -> Hooks {
        Hooks {
            pre_freeze: self.pre_freeze.clone(),
            post_resume: self.post_resume.clone(),
            on_failure: self.on_failure.clone(),
            limit_ms: u64::try_from(self.hook_limit.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// What becomes of connections.
    pub(super) fn tcp(&self) -> TcpConnections {
        match self.tcp {
            None => TcpConnections::Refuse,
            Some(TcpArg::Established) => TcpConnections::Established,
            Some(TcpArg::Close) => TcpConnections::Close,
        }
    }
}

/// An address and its devices on both hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct AddressArg {
    pub(super) here: ServiceAddress,
    pub(super) there: ServiceAddress,
}

/// `10.0.0.5/24@eth0`, `fd00::5/64@eth0:eth1`.
fn service_address(text: &str) -> Result<AddressArg, String> {
    let wrong = || format!("{text:?} is not an address with a device, as 10.0.0.5/24@eth0");
    let (cidr, devices) = text.split_once('@').ok_or_else(wrong)?;
    let (address, prefix) = cidr.split_once('/').ok_or_else(wrong)?;
    let (here, there) = devices.split_once(':').unwrap_or((devices, devices));
    let on = |device: &str| {
        let service = ServiceAddress {
            address: address.parse().map_err(|_| wrong())?,
            prefix: prefix.parse().map_err(|_| wrong())?,
            device: device.to_owned(),
        };
        match service.is_possible() {
            true => Ok(service),
            false => Err(wrong()),
        }
    };
    Ok(AddressArg {
        here: on(here)?,
        there: on(there)?,
    })
}

/// Values of `--route`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RouteArg {
    Address(AddressArg),
    Other(Route),
}

/// `address:10.0.0.5/24@eth0`, or what [`Route`] knows.
fn route(text: &str) -> Result<RouteArg, String> {
    match text.strip_prefix("address:") {
        Some(rest) => service_address(rest).map(RouteArg::Address),
        None => text.parse().map(RouteArg::Other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_devices_on_both_hosts() {
        let of = |text| service_address(text).unwrap();
        let same = of("10.0.0.5/24@eth0");
        assert_eq!(
            (&same.here, same.here.cidr()),
            (&same.there, "10.0.0.5/24".to_owned())
        );
        let other = of("fd00::5/64@eth0:br-lan");
        assert_eq!(
            (&*other.here.device, &*other.there.device),
            ("eth0", "br-lan")
        );
        for bad in [
            "10.0.0.5@eth0",
            "10.0.0.5/24",
            "10.0.0.5/33@eth0",
            "x/24@eth0",
            "10.0.0.5/24@",
        ] {
            assert!(service_address(bad).is_err(), "{bad}");
        }
    }
}
