//! One error type for the engines and binaries: a kind to match on, the context in words, the source.
//!
//! The context names the file, the address, the peer or the field, and says what to do where that
//! is known. Pure rooms have small typed errors of their own; engines wrap them with
//! [`Error::wrap`], adding what only they know (which peer, which file).

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

/// What went wrong, for code that must decide what to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The command line or the set-up is wrong: wrong directory, port in use, no permission.
    Usage,
    /// A file or socket operation failed on this host.
    Io,
    /// A peer broke the protocol.
    Protocol,
    /// A peer went away before the work was done.
    PeerLost,
    /// A peer connected and left without a byte, as probes of ports do: nothing has begun.
    NothingCame,
    /// An image file is missing, damaged or of an unknown kind.
    Image,
    /// Memory of a process is lost: the source cannot supply it any more.
    MemoryLost,
    /// This kernel or this build lacks what was asked for.
    Unsupported,
    /// A signal asked to stop.
    Interrupted,
}

/// An error with its context. See the module's text.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Results with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that has no deeper cause.
    pub fn new(kind: Kind, context: impl Into<String>) -> Error {
        Error {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error of `kind` caused by `source`.
    pub fn wrap(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// A failed operation `doing` ("open", "write", ...) on the file `path`.
    pub fn file(doing: &str, path: &Path, source: impl Into<std::io::Error>) -> Error {
        Error::wrap(
            Kind::Io,
            format!("cannot {doing} {}", path.display()),
            source.into(),
        )
    }

    /// The error for a peer that connected and left without a byte.
    pub fn nothing_came(peer: &str) -> Error {
        let text = format!("{peer} connected and left without a byte, as a probe of the port does");
        Error::new(Kind::NothingCame, text)
    }

    /// The kind, to match on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether nobody could be connected to, at an address that may be right.
    pub fn is_unreachable(&self) -> bool {
        use std::io::ErrorKind::{
            ConnectionRefused, HostUnreachable, NetworkUnreachable, NotFound, TimedOut,
        };
        let cause = self.source.as_ref();
        let cause = cause.and_then(|source| source.downcast_ref::<std::io::Error>());
        self.kind == Kind::PeerLost
            && cause.is_some_and(|error| {
                matches!(
                    error.kind(),
                    ConnectionRefused | HostUnreachable | NetworkUnreachable | NotFound | TimedOut
                )
            })
    }

    /// The same error, told from one level further out.
    #[must_use]
    pub fn within(mut self, outer: impl fmt::Display) -> Error {
        self.context = format!("{outer}: {}", self.context);
        self
    }
}

/// Whether the process has as many open files as it may have (EMFILE).
fn is_out_of_descriptors(error: &(dyn StdError + 'static)) -> bool {
    const EMFILE: i32 = 24;
    #[cfg(feature = "engine")]
    if let Some(errno) = error.downcast_ref::<nix::errno::Errno>() {
        return *errno as i32 == EMFILE;
    }
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.raw_os_error() == Some(EMFILE))
}

impl fmt::Display for Error {
    /// The context and every cause behind it, in one line; what to do about a cause, where it says nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        let mut cause = self.source.as_deref().map(|source| source as &dyn StdError);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            if is_out_of_descriptors(error) {
                f.write_str(" (raise the limit of open files: ulimit -n, LimitNOFILE=)")?;
            }
            // One of ours has told its own causes.
            cause = if error.is::<Error>() {
                None
            } else {
                error.source()
            };
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_told_once() {
        let io = std::io::Error::other("disk on fire");
        let inner = Error::wrap(Kind::Io, "cannot write x", io);
        let outer = Error::wrap(Kind::MemoryLost, "all is lost", inner);
        assert_eq!(
            outer.to_string(),
            "all is lost: cannot write x: disk on fire"
        );
    }

    #[test]
    fn want_of_descriptors_is_told_with_what_helps() {
        let error = Error::file(
            "open",
            Path::new("/x"),
            std::io::Error::from_raw_os_error(24),
        );
        let message = error.within("outer").to_string();
        assert!(message.starts_with("outer: cannot open /x: "), "{message}");
        assert!(message.ends_with("ulimit -n, LimitNOFILE=)"), "{message}");
    }
}
