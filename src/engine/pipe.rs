//! A pipe that bytes pass through on their way from a socket to a file, without being copied here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

use crate::error::{Error, Kind, Result};
use crate::image::writer::PagesPart;
use crate::limits::PIPE_BYTES;

/// The end that bytes go into.
#[derive(Debug)]
pub(super) struct Inlet(OwnedFd);

/// The end that bytes come out of.
#[derive(Debug)]
pub(super) struct Outlet(OwnedFd);

/// Makes a pipe, of [`PIPE_BYTES`] if the kernel allows.
pub(super) fn pipe() -> Result<(Inlet, Outlet)> {
    let made = pipe2(OFlag::O_CLOEXEC);
    let (outlet, inlet) =
        made.map_err(|errno| Error::wrap(Kind::Io, "cannot make a pipe", errno))?;
    if let Err(errno) = fcntl(&inlet, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)) {
        tracing::debug!("a pipe stays small, which costs time: {errno}");
    }
    Ok((Inlet(inlet), Outlet(outlet)))
}

impl AsFd for Inlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Outlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Inlet {
    /// Takes up to `bytes` bytes from `socket`; waits while the pipe is full. 0 is the end of the
    /// stream.
    pub(super) fn take_from(&self, socket: &impl AsFd, bytes: u64) -> nix::Result<u64> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let flags = SpliceFFlags::SPLICE_F_MOVE;
        splice(socket, None, &self.0, None, bytes, flags).map(|moved| moved as u64)
    }
}

impl Outlet {
    /// Moves exactly `bytes` bytes to `offset` of `part`, waiting for them to arrive.
    pub(super) fn put_into(&self, part: &PagesPart, offset: u64, bytes: u64) -> Result<()> {
        let mut at = i64::try_from(offset).map_err(|_| part.write_error(Errno::EFBIG))?;
        let mut left = bytes;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let flags = SpliceFFlags::SPLICE_F_MOVE;
            match splice(&self.0, None, part.file(), Some(&mut at), most, flags) {
                Ok(0) => {
                    // The inlet is closed: receiving has failed, and whoever did it says why.
                    return Err(Error::new(Kind::PeerLost, "receiving was given up"));
                }
                Ok(moved) => left -= moved as u64,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(part.write_error(errno)),
            }
        }
        Ok(())
    }
}
