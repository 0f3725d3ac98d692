//! Pages on their way to the agent: a page-server for each round, and for the last dump.

use std::fs;
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_ROUNDS_MAX;
use pageferry::migration::AgentState;
use pageferry::migration::events::Step;
use pageferry::migration::messages::{Receiver, Status};

use super::commands::{self, READY_LIMIT, RECEIVER_PORT};
use super::session::{Session, make_dir, round_name};
use super::session_table::AgentSession;
use crate::child::Program;
use crate::events::Details;

impl Session {
    /// Receives round `number` (1, 2, 3...), or the final pages if that is `None`.
    pub(super) async fn receive(&self, number: Option<u32>) -> Result<Receiver> {
        let (last, port) = {
            let inner = self.lock();
            if inner.agent.state() != AgentState::Receiving || inner.receiver.is_some() {
                let text =
                    "pages cannot be received now: the restore has begun, or a round is under way";
                return Err(Error::new(Kind::Usage, text));
            }
            (inner.rounds, inner.port)
        };
        let dir = match number {
            Some(number) if number != last + 1 || number > MIGRATION_ROUNDS_MAX => {
                let text = format!("round {number} does not follow round {last}");
                return Err(Error::new(Kind::Usage, text));
            }
            Some(number) => self.dir.join(round_name(number)),
            None => self.images(),
        };
        make_dir(&dir)?;
        let parent = (last > 0).then(|| format!("../{}", round_name(last)));
        let mut command = commands::receiver(
            &self.context.programs,
            &self.context.tls,
            &dir,
            parent.as_deref(),
            (&self.context.host, port),
            self.from,
        );
        let step = step_of(number);
        self.events.begin(step);
        let log = dir.join("receive.log");
        let mut receiver =
            Program::start_ready("page-server", &mut command, &log, READY_LIMIT).await?;
        let port = port_in(&dir.join(RECEIVER_PORT));
        {
            let mut inner = self.lock();
            if let Ok(port) = port
                && inner.agent.state() == AgentState::Receiving
            {
                inner.port = port;
                inner.receiver = Some(receiver);
                return Ok(Receiver { port });
            }
        }
        // Whoever discards has looked for a receiver, and there was none yet.
        self.end_receiver(&mut receiver).await;
        port.and(Err(given_up()))
    }

    async fn end_receiver(&self, receiver: &mut Program) {
        receiver.terminate();
        receiver.end().await;
        if self.is_decided() {
            self.remove_memory();
        }
    }

    /// Waits until what [`Session::receive`] began is stored.
    pub(super) async fn received(&self, number: Option<u32>) -> Result<Status> {
        let receiver = {
            let mut inner = self.lock();
            let next = inner.rounds + 1;
            if number.is_some_and(|number| number != next) {
                let text = format!("round {next} is the next that can be stored");
                return Err(Error::new(Kind::Usage, text));
            }
            inner.receiver.take()
        };
        let Some(mut receiver) = receiver else {
            return Err(Error::new(Kind::Usage, "nothing is being received"));
        };
        tokio::select! {
            ended = receiver.succeed() => {
                if let Err(error) = ended {
                    let details = Details::error(&error.to_string());
                    self.events.failed(step_of(number), details);
                    return Err(error);
                }
            }
            // Whoever discards has not found it either.
            _ = self.wait_for(|status| status.state.is_decided()) => {
                self.end_receiver(&mut receiver).await;
                return Err(given_up());
            }
        }
        let count = match number {
            Some(number) => {
                self.lock().rounds = number;
                Details::counts(&[("round", u64::from(number))])
            }
            None => Details::default(),
        };
        self.events.done(step_of(number), count);
        self.changed.send_modify(|count| *count += 1);
        Ok(self.status())
    }
}

fn given_up() -> Error {
    Error::new(Kind::Usage, "the migration was aborted meanwhile")
}

fn port_in(path: &Path) -> Result<u16> {
    let port = fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
    port.trim()
        .parse()
        .map_err(|error| Error::wrap(Kind::Io, format!("{} holds no port", path.display()), error))
}

/// What is received: a round, or the last pages.
fn step_of(number: Option<u32>) -> Step {
    match number {
        Some(_) => Step::Round,
        None => Step::Pages,
    }
}
