//! Established connections of the tree, and what a dump leaves of them.
//!
//! CRIU puts sockets into repair mode and has packets of their connections dropped (iptables, or a table of
//! nftables named `CRIU-...`; in a network namespace of the container's own everything). A dump that was killed, one
//! that leaves its processes stopped, and a lazy one whose client gives up leave all of that behind, and the
//! next data would end the connection.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

/// The mark of CRIU's own packets, which its rules let pass (`SOCCR_MARK`).
const MARK: &str = "0xc114";

/// Programs that show and change the filter rules of each family.
const FILTERS: [(&str, &str); 2] = [
    ("iptables-save", "iptables"),
    ("ip6tables-save", "ip6tables"),
];

/// Both ends of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(super) struct Connection {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

/// The established TCP connections of a tree. Each is told once, however many descriptors lead to it.
pub(super) fn connections(tree: &[ProcessName]) -> BTreeSet<Connection> {
    let mut found = BTreeSet::new();
    each_socket(tree, |socket| found.extend(connection(socket)));
    found
}

/// Takes sockets out of repair mode while their processes are frozen and packets are dropped: whatever lets the
/// processes go from now on, no socket refuses their data. For a dump that has its images and still serves
/// memory, which fails by itself when its client does.
pub(super) fn leave_repair_mode(tree: &[ProcessName]) {
    set_repair(tree, 0);
}

/// Puts sockets back into repair mode: their processes end here, and their peers must not be told.
pub(super) fn enter_repair_mode(tree: &[ProcessName]) {
    set_repair(tree, 1);
}

fn set_repair(tree: &[ProcessName], mode: u32) {
    each_socket(tree, |socket| {
        let established = connection(socket).is_some();
        if established
            && is_in_repair(socket) != (mode == 1)
            && let Err(error) = setsockopt(socket, sockopt::TcpRepair, &mode)
        {
            tracing::error!("the repair mode of a connection cannot be set: {error}");
        }
    });
}

/// Lets the connections of processes that stay here go on: packets pass, and sockets are as they were.
/// `noted` are connections that are known from before.
pub(super) fn unlock(tree: &[ProcessName], noted: &[Connection]) {
    let mut held: BTreeSet<Connection> = noted.iter().copied().collect();
    each_socket(tree, |socket| {
        if is_in_repair(socket) {
            held.extend(connection(socket));
        }
    });
    remove_rules(tree, &held);
    // Last: what leaves repair mode sends a packet.
    leave_repair_mode(tree);
}

/// Removes the rules that drop packets of connections which have moved.
pub(super) fn forget(connections: &[Connection]) {
    remove_rules(&[], &connections.iter().copied().collect());
}

/// Removes those rules but for connections that this host would answer by a reset, because their address is still
/// here. Returns how many these are.
pub(super) fn forget_gone(connections: &[Connection]) -> usize {
    let (kept, gone): (Vec<Connection>, Vec<Connection>) = connections
        .iter()
        .partition(|connection| may_be_answered(connection, connections, is_here));
    forget(&gone);
    kept.len()
}

/// Whether a packet of a connection that has moved could come to this host and be answered by it.
fn may_be_answered(
    connection: &Connection,
    moved: &[Connection],
    is_here: impl Fn(SocketAddr) -> bool,
) -> bool {
    let other_end = Connection {
        local: connection.remote,
        remote: connection.local,
    };
    // A connection inside of the host goes nowhere else, and one whose both ends have moved gets no packet.
    !plain(connection.local).ip().is_loopback()
        && !moved.contains(&other_end)
        && is_here(connection.local)
}

/// Whether the address is on a device of this host.
fn is_here(address: SocketAddr) -> bool {
    let mut address = address;
    address.set_port(0);
    UdpSocket::bind(address).is_ok()
}

fn each_socket(tree: &[ProcessName], mut look: impl FnMut(&OwnedFd)) {
    for process in tree {
        let dir = format!("/proc/{}/fd", process.pid);
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if !target.to_string_lossy().starts_with("socket:") {
                continue;
            }
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(Ok(socket)) = number.map(|number| process.descriptor(number)) else {
                continue;
            };
            let protocol = SockRef::from(&socket).protocol();
            if protocol.ok().flatten() == Some(socket2::Protocol::TCP) {
                look(&socket);
            }
        }
    }
}

fn is_in_repair(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::TcpRepair).is_ok_and(|on| on == 1)
}

fn connection(socket: &OwnedFd) -> Option<Connection> {
    let socket = SockRef::from(socket);
    Some(Connection {
        local: socket.local_addr().ok()?.as_socket()?,
        remote: socket.peer_addr().ok()?.as_socket()?,
    })
}

fn remove_rules(tree: &[ProcessName], held: &BTreeSet<Connection>) {
    let foreign = foreign_network(tree);
    let is_foreign = foreign.is_some();
    if held.is_empty() && !is_foreign {
        return;
    }
    // A thread, for the network of a thread is its own.
    thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(network) = &foreign
                && let Err(errno) = setns(network, CloneFlags::CLONE_NEWNET)
            {
                tracing::error!("the network of the processes cannot be unlocked: {errno}");
                return;
            }
            for (show, change) in FILTERS {
                for rule in shown(show, &["-t", "filter"]).lines() {
                    if is_lock(rule, held, is_foreign) {
                        let words: Vec<&str> = rule.split_whitespace().skip(1).collect();
                        carry_out(
                            change,
                            &[&["-w", "-t", "filter", "-D"], &words[..]].concat(),
                        );
                    }
                }
                if is_foreign && shown(show, &["-t", "filter"]).contains(":CRIU ") {
                    carry_out(change, &["-w", "-t", "filter", "-F", "CRIU"]);
                    carry_out(change, &["-w", "-t", "filter", "-X", "CRIU"]);
                }
            }
            for table in shown("nft", &["list", "tables"]).lines() {
                let words: Vec<&str> = table.split_whitespace().collect();
                let &["table", family, name] = words.as_slice() else {
                    continue;
                };
                if name.starts_with("CRIU-")
                    && (is_foreign
                        || is_table_of(&shown("nft", &["list", "table", family, name]), held))
                {
                    carry_out("nft", &["delete", "table", family, name]);
                }
            }
        });
    });
}

