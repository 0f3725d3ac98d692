//! Accepts connections and gives each session a thread of its own.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use socket2::Socket;
use tracing::{error, info};

use crate::error::{Error, Kind, Result};
use crate::limits::CLIENTS_MAX;
use crate::stream::Stream;

/// What happens while sessions run.
enum Event {
    Accepted(Stream),
    AcceptFailed(std::io::Error),
    Ended(Result<()>),
}

/// Runs `session` for each connection to `listener`, at most [`CLIENTS_MAX`] at once. Failed
/// sessions are told in the log. With `keep` it goes on until `listener` is shut down; otherwise it
/// ends with the last of the sessions that run at once with the first, and fails if one of them
/// did.
pub fn run_sessions(
    listener: &Socket,
    keep: bool,
    session: impl Fn(Stream) -> Result<()> + Sync,
) -> Result<()> {
    let (events, inbox) = channel();
    thread::scope(|scope| {
        let accepted = events.clone();
        scope.spawn(move || accept_all(listener, &accepted));
        let mut running = 0;
        let mut outcome = Ok(());
        for event in &inbox {
            match event {
                Event::Accepted(stream) if running < CLIENTS_MAX => {
                    running += 1;
                    info!("{} connected", stream.peer());
                    let (events, session) = (events.clone(), &session);
                    scope.spawn(move || {
                        // The inbox outlives every session.
                        let _ = events.send(Event::Ended(session(stream)));
                    });
                }
                Event::Accepted(stream) => {
                    error!(
                        "refused {}: {CLIENTS_MAX} clients are served already",
                        stream.peer()
                    );
                    stream.reset();
                }
                Event::Ended(result) => {
                    running -= 1;
                    if let Err(failure) = &result {
                        error!("{failure}");
                    }
                    if !keep {
                        outcome = outcome.and(result);
                    }
                }
                Event::AcceptFailed(failure) => {
                    if keep && failure.kind() == ErrorKind::InvalidInput {
                        break;
                    }
                    outcome = Err(Error::wrap(Kind::Io, "cannot accept connections", failure));
                    break;
                }
            }
            if running == 0 && !keep {
                break;
            }
        }
        // Wakes the accepting thread; it may have ended before.
        let _ = listener.shutdown(Shutdown::Both);
        outcome
    })
}

/// Accepts until the listener is shut down.
fn accept_all(listener: &Socket, events: &Sender<Event>) {
    loop {
        let event = match listener.accept() {
            Ok((socket, _)) => Event::Accepted(Stream::plain(socket)),
            // The peer was gone before we came to it.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Event::AcceptFailed(error),
        };
        let last = matches!(event, Event::AcceptFailed(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}
