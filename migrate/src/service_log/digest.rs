//! The user's command that tells a service's state in a few bytes.

use std::process::Stdio;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::REPLAY_DIGEST_BYTES_MAX;
use tokio::process::Command;

/// What the command prints for the service at an address, which it finds in `PAGEFERRY_ADDRESS`,
/// `PAGEFERRY_HOST` and `PAGEFERRY_PORT`.
pub(crate) async fn digest(command: &str, address: &str) -> Result<Vec<u8>> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    with_address(&mut shell, address);
    shell
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    let output = shell.output().await;
    let output = output.map_err(|error| Error::wrap(Kind::Usage, "--digest: sh", error))?;
    let problem = match output.stdout.len() {
        _ if !output.status.success() => format!("{} for {address}", output.status),
        0 => format!("it printed nothing for {address}"),
        bytes if bytes > REPLAY_DIGEST_BYTES_MAX => format!(
            "it printed {bytes} bytes for {address}, and may print {REPLAY_DIGEST_BYTES_MAX} (add `| sha256sum`)"
        ),
        _ => return Ok(output.stdout),
    };
    Err(Error::new(Kind::Usage, format!("--digest: {problem}")))
}

/// Tells a command where a service is.
pub(crate) fn with_address(command: &mut Command, address: &str) {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    command
        .env("PAGEFERRY_ADDRESS", address)
        .env("PAGEFERRY_HOST", host.trim_matches(['[', ']']))
        .env("PAGEFERRY_PORT", port);
}
