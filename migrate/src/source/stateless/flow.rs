//! One move under way, by the command that began it.

use std::path::PathBuf;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Container, ContainerBegin, ContainerStart, ContainerStatus};
use pageferry::migration::{MoveEnd, MoveRecord, StatelessAction, StatelessMode};
use tokio::time::Instant;

use super::context::Facts;
use super::image;
use crate::runtime::bundle;
use crate::source::hooks::Point;
use crate::source::layers::Layered;
use crate::source::report::{Report, ms};
use crate::source::stepped::{self, Course};
use crate::tree_summary::TreeSummary;

/// How often an image is sent whose files are removed while they are read.
const SEND_ATTEMPTS: u32 = 4;

/// How much longer than `--timeout` the agent may take to say that a container is not ready.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// See the module's text.
pub(super) struct Flow<'a> {
    course: Course<'a, Facts>,
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
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        course: Course<'a, Facts>,
        (container, layered): (Container, Option<Layered>),
        room_bytes: u64,
    ) -> Flow<'a> {
        let bundle = &course.context.facts.bundle;
        Flow {
            files: match &layered {
                Some(layered) => layered.upper.clone(),
                None => bundle::root_of(bundle, &container.config),
            },
            layered,
            course,
            container,
            room_bytes,
            sent: None,
        }
    }

    /// The report of a move that has ended.
    pub(super) async fn finish(self, ended: &Result<MoveEnd>) -> Report {
        self.course.finish(ended).await
    }

    fn mode(&self) -> StatelessMode {
        self.course.context.facts.mode
    }

    async fn prepare(&mut self) -> Result<()> {
        let begin = ContainerBegin {
            id: self.course.context.common.id.clone(),
            container: self.container.clone(),
            addresses: self.course.args.addresses_there(),
            timeout_s: self.course.args.timeout.as_secs(),
            drain_ms: self.course.context.facts.drain_ms,
            overlay: self.layered.as_ref().map(Layered::description),
        };
        let client = &self.course.context.client;
        client
            .post::<ContainerStatus>("/v1/containers", &begin)
            .await?;
        if let Some(layered) = &self.layered {
            self.course.report.files.layers = layered.send(client).await?;
            self.course.report.wire_bytes += self.course.report.files.bytes();
        }
        let mut attempts = 1..SEND_ATTEMPTS;
        while let Err(error) = self.look_and_send().await {
            if error.kind() != Kind::Io || attempts.next().is_none() {
                return Err(error);
            }
            tracing::warn!("{error}: the image is sent again");
        }
        if self.mode() == StatelessMode::Cold {
            self.course.context.run_hook(Point::PreFreeze).await?;
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
        let path = self.course.context.path("");
        let tree = (self.files.as_path(), self.layered.is_some());
        let bytes = image::send(&self.course.context.client, &path, tree).await?;
        self.course.report.wire_bytes += bytes;
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
        let left = self
            .course
            .args
            .timeout
            .saturating_sub(self.course.started.elapsed());
        let request = ContainerStart {
            ready: self.course.args.stateless.ready.clone(),
            limit_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        };
        self.course.context.post("/start", &request).await?;
        if self.mode() == StatelessMode::Live {
            self.course.context.run_hook(Point::PreFreeze).await?;
        }
        Ok(())
    }

    /// Notes that the container lives at the destination.
    fn switched(&mut self) {
        let done = self.course.report.complete_ms.unwrap_or_default();
        let downtime = match self.mode() {
            StatelessMode::Cold => done - self.course.report.preparation_ms,
            // Somebody served clients all the time.
            StatelessMode::Live => 0.0,
        };
        self.course.report.downtime_ms = Some(downtime);
        self.course
            .context
            .note("DOWNTIME_MS", format!("{downtime:.1}"));
    }
}

impl<'a> stepped::Flow<'a> for Flow<'a> {
    type Facts = Facts;

    fn course(&mut self) -> &mut Course<'a, Facts> {
        &mut self.course
    }

    fn grace(action: StatelessAction) -> Option<Duration> {
        match action {
            StatelessAction::Prepare | StatelessAction::Renew => Some(Duration::ZERO),
            // The agent knows better why a container is not ready in time.
            StatelessAction::Start => Some(LAST_ANSWER),
            _ => None,
        }
    }

    fn leaves(&self, action: StatelessAction) -> bool {
        match self.mode() {
            StatelessMode::Cold => action == StatelessAction::Stop,
            StatelessMode::Live => action == StatelessAction::Switch,
        }
    }

    async fn carry_out(&mut self, action: StatelessAction) -> Result<()> {
        match action {
            StatelessAction::Prepare => self.prepare().await,
            StatelessAction::Renew => self.renew().await,
            StatelessAction::Start => self.start().await,
            StatelessAction::Keep => self.course.context.post("/keep", &()).await,
            StatelessAction::Switch => self.course.switch().await,
            action => self.course.context.carry_out(action).await,
        }
    }

    fn ends(&mut self, action: StatelessAction, began: Instant) {
        let name = match action {
            StatelessAction::Prepare | StatelessAction::Renew => "image",
            StatelessAction::Stop => "stop",
            StatelessAction::Start => "start",
            StatelessAction::Switch => "route",
            StatelessAction::Drain => "drain",
            StatelessAction::Record(MoveRecord::Switched) => return self.switched(),
            _ => return,
        };
        let (start, end) = (
            ms(began - self.course.started),
            ms(self.course.started.elapsed()),
        );
        let is_down = self.mode() == StatelessMode::Cold && self.course.left.is_some();
        let row = match (is_down, self.course.report.switch_ms) {
            (true, _) => "freeze",
            (false, None) => "rounds",
            (false, Some(_)) => "memory",
        };
        if is_down {
            self.course
                .report
                .phases_ms
                .insert(name.to_owned(), end - start);
        }
        self.course.report.add_span(row, name, start, end);
        if action == StatelessAction::Switch {
            self.course.report.complete_ms = Some(end);
        }
    }
}
