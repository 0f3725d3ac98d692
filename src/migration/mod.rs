//! What the two sides of a live migration decide, and when. Pure: no descriptor, clock or system call.
//!
//! ```text
//! source   Preparing ──> Frozen ──> Granted ──> Committed ──> Complete
//!              │            │          │
//!              └────────────┴──────────┴──> RolledBack        from Granted only if the agent has aborted
//!
//! agent    Receiving ──> Restoring ──> Ready ──> Committed ──> Complete
//!              │             │           │
//!              └─────────────┴───────────┴──> Aborted
//! ```
//!
//! The source grants, the agent decides. A grant is the source's promise not to let its processes run again
//! before it knows what the agent decided; it is on disk before the agent is told. The decision is
//! one record on the agent's disk: `Committed`, or `Aborted`. Whichever of the two is written first is
//! final, and is the answer to every later question.
//!
//! | what happens | before the grant | between grant and decision | after the decision |
//! |---|---|---|---|
//! | the source's process dies | its guard rolls back; the agent aborts | the agent decides; the source asks it | the source reads its record, or asks |
//! | the agent dies | the source rolls back | the agent, started again, has no `Committed` record: it aborts and says so | the agent finds its record: the copy there is the living one |
//! | the link breaks | the source rolls back | the source stays frozen and asks until it is answered | as decided |
//!
//! Invariants, which `tests/sim_migration.rs` checks with crashes at every step: the processes never run on
//! both sides; when both sides have recovered and reach each other, the processes run on exactly one side.

mod agent;
mod catch_up;
mod convergence;
mod event_steps;
pub mod events;
mod log_replay;
pub mod messages;
mod plan;
mod source;
mod stateless;
mod steps;

pub use agent::{Agent, AgentAction, AgentEvent, AgentRecord, AgentState};
pub use catch_up::{CatchUp, Progress};
pub use convergence::{
    Convergence, Costs, Decision, Limits, Mode, OnMissed, RoundResult, predict_downtime,
};
pub use event_steps::ActionStep;
pub use log_replay::{LogReplay, LogReplayAction, ReplayEvent, ReplayState};
pub use plan::{Forecast, LogFacts, ReplayCosts, forecast_replay, recommend};
pub use source::{Source, SourceAction, SourceEvent, SourceRecord, SourceState};
pub use stateless::{Stateless, StatelessAction, StatelessEvent, StatelessMode, StatelessState};
pub use steps::{MoveAction, MoveEnd, MoveRecord, MoveSteps};
