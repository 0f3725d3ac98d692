//! Logs that exist already: a file that one command reads.

use std::fs::File;
use std::process::Stdio;

use pageferry::error::{Error, Kind, Result};
use tokio::process::Command;

use super::{Args, compare};
use crate::service_log::digest;

/// Runs the command with the file on its standard input, and compares the digests.
pub(super) async fn run(args: &Args, command: &str) -> Result<()> {
    let path = &args.log;
    let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .stdin(Stdio::from(file))
        .kill_on_drop(true);
    let status = shell.status().await;
    let status = status.map_err(|error| Error::wrap(Kind::Usage, "--replay: sh", error))?;
    if !status.success() {
        let text = format!(
            "--replay: the command that reads {}: {status}",
            path.display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    tracing::info!("the command has read {}", path.display());
    let Some(ask) = &args.digest else {
        return Ok(());
    };
    let (Some(source), Some(to)) = (&args.source, &args.to) else {
        let text = "--digest with --replay: name the services with --source and --to";
        return Err(Error::new(Kind::Usage, text));
    };
    compare(to, &digest(ask, source).await?, &digest(ask, to).await?)?;
    tracing::info!("the digests agree");
    Ok(())
}
