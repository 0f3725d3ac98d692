//! The first answer of a moved service (`--probe`), waited for while the rest is done here.

use pageferry::engine::io::transport::Peer;
use pageferry::error::Result;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::args::Args;
use super::report::{Report, ms};

/// The host at which a moved service is asked: its address if that moves along, else the destination.
pub(super) fn host(args: &Args, destination: &Peer) -> String {
    match (args.addresses().first(), destination) {
        (Some(address), _) => address.here.address.to_string(),
        (None, Peer::Tcp { host, .. }) => host.clone(),
        (None, Peer::Unix(_)) => "127.0.0.1".to_owned(),
    }
}

/// A task that asks until there is an answer.
#[derive(Debug)]
pub(super) struct FirstAnswer(JoinHandle<Result<Instant>>);

impl FirstAnswer {
    /// Begins to ask, if `--probe` is given.
    pub(super) fn start(args: &Args, destination: &Peer) -> Option<FirstAnswer> {
        let probe = args.probe.clone()?;
        let host = host(args, destination);
        let answer = async move { probe.wait(&host).await.map(|()| Instant::now()) };
        Some(FirstAnswer(tokio::spawn(answer)))
    }

    /// Waits for the answer and notes its time: after `started`, and after clients had to wait from `left` on.
    pub(super) async fn note(self, report: &mut Report, started: Instant, left: Option<Instant>) {
        match self.0.await {
            Ok(Ok(at)) => {
                report.answer_ms = Some(ms(at - started));
                report.resume_ms = left.map(|left| ms(at - left));
            }
            Ok(Err(error)) => report.warnings.push(error.to_string()),
            Err(error) => report.warnings.push(format!("the probe: {error}")),
        }
    }

    /// Asks no more.
    pub(super) fn abort(self) {
        self.0.abort();
    }
}
