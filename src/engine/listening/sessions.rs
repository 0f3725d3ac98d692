//! Accepts connections and gives each session a thread of its own.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use ipnet::IpNet;
use nix::errno::Errno;
use socket2::{SockAddr, Socket};
use tracing::{error, info, warn};

use crate::engine::listening::stop::{Stop, Watched};
use crate::error::{Error, Kind, Result};
use crate::stream::Stream;

/// How long to wait until what a connection lacks to be accepted may be there again.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a server that lives for one client waits for it to come back, after it could not read what that needs.
const RETURN_TIMEOUT: Duration = Duration::from_secs(60);

/// When a server ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndPolicy {
    /// Until its listener is shut down, which a session does, and all sessions are over. So a session decides
    /// when nobody else may come.
    UntilShutDown,
    /// Until the last of the sessions that run at once with the first is over.
    Together,
    /// Until it is stopped.
    Keep,
}

/// Whom a server lets in, and for how long.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How long it stays.
    pub ends: EndPolicy,
    /// Most sessions at once.
    pub most: usize,
    /// Networks whose peers may connect; none means all. Peers without an address are on this host
    /// and may always.
    pub allowed: Vec<IpNet>,
}

impl Rules {
    fn allow(&self, address: &SockAddr) -> bool {
        let Some(address) = address.as_socket() else {
            return true;
        };
        // A socket that listens for both shows IPv4 peers as mapped ones.
        let address = address.ip().to_canonical();
        self.allowed.is_empty() || self.allowed.iter().any(|net| net.contains(&address))
    }
}

/// What happens while sessions run.
enum Event {
    Accepted(Socket),
    /// No more connections come.
    AcceptEnded(Result<()>),
    SessionEnded(Result<()>),
}

/// Runs `session` for each connection to `listener` that `rules` let in. The connection is shut down when `stop` is
/// requested, unless the session drops the guard that it gets: to say why it ends.
///
/// # Errors
///
/// A session failed (the first error that is; the others, and all with [`EndPolicy::Keep`], are only told
/// in the log), connections cannot be accepted, or `stop` was requested before all was done.
pub fn run_sessions(
    listener: &Socket,
    rules: &Rules,
    stop: &Stop,
    session: impl Fn(Stream, Watched) -> Result<()> + Sync,
) -> Result<()> {
    let (events, inbox) = channel();
    let _listening = stop.watch(&listener.into())?;
    thread::scope(|scope| {
        let accepted = events.clone();
        scope.spawn(move || accept_all(listener, rules, &accepted));
        let mut state = ServerState::begin(rules);
        while !state.is_over() {
            let event = match state.waits_for_return() {
                true => inbox.recv_timeout(RETURN_TIMEOUT).ok(),
                false => inbox.recv().ok(),
            };
            let Some(event) = event else {
                break;
            };
            match event {
                Event::Accepted(socket) if state.running < rules.most => {
                    state.running += 1;
                    let stream = Stream::plain(socket);
                    info!("{} connected", stream.peer());
                    let (events, session) = (events.clone(), &session);
                    scope.spawn(move || {
                        let mut end = SessionEnd::of_panic(events);
                        let watched = stop.watch(&stream.socket());
                        end.result = watched.and_then(|watched| session(stream, watched));
                    });
                }
                Event::Accepted(socket) => {
                    let stream = Stream::plain(socket);
                    warn!(
                        "refused {}: {} sessions run already",
                        stream.peer(),
                        rules.most
                    );
                    stream.reset();
                }
                Event::SessionEnded(result) => state.session_ended(result),
                Event::AcceptEnded(result) => state.accept_ended(result, stop),
            }
        }
        // Wakes the accepting thread; it may have ended before.
        let _ = listener.shutdown(Shutdown::Both);
        state.conclude()
    })
}

/// How far a server has come: what runs, and what it will end with.
struct ServerState<'a> {
    rules: &'a Rules,
    /// Sessions that run.
    running: usize,
    accepting: bool,
    /// A session has ended.
    served: bool,
    outcome: Result<()>,
    /// A failure of this host, after which the client may come back.
    own_failure: Option<Error>,
}

