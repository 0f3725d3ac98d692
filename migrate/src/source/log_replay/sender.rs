//! Sends a log to the agent as it is written, and judges whether the replay keeps up.

use std::path::PathBuf;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ReplayFinish, ReplayStatus};
use pageferry::migration::{CatchUp, Progress};
use tokio::time::{Instant, sleep};

use super::tail::Tail;
use crate::client::{AgentClient, AgentProblem};
use crate::service_log::{Hold, digest};
use crate::source::log_replay_args::LagArg;
use crate::source::report::LogReport;

/// Between two looks at a log of which everything was sent.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What the user has chosen.
#[derive(Clone, Debug)]
pub(super) struct SenderOptions {
    /// The directory of a recorder that may hold its clients for a while.
    pub(super) recorder: Option<PathBuf>,
    pub(super) on_lag: Option<LagArg>,
    pub(super) max_lag: u64,
    /// How long the replay of the rest may take.
    pub(super) close: Duration,
    pub(super) digest: Option<String>,
    /// Where the service listens here.
    pub(super) service: String,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Sender {
    client: AgentClient,
    /// The move, in the agent's interface.
    path: String,
    tail: Tail,
    options: SenderOptions,
    catch_up: CatchUp,
    began: Instant,
    sent_bytes: u64,
    replayed_bytes: u64,
    holds: u64,
    too_slow: bool,
}

impl Sender {
    pub(super) fn new(
        client: AgentClient,
        path: String,
        tail: Tail,
        options: SenderOptions,
    ) -> Sender {
        let close_ms = u64::try_from(options.close.as_millis()).unwrap_or(u64::MAX);
        Sender {
            client,
            path,
            tail,
            catch_up: CatchUp::new(options.max_lag, close_ms),
            options,
            began: Instant::now(),
            sent_bytes: 0,
            replayed_bytes: 0,
            holds: 0,
            too_slow: false,
        }
    }

    pub(super) fn is_too_slow(&self) -> bool {
        self.too_slow
    }

    pub(super) fn report(&self) -> LogReport {
        LogReport {
            bytes: self.sent_bytes,
            most_lag_bytes: self.catch_up.most(),
            holds: self.holds,
        }
    }

    /// Sends what is there next, of a recorder's log up to the entry `until`. Returns whether there was something.
    async fn send(&mut self, until: Option<u64>) -> Result<bool> {
        let first = self.tail.at();
        let part = self.tail.next(until)?;
        let status: ReplayStatus = match part.is_empty() {
            true => self.client.get(&self.path).await?,
            false => {
                self.sent_bytes += part.len() as u64;
                let path = format!("{}/log/{first}", self.path);
                self.client.post_text(&path, part).await?
            }
        };
        if let Some(problem) = status.problem {
            let reported = AgentProblem(problem);
            return Err(Error::wrap(Kind::Protocol, "the destination", reported));
        }
        self.replayed_bytes = status.replayed_bytes;
        Ok(self.tail.at() > first)
    }

    /// Sends the log until its replay is close behind.
    pub(super) async fn follow(&mut self) -> Result<()> {
        self.began = Instant::now();
        let mut hold: Option<Hold> = None;
        loop {
            let has_sent = self.send(None).await?;
            let under_way = self.sent_bytes.saturating_sub(self.replayed_bytes);
            let left = self.tail.left()? + under_way;
            let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            let written = self.replayed_bytes + left;
            match self.catch_up.sample(at_ms, written, self.replayed_bytes) {
                Progress::Close => return Ok(()),
                Progress::Under { left } if hold.is_some() && left <= self.options.max_lag / 2 => {
                    hold = None;
                    tracing::info!("clients continue: {left} bytes of the log are left");
                }
                Progress::Under { .. } => {}
                Progress::Behind { left, more_per_s } => {
                    self.is_behind(left, more_per_s, &mut hold).await?;
                }
            }
            if !has_sent {
                sleep(LOOK_AGAIN).await;
            }
        }
    }

    async fn is_behind(
        &mut self,
        left: u64,
        more_per_s: f64,
        hold: &mut Option<Hold>,
    ) -> Result<()> {
        let text = format!(
            "the replay is slower than what arrives: {left} bytes of the log are left, {more_per_s:.0} more each second"
        );
        match (self.options.on_lag, &self.options.recorder) {
            (Some(LagArg::Cancel), _) => Err(Error::new(
                Kind::Usage,
                format!(
                    "{text} (--max-lag {}, --on-lag cancel)",
                    self.options.max_lag
                ),
            )),
            (Some(LagArg::PreCopy), _) => {
                self.too_slow = true;
                let text = format!("{text}: pre-copy instead (--on-lag pre-copy)");
                Err(Error::new(Kind::Usage, text))
            }
            (Some(LagArg::PauseClients), Some(log)) if hold.is_none() => {
                *hold = Some(Hold::take(log).await?);
                self.holds += 1;
                tracing::warn!("{text}: clients are held");
                Ok(())
            }
            _ => {
                tracing::warn!("{text}");
                Ok(())
            }
        }
    }

    /// Sends the rest, which ends with the entry `until` of a recorder's log, waits until it is replayed, and compares
    /// the digests.
    pub(super) async fn finish(&mut self, until: Option<u64>) -> Result<()> {
        while self.send(until).await? {}
        let at = self.tail.at();
        if let Some(until) = until.filter(|until| at != *until) {
            let text = format!("the log ends at entry {at}, and the recorder wrote {until}");
            return Err(Error::new(Kind::Io, text));
        }
        let request = ReplayFinish {
            sent: self.tail.at(),
            digest: self.options.digest.clone(),
        };
        let path = format!("{}/finish", self.path);
        let there = self.client.post::<ReplayStatus>(&path, &request);
        let here = async {
            match &self.options.digest {
                Some(command) => digest(command, &self.options.service).await.map(Some),
                None => Ok(None),
            }
        };
        let (there, here) = tokio::try_join!(there, here)?;
        self.replayed_bytes = there.replayed_bytes;
        let here = here.map(|here| here.trim_ascii().escape_ascii().to_string());
        match here == there.digest {
            true => Ok(()),
            false => {
                let shown = |digest: Option<String>| digest.unwrap_or_default();
                let text = format!(
                    "the digests differ: the service here has \"{}\", the one at the destination \"{}\": it is not \
                     deterministic, or did not begin with the same state (--snapshot)",
                    shown(here),
                    shown(there.digest)
                );
                Err(Error::new(Kind::Protocol, text))
            }
        }
    }
}
