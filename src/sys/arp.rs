//! Announcing an IPv4 address by ARP, over a packet socket.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes of an Ethernet address.
pub const MAC_BYTES: usize = 6;

/// Hardware type of Ethernet in ARP (RFC 826).
const ETHERNET: u16 = 1;

/// Operations of ARP that an announcement uses: hosts update their tables by either, some by one alone.
const OPERATIONS: [u16; 2] = [1, 2];

/// Tells all hosts on the link of interface `index` that `address` is at the Ethernet address `mac`: a gratuitous
/// request and reply (RFC 5227).
///
/// # Errors
///
/// There is no such interface, or this process may not send such packets.
pub fn announce(index: u32, mac: [u8; MAC_BYTES], address: Ipv4Addr) -> io::Result<()> {
    let protocol = u16::try_from(libc::ETH_P_ARP).map_err(io::Error::other)?;
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes three numbers and touches no memory of this process. Protocol 0: nothing is received.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let to = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: ETHERNET,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    let length = u32::try_from(size_of_val(&to)).map_err(io::Error::other)?;
    for operation in OPERATIONS {
        let packet = packet(operation, mac, address);
        // SAFETY: buffer and address are live for the call, with the lengths that are given.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                length,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A packet of ARP (RFC 826) whose sender and target are the same.
fn packet(operation: u16, mac: [u8; MAC_BYTES], address: Ipv4Addr) -> Vec<u8> {
    let mut packet = Vec::with_capacity(28);
    packet.extend(ETHERNET.to_be_bytes());
    packet.extend(0x0800_u16.to_be_bytes());
    packet.extend([6, 4]);
    packet.extend(operation.to_be_bytes());
    packet.extend(mac);
    packet.extend(address.octets());
    packet.extend([0xff; MAC_BYTES]);
    packet.extend(address.octets());
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_the_fields_of_rfc_826() {
        let packet = packet(1, [2, 0, 0, 0, 0, 9], Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!(packet.len(), 28);
        assert_eq!(packet[..8], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(packet[8..18], [2, 0, 0, 0, 0, 9, 10, 0, 0, 7]);
        assert_eq!(packet[24..], [10, 0, 0, 7]);
    }

    #[test]
    fn no_interface_no_announcement() {
        assert!(announce(u32::from(u16::MAX), [0; 6], Ipv4Addr::LOCALHOST).is_err());
    }
}
