//! How much of a log is written and not replayed, and what is done about it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::OnLag;
use crate::service_log::{Hold, size};
use pageferry::error::{Error, Kind, Result};

/// Between two looks at the size of the log.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Between two lines about it.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// What a replay knows of the recording before it.
#[derive(Debug)]
pub(super) struct Lag {
    log: PathBuf,
    limit: u64,
    action: Option<OnLag>,
    looked: Option<Instant>,
    logged: (Instant, u64),
    most: u64,
    holds: u64,
    /// While this is connected, the recorder's clients wait.
    hold: Option<Hold>,
}

impl Lag {
    pub(super) fn new(log: &Path, limit: u64, action: Option<OnLag>) -> Lag {
        let now = Instant::now();
        Lag {
            log: log.to_owned(),
            limit,
            action,
            looked: None,
            logged: (now, 0),
            most: 0,
            holds: 0,
            hold: None,
        }
    }

    /// The most that it was, and how often clients were held.
    pub(super) fn figures(&self) -> (u64, u64) {
        (self.most, self.holds)
    }

    /// Looks, and acts, if it is time to.
    pub(super) async fn look(&mut self, position: u64) -> Result<()> {
        let now = Instant::now();
        let is_recent = |at: Instant| now.duration_since(at) < LOOK_EVERY;
        if self.looked.is_some_and(is_recent) {
            return Ok(());
        }
        self.looked = Some(now);
        let lag = size(&self.log)?.saturating_sub(position);
        self.most = self.most.max(lag);
        self.log(now, lag);
        if self.hold.is_some() && lag <= self.limit / 2 {
            self.hold = None;
            tracing::info!("clients continue: {lag} bytes of the log are left");
        }
        match self.action {
            Some(OnLag::Cancel) if lag > self.limit => {
                let text = format!(
                    "the replay is slower than what arrives: {lag} bytes of the log are left (--max-lag {}, \
                     --on-lag cancel)",
                    self.limit
                );
                Err(Error::new(Kind::Usage, text))
            }
            Some(OnLag::PauseClients) if lag > self.limit && self.hold.is_none() => {
                self.hold_clients(lag).await
            }
            _ => Ok(()),
        }
    }

    async fn hold_clients(&mut self, lag: u64) -> Result<()> {
        match Hold::take(&self.log).await {
            Ok(hold) => {
                self.hold = Some(hold);
                self.holds += 1;
                tracing::warn!("clients are held: {lag} bytes of the log are left");
                Ok(())
            }
            // Without a recorder nobody writes to the log any more: the rest of it is replayed at any speed.
            Err(error) if error.kind() == Kind::PeerLost => {
                self.action = None;
                tracing::warn!(
                    "{error}: {lag} bytes of the log are left, and clients are held no more"
                );
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn log(&mut self, now: Instant, lag: u64) {
        let (at, before) = self.logged;
        let seconds = now.duration_since(at).as_secs_f64();
        if seconds < LOG_EVERY.as_secs_f64() {
            return;
        }
        self.logged = (now, lag);
        #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = (lag as f64 - before as f64) / seconds;
        if lag > 0 && rate > 0.0 {
            tracing::info!("{lag} bytes of the log are left, {rate:.0} more each second");
        } else if lag > 0 {
            tracing::info!("{lag} bytes of the log are left");
        }
    }
}