impl ServerState<'_> {
    fn begin(rules: &Rules) -> ServerState<'_> {
        ServerState {
            rules,
            running: 0,
            accepting: true,
            served: false,
            outcome: Ok(()),
            own_failure: None,
        }
    }

    /// Whether a client of whom nothing runs may come back.
    fn waits_for_return(&self) -> bool {
        self.own_failure.is_some() && self.running == 0
    }

    fn session_ended(&mut self, result: Result<()>) {
        self.running -= 1;
        if let Err(error) = &result
            && error.kind() == Kind::NothingCame
        {
            info!("{error}");
            return;
        }
        self.served = true;
        let ends = self.rules.ends;
        match result {
            Ok(()) => self.own_failure = None,
            Err(failure) if ends == EndPolicy::Keep || self.outcome.is_err() => error!("{failure}"),
            // A session that this host failed, and those that its client gives up with it.
            Err(failure)
                if ends == EndPolicy::Together
                    && (failure.kind() == Kind::Io || self.own_failure.is_some()) =>
            {
                error!("{failure}; its client may reconnect");
                self.own_failure.get_or_insert(failure);
            }
            Err(failure) => self.outcome = Err(failure),
        }
    }

    fn accept_ended(&mut self, result: Result<()>, stop: &Stop) {
        self.accepting = false;
        let interrupted =
            stop.is_requested() && (self.running > 0 || self.rules.ends != EndPolicy::Keep);
        let before = std::mem::replace(&mut self.outcome, Ok(()));
        self.outcome = before.and(result).and_then(|()| match interrupted {
            true => Err(Error::new(Kind::Interrupted, "stopped by a signal")),
            false => Ok(()),
        });
    }

    /// Whether nothing runs, and nobody is waited for.
    fn is_over(&self) -> bool {
        let waits = match self.rules.ends {
            EndPolicy::Keep | EndPolicy::UntilShutDown => self.accepting,
            EndPolicy::Together => self.accepting && (!self.served || self.own_failure.is_some()),
        };
        self.running == 0 && !waits
    }

    fn conclude(self) -> Result<()> {
        self.outcome.and(self.own_failure.map_or(Ok(()), Err))
    }
}

/// Tells how a session has ended, also when it panics.
struct SessionEnd {
    events: Sender<Event>,
    result: Result<()>,
}

impl SessionEnd {
    fn of_panic(events: Sender<Event>) -> SessionEnd {
        let text = "a session has ended by a mistake of this program: its message stands before";
        SessionEnd {
            events,
            result: Err(Error::new(Kind::Interrupted, text)),
        }
    }
}

impl Drop for SessionEnd {
    fn drop(&mut self) {
        let result = std::mem::replace(&mut self.result, Ok(()));
        // The inbox outlives every session.
        let _ = self.events.send(Event::SessionEnded(result));
    }
}

/// Accepts until the listener is shut down.
fn accept_all(listener: &Socket, rules: &Rules, events: &Sender<Event>) {
    loop {
        let event = match listener.accept() {
            Ok((socket, address)) if rules.allow(&address) => Event::Accepted(socket),
            Ok((socket, _)) => {
                let stream = Stream::plain(socket);
                warn!("refused {}: --allow does not name it", stream.peer());
                stream.reset();
                continue;
            }
            // The peer was gone before we came to it.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // Shut down.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Event::AcceptEnded(Ok(())),
            Err(error) if is_passing(&error) => {
                let text = "a connection cannot be accepted now";
                warn!("{}", Error::wrap(Kind::Io, text, error));
                thread::sleep(PAUSE);
                continue;
            }
            Err(error) => Event::AcceptEnded(Err(Error::wrap(
                Kind::Io,
                "cannot accept connections",
                error,
            ))),
        };
        let last = matches!(event, Event::AcceptEnded(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// Whether the next attempt to accept may succeed: descriptors or memory are short.
fn is_passing(error: &std::io::Error) -> bool {
    let short = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.is_some_and(|errno| short.contains(&errno))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_session_that_panics_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let rules = Rules {
            ends: EndPolicy::Together,
            most: 1,
            allowed: Vec::new(),
        };
        let session = |_, _| panic!("a mistake");
        let _ = run_sessions(&listener.into(), &rules, &Stop::default(), session);
    }
}
