//! One move under way, by the command that began it.

use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::{ActionStep, MoveAction, MoveEnd, MoveSteps};
use tokio::time::{Instant, timeout_at};

use super::SteppedFacts;
use crate::end_signals::StopSignals;
use crate::events::Details;
use crate::source::args::Args;
use crate::source::first_answer::FirstAnswer;
use crate::source::flow_context::FlowContext;
use crate::source::logs;
use crate::source::progress::Progress;
use crate::source::report::{Report, ms};

/// What every such flow keeps while it is under way.
pub(in crate::source) struct Course<'a, F: SteppedFacts> {
    pub(in crate::source) args: &'a Args,
    pub(in crate::source) context: FlowContext<F>,
    steps: MoveSteps<F::Action>,
    pub(in crate::source) report: Report,
    progress: Progress,
    pub(in crate::source) started: Instant,
    /// When clients lost the service here, or began to be led away from it.
    pub(in crate::source) left: Option<Instant>,
    /// The first answer from the destination.
    answer: Option<FirstAnswer>,
}

impl<'a, F: SteppedFacts> Course<'a, F> {
    pub(in crate::source) fn new(
        args: &'a Args,
        context: FlowContext<F>,
        report: Report,
        started: Instant,
    ) -> Course<'a, F> {
        Course {
            args,
            steps: context.facts.steps(),
            context,
            report,
            progress: Progress::start(),
            started,
            left: None,
            answer: None,
        }
    }

    /// Leads clients to the destination, and begins to ask for an answer there.
    pub(in crate::source) async fn switch(&mut self) -> Result<()> {
        self.context.switch().await?;
        self.answer = FirstAnswer::start(self.args, self.context.client.peer());
        Ok(())
    }

    /// Notes what begins. `leaves` tells whether clients lose the service here by it.
    fn begins(&mut self, action: F::Action, leaves: bool) {
        if let Some(step) = action.step() {
            self.context.events.begin(step);
        }
        self.progress.phase(format!("{action:?}").to_lowercase());
        if leaves && self.left.is_none() {
            self.left = Some(Instant::now());
            self.report.preparation_ms = ms(self.started.elapsed());
        }
        if action == F::Action::SWITCH {
            self.report.switch_ms = Some(ms(self.started.elapsed()));
        }
    }

    fn fails(&mut self, action: F::Action, error: &Error) {
        let step = action.step().unwrap_or(Step::Commit);
        let details = Details::error(&error.to_string());
        self.context.events.failed(step, details);
        if !self.steps.failed() {
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

    /// The report of a move that has ended.
    pub(in crate::source) async fn finish(mut self, ended: &Result<MoveEnd>) -> Report {
        self.progress.finish();
        let moved = matches!(ended, Ok(MoveEnd::Moved));
        let to = logs::place(self.args.report.as_deref(), self.context.dir());
        let (client, id) = (&self.context.client, &self.context.common.id);
        logs::merge(client, id, &self.context.events).await;
        if !moved {
            let dirs = (self.context.dir(), to.as_path());
            self.report.logs = logs::collect(client, id, dirs, &self.context.events).await;
        }
        match self.answer.take() {
            Some(answer) if moved => {
                answer.note(&mut self.report, self.started, self.left).await;
            }
            Some(answer) => answer.abort(),
            None => {}
        }
        self.report.total_ms = ms(self.started.elapsed());
        self.report.warnings.extend(self.context.take_warnings());
        self.report.result = match ended {
            Ok(MoveEnd::Moved) => "moved".to_owned(),
            Ok(MoveEnd::RolledBack) => "rolled back".to_owned(),
            Ok(MoveEnd::Stuck) => "not known".to_owned(),
            Err(error) => {
                self.report.problem.get_or_insert(error.to_string());
                "not known".to_owned()
            }
        };
        self.report
    }
}

/// A flow under way.
pub(in crate::source) trait Flow<'a> {
    type Facts: SteppedFacts;

    fn course(&mut self) -> &mut Course<'a, Self::Facts>;

    /// How long after `--timeout` an action may still take, if it may be given up at all: what changes something here
    /// is never left half-way.
    fn grace(action: ActionOf<Self::Facts>) -> Option<Duration>;

    /// Whether clients lose the service here when `action` begins, or are led away from it.
    fn leaves(&self, action: ActionOf<Self::Facts>) -> bool;

    async fn carry_out(&mut self, action: ActionOf<Self::Facts>) -> Result<()>;

    /// Notes what has been done, and `began` then.
    fn ends(&mut self, action: ActionOf<Self::Facts>, began: Instant);
}

/// What is to be done in a flow.
pub(in crate::source) type ActionOf<F> = <F as SteppedFacts>::Action;

/// Moves the service, or leaves it where it is.
pub(in crate::source) async fn run<'a, F: Flow<'a>>(flow: &mut F) -> Result<MoveEnd> {
    let (timeout, started) = (flow.course().args.timeout, flow.course().started);
    let mut signals = StopSignals::new()?;
    while let Some(action) = flow.course().steps.next_action() {
        let leaves = flow.leaves(action);
        flow.course().begins(action, leaves);
        let began = Instant::now();
        let done = match F::grace(action) {
            None => flow.carry_out(action).await,
            Some(grace) => tokio::select! {
                done = timeout_at(started + timeout + grace, flow.carry_out(action)) => done.unwrap_or_else(|_| {
                    let text = format!("the time is over (--timeout {timeout:?})");
                    Err(Error::new(Kind::Interrupted, text))
                }),
                error = signals.stopped() => Err(error),
            },
        };
        match done {
            Ok(()) => {
                if let Some(step) = action.step() {
                    flow.course().context.events.done(step, Details::default());
                }
                flow.ends(action, began);
                flow.course().steps.done();
            }
            Err(error) => flow.course().fails(action, &error),
        }
    }
    Ok(flow.course().steps.end())
}
