//! Options of `pageferry migrate` for services that move as the log of what their clients have said.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::units::parse_bytes;

use crate::times::duration;

/// See the module's text.
#[derive(clap::Args, Debug)]
pub(super) struct LogReplayArgs {
    /// With --mode log-replay: the directory of `pageferry record`; with --replay any file
    ///
    /// The recorder must run: it holds clients while routes are switched.
    #[arg(long, value_name = "PATH", requires_all = ["service", "start"])]
    pub(super) log: Option<PathBuf>,

    /// A command at the destination that reads the file --log
    ///
    /// The file is its standard input, followed as it grows; the input ends when clients are held.
    #[arg(long, value_name = "COMMAND", requires_all = ["log", "hold"], conflicts_with_all = ["verify", "wrong_order"])]
    pub(super) replay: Option<String>,

    /// With --replay: a command that holds clients here, and releases them
    ///
    /// PAGEFERRY_HOLD is `hold` or `release`. When `hold` has ended, all that the service has accepted must be in the log.
    #[arg(long, value_name = "COMMAND", requires = "replay")]
    pub(super) hold: Option<String>,

    /// Where the service listens here; the recorder's --to
    #[arg(long, value_name = "HOST:PORT", requires = "log")]
    pub(super) service: Option<String>,

    /// Where the service listens at the destination [default: as here]
    #[arg(long, value_name = "HOST:PORT", requires = "log")]
    pub(super) at: Option<String>,

    /// A command at the destination that runs the service, in the foreground
    ///
    /// A shell runs it in its own directory with PAGEFERRY_ADDRESS, PAGEFERRY_HOST, PAGEFERRY_PORT and, with
    /// --snapshot, PAGEFERRY_SNAPSHOT in its environment. What it starts must stay in its process group.
    #[arg(long, value_name = "COMMAND", requires = "log")]
    pub(super) start: Option<String>,

    /// A file that the service starts from, sent ahead [default: it starts empty]
    ///
    /// It must be the state in which the log begins.
    #[arg(long, value_name = "FILE", requires = "log")]
    pub(super) snapshot: Option<PathBuf>,

    /// A command that prints a checksum of the service's state
    ///
    /// It must be equal on both sides before the switch.
    #[arg(long, value_name = "COMMAND", requires = "log")]
    pub(super) digest: Option<String>,

    /// Compare the bytes of answers, not only how many there are
    #[arg(long, requires = "log")]
    pub(super) verify: bool,

    /// What to do when more than --max-lag of the log is not replayed, and this grows
    ///
    /// Without it, only a warning is logged, until --timeout.
    #[arg(long, value_enum, requires = "log")]
    pub(super) on_lag: Option<LagArg>,

    /// How much of the log may be not replayed while this grows (K, M, G)
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_bytes, requires = "log")]
    pub(super) max_lag: u64,

    /// How long the start, an answer or a digest may take at the destination
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration, requires = "log")]
    pub(super) stall: Duration,

    /// For tests: send everything without waiting for answers
    #[arg(long, hide = true, requires = "log")]
    pub(super) wrong_order: bool,
}

/// Values of `--on-lag`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub(super) enum LagArg {
    /// Give up
    Cancel,
    /// Let the recorder hold its clients until half of that is replayed
    PauseClients,
    /// Abandon the replay, and move the processes with their memory instead, as --mode pre-copy
    PreCopy,
}
