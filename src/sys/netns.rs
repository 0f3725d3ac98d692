//! Which network a socket belongs to.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::MetadataExt;

/// `SIOCGSKNS` of linux/sockios.h: a descriptor of the socket's network namespace.
const SIOCGSKNS: libc::Ioctl = 0x894C;

/// The network namespace of `socket`: the inode number by which /proc/PID/ns/net names it.
///
/// # Errors
///
/// The kernel's: it takes CAP_NET_ADMIN in the owner of that namespace.
pub fn network_of(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: this request takes no argument, so the kernel reads and writes no memory of this process.
    let number = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows its number.
    let namespace = unsafe { File::from_raw_fd(number) };
    Ok(namespace.metadata()?.ino())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn sockets_of_this_process_are_in_its_network() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = std::fs::metadata("/proc/self/ns/net").unwrap().ino();
        match network_of(socket.as_fd()) {
            Ok(network) => assert_eq!(network, own),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
    }
}
