//! The command lines of the programs that the agent runs.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use pageferry::migration::messages::TcpConnections;
use pageferry::tls::TlsArgs;
use tokio::process::Command;

use crate::commands::{LOG_ALL, LOG_WARNINGS, criu, with_tls};
use crate::hook::quoted;
use crate::programs::Programs;

/// How long a program may take to listen.
pub(super) const READY_LIMIT: Duration = Duration::from_secs(30);

/// Where a receiver tells its port, in its images directory.
pub(super) const RECEIVER_PORT: &str = "receive.port";

/// Where lazy-client records faults, in its images directory.
pub(super) const TRACE: &str = "faults.trace";

/// A page-server that receives one dump or round into `images`, on top of `parent`.
pub(super) fn receiver(
    programs: &Programs,
    tls: &TlsArgs,
    images: &Path,
    parent: Option<&str>,
    place: (&str, u16),
    from: IpAddr,
) -> Command {
    let mut command = Command::new(&programs.page_server);
    command
        .arg("-D")
        .arg(images)
        .args(["-o", "receive.log", "-v3", "--address", place.0])
        .args(["--port", &place.1.to_string(), "--port-file", RECEIVER_PORT])
        .args(["--allow", &from.to_string()]);
    if let Some(parent) = parent {
        command.args(["--prev-images-dir", parent]);
    }
    with_tls(&mut command, tls);
    command
}

/// A lazy-client for the restore in `images`, with the memory at the source's forwarder.
pub(super) fn lazy_client(
    programs: &Programs,
    tls: &TlsArgs,
    images: &Path,
    source: (IpAddr, u16),
    earlier: Option<&str>,
) -> Command {
    let mut command = Command::new(&programs.lazy_client);
    command
        .arg("-D")
        .arg(images)
        .args(["-o", "lazy.log", "-v3", "--ferry", "--page-server"])
        .args(["--address", &source.0.to_string()])
        .args(["--port", &source.1.to_string()])
        .args(["--summary-json", "lazy-summary.json", "--trace", TRACE]);
    if let Some(earlier) = earlier {
        command.args(["--prev-images-dir", earlier]);
    }
    with_tls(&mut command, tls);
    command
}

/// `criu restore` from `images`, which tells its stages to the script at `hook`.
pub(super) fn restore(
    programs: &Programs,
    images: &Path,
    hook: &Path,
    lazily: bool,
    tcp: TcpConnections,
) -> Command {
    let level = match lazily {
        true => LOG_ALL,
        false => LOG_WARNINGS,
    };
    let mut command = criu(programs, ("restore", images), level, tcp);
    command
        .arg("--restore-detached")
        .arg("--action-script")
        .arg(hook);
    if lazily {
        command.arg("--lazy-pages");
    }
    command
}

/// The script that CRIU runs at each stage.
pub(super) fn hook_script(programs: &Programs, dir: &Path) -> String {
    format!(
        "#!/bin/sh\nexec {} restore-hook {}\n",
        quoted(&programs.pageferry),
        quoted(dir)
    )
}
