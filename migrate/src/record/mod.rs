//! `pageferry record`: a relay before a service that writes down what clients send, in an order that a replay can
//! repeat.
//!
//! ```text
//! client ── piece ──> relay ── turn? ──> coordinator: log, sequencer
//!                       └────────────── piece ──> service
//! client <── answers ── relay <─────────────── service        counted by the coordinator before the client sees them
//! ```

mod control;
mod coordinator;
mod relay;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::REPLAY_CONNECTIONS_MAX;
use pageferry::replay::Order;
use pageferry::units::parse_bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use crate::end_signals::EndSignals;
use crate::service_log::{LogWriter, digest};
use coordinator::Coordinator;

/// How long the service may take at the end to answer what it was told, and to end the connections.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How long to wait when no connection can be accepted (too many descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Smallest file of a log, bytes.
const FILE_BYTES_MIN: u64 = 64 << 10;

/// Passes connections on to a service, and writes what clients send to a log.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Where clients connect to: HOST:PORT; with port 0 a free one is taken
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,

    /// The service
    #[arg(long, value_name = "HOST:PORT")]
    to: String,

    /// Directory of the log
    #[arg(long, value_name = "DIR")]
    log: PathBuf,

    /// What may be on its way to the service at once
    #[arg(long, value_enum, default_value_t = OrderArg::Total)]
    order: OrderArg,

    /// How long to wait for an answer before another connection has its turn
    #[arg(long, value_name = "TIME", default_value = "2ms", value_parser = crate::times::duration)]
    order_wait: Duration,

    /// Begin a new file of the log when one is so large (K, M, G)
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = file_bytes)]
    file_bytes: u64,

    /// A command that prints the service's state; run at the end, and kept in the log
    ///
    /// It prints a few bytes, as a checksum. A shell runs it with PAGEFERRY_ADDRESS, PAGEFERRY_HOST and PAGEFERRY_PORT in its environment.
    #[arg(long, value_name = "COMMAND")]
    digest: Option<String>,

    /// Write the port to this file once clients can connect
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum OrderArg {
    /// Pieces of one connection at a time: a replay can repeat the order in which the service read them
    Total,
    /// Anything: for services where requests that are under way at the same time do not concern each other
    Causal,
}

fn file_bytes(text: &str) -> std::result::Result<u64, String> {
    match parse_bytes(text)? {
        bytes if bytes < FILE_BYTES_MIN => Err(format!("at least {FILE_BYTES_MIN} bytes")),
        bytes => Ok(bytes),
    }
}

/// Records until a signal ends it.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async { LocalSet::new().run_until(record(args)).await })
}

async fn record(args: &Args) -> Result<()> {
    let order = match args.order {
        OrderArg::Total => Order::Total,
        OrderArg::Causal => Order::Causal,
    };
    let wait_us = u32::try_from(args.order_wait.as_micros());
    let wait_us = wait_us.map_err(|_| Error::new(Kind::Usage, "--order-wait is over an hour"))?;
    let mut signals = EndSignals::new()?;
    let listener = TcpListener::bind(&args.listen).await.map_err(|error| {
        Error::wrap(
            Kind::Usage,
            format!("cannot listen on {} (is the port in use?)", args.listen),
            error,
        )
    })?;
    let log = LogWriter::open(&args.log, args.file_bytes, wait_us)?;
    let coordinator = Coordinator::new(log, order);
    let address = listener.local_addr();
    let address = address.map_err(|error| Error::wrap(Kind::Io, "the listening socket", error))?;
    let control = control::listen(&args.log, args.order_wait)?;
    if let Some(path) = &args.port_file {
        std::fs::write(path, format!("{}\n", address.port()))
            .map_err(|error| Error::file("write", path, error))?;
    }
    tracing::info!("recording connections to {address} for {}", args.to);
    let mut connections = JoinSet::new();
    let ended = tokio::select! {
        ended = accept(&listener, &coordinator, args, &mut connections) => ended,
        error = coordinator.failure() => Err(error),
        never = coordinator.measure_waits(args.order_wait) => match never {},
        error = control.serve(&coordinator) => Err(error),
        () = signals.next() => Ok(()),
        () = coordinator.end_asked() => Ok(()),
    };
    drop(listener);
    control.remove();
    match ended {
        Ok(()) => finish(args, &coordinator, connections).await,
        // What has no log is not passed on.
        Err(error) => Err(error),
    }
}

async fn accept(
    listener: &TcpListener,
    coordinator: &Rc<Coordinator>,
    args: &Args,
    connections: &mut JoinSet<()>,
) -> Result<()> {
    loop {
        while connections.try_join_next().is_some() {}
        let (client, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("a client cannot be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if connections.len() >= REPLAY_CONNECTIONS_MAX {
            tracing::warn!("{peer} is refused: {REPLAY_CONNECTIONS_MAX} clients are connected");
            continue;
        }
        match TcpStream::connect(&args.to).await {
            Ok(service) => {
                let connection = coordinator.open()?;
                let relay = relay::run(Rc::clone(coordinator), connection, client, service);
                connections.spawn_local(relay);
            }
            Err(error) => tracing::warn!("{peer}: cannot connect to {}: {error}", args.to),
        }
    }
}

/// Ends all connections in order, so that the log has every answer, and then the log.
async fn finish(
    args: &Args,
    coordinator: &Rc<Coordinator>,
    mut connections: JoinSet<()>,
) -> Result<()> {
    coordinator.stop();
    if coordinator.is_sealed() {
        // They are another service's clients: what they still send was never passed on, nor acknowledged.
        connections.shutdown().await;
    }
    let all = async { while connections.join_next().await.is_some() {} };
    let ended = tokio::select! {
        ended = timeout(END_LIMIT, all) => ended.is_ok(),
        error = coordinator.failure() => return Err(error),
        never = coordinator.measure_waits(args.order_wait) => match never {},
    };
    if !ended {
        tracing::warn!(
            "the service has not ended {} connections within {} s",
            connections.len(),
            END_LIMIT.as_secs()
        );
        connections.shutdown().await;
    }
    let digest = match &args.digest {
        // The service may be gone by now.
        Some(command) if !coordinator.is_sealed() => Some(digest(command, &args.to).await?),
        _ => None,
    };
    let entries = coordinator.end(digest)?;
    tracing::info!("{entries} entries are in {}", args.log.display());
    Ok(())
}
