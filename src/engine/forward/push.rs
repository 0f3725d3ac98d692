//! A session with a receiving page-server: opened, filled by its caller, and ended.

use std::sync::Arc;
use std::thread::Scope;
use std::time::Duration;

use super::SenderConfig;
use super::session_dialer::SessionDialer;
use crate::engine::ferry::sender_session::SenderSession;
use crate::engine::ferry::{END_TIMEOUT, SenderHistory, WINDOW, random_bits};
use crate::error::Result;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Features, Hello, Role, SessionId, VERSION};
use crate::ferry::link::RetryPolicy;
use crate::ferry::message::StateId;
use crate::observe::ferried::Sent;
use crate::units::PageSize;

/// First and longest pause before a broken connection is made again.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// Runs `body` with a session to the receiver, which `body` ends with [`SenderSession::finish`] or by
/// failing. Returns its result, what was sent, and its history, for the next session. With `goes_on` the receiver's version
/// is the one that the last session of `history` has left.
pub(super) fn push<T>(
    (config, page, goes_on): (&SenderConfig, PageSize, bool),
    history: SenderHistory,
    body: impl for<'s, 'env> FnOnce(&'s Scope<'s, 'env>, &'s SenderSession) -> Result<T>,
) -> Result<(Result<T>, Sent, SenderHistory)> {
    let session = SessionId(random_bits()?);
    let mut features = Features::HASHES
        .with(Features::DELTA)
        .with(Features::SHARED);
    let mut hash_key = HashKey::default();
    if goes_on && history.memory().state() != StateId::NONE {
        features = features.with(Features::KNOWN);
        hash_key = history.memory().key();
    }
    let sending = SenderSession::new(page, session, history, Arc::clone(&config.traffic));
    let hello = Hello {
        version: VERSION,
        role: Role::Sender,
        page,
        features,
        session,
        stream: 0,
        streams: config.streams,
        attempt: 0,
        opening: true,
        window: WINDOW,
        hash_key,
    };
    let retry = retry(config.reconnect_timeout);
    let dialer = SessionDialer::new(config, &sending, sending.notifier(), hello, retry);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| dialer.run(scope));
        let result = body(scope, &sending);
        match &result {
            Ok(_) => sending.finish(),
            Err(error) => sending.abort(&error.to_string()),
        }
        sending.wait_until_done(END_TIMEOUT);
        sending.cut();
        result
    });
    let sent = sending.sent();
    drop(dialer);
    Ok((result, sent, sending.into_history()))
}

/// The retry of an end that gives up after `give_up_after` without progress.
fn retry(give_up_after: Duration) -> RetryPolicy {
    RetryPolicy {
        pause_first: PAUSES[0],
        pause_max: PAUSES[1],
        give_up_after,
    }
}
