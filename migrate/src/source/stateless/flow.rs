//! One move under way, by the command that began it.

use std::path::PathBuf;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{Container, ContainerBegin, ContainerStart, ContainerStatus};
use pageferry::migration::{
    Stateless, StatelessAction, StatelessEnd, StatelessMode, StatelessRecord,
};
use tokio::time::{Instant, timeout_at};

use super::context::SourceContext;
use super::image;
use crate::end_signals::StopSignals;
use crate::events::Details;
use crate::runtime::bundle;
use crate::source::args::Args;
use crate::source::first_answer::FirstAnswer;
use crate::source::hooks::Point;
use crate::source::layers::Layered;
use crate::source::logs;
use crate::source::progress::Progress;
use crate::source::report::{Report, ms};
use crate::tree_summary::TreeSummary;

/// How often an image is sent whose files are removed while they are read.
const SEND_ATTEMPTS: u32 = 4;

/// How much longer than `--timeout` the agent may take to say that a container is not ready.
const LAST_WORD: Duration = Duration::from_secs(5);

/// See the module's text.
pub(super) struct Flow<'a> {
    args: &'a Args,
    context: SourceContext,
    source: Stateless,
    /// What the destination is told of the container.
    container: Container,
    /// Space in the agent's directory.
    room_bytes: u64,
    /// The container's files here, or those of its writable layer.
    files: PathBuf,
    /// The overlay that its root is, if its layers travel by themselves.
    layered: Option<Layered>,
    /// They, as they were sent.
    sent: Option<TreeSummary>,
    report: Report,
    progress: Progress,
    started: Instant,
    /// When the container was told to end (cold), or clients began to be led away (live).
    left: Option<Instant>,
    /// The first answer from the destination.
    answer: Option<FirstAnswer>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        args: &'a Args,
        context: SourceContext,
        (container, layered): (Container, Option<Layered>),
        room_bytes: u64,
        report: Report,
        started: Instant,
    ) -> Flow<'a> {
        Flow {
            args,
            source: Stateless::new(context.facts.mode),
            files: match &layered {
                Some(layered) => layered.upper.clone(),
                None => bundle::root_of(&context.facts.bundle, &container.config),
            },
            layered,
            context,
            container,
            room_bytes,
            sent: None,
            report,
            progress: Progress::start(),
            started,
            left: None,
            answer: None,
        }
    }

    /// Moves the container, or leaves it where it is.
    pub(super) async fn run(&mut self) -> Result<StatelessEnd> {
        let deadline = self.started + self.args.timeout;
        let mut signals = StopSignals::new()?;
        while let Some(action) = self.source.next_action() {
            self.begins(action);
            let began = Instant::now();
            // What changes something here is never left half-way.
            let may_stop = matches!(
                action,
                StatelessAction::Prepare | StatelessAction::Renew | StatelessAction::Start
            );
            // The agent knows better why a container is not ready in time.
            let until = match action {
                StatelessAction::Start => deadline + LAST_WORD,
                _ => deadline,
            };
            let done = match may_stop {
                false => self.carry_out(action).await,
                true => tokio::select! {
                    done = timeout_at(until, self.carry_out(action)) => done.unwrap_or_else(|_| {
                        let text = format!("the time is over (--timeout {:?})", self.args.timeout);
                        Err(Error::new(Kind::Interrupted, text))
                    }),
                    error = signals.stopped() => Err(error),
                },
            };
            match done {
                Ok(()) => {
                    self.ends(action, began);
                    self.source.done();
                }
                Err(error) => self.fails(action, &error),
            }
        }
        Ok(self.source.end())
    }

    fn fails(&mut self, action: StatelessAction, error: &Error) {
        let step = action.step().unwrap_or(Step::Commit);
        self.context
            .events
            .failed(step, Details::error(&error.to_string()));
        if !self.source.failed() {
            return self.context.warn(error.to_string());
        }
        let is_first = self.report.problem.is_none();
        self.report.fail(step, error);
        let problem = self.report.problem.clone().unwrap_or_default();
        tracing::error!("{problem}");
        if is_first {
            self.context.note("PROBLEM", problem);
        }
    }

    async fn carry_out(&mut self, action: StatelessAction) -> Result<()> {
        match action {
            StatelessAction::Prepare => self.prepare().await,
            StatelessAction::Renew => self.renew().await,
            StatelessAction::Start => self.start().await,
            StatelessAction::Keep => self.post("/keep").await,
            StatelessAction::Switch => {
                self.context.switch().await?;
                self.answer = FirstAnswer::start(self.args, self.context.client.peer());
                Ok(())
            }
            action => self.context.carry_out(action).await,
        }
    }

    async fn post(&self, what: &str) -> Result<()> {
        let path = self.context.path(what);
        let answer = self.context.client.post::<ContainerStatus>(&path, &());
        answer.await.map(drop)
    }

    async fn prepare(&mut self) -> Result<()> {
        let begin = ContainerBegin {
            id: self.context.facts.id.clone(),
            container: self.container.clone(),
            addresses: self.args.addresses_there(),
            timeout_s: self.args.timeout.as_secs(),
            drain_ms: self.context.facts.drain_ms,
            overlay: self.layered.as_ref().map(Layered::description),
        };
        let client = &self.context.client;
        client
            .post::<ContainerStatus>("/v1/containers", &begin)
            .await?;
        if let Some(layered) = &self.layered {
            self.report.files.layers = layered.send(client).await?;
            self.report.wire_bytes += self.report.files.bytes();
        }
        let mut attempts = 1..SEND_ATTEMPTS;
        while let Err(error) = self.look_and_send().await {
            if error.kind() != Kind::Io || attempts.next().is_none() {
                return Err(error);
            }
            tracing::warn!("{error}: the image is sent again");
        }
        if self.source.mode() == StatelessMode::Cold {
            self.context.run_hook(Point::PreFreeze).await?;
        }
        Ok(())
    }

    async fn look_and_send(&mut self) -> Result<()> {
        let summary = image::summarize_tree(&self.files).await?;
        let missing = self.layered.as_ref().map_or(0, Layered::missing_bytes);
        let needed = summary.bytes.saturating_add(missing);
        if needed > self.room_bytes {
            let text = format!(
                "the destination has {} MiB of free space in its directory, {} MiB are needed",
                self.room_bytes >> 20,
                needed >> 20
            );
            return Err(Error::new(Kind::Usage, text));
        }
        self.send(summary).await
    }

    async fn send(&mut self, summary: TreeSummary) -> Result<()> {
        let path = self.context.path("");
        let tree = (self.files.as_path(), self.layered.is_some());
        let bytes = image::send(&self.context.client, &path, tree).await?;
        self.report.wire_bytes += bytes;
        self.sent = Some(summary);
        Ok(())
    }

    /// The container has ended: its files are what they are.
    async fn renew(&mut self) -> Result<()> {
        if let Some(sent) = self.sent
            && image::is_same(&self.files, sent).await?
        {
            return Ok(());
        }
        tracing::info!("files of the container have changed meanwhile: its image is sent again");
        self.look_and_send().await
    }

    async fn start(&mut self) -> Result<()> {
        let left = self.args.timeout.saturating_sub(self.started.elapsed());
        let request = ContainerStart {
            ready: self.args.stateless.ready.clone(),
            limit_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        };
        let path = self.context.path("/start");
        let client = &self.context.client;
        client.post::<ContainerStatus>(&path, &request).await?;
        if self.source.mode() == StatelessMode::Live {
            self.context.run_hook(Point::PreFreeze).await?;
        }
        Ok(())
    }

    /// Notes what begins.
    fn begins(&mut self, action: StatelessAction) {
        if let Some(step) = action.step() {
            self.context.events.begin(step);
        }
        self.progress.phase(format!("{action:?}").to_lowercase());
        let leaves = match self.source.mode() {
            StatelessMode::Cold => action == StatelessAction::Stop,
            StatelessMode::Live => action == StatelessAction::Switch,
        };
        if leaves && self.left.is_none() {
            self.left = Some(Instant::now());
            self.report.preparation_ms = ms(self.started.elapsed());
        }
        if action == StatelessAction::Switch {
            self.report.switch_ms = Some(ms(self.started.elapsed()));
        }
    }

    /// Notes what has been done.
    fn ends(&mut self, action: StatelessAction, began: Instant) {
        if let Some(step) = action.step() {
            self.context.events.done(step, Details::default());
        }
        let name = match action {
            StatelessAction::Prepare | StatelessAction::Renew => "image",
            StatelessAction::Stop => "stop",
            StatelessAction::Start => "start",
            StatelessAction::Switch => "route",
            StatelessAction::Drain => "drain",
            StatelessAction::Record(StatelessRecord::Switched) => return self.switched(),
            _ => return,
        };
        let (start, end) = (ms(began - self.started), ms(self.started.elapsed()));
        let is_down = self.source.mode() == StatelessMode::Cold && self.left.is_some();
        let row = match (is_down, self.report.switch_ms) {
            (true, _) => "freeze",
            (false, None) => "rounds",
            (false, Some(_)) => "memory",
        };
        if is_down {
            self.report.phases_ms.insert(name.to_owned(), end - start);
        }
        self.report.add_span(row, name, start, end);
        if action == StatelessAction::Switch {
            self.report.complete_ms = Some(end);
        }
    }

    /// Notes that the container lives at the destination.
    fn switched(&mut self) {
        let done = self.report.complete_ms.unwrap_or_default();
        let downtime = match self.source.mode() {
            StatelessMode::Cold => done - self.report.preparation_ms,
            // Somebody served clients all the time.
            StatelessMode::Live => 0.0,
        };
        self.report.downtime_ms = Some(downtime);
        self.context.note("DOWNTIME_MS", format!("{downtime:.1}"));
    }

    /// The report of a move that has ended.
    pub(super) async fn finish(mut self, ended: &Result<StatelessEnd>) -> Report {
        self.progress.finish();
        let moved = matches!(ended, Ok(StatelessEnd::Moved));
        let to = logs::place(self.args.report.as_deref(), self.context.dir());
        let (client, id) = (&self.context.client, &self.context.facts.id);
        logs::merge(client, id, &self.context.events).await;
        if !moved {
            let dirs = (self.context.dir(), to.as_path());
            self.report.logs = logs::collect(client, id, dirs, &self.context.events).await;
        }
        if let Some(answer) = self.answer.take() {
            match ended {
                Ok(StatelessEnd::Moved) => {
                    answer.note(&mut self.report, self.started, self.left).await;
                }
                _ => answer.abort(),
            }
        }
        self.report.total_ms = ms(self.started.elapsed());
        self.report.warnings.extend(self.context.take_warnings());
        self.report.result = match ended {
            Ok(StatelessEnd::Moved) => "moved".to_owned(),
            Ok(StatelessEnd::RolledBack) => "rolled back".to_owned(),
            Ok(StatelessEnd::Stuck) => "not known".to_owned(),
            Err(error) => {
                self.report.problem.get_or_insert(error.to_string());
                "not known".to_owned()
            }
        };
        self.report
    }
}
