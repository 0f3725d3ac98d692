//! Which connections a receiving server accepts: dumps, or ferry, told apart by their first bytes.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pageferry::engine::listening::listen::Source;
use pageferry::engine::listening::stop::Stop;
use pageferry::engine::receive::ReceiveContext;
use pageferry::engine::receive::precopy_listener::PrecopyListener;
use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::frame;
use pageferry::stream::{Stream, silent};
use socket2::Socket;

/// What has come in.
pub(crate) enum PeerKind {
    /// CRIU.
    Dump,
    /// Another page-server.
    Ferry,
}

/// Who may still come in: with --keep everybody, else the connections of one session.
pub(crate) struct Entry {
    keep: bool,
    /// A dump has come.
    taken: AtomicBool,
    /// Ends connections that have not said yet what they are.
    undecided: Stop,
    listener: Option<Socket>,
}

impl Entry {
    pub(crate) fn new(source: &Source, keep: bool) -> Result<Entry> {
        let listener = match source.connected {
            true => None,
            false => Some(source.socket.try_clone().map_err(|error| {
                Error::wrap(Kind::Io, "cannot duplicate the listening socket", error)
            })?),
        };
        Ok(Entry {
            keep,
            taken: AtomicBool::new(false),
            undecided: Stop::default(),
            listener,
        })
    }

    /// Tells what has connected, by the first bytes; `None` if a session has come before. After a dump no further
    /// connection is accepted. After ferry they are, since a session of it has several.
    ///
    /// # Errors
    ///
    /// The first bytes did not come. After [`Kind::NothingCame`] connections are accepted as before.
    pub(crate) fn admit(
        &self,
        stream: &mut Stream,
        context: &ReceiveContext,
        listener: &PrecopyListener<'_>,
    ) -> Result<Option<PeerKind>> {
        let ferry = self.is_ferry(stream, context.idle_timeout);
        match ferry {
            Ok(true) => return Ok(Some(PeerKind::Ferry)),
            Ok(false) if self.keep => return Ok(Some(PeerKind::Dump)),
            Err(error) if self.keep || error.kind() == Kind::NothingCame => return Err(error),
            Ok(false) | Err(_) => {}
        }
        match !listener.has_opened() && self.is_first(stream) {
            true => ferry.map(|_| Some(PeerKind::Dump)),
            false => Ok(None),
        }
    }

    /// Waits for the first byte of a dump, for `time_limit` if that is given, and tells whether it is the one
    /// to come. If so, no further connection is accepted.
    ///
    /// # Errors
    ///
    /// As for [`Entry::admit`].
    pub(crate) fn admit_dump(
        &self,
        stream: &mut Stream,
        time_limit: Option<Duration>,
    ) -> Result<bool> {
        let begun = self.is_ferry(stream, time_limit);
        match begun {
            Err(error) if self.keep || error.kind() == Kind::NothingCame => Err(error),
            _ if self.keep || self.is_first(stream) => begun.map(|_| true),
            _ => Ok(false),
        }
    }

    /// Whether no session has come before this one. If so, no further connection is accepted.
    fn is_first(&self, stream: &Stream) -> bool {
        let first = !self.taken.swap(true, Ordering::SeqCst);
        if first {
            self.shut();
        } else {
            tracing::warn!(
                "refused {}: another session came first (give --keep for several)",
                stream.peer()
            );
        }
        first
    }

    /// What becomes of the server when a peer could not even say what it is, for `error`: without
    /// --keep it was the one to come, unless a session has begun, which it does not concern.
    pub(crate) fn reject(&self, error: Error, listener: &PrecopyListener<'_>) -> Result<()> {
        if error.kind() == Kind::NothingCame {
            return Err(error);
        }
        if !self.keep && (listener.has_opened() || self.taken.swap(true, Ordering::SeqCst)) {
            tracing::warn!("{error}");
            return Ok(());
        }
        self.shut();
        Err(error)
    }

    fn is_ferry(&self, stream: &mut Stream, time_limit: Option<Duration>) -> Result<bool> {
        let _watched = self.undecided.watch(&stream.socket())?;
        let timeout = stream.socket().set_read_timeout(time_limit);
        let begun = timeout.and_then(|()| stream.begins());
        if matches!(begun, Ok(false)) {
            return Err(Error::nothing_came(stream.peer()));
        }
        begun
            .and_then(|_| stream.begins_with(frame::MAGIC))
            .map_err(|error| match error.kind() {
                ErrorKind::WouldBlock => silent(time_limit),
                _ => Error::wrap(Kind::PeerLost, "the first bytes did not come", error),
            })
            .map_err(|error| error.within(format!("session with {}", stream.peer())))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.keep || !self.taken.load(Ordering::SeqCst)
    }

    /// Without --keep: nobody else comes in.
    pub(crate) fn shut(&self) {
        if self.keep {
            return;
        }
        self.undecided.request();
        if let Some(listener) = &self.listener {
            // It may have been shut before.
            let _ = listener.shutdown(Shutdown::Both);
        }
    }
}
