//! Sending and receiving a descriptor over an AF_UNIX socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recv, recvmsg, sendmsg,
    setsockopt,
};

/// What one receive brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes put into the buffer; 0 at the end of the stream.
    pub bytes: usize,
    /// The first descriptor that came along. Any others were closed.
    pub fd: Option<OwnedFd>,
    /// The pid of who sent it, if [`ask_for_senders`] was called; 0 if that is in another PID namespace.
    pub sender: Option<i32>,
}

/// From now on the kernel says who has sent what is received at `socket`, and at those that it accepts.
pub fn ask_for_senders(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, PassCred, &true)?)
}

/// Receives up to `buffer.len()` bytes and the descriptors that ride on them (SCM_RIGHTS). The
/// descriptors are closed on exec.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_with(socket, buffer, MsgFlags::empty())
}

/// The same, and leaves all of it in the socket: the next call gets the same bytes, and descriptors of the same files.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_with(socket, buffer, MsgFlags::MSG_PEEK)
}

/// Takes the next `count` bytes, which were peeked at, out of `socket`. Descriptors that ride on them are closed.
///
/// # Errors
///
/// There are fewer bytes.
pub fn discard(socket: BorrowedFd<'_>, mut count: usize) -> io::Result<()> {
    let mut bytes = [0; 64];
    while count > 0 {
        let most = count.min(bytes.len());
        match recv(socket.as_raw_fd(), &mut bytes[..most], MsgFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(taken) => count -= taken,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Whether nothing more will come at `socket` than what is there already.
pub fn hangs_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let hung_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut polled = [PollFd::new(socket, hung_up)];
    Ok(poll(&mut polled, PollTimeout::ZERO)? > 0)
}

fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<Received> {
    let mut slices = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!([i32; 4], UnixCredentials);
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let (mut first, mut sender) = (None, None);
    for item in message.cmsgs()? {
        match item {
            ControlMessageOwned::ScmRights(raw) => {
                for fd in raw {
                    // SAFETY: the kernel has just installed this descriptor for us and nobody else
                    // knows its number.
                    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
                    first.get_or_insert(owned);
                }
            }
            ControlMessageOwned::ScmCredentials(who) => sender = Some(who.pid()),
            _ => {}
        }
    }
    Ok(Received {
        bytes: message.bytes,
        fd: first,
        sender,
    })
}

/// Sends `bytes`, which a copy of `fd` rides on, if one is given. A socket whose other end is gone gives an
/// error and no signal.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let slices = [IoSlice::new(bytes)];
    let raw: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights: &[_] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(socket.as_raw_fd(), &slices, rights, flags, None)?;
    match sent == bytes.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_as_another_one_of_the_same_file() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        send(ours.as_fd(), b"with", Some(write.as_fd())).unwrap();
        drop(write);
        let mut word = [0; 4];
        let received = receive(theirs.as_fd(), &mut word).unwrap();
        assert_eq!((received.bytes, &word), (4, b"with"));
        assert_eq!(received.sender, None);
        let mut pipe = std::fs::File::from(received.fd.unwrap());
        pipe.write_all(b"x").unwrap();
        drop(pipe);
        assert_eq!(
            std::io::read_to_string(std::fs::File::from(read)).unwrap(),
            "x"
        );
        ask_for_senders(theirs.as_fd()).unwrap();
        send(ours.as_fd(), b"more", Some(ours.as_fd())).unwrap();
        let received = receive(theirs.as_fd(), &mut word).unwrap();
        let own = std::process::id().cast_signed();
        assert_eq!((received.sender, received.fd.is_some()), (Some(own), true));
        drop(theirs);
        assert!(send(ours.as_fd(), b"nobody", None).is_err());
    }

    #[test]
    fn what_is_peeked_at_stays_with_its_descriptor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ask_for_senders(theirs.as_fd()).unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        let file = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
        send(ours.as_fd(), b"four", None).unwrap();
        let mut bytes = [0; 5];
        let first = peek(theirs.as_fd(), &mut bytes).unwrap();
        assert_eq!((first.bytes, first.fd.is_none()), (4, true));
        send(ours.as_fd(), b"x", Some(write.as_fd())).unwrap();
        // Bytes behind a descriptor are not reached.
        send(ours.as_fd(), b"more", None).unwrap();
        for _ in 0..2 {
            let mut bytes = [0; 16];
            let peeked = peek(theirs.as_fd(), &mut bytes).unwrap();
            assert_eq!((peeked.bytes, &bytes[..5]), (5, &b"fourx"[..]));
            assert_eq!(peeked.sender, Some(std::process::id().cast_signed()));
            assert_eq!(file(&peeked.fd.unwrap()), file(&write));
        }
        discard(theirs.as_fd(), 5).unwrap();
        let next = peek(theirs.as_fd(), &mut bytes).unwrap();
        assert_eq!((next.bytes, &bytes[..4]), (4, &b"more"[..]));
        assert!(next.fd.is_none());
        // The copy that was discarded is closed.
        drop(write);
        let ended = std::io::read_to_string(std::fs::File::from(read)).unwrap();
        assert_eq!(ended, "");
        assert!(!hangs_up(theirs.as_fd()).unwrap());
        drop(ours);
        assert!(hangs_up(theirs.as_fd()).unwrap());
        assert!(discard(theirs.as_fd(), 5).is_err());
    }
}
