//! Receiving a descriptor over an AF_UNIX socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// What one receive brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes put into the buffer; 0 at the end of the stream.
    pub bytes: usize,
    /// The first descriptor that came along. Any others were closed.
    pub fd: Option<OwnedFd>,
}

/// Receives up to `buffer.len()` bytes and the descriptors that ride on them (SCM_RIGHTS). The
/// descriptors are closed on exec.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut slices = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!([i32; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut first = None;
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = item {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor for us and nobody else
                // knows its number.
                let owned = unsafe { OwnedFd::from_raw_fd(fd) };
                first.get_or_insert(owned);
            }
        }
    }
    Ok(Received {
        bytes: message.bytes,
        fd: first,
    })
}
