//! The steps of one migration at the source, in order.
//!
//! ```text
//! begin ──> rounds (mod rounds) ──> freeze, pages, images, restore (mod dump) ──> decide ──> finish
//!             └─ or start_forwarder, for a mode without rounds
//! ```

mod dump;
mod event_log;
mod rounds;

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pageferry::criu::header::Wire;
use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{Begin, Container, Receiver, Status};
use pageferry::migration::{
    Convergence, Costs, Mode, Source, SourceAction, SourceEvent, SourceState, predict_downtime,
};
use pageferry::units::PageSize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::args::Args;
use super::commands::{self, FORWARDER, Notes};
use super::context::{SourceContext, read_number};
use super::files::{Files, FilesReport};
use super::first_answer;
use super::flow_context::FlowFacts;
use super::frozen::frozen;
use super::hooks::Point;
use super::progress::Progress;
use super::report::{Report, ms, session};
use super::shared::WORTH_COMPARING_BYTES;
use crate::child::Program;
use crate::client::AgentClient;
use crate::end_signals::StopSignals;
use crate::events::Details;
use crate::programs::Programs;
use crate::rounds::{Size, Tree};

/// How long a program may take to listen.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Connections that are made before the freeze: for the images, the files, the restore and the commit.
const WARM_CONNECTIONS: usize = 3;

