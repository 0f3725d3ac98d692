//! The command line of `pageferry migrate`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::engine::io::transport::Peer;
use pageferry::limits::{MIGRATION_ROUNDS_MAX, TIMEOUT_S_MAX};
use pageferry::migration::messages::{MigrationId, TcpConnections};
use pageferry::migration::{Limits, Mode, OnMissed};
use pageferry::tls::TlsArgs;
use pageferry::units::parse_bytes;

use crate::agent::address;
use crate::programs::ProgramArgs;

/// Moves a running process tree to the host of a `pageferry agent`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Root of the process tree
    #[arg(long, value_name = "PID", required_unless_present = "resume")]
    pub(super) pid: Option<i32>,

    #[command(flatten)]
    pub(super) target: Target,

    /// How memory is carried
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    pub(super) mode: ModeArg,

    /// Freeze when the predicted downtime is under this: 300ms, 2s
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) max_downtime: Option<Duration>,

    /// Most rounds before the freeze
    #[arg(long, value_name = "COUNT", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MIGRATION_ROUNDS_MAX)))]
    pub(super) max_rounds: u32,

    /// What to do when rounds end and the predicted downtime is over --max-downtime [default: cancel
    /// with --mode pre-copy, else post-copy]
    #[arg(long, value_enum)]
    pub(super) on_missed: Option<OnMissedArg>,

    /// Give up, and leave the processes here, after this time: 90s, 10m
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub(super) timeout: Duration,

    /// Established TCP connections: keep them (the address must move too), or close them at the
    /// destination [default: a tree that has one is not moved]
    #[arg(long, value_enum)]
    pub(super) tcp: Option<TcpArg>,

    /// Bytes a second that rounds read from the running processes (K, M, G)
    #[arg(long, value_name = "RATE", default_value = "400M", value_parser = parse_bytes)]
    pub(super) round_rate: u64,

    /// Write a report of the migration to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,

    /// Name of the migration [default: made up]
    #[arg(long, value_name = "NAME")]
    pub(super) id: Option<MigrationId>,

    /// Finish the migration of this name, whose command died
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pid", "id", "mode", "report"])]
    pub(super) resume: Option<MigrationId>,

    /// The address at which the destination fetches memory from this host [default: all addresses with
    /// TLS, loopback without]
    #[arg(long, value_name = "ADDR")]
    pub(super) serve_on: Option<String>,
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
    /// The one whose downtime is predicted to be the shortest
    Auto,
    /// Freeze, dump, send, restore
    Cold,
    /// Rounds while it runs, then freeze, send what changed, restore
    PreCopy,
    /// Freeze, send the execution state, resume there; memory follows
    PostCopy,
    /// Rounds, then post-copy of the rest
    Hybrid,
}

impl ModeArg {
    pub(super) fn chosen(self) -> Option<Mode> {
        match self {
            ModeArg::Auto => None,
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
    /// Freeze all the same
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

/// A time with its unit: 300ms, 1.5s, 10m, 1h.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: a number and ms, s, m or h");
    let digits = text
        .find(|c: char| c.is_ascii_alphabetic())
        .ok_or_else(wrong)?;
    let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    // Nothing longer than the other programs take.
    #[allow(clippy::cast_precision_loss)]
    let most = Duration::from_secs(TIMEOUT_S_MAX);
    match Duration::try_from_secs_f64(number * unit) {
        Ok(time) if !time.is_zero() && time <= most => Ok(time),
        _ => Err(format!("{text:?} is not between 1 ms and a year")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let of = |text| duration(text).unwrap();
        assert_eq!(of("300ms"), Duration::from_millis(300));
        assert_eq!(of("1.5s"), Duration::from_millis(1500));
        assert_eq!(of("10m"), Duration::from_secs(600));
        for bad in ["", "5", "s", "0s", "-1s", "1d", "1e30s", "nans"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
