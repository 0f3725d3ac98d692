//! Sockets of other processes: copies of their descriptors, and TCP sockets that a checkpoint has left in repair mode.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::owned_process::pidfd_open;

/// A copy of descriptor `number` of the process `pid`. That takes the right to trace it.
pub fn copy_descriptor(pid: i32, number: i32) -> io::Result<OwnedFd> {
    let pidfd = pidfd_open(pid)?;
    // SAFETY: the call takes three numbers and touches no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a TCP socket that is in repair mode work again, and tells whether it was. Its peer hears nothing of it.
pub fn end_repair(socket: impl AsFd) -> io::Result<bool> {
    let fd = socket.as_fd().as_raw_fd();
    let mut mode: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&mode)).map_err(io::Error::other)?;
    // SAFETY: `mode` has room for the number of bytes that `length` tells; both outlive the call.
    let got = unsafe {
        libc::getsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw mut mode).cast(),
            &raw mut length,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    if mode == 0 {
        return Ok(false);
    }
    let off: libc::c_int = 0;
    // SAFETY: the kernel reads as many bytes of `off` as it is long.
    let set = unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const off).cast(),
            length,
        )
    };
    match set {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_socket_of_a_process_is_copied() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let copy = copy_descriptor(pid, server.as_raw_fd()).unwrap();
        assert!(!end_repair(&copy).unwrap());
        client.write_all(b"heard").unwrap();
        let mut heard = [0; 5];
        TcpStream::from(copy).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"heard");
    }

    #[test]
    fn what_is_no_socket_is_refused() {
        assert!(end_repair(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
