//! What a migration under way writes to its event log and to its report.

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::Status;
use pageferry::migration::{AgentState, SourceState};

use super::Flow;
use crate::client::AgentProblem;
use crate::events::{Details, Events};
use crate::source::logs;

/// The step that ends where a part of the downtime ends.
pub(super) fn step_of(phase: &str) -> Option<Step> {
    Some(match phase {
        "dump" => Step::Dump,
        "pages" => Step::Pages,
        "shared" => Step::Shared,
        "images" => Step::Images,
        "forwarder" => Step::Forwarder,
        "files" => Step::Files,
        "address" => Step::Address,
        "restore" => Step::Restore,
        "route" => Step::Route,
        _ => return None,
    })
}

/// A downtime in words.
pub(super) fn downtime(ms: f64) -> Details {
    Details::text(format!("downtime {ms:.1} ms"))
}

impl Flow<'_> {
    /// The migration's event log.
    pub(super) fn events(&self) -> &Events {
        &self.context.events
    }

    /// Notes why the migration is given up, before any decision.
    pub(super) fn give_up(&mut self, error: &Error) {
        let step = self.events().step().unwrap_or(Step::Freeze);
        self.report.fail(step, error);
        let problem = self.report.problem.clone().unwrap_or_default();
        tracing::error!("{problem}: the processes continue here");
        self.events()
            .failed(step, Details::error(&error.to_string()));
        self.context.note("PROBLEM", problem);
    }

    /// Sends what the container has printed so far. With `frozen` nothing more comes of what it writes to a file.
    pub(super) async fn send_outputs(&mut self, frozen: bool) -> Result<()> {
        if self.context.facts.outputs.is_empty() {
            return Ok(());
        }
        self.events().begin(Step::Output);
        let path = self.context.path("/outputs");
        let outputs = &mut self.context.facts.outputs;
        outputs.send(&self.client, &path).await?;
        if frozen {
            outputs.seal_files(&self.client, &path).await?;
        }
        self.events().done(Step::Output, Details::default());
        Ok(())
    }

    /// Notes whether all memory is at the destination.
    pub(super) fn memory_ended(&mut self, status: &Status) {
        match &status.problem {
            Some(problem) if status.state != AgentState::Complete => {
                let reported = AgentProblem(problem.clone());
                let error = Error::wrap(Kind::MemoryLost, "the processes run there", reported);
                self.report.fail(Step::Memory, &error);
                self.events().failed(Step::Memory, Details::error(problem));
            }
            _ => self.events().done(Step::Memory, Details::default()),
        }
    }

    /// Brings what the destination has to tell, and if something went wrong the logs of both sides.
    pub(in crate::source) async fn bring_logs(&mut self, ended: &Result<SourceState>) {
        let (id, client) = (self.context.common.id.clone(), self.client.clone());
        logs::merge(&client, &id, self.events()).await;
        if !matches!(ended, Ok(SourceState::Complete)) {
            let dir = self.context.dir();
            let to = logs::place(self.args.report.as_deref(), dir);
            self.report.logs = logs::collect(&client, &id, (dir, &to), self.events()).await;
        }
    }
}
