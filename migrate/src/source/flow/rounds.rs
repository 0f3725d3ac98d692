//! Pre-copy: the rounds that read and send memory while the processes run.

use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::Receiver;
use pageferry::migration::{Decision, Mode, OnMissed, RoundResult};
use tokio::time::Instant;

use super::{Flow, blocking, ms};
use crate::rounds::{self, Trackers, Tree};

impl Flow<'_> {
    /// Sends rounds until a freeze would be short enough, or the rounds are over.
    pub(super) async fn run_rounds(&mut self) -> Result<()> {
        let limits = self.args.limits(self.mode);
        // Gone when the rounds are over: CRIU dumps no memory under a userfaultfd.
        let mut trackers = Trackers::new(self.args.track, self.page, self.place.dir())?;
        trackers.how().name().clone_into(&mut self.report.track);
        for number in 1.. {
            let started = Instant::now();
            self.progress
                .phase(format!("round {number}: memory is read and sent"));
            let receiver: Receiver = self
                .client
                .post(&self.place.path(&format!("/rounds/{number}")), &())
                .await?;
            if number == 1 {
                self.start_forwarder(Some(receiver)).await?;
            }
            let forwarder = self.forwarder_address()?;
            let tree = Tree::of(self.root())?;
            let (page, wire, rate) = (self.page, self.wire, self.args.round_rate);
            let reading = blocking("a round", move || {
                let rate = Some(rate.max(1));
                let read = rounds::run(&tree, forwarder, page, wire, rate, &mut trackers)?;
                Ok((read, trackers))
            });
            let read;
            (read, trackers) = reading.await?;
            let line = self.stored(&format!("/rounds/{number}")).await?;
            let round = result_of_round(&line, started.elapsed());
            self.report.memory_bytes = read.pages << self.page.shift();
            self.learn(round);
            let decision = self.convergence.add(round, self.predict(), &limits);
            self.report.rounds.push(round);
            let start = ms(started - self.started);
            let end = ms(self.started.elapsed());
            self.report
                .add_span("rounds", format!("round {number}"), start, end);
            self.progress.round(number, round, read, self.predict());
            match decision {
                Decision::Again => {}
                Decision::Freeze | Decision::Missed(OnMissed::Proceed) => return Ok(()),
                Decision::Missed(OnMissed::PostCopy) => {
                    self.change_mode(Mode::Hybrid)?;
                    return Ok(());
                }
                Decision::Missed(OnMissed::Cancel) => {
                    let text = format!(
                        "after {number} rounds the downtime would be {:.0} ms, more than --max-downtime \
                         (--on-missed post-copy moves it all the same)",
                        ms(self.predict())
                    );
                    return Err(Error::new(Kind::Interrupted, text));
                }
            }
        }
        Ok(())
    }

    /// The first round fills the link: it tells the rate.
    fn learn(&mut self, round: RoundResult) {
        if self.convergence.rounds().is_empty() && round.ms > 0 {
            #[allow(clippy::cast_precision_loss)]
            let rate = round.bytes as f64 / (round.ms as f64 / 1e3);
            self.costs.bytes_per_s = self.costs.bytes_per_s.max(rate);
        }
    }

    fn change_mode(&mut self, mode: Mode) -> Result<()> {
        self.mode = mode;
        self.place.facts.mode = mode;
        self.report.mode = mode.name().to_owned();
        self.place.keep_facts()
    }
}

fn result_of_round(line: &serde_json::Value, took: Duration) -> RoundResult {
    let pages = |kind: &str| line["sent"][kind]["pages"].as_u64().unwrap_or_default();
    RoundResult {
        pages: pages("delta") + pages("zstd") + pages("raw"),
        bytes: line["frame_bytes"].as_u64().unwrap_or_default(),
        ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    }
}