/// The network of a container, if it is not this process's own.
fn foreign_network(tree: &[ProcessName]) -> Option<File> {
    let alive = tree.iter().find(|process| process.is_alive())?;
    let path = format!("/proc/{}/ns/net", alive.pid);
    let theirs = fs::read_link(&path).ok()?;
    let ours = fs::read_link("/proc/self/ns/net").ok()?;
    (theirs != ours).then(|| File::open(path).ok()).flatten()
}

/// Whether a line of iptables-save is one of CRIU's locks: of a connection, or the way to a chain with
/// everything.
fn is_lock(rule: &str, held: &BTreeSet<Connection>, is_foreign: bool) -> bool {
    if is_foreign && matches!(rule.trim(), "-A INPUT -j CRIU" | "-A OUTPUT -j CRIU") {
        return true;
    }
    if !rule.contains(MARK) || !rule.ends_with("-j DROP") || rule.starts_with("-A CRIU ") {
        return false;
    }
    let words: Vec<&str> = rule.split_whitespace().collect();
    let value = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).copied()
    };
    let end = |address: &str, port: &str| {
        // iptables shows one address with the length of its prefix.
        let address: IpAddr = value(address)?.split('/').next()?.parse().ok()?;
        Some(SocketAddr::new(address, value(port)?.parse().ok()?))
    };
    let (Some(from), Some(to)) = (end("-s", "--sport"), end("-d", "--dport")) else {
        return false;
    };
    held.iter().any(|connection| {
        let ends = (plain(connection.local), plain(connection.remote));
        ends == (from, to) || ends == (to, from)
    })
}

/// Whether a table of CRIU's drops packets of one of the connections.
fn is_table_of(text: &str, held: &BTreeSet<Connection>) -> bool {
    held.iter().any(|connection| {
        let (local, remote) = (plain(connection.local), plain(connection.remote));
        let element = format!(
            "{} . {} . {} . {}",
            local.ip(),
            local.port(),
            remote.ip(),
            remote.port()
        );
        text.contains(&element)
    })
}

/// An address of IPv4 that a socket of IPv6 has is one of IPv4 for the rules.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What a program prints; nothing if it is not there.
fn shown(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

fn carry_out(program: &str, args: &[&str]) {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => tracing::error!(
            "{program} {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        ),
        Err(error) => tracing::error!("{program}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> BTreeSet<Connection> {
        BTreeSet::from([Connection {
            local: "[::ffff:10.0.0.1]:7000".parse().unwrap(),
            remote: "[::ffff:10.0.0.2]:43602".parse().unwrap(),
        }])
    }

    #[test]
    fn only_locks_of_the_trees_connections_are_removed() {
        let lock = "-A INPUT -s 10.0.0.2/32 -d 10.0.0.1/32 -p tcp -m mark ! --mark 0xc114 -m tcp \
                    --sport 43602 --dport 7000 -j DROP";
        assert!(is_lock(lock, &held(), false));
        let others = [
            lock.replace("43602", "43603"),
            lock.replace("0xc114", "0x1"),
            lock.replace("DROP", "ACCEPT"),
            "-A INPUT -j CRIU".to_owned(),
            "-A CRIU -m mark ! --mark 0xc114 -j DROP".to_owned(),
        ];
        for rule in others {
            assert!(!is_lock(&rule, &held(), false), "{rule}");
        }
        assert!(is_lock("-A INPUT -j CRIU", &held(), true));
        let back = "-A OUTPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp \
                    --sport 7000 --dport 43602 -j DROP";
        assert!(is_lock(back, &held(), false));
    }

    #[test]
    fn only_connections_that_this_host_may_answer_keep_their_locks() {
        let of = |local: &str, remote: &str| Connection {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        };
        let outside = of("10.0.0.1:7000", "10.0.0.2:43602");
        let moved = [
            outside,
            of("10.0.0.1:7000", "10.0.0.1:5000"),
            of("10.0.0.1:5000", "10.0.0.1:7000"),
            of("[::ffff:127.0.0.1]:7000", "[::ffff:127.0.0.1]:1"),
        ];
        let answered = |here: bool| -> Vec<Connection> {
            let answered = moved.iter().copied();
            answered
                .filter(|connection| may_be_answered(connection, &moved, |_| here))
                .collect()
        };
        assert_eq!(answered(true), [outside]);
        assert_eq!(answered(false), []);
    }

    #[test]
    fn tables_of_other_dumps_stay() {
        let table = "elements = { 10.0.0.2 . 43602 . 10.0.0.1 . 7000,\n 10.0.0.1 . 7000 . 10.0.0.2 . 43602 }";
        assert!(is_table_of(table, &held()));
        assert!(!is_table_of(&table.replace("43602", "1"), &held()));
    }
}
