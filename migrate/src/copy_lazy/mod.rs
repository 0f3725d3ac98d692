//! `pageferry copy-lazy SRC DST`: what a destination needs of a lazy dump's directory, while the dump serves the
//! rest.
//!
//! ```text
//! wait until complete ──> list files ──> local:  files with their holes ──> DST.part-N ──> rename to DST
//!                                        remote: tar -S | ssh HOST sh   ──> DST.part-N ──> mv to DST
//! ```
//!
//! Invariant: `DST` is whole or absent, whatever ends the copy; what was half copied is removed.

mod files;
mod local;
mod remote;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pageferry::error::{Error, Kind, Result};
use pageferry::image::check::check_lazy;
use pageferry::image::dir::ImageDir;
use pageferry::limits::TIMEOUT_S_MAX;
use pageferry::sys::process::page_size;
use tokio::signal::unix::{SignalKind, signal};

use files::Listing;
use remote::RemoteDir;

/// Between two looks at the images.
const PAUSE: Duration = Duration::from_millis(100);

/// Copies what a destination needs of a lazy dump's directory, once the dump is complete.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The directory that `criu dump --lazy-pages` writes to
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// A directory that is not there or empty: DIR, or HOST:DIR
    ///
    /// HOST:DIR is on another host, which --rsh reaches. HOST may begin with USER@. A path with a colon before its
    /// first slash is meant as ./PATH.
    #[arg(value_name = "DST")]
    destination: String,

    /// How many seconds to wait until the dump is complete; 0 does not wait
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(..=TIMEOUT_S_MAX))]
    wait: u64,

    /// The command that runs a shell on another host, with its options
    ///
    /// HOST and a command line for a POSIX shell are appended. Both ends need GNU tar.
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    rsh: String,
}

/// Where to.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Destination {
    Here(PathBuf),
    There(RemoteDir),
}

/// What was copied.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Copied {
    files: u64,
    /// Lengths of the files.
    bytes: u64,
}

/// Copies. SIGTERM and SIGINT end it, with nothing left at the destination.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let source = wait_until_complete(&args.source, Duration::from_secs(args.wait)).await?;
        let listing = Listing::of(&source)?;
        let stop = Arc::new(AtomicBool::new(false));
        let copied = tokio::select! {
            copied = copy(args, &listing, &stop) => copied?,
            ended = until_ended() => {
                ended?;
                stop.store(true, Ordering::Relaxed);
                let text = "a signal ended the copy: nothing is left of it";
                return Err(Error::new(Kind::Interrupted, text));
            }
        };
        tracing::info!(
            "{} files of {} bytes were copied to {}",
            copied.files,
            copied.bytes,
            args.destination
        );
        Ok(())
    })
}

async fn copy(args: &Args, listing: &Listing, stop: &Arc<AtomicBool>) -> Result<Copied> {
    match Destination::parse(&args.destination) {
        Destination::Here(dir) => {
            let (listing, stop) = (listing.clone(), Arc::clone(stop));
            let copied = tokio::task::spawn_blocking(move || local::copy(&listing, &dir, &stop));
            let failed = |error| Error::wrap(Kind::Io, "the copy has ended", error);
            copied.await.map_err(failed)?
        }
        Destination::There(dir) => remote::copy(listing, &dir, &args.rsh).await,
    }
}

async fn until_ended() -> Result<()> {
    let failed = |error| Error::wrap(Kind::Io, "cannot wait for signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Waits for the dump's images, `inventory.img` last.
async fn wait_until_complete(path: &Path, limit: Duration) -> Result<ImageDir> {
    let began = Instant::now();
    let mut is_logged = false;
    loop {
        let missing = match look(path) {
            Ok(Some(dir)) => return Ok(dir),
            Ok(None) => {
                let text = format!(
                    "no page stayed with the dump in {}: it was made without --lazy-pages, and its directory is \
                     copied by any means",
                    path.display()
                );
                return Err(Error::new(Kind::Usage, text));
            }
            Err(missing) => missing,
        };
        let seconds = limit.as_secs();
        if began.elapsed() >= limit {
            return Err(match seconds {
                0 => missing,
                _ => missing.within(format!("gave up after {seconds} s (--wait)")),
            });
        }
        if !std::mem::replace(&mut is_logged, true) {
            tracing::warn!("{missing}: waiting for up to {seconds} s (--wait)");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The directory of a complete lazy dump; `None` if no page has stayed with the dump.
fn look(path: &Path) -> Result<Option<ImageDir>> {
    let failed = |error| Error::wrap(Kind::Unsupported, "cannot determine the page size", error);
    let dir = ImageDir::open(path, page_size().map_err(failed)?)?;
    let inventory = dir.path().join("inventory.img");
    if !inventory.exists() {
        let text = format!("there is no {} yet", inventory.display());
        return Err(Error::new(Kind::Image, text));
    }
    Ok(check_lazy(&dir)?.then_some(dir))
}

impl Destination {
    /// As scp and rsync tell them apart: a colon before any slash.
    fn parse(text: &str) -> Destination {
        let host = match text
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("]:"))
        {
            Some((host, dir)) => Some((host, dir)),
            None => text.split_once(':').filter(|(host, _)| !host.contains('/')),
        };
        match host {
            Some((host, dir)) if !host.is_empty() => Destination::There(RemoteDir {
                host: host.to_owned(),
                dir: dir.to_owned(),
            }),
            _ => Destination::Here(text.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_from_paths() {
        let there = |host: &str, dir: &str| {
            Destination::There(RemoteDir {
                host: host.to_owned(),
                dir: dir.to_owned(),
            })
        };
        for (text, meant) in [
            ("dir", Destination::Here("dir".into())),
            ("/a:b", Destination::Here("/a:b".into())),
            ("./a:b", Destination::Here("./a:b".into())),
            (":b", Destination::Here(":b".into())),
            ("host:dir/a:b", there("host", "dir/a:b")),
            ("me@host:/dir", there("me@host", "/dir")),
            ("[::1]:dir", there("::1", "dir")),
        ] {
            assert_eq!(Destination::parse(text), meant, "{text}");
        }
    }
}
