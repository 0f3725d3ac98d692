//! What a host on the link hears of an address that has moved: ARP and neighbour advertisements, by a packet socket.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::net::NetNs;
use crate::process::run;
use crate::wait::{self, GENEROUS};

/// Protocols of Ethernet frames (linux/if_ether.h).
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// Bytes of an ARP message for IPv4 over Ethernet.
const ARP_BYTES: usize = 28;

/// Where an IPv6 packet without extensions has its ICMPv6 message, and the type of an advertisement (RFC 4861).
const ICMPV6_AT: usize = 40;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// A socket that hears every frame of one protocol in a network.
#[derive(Debug)]
pub struct Announcements {
    socket: Socket,
}

impl Announcements {
    /// Hears what is said from now on of addresses of the family of `address`.
    ///
    /// # Errors
    /// Not root.
    pub fn capture(net: &NetNs, address: IpAddr) -> Result<Announcements> {
        let protocol = match address {
            IpAddr::V4(_) => ETH_P_ARP,
            IpAddr::V6(_) => ETH_P_IPV6,
        };
        let protocol = Protocol::from(i32::from(protocol.to_be()));
        let socket = net.enter(|| {
            // Of DGRAM sockets the kernel takes off the Ethernet header.
            Ok(Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?)
        })?;
        socket.set_nonblocking(true)?;
        Ok(Announcements { socket })
    }

    /// Waits until somebody says unasked that `address` is at the Ethernet address `mac`.
    ///
    /// # Errors
    /// Nobody does.
    pub fn expect(&self, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        wait::until(&format!("an announcement of {address}"), GENEROUS, || {
            let mut bytes = [0; 2048];
            let Ok(count) = (&self.socket).read(&mut bytes) else {
                return Ok(None);
            };
            let announced = match address {
                IpAddr::V4(_) => of_arp(&bytes[..count]),
                IpAddr::V6(_) => of_advertisement(&bytes[..count]),
            };
            Ok((announced == Some((address, mac))).then_some(()))
        })
    }
}

/// Who an ARP message without a question says that it is: sender and target are the same address.
fn of_arp(bytes: &[u8]) -> Option<(IpAddr, [u8; 6])> {
    let bytes: &[u8; ARP_BYTES] = bytes.get(..ARP_BYTES)?.try_into().ok()?;
    let mac = bytes[8..14].try_into().ok()?;
    let ip = |at: usize| -> Option<Ipv4Addr> {
        let ip: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(ip.into())
    };
    let (sender, target) = (ip(14)?, ip(24)?);
    (sender == target).then_some((sender.into(), mac))
}

/// The target of a neighbour advertisement that overrides what was known, and its link-layer address.
fn of_advertisement(bytes: &[u8]) -> Option<(IpAddr, [u8; 6])> {
    let message = bytes.get(ICMPV6_AT..)?;
    let &[kind, _, _, _, flags, ..] = message else {
        return None;
    };
    // Solicited answers have the bit before it.
    let unasked_and_overriding = flags & 0x60 == 0x20;
    let target: [u8; 16] = message.get(8..24)?.try_into().ok()?;
    let mac = message.get(26..32)?.try_into().ok()?;
    let is_one = kind == NEIGHBOUR_ADVERTISEMENT && unasked_and_overriding;
    is_one.then_some((Ipv6Addr::from(target).into(), mac))
}

/// The Ethernet address of a device.
///
/// # Errors
/// There is no such device.
pub fn mac_of(net: &NetNs, device: &str) -> Result<[u8; 6]> {
    let shown = run(net
        .command("ip")
        .args(["-o", "link", "show", "dev", device]))?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let mut words = shown
        .split_whitespace()
        .skip_while(|word| *word != "link/ether");
    let mac = words.nth(1).with_context(|| shown.clone())?;
    let bytes: Result<Vec<u8>, _> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect();
    bytes?.try_into().ok().with_context(|| mac.to_owned())
}
