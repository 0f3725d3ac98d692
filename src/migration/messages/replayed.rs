//! What is said of a service that is told a log at the destination.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::super::log_replay::ReplayState;
use super::{BadBegin, Digest, MigrationId, ServiceAddress};
use crate::limits::{
    COMMAND_BYTES_MAX, MIGRATION_ADDRESSES_MAX, SERVICE_ADDRESS_BYTES_MAX, TIMEOUT_S_MAX,
};

/// Begins a move.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplayBegin {
    /// Its name.
    pub id: MigrationId,
    /// Where the service listens at the destination, `HOST:PORT`.
    pub address: String,
    /// The command of a shell that runs the service, in the foreground.
    pub start: String,
    /// The command of a shell that reads the log. Without one the log is a recorder's.
    pub feed: Option<String>,
    /// Whether bytes of answers are compared, and not only their number.
    pub verify: bool,
    /// For tests: whether pieces are sent without waiting for answers.
    #[serde(default)]
    pub wrong_order: bool,
    /// How long to wait where the recorder did, µs.
    pub wait_us: u32,
    /// How long an answer, a digest, or the start may take, ms.
    pub stall_ms: u64,
    /// After so many seconds without a request from the source the agent ends what it has, unless it is to be kept.
    pub timeout_s: u64,
}

/// Something in [`ReplayBegin`] that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BadReplay {
    /// An address without a port.
    #[error("{0:?} is not a HOST:PORT")]
    Address(String),
    /// A command that no shell takes.
    #[error("a command of {0} bytes: 1 to {COMMAND_BYTES_MAX} can be run")]
    Command(usize),
    /// A time that no clock reaches.
    #[error("a time of {0} s: at most {TIMEOUT_S_MAX} s are waited for")]
    Time(u64),
}

/// Whether an address can be connected to: a peer may have said anything.
fn is_address(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:%[]".contains(c);
    let port = text.rsplit_once(':').map(|(host, port)| {
        let port = port.parse::<u16>().is_ok_and(|port| port > 0);
        !host.is_empty() && port
    });
    text.len() <= SERVICE_ADDRESS_BYTES_MAX && text.chars().all(plain) && port == Some(true)
}

/// Whether a shell can be given a command.
fn check_command(text: &str) -> Result<(), BadReplay> {
    match (1..=COMMAND_BYTES_MAX).contains(&text.len()) && !text.contains('\0') {
        true => Ok(()),
        false => Err(BadReplay::Command(text.len())),
    }
}

impl ReplayBegin {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadReplay> {
        if !is_address(&self.address) {
            let shown = self.address.chars().take(100).collect();
            return Err(BadReplay::Address(shown));
        }
        check_command(&self.start)?;
        self.feed.as_deref().map_or(Ok(()), check_command)?;
        match self.timeout_s.max(self.stall_ms / 1000) {
            longest if longest > TIMEOUT_S_MAX => Err(BadReplay::Time(longest)),
            _ => Ok(()),
        }
    }

    /// How long an answer may take.
    pub fn stall(&self) -> Duration {
        Duration::from_millis(self.stall_ms).min(Duration::from_secs(TIMEOUT_S_MAX))
    }
}

/// Asks for the service to be started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplayStart {
    /// The SHA-256 of the snapshot that has come, if there is one.
    pub snapshot: Option<Digest>,
}

/// Asks for the end of the replay.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplayFinish {
    /// What has been sent: entries of a recorder's log, bytes of another one.
    pub sent: u64,
    /// The command of a shell that prints the service's state.
    pub digest: Option<String>,
}

impl ReplayFinish {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadReplay> {
        self.digest.as_deref().map_or(Ok(()), check_command)
    }
}

/// Asks for the addresses that come along.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplayAddresses {
    /// Those to be brought up, on the destination's devices; none: those that were are taken off.
    pub up: Vec<ServiceAddress>,
}

impl ReplayAddresses {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadBegin> {
        if self.up.len() > MIGRATION_ADDRESSES_MAX {
            return Err(BadBegin::Addresses(self.up.len()));
        }
        match self.up.iter().find(|service| !service.is_possible()) {
            Some(bad) => Err(BadBegin::Address(bad.cidr(), bad.device.clone())),
            None => Ok(()),
        }
    }
}

/// Where a move stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplayStatus {
    /// Which one.
    pub id: MigrationId,
    /// Where the agent stands.
    pub state: ReplayState,
    /// Why it was ended, or what is wrong.
    pub problem: Option<String>,
    /// How much of the log has come: entries of a recorder's, bytes of another one.
    pub taken: u64,
    /// Of what has come, bytes that were replayed.
    pub replayed_bytes: u64,
    /// What the digest printed, once the replay has finished; bytes that are no text are escaped.
    pub digest: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> ReplayBegin {
        ReplayBegin {
            id: "r-1".parse().unwrap(),
            address: "127.0.0.1:6379".to_owned(),
            start: "exec redis-server".to_owned(),
            feed: None,
            verify: true,
            wrong_order: false,
            wait_us: 2000,
            stall_ms: 60_000,
            timeout_s: 600,
        }
    }

    #[test]
    fn what_no_peer_should_say_is_refused() {
        assert_eq!(begin().check(), Ok(()));
        for address in ["", "host", ":1", "host:0", "host:70000", "a b:1", "h\n:1"] {
            let address = address.to_owned();
            let bad = ReplayBegin { address, ..begin() };
            assert!(bad.check().is_err(), "{bad:?}");
        }
        let ipv6 = "[fd00::1]:80".to_owned();
        let good = ReplayBegin {
            address: ipv6,
            ..begin()
        };
        assert_eq!(good.check(), Ok(()));
        for command in ["", "a\0b", &"x".repeat(COMMAND_BYTES_MAX + 1)] {
            let start = command.to_owned();
            assert!(ReplayBegin { start, ..begin() }.check().is_err());
            let feed = Some(command.to_owned());
            assert!(ReplayBegin { feed, ..begin() }.check().is_err());
            let digest = Some(command.to_owned());
            assert!(ReplayFinish { sent: 0, digest }.check().is_err());
        }
        for (timeout_s, stall_ms) in [(u64::MAX, 1), (1, u64::MAX)] {
            let bad = ReplayBegin {
                timeout_s,
                stall_ms,
                ..begin()
            };
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
