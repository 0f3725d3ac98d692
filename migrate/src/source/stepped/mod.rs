//! Flows that go through a list of steps ([`MoveSteps`]): containers without state, and services that move as their log.
//!
//! ```text
//! command   run ──> carry_out, step after step ──> report       (flow)
//! guard     finish ──> what is left, from the last record
//! ```

mod flow;

use std::path::Path;

use pageferry::error::Result;
use pageferry::migration::{ActionStep, MoveAction, MoveEnd, MoveSteps};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::flow_context::{FlowContext, FlowFacts};
use super::logs;
use crate::client::AgentClient;

pub(super) use flow::{Course, Flow, run};

/// What such a flow is, by its facts.
pub(super) trait SteppedFacts: FlowFacts {
    /// What is to be done.
    type Action: MoveAction + ActionStep;

    /// The agent's answer.
    type Status: DeserializeOwned;

    /// The agent's addresses, brought up or down.
    type Addresses: Serialize;

    /// The steps of a move that begins.
    fn steps(&self) -> MoveSteps<Self::Action>;

    /// Asks the agent for the service's addresses, or to give them up.
    fn addresses_request(&self, up: bool) -> Self::Addresses;

    /// Carries an action out that needs nothing but what is written down.
    async fn carry_out(context: &mut FlowContext<Self>, action: Self::Action) -> Result<()>
    where
        Self: Sized;
}

impl<F: SteppedFacts> FlowContext<F> {
    /// Posts to the agent, at a path of the migration.
    pub(super) async fn post(&self, what: &str, body: &impl Serialize) -> Result<()> {
        let path = self.path(what);
        self.client.post::<F::Status>(&path, body).await.map(drop)
    }

    /// Leads clients to the destination, and its addresses. That it begins is on disk first.
    pub(super) async fn switch(&mut self) -> Result<()> {
        let addresses = &mut self.common.addresses;
        addresses.taken = !addresses.is_empty();
        self.begin_switch()?;
        if self.common.addresses.taken {
            self.common.addresses.take().await?;
            let up = self.facts.addresses_request(true);
            self.post("/addresses", &up).await?;
        }
        self.switch_routes().await
    }

    /// Leads clients here, and the addresses.
    pub(super) async fn give_back(&self) {
        for problem in self.give_routes_back().await {
            self.warn(problem);
        }
        if self.common.addresses.taken {
            let down = self.facts.addresses_request(false);
            if let Err(error) = self.post("/addresses", &down).await {
                self.warn(format!("the destination may keep the addresses: {error}"));
            }
            self.common.addresses.give_back().await;
        }
    }
}

/// Finishes the migration in `dir`, whose command died. Returns whether the service lives at the destination.
pub(super) async fn finish<F: SteppedFacts>(dir: &Path, client: AgentClient) -> Result<bool> {
    let mut context = FlowContext::<F>::find(dir, client)?;
    let last = context.record()?;
    let mut steps = context.facts.steps().recovered(last);
    let is_left = steps.next_action().is_some();
    if is_left {
        tracing::warn!("finishing {}, left at {last:?}", context.common.id);
    }
    let mut problem = None;
    while let Some(action) = steps.next_action() {
        let done = F::carry_out(&mut context, action).await;
        if let Some(step) = action.step() {
            context.events.ended(step, &done);
        }
        match done {
            Ok(()) => steps.done(),
            Err(error) => {
                context.warn(error.to_string());
                if steps.failed() {
                    problem = Some(error);
                }
            }
        }
    }
    let moved = steps.end() == MoveEnd::Moved;
    if is_left {
        let (client, id) = (&context.client, &context.common.id);
        logs::at_end(client, id, context.dir(), (&context.events, moved)).await;
    }
    match (steps.end(), problem) {
        (MoveEnd::Stuck, Some(error)) => Err(error),
        _ => Ok(moved),
    }
}
