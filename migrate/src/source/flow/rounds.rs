//! Pre-copy: the rounds that read and send memory while the processes run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::known_hashes::KnownHashes;
use pageferry::migration::events::Step;
use pageferry::migration::messages::Receiver;
use pageferry::migration::{Decision, Mode, OnMissed, RoundResult};
use tokio::time::Instant;

use super::{Flow, blocking, ms};
use crate::events::Details;
use crate::rounds::{self, Trackers, Tree};
use crate::source::commands;
use crate::source::last_pages;
use crate::source::progress::Part;
use crate::source::throttle::Throttle;

impl Flow<'_> {
    /// Sends rounds until a freeze would be short enough, or the rounds are over.
    pub(super) async fn run_rounds(&mut self) -> Result<()> {
        self.send_rounds().await?;
        if self.mode.is_lazy()
            && let Err(error) = commands::keep_hashes(self.context.dir())
        {
            // The destination hashes its pages once more then.
            tracing::warn!("the hashes of the rounds are lost: {error}");
        }
        Ok(())
    }

    async fn send_rounds(&mut self) -> Result<()> {
        let limits = self.args.limits(self.mode);
        // Gone when the rounds are over: CRIU dumps no memory under a userfaultfd.
        let mut trackers = Trackers::new(self.args.track, self.page, self.context.dir())?;
        trackers.how().name().clone_into(&mut self.report.track);
        // At most one; undone when it is dropped: before the freeze, however the rounds end.
        let mut throttles: Vec<Throttle> = Vec::new();
        for number in 1.. {
            let started = Instant::now();
            self.events().begin(Step::Round);
            self.progress
                .phase(format!("round {number}: memory is read and sent"));
            let receiver: Receiver = self
                .client
                .post(&self.context.path(&format!("/rounds/{number}")), &())
                .await?;
            if number == 1 {
                self.start_forwarder(Some(receiver)).await?;
            }
            let forwarder = self.forwarder_address()?;
            let tree = Tree::of(self.root())?;
            let (page, wire, rate) = (self.page, self.wire, self.args.round_rate);
            let count = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&count);
            let reading = blocking("a round", move || {
                let to = rounds::Forwarder {
                    at: forwarder,
                    page,
                    wire,
                    bytes_per_s: Some(rate.max(1)),
                };
                let read = rounds::run(&tree, to, &mut trackers, &counted)?;
                Ok((read, trackers))
            });
            let read;
            (read, trackers) = self.show_while(number, &count, reading).await?;
            let line = self.stored(&format!("/rounds/{number}")).await?;
            let round = result_of_round(&line, started.elapsed());
            self.report.memory_bytes = read.pages << self.page.shift();
            self.learn(round);
            trackers = self.expect_after(&round, started, trackers).await?;
            let decision = self.convergence.add(round, self.predict(), &limits);
            self.report.rounds.push(round);
            let start = ms(started - self.started);
            let end = ms(self.started.elapsed());
            self.report
                .add_span("rounds", format!("round {number}"), start, end);
            self.progress.round(number, round, read, self.predict());
            self.events().done(Step::Round, counts_of(number, round));
            match decision {
                Decision::Again => {}
                Decision::Throttle => throttles.extend(self.slow_down()),
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

    /// Notes how much would have to travel after `round`, which began when `started` says.
    async fn expect_after(
        &mut self,
        round: &RoundResult,
        started: Instant,
        trackers: Trackers,
    ) -> Result<Trackers> {
        let (tree, page) = (Tree::of(self.root())?, self.page);
        let counting = blocking("counting written pages", move || {
            Ok((rounds::written_pages(&tree, &trackers, page), trackers))
        });
        let (written, trackers) = counting.await?;
        // Whether shared memory was written is not known.
        let written = written.filter(|_| self.size.shared_bytes == 0);
        self.convergence.expect(round, written, started.elapsed());
        Ok(trackers)
    }

    /// The hashes of what the rounds have left at the destination, if the last pages are compared with them here. If most
    /// memory is of a kind that a lazy dump writes into files first, CRIU sends all of it.
    pub(super) fn compared_hashes(&self) -> Option<KnownHashes> {
        let is_lazy = self.size.eager_bytes() <= self.size.bytes() / 2;
        if self.mode != Mode::PreCopy || !is_lazy {
            return None;
        }
        let path = commands::round_hashes(self.context.dir());
        last_pages::known_hashes(&path, self.page)
            .inspect_err(|error| tracing::warn!("CRIU sends the last pages, all of them: {error}"))
            .ok()
    }

    /// Shows what a round has read while it reads.
    async fn show_while<T>(
        &self,
        number: u32,
        pages: &AtomicU64,
        reading: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let mut reading = std::pin::pin!(reading);
        let mut turns = tokio::time::interval(self.progress.turn());
        // The first is at once.
        turns.tick().await;
        loop {
            tokio::select! {
                done = &mut reading => return done,
                _ = turns.tick() => {
                    let bytes = pages.load(Ordering::Relaxed) << self.page.shift();
                    let part = Part {
                        bytes,
                        of_bytes: self.report.memory_bytes,
                        took: begun.elapsed(),
                        predicted: self.predict(),
                    };
                    self.progress.inside_round(number, part);
                }
            }
        }
    }

    /// Slows the processes, if that can be done here.
    fn slow_down(&mut self) -> Option<Throttle> {
        let percent = self.args.throttle?;
        let id = self.context.common.id.to_string();
        let tree = Tree::of(self.root());
        let started =
            tree.and_then(|tree| Throttle::start(&tree, percent, self.context.dir(), &id));
        match started {
            Ok(throttle) => {
                tracing::info!(
                    "rounds do not shrink: the processes have {percent} % less CPU time"
                );
                Some(throttle)
            }
            Err(error) => {
                tracing::warn!("{error}");
                self.report.warnings.push(error.to_string());
                None
            }
        }
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
        self.context.facts.mode = mode;
        self.report.mode = mode.name().to_owned();
        self.context.keep_facts()
    }
}

fn counts_of(number: u32, round: RoundResult) -> Details {
    Details::counts(&[
        ("round", u64::from(number)),
        ("pages", round.pages),
        ("bytes", round.bytes),
    ])
}

fn result_of_round(line: &serde_json::Value, took: Duration) -> RoundResult {
    let pages = |kind: &str| line["sent"][kind]["pages"].as_u64().unwrap_or_default();
    RoundResult {
        pages: pages("delta") + pages("zstd") + pages("raw"),
        bytes: line["frame_bytes"].as_u64().unwrap_or_default(),
        ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    }
}
