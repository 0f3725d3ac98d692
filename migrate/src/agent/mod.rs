//! `pageferry agent`: waits at the destination for what other hosts send.
//!
//! ```text
//! source ── HTTP over TLS ──> http ──> Session ──> migration::Agent (pure: decides)
//!                                         │
//!                                         ├──> page-server      rounds, the final pages
//!                                         ├──> lazy-client      pages after the resume
//!                                         ├──> files            trees beside their places, until all has arrived
//!                                         └──> criu restore ──> restore-hook ──> Session: waits for the decision
//! ```
//!
//! Layers below containers are kept for all migrations ([`layers`]).
//! Containers without state have sessions of their own ([`stateless`]), and so do services that come as a log
//! ([`replays`]).
//!
//! Invariants: everything but files is written below the agent's directory; a decision is on disk before anybody
//! is told of it; an agent that is started again finishes what it finds there.

mod addresses;
mod answer;
mod commands;
mod contact;
mod containers;
mod context;
mod file_trees;
mod files;
mod free_pids;
pub(crate) mod http;
mod incoming;
mod kept_addresses;
mod layers;
mod layers_http;
mod lazy_client;
mod listen;
mod logs_http;
mod outputs;
mod outputs_http;
mod pages;
mod replays;
mod restore;
mod session;
mod session_dir;
mod session_table;
mod sessions;
mod stateless;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::tls::{Tls, TlsArgs};
use tokio::signal::unix::{SignalKind, signal};

use crate::programs::ProgramArgs;
use context::AgentContext;
use layers::LayerStore;
use listen::Listener;
use replays::Replays;
use sessions::Sessions;
use stateless::Containers;

/// Receives migrations and runs what they bring.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Listen here: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9191", value_parser = address)]
    listen: Peer,

    /// Write the TCP port to FILE once it listens (with port 0)
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,

    /// Directory of all that arrives
    #[arg(long, value_name = "DIR", default_value = "/var/lib/pageferry/agent")]
    dir: PathBuf,

    /// Listen on a network without TLS: whoever reaches the port can run programs as this user
    #[arg(long)]
    insecure: bool,

    /// Containers' bundles are DIR/NAME here; one that has a root file system and no config.json gets the
    /// source's [default: the directory that the source names]
    #[arg(long, value_name = "DIR")]
    bundles: Option<PathBuf>,

    /// Directory of the runtime's state (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR")]
    runtime_root: Option<PathBuf>,

    #[command(flatten)]
    tls: TlsArgs,

    #[command(flatten)]
    programs: ProgramArgs,
}

/// `HOST:PORT` or `unix:PATH`.
pub(crate) fn address(text: &str) -> std::result::Result<Peer, String> {
    match text.strip_prefix("unix:") {
        Some(path) => Ok(Peer::Unix(path.into())),
        None => Peer::parse(text),
    }
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(serve(args))
}

async fn serve(args: &Args) -> Result<()> {
    let tls = Tls::load(&args.tls)?;
    if tls.is_none() && !args.insecure && !is_local(&args.listen).await? {
        let text = format!(
            "{} can be reached from a network: give --tls with certificates, or say --insecure",
            args.listen
        );
        return Err(Error::new(Kind::Usage, text));
    }
    std::fs::create_dir_all(&args.dir)
        .map_err(|error| Error::file("make the directory (--dir)", &args.dir, error))?;
    let dir =
        std::fs::canonicalize(&args.dir).map_err(|error| Error::file("find", &args.dir, error))?;
    let host = match &args.listen {
        Peer::Tcp { host, .. } => host.clone(),
        Peer::Unix(_) => "127.0.0.1".to_owned(),
    };
    let layers = Arc::new(LayerStore::open(&dir)?);
    let context = AgentContext {
        layers: Arc::clone(&layers),
        dir,
        host,
        programs: args.programs.find()?,
        tls: args.tls.clone(),
        bundles: args.bundles.clone(),
        runtime_root: args.runtime_root.clone(),
    };
    let sessions = Sessions::open(&Arc::new(context))?;
    let containers = Containers::open(sessions.context())?;
    let replays = Replays::open(sessions.context())?;
    let app = http::router(sessions.clone())
        .merge(stateless::router(containers.clone()))
        .merge(replays::router(replays.clone()))
        .merge(layers_http::router(layers))
        .merge(logs_http::router(Arc::clone(sessions.context())))
        .merge(outputs_http::router(sessions.clone()));
    let listener = Listener::bind(&args.listen, tls.as_ref()).await?;
    if let (Some(path), Some(port)) = (&args.port_file, listener.port()) {
        crate::records::write(path, &port)?;
    }
    tracing::info!("listening on {}", args.listen);
    let failed = |error| Error::wrap(Kind::Io, "the agent cannot continue", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let stopped = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::select! {
        served = http::serve(listener, app) => served.map_err(failed)?,
        () = stopped => {}
    }
    sessions.shut_down().await;
    containers.shut_down().await;
    replays.shut_down().await;
    Ok(())
}

/// Whether nobody from outside reaches the address.
async fn is_local(listen: &Peer) -> Result<bool> {
    let Peer::Tcp { host, port } = listen else {
        return Ok(true);
    };
    let found = tokio::net::lookup_host((host.as_str(), *port)).await;
    let found = found.map_err(|error| {
        Error::wrap(
            Kind::Usage,
            format!("{host:?} is not an address of this host"),
            error,
        )
    })?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    Ok(addresses.iter().all(IpAddr::is_loopback))
}
