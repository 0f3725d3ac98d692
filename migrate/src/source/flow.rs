//! The steps of one migration at the source, in order.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::body::Body;
use pageferry::criu::header::Wire;
use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Begin, Receiver, RestoreRequest, Status};
use pageferry::migration::{
    AgentState, Convergence, Costs, Decision, Mode, OnMissed, RoundResult, Source, SourceAction,
    SourceEvent, SourceState, predict_downtime,
};
use pageferry::units::PageSize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, timeout_at};
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::args::Args;
use super::commands::{self, PORT_FILE, Pages, SUMMARY, free_port};
use super::images::pack;
use super::place::{Place, read_number};
use super::report::{Report, session};
use super::shared;
use crate::child::Program;
use crate::client::AgentClient;
use crate::programs::Programs;
use crate::rounds::{self, Size, Tree};

/// How long a program may take to listen.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Connections that are made before the freeze: for the images, the restore and the commit.
const WARM_CONNECTIONS: usize = 2;

/// Buffered between the reading of image files and the connection, bytes.
const IMAGES_BUFFER_BYTES: usize = 256 << 10;

/// One migration under way.
pub(super) struct Flow<'a> {
    args: &'a Args,
    programs: Programs,
    client: AgentClient,
    place: Place,
    page: PageSize,
    /// The layout that the source's CRIU speaks.
    wire: Wire,
    source: Source,
    mode: Mode,
    costs: Costs,
    convergence: Convergence,
    report: Report,
    size: Size,
    started: Instant,
    frozen: Option<Instant>,
    /// Sessions of the forwarder that runs, so far.
    sessions: usize,
    /// Programs that were started; the records know them too.
    running: Vec<Program>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        args: &'a Args,
        programs: Programs,
        client: AgentClient,
        place: Place,
        (page, wire): (PageSize, Wire),
        (report, size): (Report, Size),
        started: Instant,
    ) -> Flow<'a> {
        Flow {
            args,
            programs,
            client,
            mode: place.facts.mode,
            place,
            page,
            wire,
            source: Source::new(),
            costs: Costs::default(),
            convergence: Convergence::default(),
            report,
            size,
            started,
            frozen: None,
            sessions: 0,
            running: Vec::new(),
        }
    }

    /// Moves the tree, or leaves it where it is. Fails if neither can be done for sure.
    pub(super) async fn run(&mut self) -> Result<SourceState> {
        let deadline = self.started + self.args.timeout;
        let failed = |error| Error::wrap(Kind::Io, "signals cannot be heard", error);
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hang_up = signal(SignalKind::hangup()).map_err(failed)?;
        let ready = tokio::select! {
            ready = timeout_at(deadline, self.prepare()) => ready.unwrap_or_else(|_| {
                let text = format!("the time is over (--timeout {:?})", self.args.timeout);
                Err(Error::new(Kind::Interrupted, text))
            }),
            _ = interrupt.recv() => Err(stopped("Ctrl-C")),
            _ = terminate.recv() => Err(stopped("SIGTERM")),
            _ = hang_up.recv() => Err(stopped("SIGHUP")),
        };
        let event = match ready {
            Ok(()) => SourceEvent::AgentReady,
            Err(error) => {
                tracing::error!("{error}: the processes go on here");
                self.report.problem = Some(error.to_string());
                SourceEvent::Failed
            }
        };
        self.decide(event).await?;
        Ok(self.source.state())
    }

    /// Everything until the agent is ready.
    async fn prepare(&mut self) -> Result<()> {
        self.begin().await?;
        if self.mode.has_rounds() {
            self.run_rounds().await?;
        } else if !self.mode.is_lazy() {
            self.start_forwarder(None).await?;
        }
        self.report.predicted_downtime_ms = Some(ms(self.predict()));
        let sends_shared = self.mode == Mode::Hybrid && self.size.shared_bytes > 0;
        if self.mode == Mode::PreCopy || sends_shared {
            let pages = self.place.path("/pages");
            self.client.post::<Receiver>(&pages, &()).await?;
        }
        self.client.warm(WARM_CONNECTIONS).await?;
        let frozen = Instant::now();
        self.report.preparation_ms = ms(frozen - self.started);
        self.frozen = Some(frozen);
        self.source.handle(SourceEvent::Freezing);
        match self.mode.is_lazy() {
            true => self.dump_lazily(sends_shared).await,
            false => self.dump_whole().await,
        }
    }

    async fn begin(&mut self) -> Result<()> {
        let tree = Tree::of(self.root())?;
        let begin = Begin {
            id: self.place.facts.id.clone(),
            mode: self.mode,
            pids: tree
                .members()
                .iter()
                .map(|member| member.inner_pid)
                .collect(),
            memory_bytes: self.report.memory_bytes,
            tcp: self.args.tcp(),
            timeout_s: self.args.timeout.as_secs(),
        };
        self.client.post::<Status>("/v1/migrations", &begin).await?;
        Ok(())
    }

    fn root(&self) -> i32 {
        self.place.facts.tree.first().map_or(0, |root| root.pid)
    }

    fn predict(&self) -> Duration {
        let memory = self.report.memory_bytes;
        let changed = self.convergence.expected_bytes().unwrap_or(memory);
        // What is shared is written by the dump, and travels before a lazy restore can begin.
        let eager = self.size.shared_bytes;
        predict_downtime(self.mode, &self.costs, memory, changed, eager)
    }

    async fn run_rounds(&mut self) -> Result<()> {
        let limits = self.args.limits(self.mode);
        for number in 1.. {
            let started = Instant::now();
            let receiver: Receiver = self
                .client
                .post(&self.place.path(&format!("/rounds/{number}")), &())
                .await?;
            if number == 1 {
                self.start_forwarder(Some(receiver)).await?;
            }
            let port = read_number(&self.place.dir().join(PORT_FILE))?;
            let forwarder = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let tree = Tree::of(self.root())?;
            let (page, wire, rate) = (self.page, self.wire, self.args.round_rate);
            let read = tokio::task::spawn_blocking(move || {
                rounds::run(&tree, forwarder, page, wire, Some(rate.max(1)))
            });
            let read = read.await.map_err(|error| {
                Error::wrap(Kind::Io, "a round was ended", io::Error::other(error))
            })??;
            let stored = self.place.path(&format!("/rounds/{number}/stored"));
            self.client.get::<Status>(&stored).await?;
            let line = self.next_session().await?;
            self.report.add_session(&line);
            let round = result_of_round(&line, started.elapsed());
            self.report.memory_bytes = read.pages << self.page.shift();
            self.learn(round);
            let decision = self.convergence.add(round, self.predict(), &limits);
            self.report.rounds.push(round);
            tracing::info!(
                "round {number}: {} of {} pages had changed, {} ms; a freeze now would take about {:.0} ms",
                round.pages,
                read.pages,
                read.took.as_millis(),
                ms(self.predict())
            );
            match decision {
                Decision::Again => {}
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
        self.place.facts.mode = mode;
        self.report.mode = mode.name().to_owned();
        self.place.keep_facts()
    }

    /// Starts what sends rounds and whole dumps on. Without a receiver that is there, the final one's.
    async fn start_forwarder(&mut self, receiver: Option<Receiver>) -> Result<()> {
        let receiver = match receiver {
            Some(receiver) => receiver,
            None => self.client.post(&self.place.path("/pages"), &()).await?,
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
        let dir = self.place.dir().to_owned();
        let mut command =
            commands::forwarder(&self.programs, &self.args.target.tls, &dir, &far_end);
        let log = dir.join("forwarder.log");
        let mut program = Program::start_waiting("page-server --forward", &mut command, &log)?;
        self.place.facts.forwarder = Some(program.name());
        self.place.keep_facts()?;
        program.ready(READY_LIMIT).await?;
        self.running.push(program);
        Ok(())
    }

    /// Freezes for good: all pages go to the destination before the restore.
    async fn dump_whole(&mut self) -> Result<()> {
        let port = read_number(&self.place.dir().join(PORT_FILE))?;
        let images = self.place.images();
        let mut command = commands::dump(
            &self.programs,
            self.root(),
            &images,
            Pages::SentTo(port),
            self.args.tcp(),
        );
        let mut dump = Program::start("criu dump", &mut command, &images.join("dump.log"))?;
        self.place.facts.dump = Some(dump.name());
        self.place.keep_facts()?;
        dump.succeed().await?;
        self.phase("dump");
        let stored = self.place.path("/pages/stored");
        self.client.get::<Status>(&stored).await?;
        let line = self.next_session().await?;
        self.report.add_session(&line);
        self.send_images(BTreeSet::new()).await?;
        self.restore(None).await
    }

    /// Freezes until the destination can go on without what is still here.
    async fn dump_lazily(&mut self, sends_shared: bool) -> Result<()> {
        let images = self.place.images();
        let port = free_port()?;
        let mut command = commands::dump(
            &self.programs,
            self.root(),
            &images,
            Pages::ServedAt(port),
            self.args.tcp(),
        );
        let log = images.join("dump.log");
        self.place.facts.dump_port = Some(port);
        let mut dump = Program::start_waiting("criu dump", &mut command, &log)?;
        self.place.facts.dump = Some(dump.name());
        self.place.keep_facts()?;
        dump.ready(self.args.timeout).await?;
        self.place.facts.round_forwarder = self.place.facts.forwarder.take();
        self.place.keep_facts()?;
        self.running.push(dump);
        self.phase("dump");
        let dir = self.place.dir().to_owned();
        let sent = match sends_shared {
            true => self.send_shared().await?,
            false => BTreeSet::new(),
        };
        if let Some(rounds) = &self.place.facts.round_forwarder {
            let _ = rounds.signal(libc::SIGTERM);
        }
        let address = self.serving_address();
        let mut command = commands::lazy_forwarder(
            &self.programs,
            &self.args.target.tls,
            (&dir, &images),
            port,
            &address,
        );
        let log = dir.join("forwarder.log");
        let title = "page-server --forward-lazy";
        let mut forwarder = Program::start_waiting(title, &mut command, &log)?;
        self.place.facts.forwarder = Some(forwarder.name());
        self.sessions = 0;
        self.place.keep_facts()?;
        forwarder.ready(READY_LIMIT).await?;
        self.running.push(forwarder);
        self.phase("forwarder");
        self.send_images(sent).await?;
        let port = read_number(&dir.join(PORT_FILE))?;
        self.restore(Some(port)).await
    }

    fn serving_address(&self) -> String {
        match (&self.args.serve_on, self.args.target.tls.tls) {
            (Some(address), _) => address.clone(),
            (None, true) => Ipv4Addr::UNSPECIFIED.to_string(),
            (None, false) => Ipv4Addr::LOCALHOST.to_string(),
        }
    }

    /// Sends what has changed in shared memory since the last round, and tells the files that hold it.
    async fn send_shared(&mut self) -> Result<BTreeSet<OsString>> {
        let images = self.place.images();
        let port = read_number(&self.place.dir().join(PORT_FILE))?;
        let forwarder = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (page, wire) = (self.page, self.wire);
        let sent =
            tokio::task::spawn_blocking(move || shared::send(&images, forwarder, page, wire));
        let sent = sent.await.map_err(|error| {
            Error::wrap(
                Kind::Io,
                "sending shared memory was ended",
                io::Error::other(error),
            )
        })??;
        let stored = self.place.path("/pages/stored");
        self.client.get::<Status>(&stored).await?;
        let line = self.next_session().await?;
        self.report.add_session(&line);
        self.phase("shared");
        Ok(sent)
    }

    /// Sends the image files that the dump wrote, but for those that are there.
    async fn send_images(&mut self, sent: BTreeSet<OsString>) -> Result<()> {
        let images = self.place.images();
        let (near, far) = tokio::io::duplex(IMAGES_BUFFER_BYTES);
        let packed =
            tokio::task::spawn_blocking(move || pack(&images, &sent, SyncIoBridge::new(near)));
        let body = Body::from_stream(ReaderStream::new(far));
        let path = self.place.path("/images");
        let sent = self.client.put::<Status>(&path, body).await;
        let packed = packed.await;
        // An agent that refuses them says why; here only the connection is seen to end.
        sent?;
        self.report.wire_bytes += packed.map_err(|error| {
            let error = io::Error::other(error);
            Error::wrap(Kind::Io, "sending the images was ended", error)
        })??;
        self.phase("images");
        Ok(())
    }

    async fn restore(&mut self, memory_port: Option<u16>) -> Result<()> {
        let request = RestoreRequest { memory_port };
        let path = self.place.path("/restore");
        let status: Status = self.client.post(&path, &request).await?;
        self.phase("restore");
        match status.state {
            AgentState::Ready => Ok(()),
            _ => {
                let why = status
                    .problem
                    .unwrap_or_else(|| format!("it is {:?}", status.state));
                let text = format!("the destination could not restore: {why}");
                Err(Error::new(Kind::PeerLost, text))
            }
        }
    }

    /// From the last event before the grant to the end.
    async fn decide(&mut self, event: SourceEvent) -> Result<()> {
        let mut todo = VecDeque::from(self.source.handle(event));
        while let Some(action) = todo.pop_front() {
            let event = self.place.carry_out(action).await?;
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

    /// What the forwarder says of the session that has ended.
    async fn next_session(&mut self) -> Result<serde_json::Value> {
        self.sessions += 1;
        session(&self.place.dir().join(SUMMARY), self.sessions).await
    }

    fn note_downtime(&mut self) {
        if let Some(frozen) = self.frozen {
            self.phase("commit");
            self.report.downtime_ms = Some(ms(frozen.elapsed()));
        }
    }

    /// Waits until the destination has everything. False if it never will.
    async fn wait_for_memory(&mut self) -> Result<bool> {
        let status: Status = self.client.get(&self.place.path("/complete")).await?;
        if let Some(summary) = &status.lazy_summary {
            self.report.add_lazy_summary(summary);
        }
        if self.mode.is_lazy() {
            let line = self.next_session().await?;
            self.report.add_session(&line);
        }
        self.report.complete_ms = Some(ms(self.started.elapsed()));
        match status.problem {
            Some(problem) if status.state != AgentState::Complete => {
                self.report.problem = Some(problem);
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Notes that a part of the downtime ends now.
    fn phase(&mut self, name: &str) {
        if let Some(frozen) = self.frozen {
            let before: f64 = self.report.phases_ms.values().sum();
            let took = ms(frozen.elapsed()) - before;
            self.report.phases_ms.insert(name.to_owned(), took);
        }
    }

    /// The report of a migration that has ended.
    pub(super) fn finish(mut self, ended: &Result<SourceState>) -> Report {
        self.report.total_ms = ms(self.started.elapsed());
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

fn stopped(by: &str) -> Error {
    Error::new(Kind::Interrupted, format!("stopped by {by}"))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn result_of_round(line: &serde_json::Value, took: Duration) -> RoundResult {
    let pages = |kind: &str| line["sent"][kind]["pages"].as_u64().unwrap_or_default();
    RoundResult {
        pages: pages("delta") + pages("zstd") + pages("raw"),
        bytes: line["frame_bytes"].as_u64().unwrap_or_default(),
        ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    }
}
