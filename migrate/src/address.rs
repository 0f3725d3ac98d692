//! A service address that moves with the processes: off the source's device, onto the destination's.
//!
//! ```text
//! source       frozen ──> address off          failure: address on, announced
//! destination  packets dropped ──> address on ──> restore ──> decision ──> packets pass, announced
//! ```
//!
//! A restore needs the address on its host, and a packet that comes before the sockets are there would be
//! answered by a reset. So packets for it are dropped until the decision.

use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ServiceAddress;
use pageferry::sys::arp::{self, MAC_BYTES};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::process::Command;
use tokio::time::sleep;

/// How often an address is announced: a switch or a host may miss one packet.
const ANNOUNCEMENTS: u32 = 4;

/// Between two of them.
const ANNOUNCE_AGAIN: Duration = Duration::from_millis(150);

/// All nodes on a link (RFC 4291).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// How an address lies on a device, as `ip` shows it, to be put back in the same way.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Attributes {
    broadcast: Option<String>,
    label: Option<String>,
    scope: Option<String>,
}

/// The address on its device; `None` if it is not there.
pub(crate) async fn find(service: &ServiceAddress) -> Result<Option<Attributes>> {
    let shown = ip(&["-json", "addr", "show", "dev", &service.device]).await?;
    let links: Value = serde_json::from_slice(&shown)
        .map_err(|error| Error::wrap(Kind::Protocol, "what `ip` shows", error))?;
    let addresses = links[0]["addr_info"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let wanted = service.address.to_string();
    let found = addresses.iter().find(|info| {
        info["local"] == wanted.as_str() && info["prefixlen"] == u64::from(service.prefix)
    });
    let text = |info: &Value, name: &str| info[name].as_str().map(str::to_owned);
    Ok(found.map(|info| Attributes {
        broadcast: text(info, "broadcast"),
        label: text(info, "label"),
        scope: text(info, "scope"),
    }))
}

/// Puts it on its device, if it is not there.
pub(crate) async fn add(service: &ServiceAddress, attributes: &Attributes) -> Result<()> {
    if find(service).await?.is_some() {
        return Ok(());
    }
    let cidr = service.cidr();
    let mut args = vec!["addr", "add", &cidr];
    if let Some(broadcast) = &attributes.broadcast {
        args.extend(["brd", broadcast]);
    }
    args.extend(["dev", &service.device]);
    if let Some(label) = &attributes.label {
        args.extend(["label", label]);
    }
    if let Some(scope) = &attributes.scope {
        args.extend(["scope", scope]);
    }
    if service.address.is_ipv6() {
        // The other host has had it until now: looking for a second owner would take a second.
        args.push("nodad");
    }
    ip(&args).await.map(drop)
}

/// Takes it off its device, if it is there.
pub(crate) async fn remove(service: &ServiceAddress) -> Result<()> {
    if find(service).await?.is_none() {
        return Ok(());
    }
    let cidr = service.cidr();
    ip(&["addr", "del", &cidr, "dev", &service.device])
        .await
        .map(drop)
}

/// Tells the hosts on the link where it is now: gratuitous ARP, or unsolicited neighbour advertisements.
pub(crate) async fn announce(service: &ServiceAddress) {
    for turn in 0..ANNOUNCEMENTS {
        if turn > 0 {
            sleep(ANNOUNCE_AGAIN).await;
        }
        if let Err(error) = announce_once(service).await {
            tracing::warn!("{} cannot be announced: {error}", service.cidr());
            return;
        }
    }
}

async fn announce_once(service: &ServiceAddress) -> Result<()> {
    let shown = ip(&["-json", "link", "show", "dev", &service.device]).await?;
    let links: Value = serde_json::from_slice(&shown)
        .map_err(|error| Error::wrap(Kind::Protocol, "what `ip` shows", error))?;
    let index = links[0]["ifindex"]
        .as_u64()
        .and_then(|index| u32::try_from(index).ok());
    let mac = links[0]["address"].as_str().and_then(mac);
    let (Some(index), Some(mac)) = (index, mac) else {
        // A device without Ethernet addresses has no neighbours to tell.
        return Ok(());
    };
    let sent = match service.address {
        IpAddr::V4(address) => arp::announce(index, mac, address),
        IpAddr::V6(address) => advertise(index, mac, address),
    };
    sent.map_err(|error| Error::wrap(Kind::Io, format!("on {}", service.device), error))
}

fn mac(text: &str) -> Option<[u8; MAC_BYTES]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes?.try_into().ok()
}

/// An unsolicited neighbour advertisement (RFC 4861, section 4.4).
fn advertise(index: u32, mac: [u8; MAC_BYTES], address: Ipv6Addr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    // Receivers take no other: it shows that the sender is on the link.
    socket.set_multicast_hops_v6(255)?;
    socket.set_multicast_if_v6(index)?;
    socket.bind(&SocketAddrV6::new(address, 0, 0, 0).into())?;
    let to = SocketAddrV6::new(ALL_NODES, 0, 0, index);
    socket
        .send_to(&advertisement(mac, address), &to.into())
        .map(drop)
}

fn advertisement(mac: [u8; MAC_BYTES], address: Ipv6Addr) -> Vec<u8> {
    // Type 136; the kernel computes the checksum; the flag says that older knowledge is wrong.
    let mut packet = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    packet.extend(address.octets());
    // Option 2, one unit of 8 bytes: the Ethernet address.
    packet.extend([2, 1]);
    packet.extend(mac);
    packet
}

/// Drops packets for the addresses, under a name that [`pass`] finds again.
pub(crate) async fn block(name: &str, services: &[ServiceAddress]) -> Result<()> {
    let mut rules = format!(
        "add table inet {name}\n\
         add chain inet {name} input {{ type filter hook input priority -300; policy accept; }}\n"
    );
    for service in services {
        let family = match service.address {
            IpAddr::V4(_) => "ip",
            IpAddr::V6(_) => "ip6",
        };
        rules += &format!(
            "add rule inet {name} input {family} daddr {} drop\n",
            service.address
        );
    }
    run("nft", &[&rules]).await.map(drop)
}

/// Lets packets pass again.
pub(crate) async fn pass(name: &str) -> Result<()> {
    // Adding first makes deleting succeed where there is nothing.
    let rules = format!("add table inet {name}\ndelete table inet {name}\n");
    run("nft", &[&rules]).await.map(drop)
}

async fn ip(args: &[&str]) -> Result<Vec<u8>> {
    run("ip", args).await
}

async fn run(program: &str, args: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(program).args(args).output().await;
    let output = output.map_err(|error| {
        let text = format!("{program} cannot be started (install iproute2 and nftables)");
        Error::wrap(Kind::Usage, text, error)
    })?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let text = format!("{program} {}: {}", args.join(" "), stderr.trim());
            Err(Error::new(Kind::Io, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_has_the_fields_of_rfc_4861() {
        let packet = advertisement([2, 0, 0, 0, 0, 9], "fd00::7".parse().unwrap());
        assert_eq!((packet.len(), packet[0], packet[4]), (32, 136, 0x20));
        assert_eq!(packet[8..10], [0xfd, 0]);
        assert_eq!(packet[24..], [2, 1, 2, 0, 0, 0, 0, 9]);
        assert_eq!(mac("02:00:00:00:00:09"), Some([2, 0, 0, 0, 0, 9]));
        assert_eq!(mac("00:00"), None);
    }
}
