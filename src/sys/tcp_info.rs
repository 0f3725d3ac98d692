//! What the kernel tells of a TCP connection.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;

/// How long ago data last came over the TCP connection of `socket`, in steps of a kernel's tick (1 to 10 ms).
///
/// # Errors
///
/// The kernel's: it is no TCP socket.
pub fn since_data(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let room = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).expect("it is small");
    let mut bytes = room;
    // SAFETY: the kernel writes at most `bytes` bytes there, of which there are so many, and their number.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    Errno::result(result)?;
    // SAFETY: it consists of numbers, and what the kernel did not write is 0.
    let info = unsafe { info.assume_init() };
    Ok(Duration::from_millis(info.tcpi_last_data_recv.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn silence_grows_until_data_comes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let most = Duration::from_millis(30);
        while since_data(server.as_fd()).unwrap() < most {
            std::thread::yield_now();
        }
        // It begins anew with data: another time, should this thread have been stopped for as long in between.
        loop {
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
            if since_data(server.as_fd()).unwrap() < most {
                break;
            }
        }
        let (other, _) = UnixStream::pair().unwrap();
        assert!(since_data(other.as_fd()).is_err());
    }
}
