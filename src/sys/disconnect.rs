//! The end of a connection whose socket other processes hold as well.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::SockRef;

/// An address of the family AF_UNSPEC, which is 0.
static NOWHERE: [u64; 2] = [0; 2];

/// Length of [`NOWHERE`], as of any `sockaddr`.
const NOWHERE_BYTES: libc::socklen_t = 16;

/// Resets the TCP connection of `socket` now, whoever else holds the socket. One of another kind is shut down.
pub fn reset(socket: BorrowedFd<'_>) {
    // SAFETY: the kernel reads so many bytes at the address, which are there for good.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), NOWHERE.as_ptr().cast(), NOWHERE_BYTES) };
    if Errno::result(result).is_err() {
        // One that is over already needs no end.
        let _ended: io::Result<()> = SockRef::from(&socket).shutdown(Shutdown::Both);
    }
}

/// Names the variable that plants a fault for tests: connections to a source that should be reset end orderly,
/// after which a lazy dump ends its processes although their memory has gone nowhere.
#[cfg(debug_assertions)]
const SKIP_RESETS: &str = "PAGEFERRY_TEST_SKIP_RESETS";

/// Whether the fault is planted. A release build cannot have it.
pub fn resets_are_skipped() -> bool {
    #[cfg(debug_assertions)]
    let skipped = std::env::var_os(SKIP_RESETS).is_some();
    #[cfg(not(debug_assertions))]
    let skipped = false;
    skipped
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_connection_is_reset_although_a_copy_of_its_socket_is_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let _copy = client.try_clone().unwrap();
        client.write_all(b"last words").unwrap();
        reset(client.as_fd());
        let mut words = [0; 10];
        server.read_exact(&mut words).unwrap();
        assert_eq!(&words, b"last words");
        let error = server.read(&mut words).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_local_one_is_shut_down() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let _copy = ours.try_clone().unwrap();
        reset(ours.as_fd());
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
}
