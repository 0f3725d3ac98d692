//! `pageferry replay`: tells a service what a log says, in an order with the same effect, and compares its answers.

mod destination;
mod feed;
mod lag;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use pageferry::error::{Error, Kind, Result};
use pageferry::observe::schema::Output;
use pageferry::replay::{Entry, Player, Step};
use pageferry::units::parse_bytes;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::task::LocalSet;

use crate::end_signals::EndSignals;
use crate::service_log::{LogReader, Next, digest};
pub(crate) use destination::Destination;
use lag::Lag;

/// Between two looks at a log that is still written.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Replays what `pageferry record` has written, or feeds an existing log to a command.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The log: a recorder's directory; with --replay any file
    #[arg(long, value_name = "PATH")]
    log: PathBuf,

    /// The service that the log is replayed to
    ///
    /// It begins in the state in which the recorded one began.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "replay")]
    to: Option<String>,

    /// A command that reads the file --log: an append-only file, statements
    ///
    /// The file is its standard input.
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["verify", "follow"])]
    replay: Option<String>,

    /// Compare the bytes of answers, not only how many there are
    #[arg(long)]
    verify: bool,

    /// Go on while the recording does, until it ends
    #[arg(long)]
    follow: bool,

    /// What to do when more than --max-lag bytes of the log wait to be replayed
    ///
    /// Without it, a warning is logged.
    #[arg(long, value_enum, requires = "follow")]
    on_lag: Option<OnLag>,

    /// How many bytes of the log may wait to be replayed (K, M, G)
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_bytes)]
    max_lag: u64,

    /// A command that prints a service's state: it must be the same for both services
    ///
    /// It prints a few bytes, as a checksum. A shell runs it with PAGEFERRY_ADDRESS, PAGEFERRY_HOST and PAGEFERRY_PORT in its environment. The recorded
    /// service is asked by `pageferry record --digest`, or now with --source.
    #[arg(long, value_name = "COMMAND")]
    digest: Option<String>,

    /// The recorded service, to run --digest for it now
    #[arg(long, value_name = "HOST:PORT", requires = "digest")]
    source: Option<String>,

    /// Give up when an answer takes longer than this
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = crate::times::duration)]
    stall: Duration,

    /// Write figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// For tests: send everything without waiting for answers
    #[arg(long, hide = true)]
    wrong_order: bool,
}

/// What to do about a replay that is slower than what arrives.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum OnLag {
    /// Give up
    Cancel,
    /// Let the recorder hold its clients until half of that is replayed
    PauseClients,
}

/// The result of a replay.
#[derive(Default, Serialize, Debug, JsonSchema)]
pub(crate) struct Report {
    /// How many entries of the log were carried out.
    entries: u64,
    /// How many connections clients had.
    connections: u64,
    /// Bytes of clients that were sent.
    bytes: u64,
    /// Bytes at the end of the log that are not a whole entry.
    torn_bytes: u64,
    /// Whether the recorder ended the log.
    is_whole: bool,
    /// From the first entry to the last answer, milliseconds.
    ms: f64,
    /// Largest part of the log that was written and not yet replayed, bytes.
    most_lag_bytes: u64,
    /// How many times clients were held because of the lag.
    holds: u64,
    /// Whether both digests were requested and are equal.
    digests_agree: bool,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("replay-report", "pageferry replay --report FILE")
}

/// Replays.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let mut signals = EndSignals::new()?;
        let work = async {
            match (&args.replay, &args.to) {
                (Some(command), _) => feed::run(args, command).await,
                (None, Some(to)) => LocalSet::new().run_until(replay(args, to)).await,
                (None, None) => Err(Error::new(Kind::Usage, "--to or --replay is missing")),
            }
        };
        tokio::select! {
            done = work => done,
            () = signals.next() => Err(Error::new(Kind::Interrupted, "a signal ended the replay")),
        }
    })
}