/// One migration under way.
pub(super) struct Flow<'a> {
    args: &'a Args,
    programs: Programs,
    client: AgentClient,
    context: SourceContext,
    page: PageSize,
    /// The layout that the source's CRIU speaks.
    wire: Wire,
    source: Source,
    mode: Mode,
    costs: Costs,
    /// What all memory would need on the wire.
    packed_bytes: u64,
    convergence: Convergence,
    report: Report,
    size: Size,
    /// What the destination is told of the container that the tree is.
    container: Option<Container>,
    files: Files,
    /// Sends the last difference of the files.
    sealing: JoinSet<Result<Files>>,
    /// The dump has stopped the tree for sure.
    dumped: Arc<Notify>,
    progress: Progress,
    started: Instant,
    frozen: Option<Instant>,
    /// What the forwarder writes whose sessions count at the moment.
    notes: Notes,
    /// Its sessions so far.
    sessions: usize,
    /// Programs that were started; the records know them too.
    running: Vec<Program>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        args: &'a Args,
        programs: Programs,
        client: AgentClient,
        context: SourceContext,
        (page, wire, costs, packed_bytes): (PageSize, Wire, Costs, u64),
        (report, size, container, files): (Report, Size, Option<Container>, Files),
        started: Instant,
    ) -> Flow<'a> {
        Flow {
            args,
            programs,
            client,
            mode: context.facts.mode,
            context,
            page,
            wire,
            source: Source::new(),
            costs,
            packed_bytes,
            convergence: Convergence::default(),
            report,
            size,
            container,
            files,
            sealing: JoinSet::new(),
            dumped: Arc::default(),
            progress: Progress::start(),
            started,
            frozen: None,
            notes: FORWARDER,
            sessions: 0,
            running: Vec::new(),
        }
    }

    /// Moves the tree, or leaves it where it is. Fails if neither can be done for sure.
    pub(super) async fn run(&mut self) -> Result<SourceState> {
        let deadline = self.started + self.args.timeout;
        let mut signals = StopSignals::new()?;
        let ready = tokio::select! {
            ready = timeout_at(deadline, self.prepare()) => ready.unwrap_or_else(|_| {
                let seconds = self.args.timeout.as_secs_f64();
                let text = format!("it was not ready within {seconds} s (--timeout)");
                Err(Error::new(Kind::Interrupted, text))
            }),
            error = signals.stopped() => Err(error),
        };
        let event = match ready {
            Ok(()) => SourceEvent::AgentReady,
            Err(error) => {
                self.give_up(&error);
                SourceEvent::Failed
            }
        };
        self.decide(event).await?;
        Ok(self.source.state())
    }

    /// Everything until the agent is ready.
    async fn prepare(&mut self) -> Result<()> {
        self.events().begin(Step::Begin);
        self.begin().await?;
        self.events().done(Step::Begin, Details::default());
        if !self.context.facts.files.is_empty() {
            self.progress.phase("files are sent");
            self.events().begin(Step::Files);
        }
        self.files.send_ahead(&self.client).await?;
        if !self.context.facts.files.is_empty() {
            self.events().done(Step::Files, Details::default());
        }
        if self.mode.has_rounds() {
            self.run_rounds().await?;
        } else if !self.mode.is_lazy() {
            self.start_forwarder(None).await?;
        }
        self.report.predicted_downtime_ms = Some(ms(self.predict()));
        let sends_shared =
            self.mode == Mode::Hybrid && self.size.eager_bytes() >= WORTH_COMPARING_BYTES;
        if self.mode == Mode::PreCopy || sends_shared {
            let pages = self.context.path("/pages");
            self.client.post::<Receiver>(&pages, &()).await?;
        }
        if self.mode.has_rounds() {
            // What was written during the rounds for memory.
            self.files.send(&self.client).await?;
        }
        let known = self.compared_hashes();
        self.send_outputs(false).await?;
        self.context
            .note("MEMORY_BYTES", self.report.memory_bytes.to_string());
        self.context
            .note("ROUNDS", self.report.rounds.len().to_string());
        self.context
            .note("PREDICTED_MS", format!("{:.0}", ms(self.predict())));
        self.context.run_hook(Point::PreFreeze).await?;
        self.client.warm(WARM_CONNECTIONS).await?;
        self.progress.phase("freezing");
        self.events().note(Step::Freeze, Details::default());
        let frozen = Instant::now();
        self.report.preparation_ms = ms(frozen - self.started);
        self.frozen = Some(frozen);
        self.source.handle(SourceEvent::Freezing);
        match (self.mode.is_lazy(), known) {
            (true, _) => self.dump_lazily(sends_shared).await?,
            (false, Some(known)) => self.dump_changes(known).await?,
            (false, None) => self.dump_whole().await?,
        }
        self.switch_routes().await
    }

    /// Leads clients to the destination, where the sockets of the restored tree take their connections from now on. It
    /// may still be given up: then clients are led back.
    async fn switch_routes(&mut self) -> Result<()> {
        if self.context.common.routes.is_empty() {
            return Ok(());
        }
        self.note_switch();
        self.events().begin(Step::Route);
        self.context.begin_switch()?;
        self.context.switch_routes().await?;
        self.phase("route");
        Ok(())
    }

    /// Notes that clients are being led elsewhere, from the first step on.
    fn note_switch(&mut self) {
        let now = ms(self.started.elapsed());
        self.report.switch_ms.get_or_insert(now);
    }

    async fn begin(&mut self) -> Result<()> {
        let tree = Tree::of(self.root())?;
        let begin = Begin {
            id: self.context.common.id.clone(),
            mode: self.mode,
            pids: tree
                .members()
                .iter()
                .map(|member| member.inner_pid)
                .collect(),
            memory_bytes: self.report.memory_bytes,
            tcp: self.args.tcp(),
            timeout_s: self.args.timeout.as_secs(),
            container: self.container.clone(),
            addresses: self.args.addresses_there(),
            files: self.files.descriptions(),
            keeps_files: false,
            outputs: self.context.facts.outputs.descriptions(),
        };
        self.client.post::<Status>("/v1/migrations", &begin).await?;
        Ok(())
    }

    /// Starts to send what has changed of the files, as soon as the dump has stopped the tree: it takes its time for the
    /// memory then.
    fn seal_files(&mut self) {
        if self.context.facts.files.is_empty() {
            return;
        }
        let (files, client, root) = (
            std::mem::take(&mut self.files),
            self.client.clone(),
            self.root(),
        );
        let dumped = Arc::clone(&self.dumped);
        self.sealing.spawn(async move {
            tokio::select! {
                () = frozen(root) => {}
                // A runtime may hold them in another way.
                () = dumped.notified() => {}
            }
            files.seal(client).await
        });
    }

    /// Waits until all files are at the destination.
    async fn files_sealed(&mut self) -> Result<()> {
        if !self.context.facts.files.is_empty() {
            self.events().begin(Step::Files);
        }
        let Some(sealed) = self.sealing.join_next().await else {
            return Ok(());
        };
        let ended =
            |error| Error::wrap(Kind::Io, "sending files was ended", io::Error::other(error));
        self.files = sealed.map_err(ended)??;
        self.report.files = self.files.report.clone();
        if !self.context.facts.files.is_empty() {
            self.phase("files");
        }
        Ok(())
    }

    fn root(&self) -> i32 {
        self.context.facts.root_pid()
    }

    fn predict(&self) -> Duration {
        let memory = self.report.memory_bytes;
        let changed = self
            .convergence
            .expected_bytes()
            .unwrap_or(self.packed_bytes);
        let eager = self.size.eager_bytes();
        predict_downtime(self.mode, &self.costs, memory, changed, eager)
    }

    /// Starts what sends rounds and whole dumps on. Without a receiver that is there, the final one's.
    async fn start_forwarder(&mut self, receiver: Option<Receiver>) -> Result<()> {
        let receiver = match receiver {
            Some(receiver) => receiver,
            None => self.client.post(&self.context.path("/pages"), &()).await?,
        };
        let far_end = match self.client.peer() {
            Peer::Tcp { host, .. } => Peer::Tcp {
                host: host.clone(),
                port: receiver.port,
            },
            Peer::Unix(_) => Peer::Tcp {
                host: Ipv4Addr::LOCALHOST.to_string(),
                port: receiver.port,
            },
        };
        let dir = self.context.dir().to_owned();
        let mut command =
            commands::forwarder(&self.programs, &self.args.target.tls, &dir, &far_end);
        let log = dir.join(FORWARDER.log);
        let mut program = Program::start_waiting("page-server --forward", &mut command, &log)?;
        self.context.facts.forwarder = Some(program.name());
        self.context.keep_facts()?;
        program.ready(READY_LIMIT).await?;
        self.running.push(program);
        Ok(())
    }

    /// Where rounds and whole dumps go.
    fn forwarder_address(&self) -> Result<SocketAddr> {
        let port = read_number(&self.context.dir().join(FORWARDER.port))?;
        Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    /// Waits until the destination has stored what was sent for `part`, and returns what the forwarder says
    /// of that session.
    async fn stored(&mut self, part: &str) -> Result<serde_json::Value> {
        let path = self.context.path(&format!("{part}/stored"));
        self.client.get::<Status>(&path).await?;
        let line = self.next_session().await?;
        self.report.add_session(&line);
        Ok(line)
    }

    /// From the last event before the grant to the end.
    async fn decide(&mut self, event: SourceEvent) -> Result<()> {
        let mut todo = VecDeque::from(self.source.handle(event));
        while let Some(action) = todo.pop_front() {
            let event = match action {
                SourceAction::EndProcesses => self.end_here().await?,
                action => self.context.carry_out(action).await?,
            };
            if action == SourceAction::SendCommit {
                self.note_downtime();
            }
            if let Some(event) = event {
                todo.extend(self.source.handle(event));
            }
            if action == SourceAction::EndProcesses && self.wait_for_memory().await? {
                todo.extend(self.source.handle(SourceEvent::MemoryComplete));
            }
        }
        Ok(())
    }

    /// Ends what is left here, while the service at the destination is asked for its first answer.
    async fn end_here(&mut self) -> Result<Option<SourceEvent>> {
        let Some(probe) = &self.args.probe else {
            return self.context.carry_out(SourceAction::EndProcesses).await;
        };
        let host = first_answer::host(self.args, self.client.peer());
        let answered = async {
            let answered = probe.wait(&host).await;
            (answered, Instant::now())
        };
        let (ended, (answered, at)) =
            tokio::join!(self.context.carry_out(SourceAction::EndProcesses), answered);
        match answered {
            Ok(()) => {
                self.report.answer_ms = Some(ms(at - self.started));
                self.report.resume_ms = self.frozen.map(|frozen| ms(at - frozen));
            }
            Err(error) => self.report.warnings.push(error.to_string()),
        }
        ended
    }

    /// What the forwarder says of the session that has ended.
    async fn next_session(&mut self) -> Result<serde_json::Value> {
        self.sessions += 1;
        session(&self.context.dir().join(self.notes.summary), self.sessions).await
    }

    fn note_downtime(&mut self) {
        if let Some(frozen) = self.frozen {
            self.phase("commit");
            let downtime = ms(frozen.elapsed());
            self.events()
                .note(Step::Resume, event_log::downtime(downtime));
            self.report.downtime_ms = Some(downtime);
            self.context.note("DOWNTIME_MS", format!("{downtime:.1}"));
        }
    }

    /// Waits until the destination has everything. False if it never will.
    async fn wait_for_memory(&mut self) -> Result<bool> {
        self.progress
            .phase("runs at the destination, memory follows");
        self.events().begin(Step::Memory);
        let status: Status = self.client.get(&self.context.path("/complete")).await?;
        // What the forwarder has to say comes later: with the end of the dump.
        let complete = ms(self.started.elapsed());
        if let Some(summary) = &status.lazy_summary {
            self.report.add_lazy_summary(summary);
        }
        if let Some(times) = &status.faults {
            self.report.add_fault_times(times);
        }
        if self.mode.is_lazy() {
            match self.next_session().await {
                Ok(line) => self.report.add_session(&line),
                // The processes have moved all the same.
                Err(error) => tracing::warn!("the report lacks what the last pages cost: {error}"),
            }
        }
        self.report.complete_ms = Some(complete);
        self.memory_ended(&status);
        if self.mode.is_lazy() {
            let resumed = self.report.preparation_ms + self.report.downtime_ms.unwrap_or_default();
            self.report
                .add_span("memory", "memory follows", resumed, complete);
        }
        Ok(self.report.failure.is_none())
    }

    /// Notes that a part of the downtime ends now.
    fn phase(&mut self, name: &str) {
        if let Some(frozen) = self.frozen {
            let before: f64 = self.report.phases_ms.values().sum();
            let took = ms(frozen.elapsed()) - before;
            let start = self.report.preparation_ms + before;
            self.report.add_span("freeze", name, start, start + took);
            self.progress
                .phase(format!("frozen: {name} took {took:.0} ms"));
            self.report.phases_ms.insert(name.to_owned(), took);
            if let Some(step) = event_log::step_of(name) {
                self.events().done(step, Details::default());
            }
        }
    }

    /// The report of a migration that has ended.
    pub(super) fn finish(mut self, ended: &Result<SourceState>) -> Report {
        self.progress.finish();
        self.report.total_ms = ms(self.started.elapsed());
        if self.report.files == FilesReport::default() {
            self.report.files = self.files.report.clone();
        }
        self.report.wire_bytes += self.report.files.bytes();
        self.report.warnings.extend(self.context.take_warnings());
        self.report.result = match ended {
            Ok(SourceState::Complete) => "moved".to_owned(),
            Ok(SourceState::Committed) => "moved, and memory was lost".to_owned(),
            Ok(_) => "rolled back".to_owned(),
            Err(error) => {
                self.report.problem.get_or_insert(error.to_string());
                "not known".to_owned()
            }
        };
        self.report
    }
}

/// Starts `work`, which blocks, on a thread of its own. `what` names it in an error.
fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> {
    let done = tokio::task::spawn_blocking(work);
    async move {
        done.await.map_err(|error| {
            let text = format!("{what} was ended");
            Error::wrap(Kind::Io, text, io::Error::other(error))
        })?
    }
}
