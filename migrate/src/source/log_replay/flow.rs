//! One move under way, by the command that began it.

use axum::body::Body;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{Digest, ReplayBegin, ReplayStart, ReplayStatus};
use pageferry::migration::{LogReplay, LogReplayAction, LogReplayEnd, LogReplayRecord};
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};
use tokio_util::io::ReaderStream;

use super::context::SourceContext;
use super::sender::Sender;
use crate::end_signals::StopSignals;
use crate::events::Details;
use crate::source::args::Args;
use crate::source::first_answer::FirstAnswer;
use crate::source::hooks::Point;
use crate::source::logs;
use crate::source::progress::Progress;
use crate::source::report::{Report, ms};

/// Bytes of a snapshot that are read at once.
const READ_BYTES: usize = 256 << 10;

/// See the module's text.
pub(super) struct Flow<'a> {
    args: &'a Args,
    context: SourceContext,
    source: LogReplay,
    /// What the destination is told of the service.
    begin: ReplayBegin,
    sender: Sender,
    report: Report,
    progress: Progress,
    started: Instant,
    /// When clients were held.
    held: Option<Instant>,
    /// Entries of the log up to there.
    until: Option<u64>,
    /// The first answer from the destination.
    answer: Option<FirstAnswer>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        args: &'a Args,
        context: SourceContext,
        (begin, sender): (ReplayBegin, Sender),
        report: Report,
        started: Instant,
    ) -> Flow<'a> {
        Flow {
            args,
            source: LogReplay::default(),
            context,
            begin,
            sender,
            report,
            progress: Progress::start(),
            started,
            held: None,
            until: None,
            answer: None,
        }
    }

    /// Moves the service, or leaves it where it is.
    pub(super) async fn run(&mut self) -> Result<LogReplayEnd> {
        let deadline = self.started + self.args.timeout;
        let mut signals = StopSignals::new()?;
        while let Some(action) = self.source.next_action() {
            self.begins(action);
            let began = Instant::now();
            // What changes something here is never left half-way.
            let may_stop = matches!(
                action,
                LogReplayAction::Prepare | LogReplayAction::Follow | LogReplayAction::Finish
            );
            let done = match may_stop {
                false => self.carry_out(action).await,
                true => tokio::select! {
                    done = timeout_at(deadline, self.carry_out(action)) => done.unwrap_or_else(|_| {
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

    fn fails(&mut self, action: LogReplayAction, error: &Error) {
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

    /// Whether the replay was given up because it is too slow, and the processes are to move with their memory.
    pub(super) fn is_too_slow(&self) -> bool {
        self.sender.is_too_slow()
    }

    async fn carry_out(&mut self, action: LogReplayAction) -> Result<()> {
        match action {
            LogReplayAction::Prepare => self.prepare().await,
            LogReplayAction::Follow => {
                self.sender.follow().await?;
                self.context.run_hook(Point::PreFreeze).await?;
                self.context.client.warm(1).await
            }
            LogReplayAction::Hold => {
                self.until = self.context.hold().await?;
                Ok(())
            }
            LogReplayAction::Finish => self.sender.finish(self.until).await,
            LogReplayAction::Switch => {
                self.context.switch().await?;
                self.answer = FirstAnswer::start(self.args, self.context.client.peer());
                Ok(())
            }
            action => self.context.carry_out(action).await,
        }
    }

    async fn prepare(&mut self) -> Result<()> {
        let client = self.context.client.clone();
        client
            .post::<ReplayStatus>("/v1/replays", &self.begin)
            .await?;
        let snapshot = match &self.args.log_replay.snapshot {
            Some(path) => Some(self.send_snapshot(path).await?),
            None => None,
        };
        let path = self.context.path("/start");
        let request = ReplayStart { snapshot };
        client.post::<ReplayStatus>(&path, &request).await.map(drop)
    }

    async fn send_snapshot(&self, path: &std::path::Path) -> Result<Digest> {
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
        let to = self.context.path("/snapshot");
        self.context.client.put::<ReplayStatus>(&to, body).await?;
        Ok(Digest::of(&sum.finalize().into()))
    }

    /// Notes what begins.
    fn begins(&mut self, action: LogReplayAction) {
        if let Some(step) = action.step() {
            self.context.events.begin(step);
        }
        self.progress.phase(format!("{action:?}").to_lowercase());
        if action == LogReplayAction::Hold {
            self.held = Some(Instant::now());
            self.report.preparation_ms = ms(self.started.elapsed());
        }
        if action == LogReplayAction::Switch {
            self.report.switch_ms = Some(ms(self.started.elapsed()));
        }
    }

    /// Notes what has been done.
    fn ends(&mut self, action: LogReplayAction, began: Instant) {
        if let Some(step) = action.step() {
            self.context.events.done(step, Details::default());
        }
        let name = match action {
            LogReplayAction::Prepare => "start",
            LogReplayAction::Follow => "replay",
            LogReplayAction::Hold => "hold",
            LogReplayAction::Finish => "rest",
            LogReplayAction::Seal | LogReplayAction::Keep => "commit",
            LogReplayAction::Switch => "route",
            LogReplayAction::Record(LogReplayRecord::Switching | LogReplayRecord::Switched) => {
                "commit"
            }
            LogReplayAction::Resume => "resume",
            LogReplayAction::Stop => "stop",
            _ => return,
        };
        let (start, end) = (ms(began - self.started), ms(self.started.elapsed()));
        let row = match (self.held, self.report.downtime_ms) {
            (None, _) => "rounds",
            (Some(_), None) => "freeze",
            (Some(_), Some(_)) => "memory",
        };
        if row == "freeze" {
            *self.report.phases_ms.entry(name.to_owned()).or_default() += end - start;
        }
        self.report.add_span(row, name, start, end);
        if let (LogReplayAction::Resume, Some(held)) = (action, self.held) {
            let downtime = ms(held.elapsed());
            self.report.downtime_ms = Some(downtime);
            self.report.complete_ms = Some(end);
            self.context.note("DOWNTIME_MS", format!("{downtime:.1}"));
        }
    }

    /// The report of a move that has ended.
    pub(super) async fn finish(mut self, ended: &Result<LogReplayEnd>) -> Report {
        self.progress.finish();
        let moved = matches!(ended, Ok(LogReplayEnd::Moved));
        let to = logs::place(self.args.report.as_deref(), self.context.dir());
        let (client, id) = (&self.context.client, &self.context.facts.id);
        logs::merge(client, id, &self.context.events).await;
        if !moved {
            let dirs = (self.context.dir(), to.as_path());
            self.report.logs = logs::collect(client, id, dirs, &self.context.events).await;
        }
        if let Some(answer) = self.answer.take() {
            match ended {
                Ok(LogReplayEnd::Moved) => {
                    answer.note(&mut self.report, self.started, self.held).await;
                }
                _ => answer.abort(),
            }
        }
        self.report.total_ms = ms(self.started.elapsed());
        self.report.warnings.extend(self.context.take_warnings());
        self.report.log = self.sender.report();
        self.report.wire_bytes = self.report.log.bytes;
        self.report.result = match ended {
            Ok(LogReplayEnd::Moved) => "moved".to_owned(),
            Ok(LogReplayEnd::RolledBack) => "rolled back".to_owned(),
            Ok(LogReplayEnd::Stuck) => "not known".to_owned(),
            Err(error) => {
                self.report.problem.get_or_insert(error.to_string());
                "not known".to_owned()
            }
        };
        self.report
    }
}