async fn replay(args: &Args, to: &str) -> Result<()> {
    let began = Instant::now();
    let mut reader = LogReader::open(&args.log)?;
    let mut player = Player::new(args.verify);
    if args.wrong_order {
        player = player.without_order();
    }
    let mut report = Report::default();
    let mut lag = Lag::new(&args.log, args.max_lag, args.on_lag);
    let destination = Destination::new(to, player, args.stall);
    let recorded = loop {
        let entry = match reader.next()? {
            Next::Entry(entry) => entry,
            Next::Nothing(_) if args.follow => {
                lag.look(reader.position()).await?;
                destination.expect_no_difference()?;
                tokio::time::sleep(LOOK_AGAIN).await;
                continue;
            }
            Next::Nothing(torn) => {
                report.torn_bytes = torn;
                warn_of_torn_entry(&args.log, torn);
                destination.end_all().await?;
                break None;
            }
        };
        if args.follow {
            lag.look(reader.position()).await?;
        }
        if carry_out(&destination, &entry, reader.header().wait_us, &mut report).await? {
            let Entry::End { digest } = entry else {
                break None;
            };
            report.is_whole = true;
            break digest;
        }
    };
    report.entries = destination.entries();
    report.ms = began.elapsed().as_secs_f64() * 1e3;
    (report.most_lag_bytes, report.holds) = lag.figures();
    report.digests_agree = compare_digests(args, to, recorded).await?;
    write_report(args, &report)
}

fn warn_of_torn_entry(log: &Path, torn: u64) {
    let what = match torn {
        0 => String::new(),
        torn => format!(", and {torn} bytes of an entry that was not written whole are left out"),
    };
    tracing::warn!(
        "{}: the recording was not ended in order{what}",
        log.display()
    );
}

/// Does what an entry says. Returns whether it was the last.
pub(crate) async fn carry_out(
    destination: &Destination,
    entry: &Entry,
    wait_us: u32,
    report: &mut Report,
) -> Result<bool> {
    match destination.take(entry)? {
        Step::Connect(connection) => {
            report.connections += 1;
            destination.connect(connection).await?;
        }
        Step::Send(connection) => {
            if let Entry::Piece { bytes, .. } = entry {
                report.bytes += bytes.len() as u64;
                destination.send(connection, bytes).await?;
            }
        }
        Step::Finish(connection) => destination.finish(connection).await,
        Step::Await => destination.wait().await?,
        Step::Pause => tokio::time::sleep(Duration::from_micros(wait_us.into())).await,
        Step::EndAll => destination.end_all().await?,
        Step::NextFile => {}
        Step::Done => {
            destination.end_all().await?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the digests of both services were asked for; they agree then.
async fn compare_digests(args: &Args, to: &str, recorded: Option<Vec<u8>>) -> Result<bool> {
    let Some(command) = &args.digest else {
        return Ok(false);
    };
    let first = match (&args.source, recorded) {
        (Some(source), _) => digest(command, source).await?,
        (None, Some(recorded)) => recorded,
        (None, None) => {
            let text = "--digest: the log has none of the recorded service: name it with --source, or record \
                        with --digest";
            return Err(Error::new(Kind::Usage, text));
        }
    };
    compare(to, &first, &digest(command, to).await?)?;
    Ok(true)
}

/// Fails if what a service says of its state is not what was recorded.
fn compare(to: &str, first: &[u8], second: &[u8]) -> Result<()> {
    if first != second {
        let text = format!(
            "the digests differ: \"{}\" was recorded, and {to} has \"{}\"; do not use what is there",
            first.trim_ascii().escape_ascii(),
            second.trim_ascii().escape_ascii()
        );
        return Err(Error::new(Kind::Protocol, text));
    }
    Ok(())
}

fn write_report(args: &Args, report: &Report) -> Result<()> {
    tracing::info!(
        "{} entries of {} connections were replayed in {:.0} ms{}",
        report.entries,
        report.connections,
        report.ms,
        match report.digests_agree {
            true => ", and the digests agree",
            false => "",
        }
    );
    let Some(path) = &args.report else {
        return Ok(());
    };
    let text = serde_json::to_string_pretty(report);
    let text = text.map_err(|error| Error::wrap(Kind::Io, "the report", error))?;
    std::fs::write(path, text + "\n").map_err(|error| Error::file("write", path, error))
}
