//! The sessions of one listener, shared by the threads of all its connections.
//!
//! ```text
//! connection ── greeting ──> admit ──> Opened:  this thread owns the session: `follow`, then `end`
//!                              │
//!                              ├─────> Joined:  one more connection of an open session, or of one that has
//!                              │                ended well and still says so to whoever asks
//!                              └─────> Refused, Failed
//! ```
//!
//! Invariant: the table of the protocol and the two maps change under one lock. So a session that the table knows is
//! in a map as long as connections may join it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::engine::ferry::change_notifier::ChangeNotifier;
use crate::engine::ferry::lock;
use crate::error::Error;
use crate::ferry::hello::{Fail, FailCode, Greeting, Hello, Role, SessionId};
use crate::ferry::link::{Admission, ConnectionId, SessionTable};
use crate::sync::{AtomicBool, Mutex};

/// How often the owner of a session looks for what nobody is notified of.
pub(in crate::engine) const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// See the module's text. `S` is what the connections of a session share.
pub(in crate::engine) struct ListenerSessions<S> {
    /// Tells a peer that the session has failed at this end.
    failed: FailCode,
    state: Mutex<State<S>>,
    /// Notifies owners when a connection or a thread of a session has ended.
    notifier: ChangeNotifier,
    start: Instant,
}

struct State<S> {
    table: SessionTable,
    /// So many sessions have been opened.
    opened: u64,
    open: BTreeMap<SessionId, Arc<S>>,
    /// Sessions that went well, as long as the table remembers them.
    finished: BTreeMap<SessionId, Arc<S>>,
}

/// What both ends of a connection have said of themselves.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Greetings {
    pub(in crate::engine) peer: Hello,
    pub(in crate::engine) welcome: Hello,
}

/// What becomes of a connection.
pub(in crate::engine) enum Admitted<S, O> {
    /// It has opened a session, which its thread owns; `O` is what only the owner needs.
    Opened(Arc<S>, O, Greetings),
    /// It is one more connection of a session. Without one there is nothing left to say.
    Joined(Option<Arc<S>>, Greetings),
    /// It is to be told why it cannot be let in.
    Refused(Refused),
    /// It would have opened a session, but that could not be made here.
    Failed(Fail, Error),
}

/// A connection that is not let in.
pub(in crate::engine) struct Refused {
    pub(in crate::engine) fail: Fail,
    /// Other sessions are open.
    pub(in crate::engine) others_open: bool,
}

/// A thread that does what a session is there for.
pub(in crate::engine) struct SessionThread<'scope, T> {
    handle: ScopedJoinHandle<'scope, T>,
    /// Its work is done.
    is_over: Arc<AtomicBool>,
}

impl<T> SessionThread<'_, T> {
    /// Whether its work is done, or has panicked.
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) || self.handle.is_finished()
    }
}

impl<S> ListenerSessions<S> {
    /// No session yet. A listener that says `own` of itself lets peers in for `roles`; `failed` is what it
    /// tells them when it fails. A session without a connection for `reconnect_timeout` is given up.
    pub(in crate::engine) fn new(
        own: Hello,
        roles: &[Role],
        failed: FailCode,
        reconnect_timeout: Duration,
    ) -> ListenerSessions<S> {
        ListenerSessions {
            failed,
            state: Mutex::new(State {
                table: SessionTable::new(own, roles, reconnect_timeout),
                opened: 0,
                open: BTreeMap::new(),
                finished: BTreeMap::new(),
            }),
            notifier: ChangeNotifier::default(),
            start: Instant::now(),
        }
    }

    /// Whether a session has been opened.
    pub(in crate::engine) fn has_opened(&self) -> bool {
        lock(&self.state).opened > 0
    }

    /// Decides on a connection that begins with `greeting`. Whether a new session may be opened is asked
    /// with the number of those that have been; `make` makes it, while others wait.
    pub(in crate::engine) fn admit<O>(
        &self,
        greeting: Greeting,
        open_to_new: impl FnOnce(u64) -> bool,
        make: impl FnOnce(&Hello) -> Result<(Arc<S>, O), Error>,
    ) -> Admitted<S, O> {
        let mut state = lock(&self.state);
        let open_to_new = open_to_new(state.opened);
        match state.table.admit(greeting, open_to_new) {
            Admission::Refused(fail) => Admitted::Refused(Refused {
                fail,
                others_open: !state.open.is_empty(),
            }),
            Admission::Joined { peer, welcome } => {
                let open = state.open.get(&peer.session);
                let session = open.or_else(|| state.finished.get(&peer.session));
                Admitted::Joined(session.cloned(), Greetings { peer, welcome })
            }
            Admission::Opened { peer, welcome } => match make(&peer) {
                Ok((session, owned)) => {
                    state.opened += 1;
                    state.open.insert(peer.session, Arc::clone(&session));
                    Admitted::Opened(session, owned, Greetings { peer, welcome })
                }
                Err(error) => {
                    let fail = Fail::new(self.failed, error.to_string());
                    state.table.fail(peer.session, fail.clone());
                    Admitted::Failed(fail, error)
                }
            },
        }
    }

    /// Runs `work`, which is all that a session does but for its connections, in a thread of `scope`.
    pub(in crate::engine) fn spawn<'scope, T: Send + 'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> SessionThread<'scope, T> {
        let notifier = &self.notifier;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let handle = scope.spawn(move || {
            let result = work();
            // A thread that has just notified is not yet finished: who looked at that would wait once more in vain.
            over.store(true, Ordering::Release);
            notifier.notify();
            result
        });
        SessionThread { handle, is_over }
    }

    /// Waits until `thread` is through with the session; calls `look` whenever something may have changed.
    pub(in crate::engine) fn follow<'scope, T>(
        &self,
        thread: SessionThread<'scope, T>,
        mut look: impl FnMut(),
    ) -> ScopedJoinHandle<'scope, T> {
        loop {
            let seen = self.notifier.notified();
            if thread.is_over() {
                return thread.handle;
            }
            look();
            self.notifier.wait(seen, LOOK_AGAIN);
        }
    }

    /// `session` is over. If it went well it is kept for connections that come back, and `retire` frees what
    /// they do not need.
    pub(in crate::engine) fn end<T>(
        &self,
        id: SessionId,
        session: Arc<S>,
        result: &Result<T, Error>,
        retire: impl FnOnce(&S),
    ) {
        let mut state = lock(&self.state);
        state.open.remove(&id);
        match result {
            Ok(_) => {
                let forgotten = state.table.finish(id);
                retire(&session);
                state.finished.insert(id, session);
                if let Some(oldest) = forgotten {
                    state.finished.remove(&oldest);
                }
            }
            Err(error) => {
                let text = format!("the session has failed: {error}");
                state.table.fail(id, Fail::new(self.failed, text));
            }
        }
    }

    /// Whether the session has had no connection for too long.
    pub(in crate::engine) fn has_expired(&self, id: SessionId) -> bool {
        let now = self.start.elapsed();
        lock(&self.state).table.has_expired(id, now)
    }

    /// A connection of a session, on which the peer said `peer`, has ended.
    pub(in crate::engine) fn connection_lost(&self, peer: &Hello) {
        let connection = ConnectionId {
            session: peer.session,
            for_faults: peer.role == Role::Requester,
            stream: peer.stream,
        };
        let now = self.start.elapsed();
        lock(&self.state)
            .table
            .handle_lost(connection, peer.attempt, now);
        self.notifier.notify();
    }
}
