//! `pageferry output-log`: reads the pipe to which a container writes what it prints, and appends it to a log.
//!
//! ```text
//! pipe ──> output-N.held ──> the log       until the source's part is in the log (output-N.go)
//! pipe ─────────────────────> the log      from then on
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry::error::{Error, Result};

/// What is held back, in the directory of the migration.
pub(crate) const HELD: &str = "held";

/// Is there once the source's part is in the log.
const GO: &str = "go";

/// Is there once somebody has begun to put the source's part into the log, or to go on without its end.
const CLAIM: &str = "claim";

/// How long the source's part is waited for.
const HOLD_LIMIT: Duration = Duration::from_secs(600);

/// How often that is looked for, ms.
const LOOK_AGAIN_MS: u16 = 20;

/// What is read at once, bytes: as much as a pipe holds.
const READ_BYTES: usize = 64 << 10;

/// Run by the agent alone.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Directory of the migration
    dir: PathBuf,

    /// Number of the output
    number: usize,

    /// The log
    path: PathBuf,
}

/// A file of an output, in the directory of the migration.
pub(crate) fn file_of(dir: &Path, number: usize, end: &str) -> PathBuf {
    dir.join(format!("output-{number}.{end}"))
}

/// The right to decide how the log goes on, of which there is one.
#[derive(Debug)]
pub(crate) struct Claim {
    go: PathBuf,
}

impl Claim {
    /// Takes it; `None` if somebody has it.
    pub(crate) fn take(dir: &Path, number: usize) -> Result<Option<Claim>> {
        let claim = file_of(dir, number, CLAIM);
        match File::create_new(&claim) {
            Ok(_) => Ok(Some(Claim {
                go: file_of(dir, number, GO),
            })),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(Error::file("create", &claim, error)),
        }
    }

    /// The log does not go on yet: somebody else may take it.
    pub(crate) fn give_back(self) {
        // Without it whoever reads goes on after a while, as if nobody had come.
        let _ = fs::remove_file(self.go.with_extension(CLAIM));
    }

    /// The log goes on.
    pub(crate) fn release(self) -> Result<()> {
        let made = File::create(&self.go);
        made.map(drop)
            .map_err(|error| Error::file("create", &self.go, error))
    }
}

/// Reads standard input until its end.
pub(crate) fn run(args: &Args) -> ExitCode {
    match log(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn log(args: &Args) -> Result<()> {
    let held = file_of(&args.dir, args.number, HELD);
    let go = file_of(&args.dir, args.number, GO);
    // Not through the buffer of standard input: what is in there is not seen by poll.
    let pipe = io::stdin().as_fd().try_clone_to_owned();
    let pipe = pipe.map_err(|error| Error::file("open", Path::new("the pipe"), error))?;
    let mut pipe = File::from(pipe);
    let mut is_open = hold(&mut pipe, &held, &go)?;
    if !go.exists() {
        let claimed = Claim::take(&args.dir, args.number)?;
        match claimed {
            Some(claim) => {
                eprintln!(
                    "the end of the source's log has not arrived: the log continues without it"
                );
                claim.release()?;
            }
            // Somebody is about to put it there.
            None => is_open &= hold(&mut pipe, &held, &go)?,
        }
    }
    let failed = |error| Error::file("write", &args.path, error);
    let mut to = File::options()
        .append(true)
        .create(true)
        .open(&args.path)
        .map_err(failed)?;
    let mut from = File::open(&held).map_err(|error| Error::file("open", &held, error))?;
    io::copy(&mut from, &mut to).map_err(failed)?;
    to.sync_all().map_err(failed)?;
    fs::remove_file(&held).map_err(|error| Error::file("remove", &held, error))?;
    let mut buffer = vec![0; READ_BYTES];
    while is_open {
        let read = read(&mut pipe, &mut buffer)?;
        is_open = read > 0;
        to.write_all(&buffer[..read]).map_err(failed)?;
    }
    Ok(())
}

fn read(pipe: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match pipe.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read.map_err(|error| Error::file("read", Path::new("the pipe"), error)),
        }
    }
}

/// Keeps what comes until the log may go on, or too much time has passed. Returns whether the pipe is still open.
fn hold(pipe: &mut (impl Read + AsFd), held: &Path, go: &Path) -> Result<bool> {
    let failed = |error| Error::file("write", held, error);
    let mut to = File::options()
        .append(true)
        .create(true)
        .open(held)
        .map_err(failed)?;
    let (began, mut is_open) = (Instant::now(), true);
    let mut buffer = vec![0; READ_BYTES];
    while !go.exists() && began.elapsed() < HOLD_LIMIT {
        let timeout = PollTimeout::from(LOOK_AGAIN_MS);
        let ready = match is_open {
            true => {
                let mut waits = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
                poll(&mut waits, timeout).unwrap_or(0) > 0
            }
            false => poll(&mut [], timeout).unwrap_or(0) > 0,
        };
        if ready {
            let read = read(pipe, &mut buffer)?;
            is_open = read > 0;
            to.write_all(&buffer[..read]).map_err(failed)?;
        }
    }
    Ok(is_open)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn what_comes_is_held_until_the_log_may_go_on() {
        let tmp = tempfile::tempdir().unwrap();
        let (held, go) = (file_of(tmp.path(), 0, HELD), file_of(tmp.path(), 0, GO));
        let (reader, mut writer) = io::pipe().unwrap();
        let mut pipe = File::from(OwnedFd::from(reader));
        writer.write_all(b"one\n").unwrap();
        let dir = tmp.path().to_owned();
        let kept = held.clone();
        let other = std::thread::spawn(move || {
            while fs::read(&kept).unwrap_or_default() != b"one\n" {
                std::thread::yield_now();
            }
            let claim = Claim::take(&dir, 0).unwrap().unwrap();
            assert!(Claim::take(&dir, 0).unwrap().is_none());
            claim.release().unwrap();
        });
        assert!(hold(&mut pipe, &held, &go).unwrap());
        other.join().unwrap();
        assert_eq!(fs::read(&held).unwrap(), b"one\n");
    }

    #[test]
    fn what_came_before_the_end_is_kept_when_the_log_goes_on_later() {
        let tmp = tempfile::tempdir().unwrap();
        let (held, go) = (file_of(tmp.path(), 1, HELD), file_of(tmp.path(), 1, GO));
        let (reader, mut writer) = io::pipe().unwrap();
        let mut pipe = File::from(OwnedFd::from(reader));
        let text = "a line\n".repeat(5_000);
        let (kept, opened, sent) = (held.clone(), go.clone(), text.clone());
        let other = std::thread::spawn(move || {
            // A user with many pipes gets small ones: the text need not fit before somebody reads.
            writer.write_all(sent.as_bytes())?;
            drop(writer);
            let length = sent.len() as u64;
            while fs::metadata(&kept).map_or(0, |held| held.len()) < length {
                std::thread::yield_now();
            }
            File::create(opened).map(drop)
        });
        hold(&mut pipe, &held, &go).unwrap();
        other.join().unwrap().unwrap();
        assert_eq!(fs::read(&held).unwrap(), text.as_bytes());
    }
}
