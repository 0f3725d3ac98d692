//! How bytes move, whatever they are: what the flows share.
//!
//! ```text
//! session_io ──> driver: epoll or uring ──> socket -> buffer (batch) -> files
//!      └───────> splice_path ────────────> socket -> pipe -> file, for pages that nobody inspects
//!                writer                    a thread that writes while its owner receives
//! transport      a byte stream for an event loop, plain or under TLS
//! ```

pub mod batch;
pub mod driver;
mod epoll;
pub(in crate::engine) mod session_io;
pub(in crate::engine) mod splice_path;
pub mod transport;
mod uring;
pub(in crate::engine) mod writer;

use crate::error::{Error, Kind, Result};
use crate::sys::ring::Ring;
use driver::{Driver, Link};
use epoll::EpollDriver;
use uring::UringDriver;

/// Which driver moves the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// io_uring.
    Uring,
    /// Plain calls, with epoll to wait: for where io_uring is refused.
    Epoll,
}

impl Io {
    /// The driver that is asked for, or without a wish io_uring where that can be had; says in the
    /// log which and why.
    ///
    /// # Errors
    ///
    /// io_uring is asked for and refused: by an old kernel, the sysctl `kernel.io_uring_disabled` or
    /// the seccomp profile of a container.
    pub fn choose(wanted: Option<Io>) -> Result<Io> {
        let refused = match wanted {
            Some(Io::Epoll) => None,
            None | Some(Io::Uring) => Ring::new().err(),
        };
        match (wanted, refused) {
            (Some(Io::Uring), Some(error)) => {
                let text = "--io uring cannot be had here";
                Err(Error::wrap(Kind::Unsupported, text, error))
            }
            (Some(Io::Epoll), _) => {
                tracing::info!("I/O by epoll, as --io says");
                Ok(Io::Epoll)
            }
            (None, Some(error)) => {
                tracing::info!("I/O by epoll: io_uring is not available here: {error}");
                Ok(Io::Epoll)
            }
            (_, None) => {
                tracing::info!("I/O by io_uring");
                Ok(Io::Uring)
            }
        }
    }

    /// A driver for a session over `link`, for the thread that calls this.
    pub fn driver(self, link: Link) -> Result<Box<dyn Driver>> {
        match self {
            Io::Uring => Ok(Box::new(UringDriver::new(link)?)),
            Io::Epoll => Ok(Box::new(EpollDriver::new(link)?)),
        }
    }
}
