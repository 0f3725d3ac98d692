//! One move under way, by the command that began it.

use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use pageferry::error::{Error, Result};
use pageferry::migration::messages::{Digest, ReplayBegin, ReplayStart, ReplayStatus};
use pageferry::migration::{LogReplayAction, MoveEnd, MoveRecord};
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

use super::context::Facts;
use super::sender::Sender;
use crate::source::hooks::Point;
use crate::source::report::{Report, ms};
use crate::source::stepped::{self, Course};

/// Bytes of a snapshot that are read at once.
const READ_BYTES: usize = 256 << 10;

/// See the module's text.
pub(super) struct Flow<'a> {
    course: Course<'a, Facts>,
    /// What the destination is told of the service.
    begin: ReplayBegin,
    sender: Sender,
    /// Entries of the log up to where clients were held.
    until: Option<u64>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(course: Course<'a, Facts>, begin: ReplayBegin, sender: Sender) -> Flow<'a> {
        Flow {
            course,
            begin,
            sender,
            until: None,
        }
    }

    /// Whether the replay was given up because it is too slow, and the processes are to move with their memory.
    pub(super) fn is_too_slow(&self) -> bool {
        self.sender.is_too_slow()
    }

    /// The report of a move that has ended.
    pub(super) async fn finish(self, ended: &Result<MoveEnd>) -> Report {
        let log = self.sender.report();
        let mut report = self.course.finish(ended).await;
        report.wire_bytes = log.bytes;
        report.log = log;
        report
    }

    async fn prepare(&mut self) -> Result<()> {
        let client = self.course.context.client.clone();
        client
            .post::<ReplayStatus>("/v1/replays", &self.begin)
            .await?;
        let snapshot = match &self.course.args.log_replay.snapshot {
            Some(path) => Some(self.send_snapshot(path).await?),
            None => None,
        };
        let path = self.course.context.path("/start");
        let request = ReplayStart { snapshot };
        client.post::<ReplayStatus>(&path, &request).await.map(drop)
    }

    async fn send_snapshot(&self, path: &Path) -> Result<Digest> {
        let failed = |error| Error::file("read", path, error);
        let mut file = File::open(path).await.map_err(failed)?;
        let (mut sum, mut buffer) = (Sha256::new(), vec![0; READ_BYTES]);
        loop {
            match file.read(&mut buffer).await.map_err(failed)? {
                0 => break,
                read => sum.update(&buffer[..read]),
            }
        }
        let file = File::open(path).await.map_err(failed)?;
        let body = Body::from_stream(ReaderStream::with_capacity(file, READ_BYTES));
        let to = self.course.context.path("/snapshot");
        self.course
            .context
            .client
            .put::<ReplayStatus>(&to, body)
            .await?;
        Ok(Digest::of(&sum.finalize().into()))
    }
}

impl<'a> stepped::Flow<'a> for Flow<'a> {
    type Facts = Facts;

    fn course(&mut self) -> &mut Course<'a, Facts> {
        &mut self.course
    }

    fn grace(action: LogReplayAction) -> Option<Duration> {
        let may_stop = matches!(
            action,
            LogReplayAction::Prepare | LogReplayAction::Follow | LogReplayAction::Finish
        );
        may_stop.then_some(Duration::ZERO)
    }

    fn leaves(&self, action: LogReplayAction) -> bool {
        action == LogReplayAction::Hold
    }

    async fn carry_out(&mut self, action: LogReplayAction) -> Result<()> {
        match action {
            LogReplayAction::Prepare => self.prepare().await,
            LogReplayAction::Follow => {
                self.sender.follow().await?;
                self.course.context.run_hook(Point::PreFreeze).await?;
                self.course.context.client.warm(1).await
            }
            LogReplayAction::Hold => {
                self.until = self.course.context.hold().await?;
                Ok(())
            }
            LogReplayAction::Finish => self.sender.finish(self.until).await,
            LogReplayAction::Switch => self.course.switch().await,
            action => self.course.context.carry_out(action).await,
        }
    }

    fn ends(&mut self, action: LogReplayAction, began: Instant) {
        let name = match action {
            LogReplayAction::Prepare => "start",
            LogReplayAction::Follow => "replay",
            LogReplayAction::Hold => "hold",
            LogReplayAction::Finish => "rest",
            LogReplayAction::Seal | LogReplayAction::Keep => "commit",
            LogReplayAction::Switch => "route",
            LogReplayAction::Record(MoveRecord::Switching | MoveRecord::Switched) => "commit",
            LogReplayAction::Resume => "resume",
            LogReplayAction::Stop => "stop",
            _ => return,
        };
        let (start, end) = (
            ms(began - self.course.started),
            ms(self.course.started.elapsed()),
        );
        let row = match (self.course.left, self.course.report.downtime_ms) {
            (None, _) => "rounds",
            (Some(_), None) => "freeze",
            (Some(_), Some(_)) => "memory",
        };
        if row == "freeze" {
            *self
                .course
                .report
                .phases_ms
                .entry(name.to_owned())
                .or_default() += end - start;
        }
        self.course.report.add_span(row, name, start, end);
        if let (LogReplayAction::Resume, Some(held)) = (action, self.course.left) {
            let downtime = ms(held.elapsed());
            self.course.report.downtime_ms = Some(downtime);
            self.course.report.complete_ms = Some(end);
            self.course
                .context
                .note("DOWNTIME_MS", format!("{downtime:.1}"));
        }
    }
}
