//! Tells the service the log, on a thread of its own: the state of a replay is one thread's.

use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use axum::body::Bytes;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::REPLAY_BATCHES_MAX;
use pageferry::migration::messages::ReplayBegin;
use pageferry::replay::{Entry, Player};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::replay::{Destination, Report, carry_out};
use crate::service_log::with_address;

/// What is told, in order.
#[derive(Debug)]
pub(super) enum Work {
    /// Entries of a recorder's log, each with its bytes there.
    Entries(Vec<(Entry, u64)>),
    /// A part of another log.
    Bytes(Bytes),
    /// Answers when everything before is done.
    Finish(oneshot::Sender<()>),
    /// Ends the connections, judges, and answers.
    End(oneshot::Sender<()>),
}

/// How far it is.
#[derive(Debug, Default)]
struct Progress {
    bytes: AtomicU64,
    problem: Mutex<Option<String>>,
}

/// A replay under way. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Runner {
    give: mpsc::Sender<Work>,
    progress: Arc<Progress>,
    stop: watch::Sender<()>,
}

impl Runner {
    /// Begins.
    pub(super) fn start(begin: &ReplayBegin) -> Result<Runner> {
        let (give, take) = mpsc::channel(REPLAY_BATCHES_MAX);
        let (stop, mut stopped) = watch::channel(());
        let progress = Arc::new(Progress::default());
        let (begin, shared) = (begin.clone(), Arc::clone(&progress));
        let work = move || {
            let ended = crate::block_on(async {
                let local = LocalSet::new();
                tokio::select! {
                    ended = local.run_until(replay(&begin, take, &shared)) => ended,
                    // Stopped or dropped: nobody waits for the result.
                    _ = stopped.changed() => Ok(()),
                }
            });
            if let Err(error) = ended {
                tracing::error!("{}: {error}", begin.id);
                let mut problem = shared
                    .problem
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *problem = Some(error.to_string());
            }
        };
        thread::Builder::new()
            .name("replay".to_owned())
            .spawn(work)
            .map_err(|error| Error::wrap(Kind::Io, "cannot start a thread", error))?;
        Ok(Runner {
            give,
            progress,
            stop,
        })
    }

    /// Ends it now. Whatever waits for it gets an error.
    pub(super) fn stop(&self) {
        self.stop.send_replace(());
    }

    /// Bytes of the log that were replayed.
    pub(super) fn bytes(&self) -> u64 {
        self.progress.bytes.load(Ordering::Relaxed)
    }

    /// Why it has failed, if it has.
    pub(super) fn problem(&self) -> Option<String> {
        let problem = self.progress.problem.lock();
        problem.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for room, and hands the next part of the log over.
    pub(super) async fn give(&self, work: Work) -> Result<()> {
        let given = self.give.send(work).await;
        given.map_err(|_| self.ended())
    }

    /// Waits until everything that was given has been done.
    pub(super) async fn finish(&self) -> Result<()> {
        let (done, finished) = oneshot::channel();
        self.give(Work::Finish(done)).await?;
        finished.await.map_err(|_| self.ended())
    }

    /// Ends the connections, and judges what the service has answered on them.
    pub(super) async fn end(&self) -> Result<()> {
        let (done, finished) = oneshot::channel();
        self.give(Work::End(done)).await?;
        finished.await.map_err(|_| self.ended())
    }

    fn ended(&self) -> Error {
        let text = self.problem();
        let text = text.unwrap_or_else(|| "the replay was ended".to_owned());
        Error::new(Kind::Protocol, text)
    }
}

async fn replay(
    begin: &ReplayBegin,
    take: mpsc::Receiver<Work>,
    progress: &Progress,
) -> Result<()> {
    match &begin.feed {
        Some(command) => feed(begin, command, take, progress).await,
        None => replay_entries(begin, take, progress).await,
    }
}

async fn replay_entries(
    begin: &ReplayBegin,
    mut take: mpsc::Receiver<Work>,
    progress: &Progress,
) -> Result<()> {
    let mut player = Player::new(begin.verify);
    if begin.wrong_order {
        player = player.without_order();
    }
    let destination = Destination::new(&begin.address, player, begin.stall());
    let mut report = Report::default();
    while let Some(work) = take.recv().await {
        match work {
            Work::Entries(entries) => {
                for (entry, bytes) in entries {
                    carry_out(&destination, &entry, begin.wait_us, &mut report).await?;
                    progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                }
            }
            Work::Bytes(_) => return Err(mixed()),
            Work::Finish(done) => {
                destination.expect_no_difference()?;
                let _ = done.send(());
            }
            Work::End(done) => {
                destination.end_all().await?;
                let _ = done.send(());
            }
        }
    }
    Ok(())
}

async fn feed(
    begin: &ReplayBegin,
    command: &str,
    mut take: mpsc::Receiver<Work>,
    progress: &Progress,
) -> Result<()> {
    let (mut child, input) = start(begin, command)?;
    let mut input = Some(input);
    while let Some(work) = take.recv().await {
        match work {
            Work::Bytes(bytes) => {
                let open = input.as_mut().ok_or_else(mixed)?;
                if open.write_all(&bytes).await.is_err() {
                    succeed(begin, &mut child).await?;
                    let text = "--replay: the command has ended before the log did";
                    return Err(Error::new(Kind::Usage, text));
                }
                let length = bytes.len() as u64;
                progress.bytes.fetch_add(length, Ordering::Relaxed);
            }
            Work::Entries(_) => return Err(mixed()),
            Work::Finish(done) => {
                // The end of its input.
                drop(input.take());
                succeed(begin, &mut child).await?;
                let _ = done.send(());
            }
            Work::End(done) => drop(done.send(())),
        }
    }
    Ok(())
}

fn start(begin: &ReplayBegin, command: &str) -> Result<(Child, ChildStdin)> {
    let failed = |error| Error::wrap(Kind::Usage, "--replay: sh", error);
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    with_address(&mut shell, &begin.address);
    shell
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let mut child = shell.spawn().map_err(failed)?;
    let input = child.stdin.take();
    let input = input.ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
    Ok((child, input))
}

async fn succeed(begin: &ReplayBegin, child: &mut Child) -> Result<()> {
    let ended = timeout(begin.stall(), child.wait()).await;
    let text = match ended {
        Ok(Ok(status)) if status.success() => return Ok(()),
        Ok(Ok(status)) => format!("--replay: the command that reads the log: {status}"),
        Ok(Err(error)) => return Err(Error::wrap(Kind::Io, "--replay", error)),
        Err(_) => format!(
            "--replay: the command has read the log and does not end ({} s: --stall)",
            begin.stall().as_secs()
        ),
    };
    Err(Error::new(Kind::Usage, text))
}

fn mixed() -> Error {
    Error::new(Kind::Protocol, "a log is either a recorder's or not")
}
