//! What is said of a container that is started anew at the destination.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::super::stateless::StatelessState;
use super::{BadBegin, Container, MigrationId, OverlayRoot, ServiceAddress};
use crate::limits::{MIGRATION_ADDRESSES_MAX, READY_BYTES_MAX, TIMEOUT_S_MAX};

/// Longest SHA-256 in hexadecimal digits, which is also the only length that it has.
const DIGEST_DIGITS: usize = 64;

/// Begins a move.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ContainerBegin {
    /// Its name.
    pub id: MigrationId,
    /// The container. Its bundle is made in the agent's directory, wherever it is at the source.
    pub container: Container,
    /// Addresses that come along, on the destination's devices.
    #[serde(default)]
    pub addresses: Vec<ServiceAddress>,
    /// After so many seconds without a request from the source the agent ends what it has, unless it is to be kept.
    pub timeout_s: u64,
    /// How long connections may go on to a container that was to be kept and is ended all the same, ms.
    #[serde(default)]
    pub drain_ms: u64,
    /// The layers below its files, if these are the writable layer of an overlay.
    #[serde(default)]
    pub overlay: Option<OverlayRoot>,
}

impl ContainerBegin {
    /// Checks what a peer said.
    pub fn check(&self) -> Result<(), BadBegin> {
        if self.addresses.len() > MIGRATION_ADDRESSES_MAX {
            return Err(BadBegin::Addresses(self.addresses.len()));
        }
        let longest_s = self.timeout_s.max(self.drain_ms / 1000);
        if longest_s > TIMEOUT_S_MAX {
            return Err(BadBegin::Timeout(longest_s));
        }
        if let Some(overlay) = self
            .overlay
            .as_ref()
            .filter(|overlay| !overlay.is_possible())
        {
            return Err(BadBegin::Layers(overlay.layers.len()));
        }
        match self.addresses.iter().find(|service| !service.is_possible()) {
            Some(bad) => Err(BadBegin::Address(bad.cidr(), bad.device.clone())),
            None => Ok(()),
        }
    }
}

/// Asks for the container to be made of the image that has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerCreate {
    /// The SHA-256 of the image, before its compression.
    pub sha256: Digest,
}

/// Asks for the container to be started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerStart {
    /// When it is ready; at once without one.
    pub ready: Option<Ready>,
    /// How long that may take, ms.
    pub limit_ms: u64,
}

impl ContainerStart {
    /// How long that may take: no clock reaches what a peer may say.
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms).min(Duration::from_secs(TIMEOUT_S_MAX))
    }
}

/// Asks for the addresses that come along.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerAddresses {
    /// Whether they are to be on their devices.
    pub up: bool,
}

/// Where a move stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Which one.
    pub id: MigrationId,
    /// Where the agent stands.
    pub state: StatelessState,
    /// Why it was ended, or what is wrong.
    pub problem: Option<String>,
    /// When the container ran, µs since 1970 by the agent's clock.
    pub started_us: Option<u64>,
    /// When it was ready, µs since 1970 by the agent's clock.
    pub ready_us: Option<u64>,
}

/// A SHA-256 in small hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// What is no SHA-256.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("a SHA-256 has {DIGEST_DIGITS} digits 0 to 9 and a to f")]
pub struct BadDigest;

impl TryFrom<String> for Digest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Digest, BadDigest> {
        let digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        match text.len() == DIGEST_DIGITS && text.chars().all(digit) {
            true => Ok(Digest(text)),
            false => Err(BadDigest),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Digest, BadDigest> {
        Digest::try_from(text.to_owned())
    }
}

impl Digest {
    /// Of the bytes of a SHA-256.
    pub fn of(bytes: &[u8; 32]) -> Digest {
        Digest(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// How a container that was started shows that it is ready.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Ready {
    /// A connection is taken, in its network.
    Tcp {
        /// An address or a name, loopback unless it was given.
        host: String,
        /// The port.
        port: u16,
    },
    /// A GET is answered by a status from 200 to 399, in its network.
    Http {
        /// An address or a name.
        host: String,
        /// The port.
        port: u16,
        /// What is asked for, with its query.
        path: String,
    },
    /// A command for its shell succeeds, in the container.
    Exec(String),
}

/// What tells of no readiness.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{0:?} is none of tcp:[HOST:]PORT, http://HOST[:PORT]/PATH and exec:COMMAND")]
pub struct BadReady(String);

/// `HOST:PORT`, an IPv6 address in brackets.
fn host_and_port(text: &str, default: Option<u16>) -> Option<(String, u16)> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        _ => (text, default?),
    };
    let bracketed = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
    let bare = bracketed.unwrap_or(host);
    let good = !bare.is_empty()
        && port > 0
        && bare.chars().all(plain)
        && bare.contains(':') == bracketed.is_some();
    good.then(|| (bare.to_owned(), port))
}

impl FromStr for Ready {
    type Err = BadReady;

    fn from_str(text: &str) -> Result<Ready, BadReady> {
        // It travels as it is written, with an address and a port that may be left out here.
        let fits = |text: &str| text.len() <= READY_BYTES_MAX;
        fits(text)
            .then(|| Ready::read(text))
            .flatten()
            .filter(|ready| fits(&ready.to_string()))
            .ok_or_else(|| BadReady(text.chars().take(100).collect()))
    }
}

impl Ready {
    fn read(text: &str) -> Option<Ready> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = match rest.parse::<u16>() {
                Ok(port) if port > 0 => ("127.0.0.1".to_owned(), port),
                _ => host_and_port(rest, None)?,
            };
            return Some(Ready::Tcp { host, port });
        }
        if let Some(rest) = text.strip_prefix("http://") {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let (host, port) = host_and_port(authority, Some(80))?;
            // Anything else could begin another header.
            if !path.chars().all(|c| c.is_ascii_graphic()) {
                return None;
            }
            let path = if path.is_empty() { "/" } else { path }.to_owned();
            return Some(Ready::Http { host, port, path });
        }
        let command = text.strip_prefix("exec:")?;
        (!command.trim().is_empty()).then(|| Ready::Exec(command.to_owned()))
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |host: &str| match host.contains(':') {
            true => format!("[{host}]"),
            false => host.to_owned(),
        };
        match self {
            Ready::Tcp { host, port } => write!(f, "tcp:{}:{port}", named(host)),
            Ready::Http { host, port, path } => write!(f, "http://{}:{port}{path}", named(host)),
            Ready::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

impl TryFrom<String> for Ready {
    type Error = BadReady;

    fn try_from(text: String) -> Result<Ready, BadReady> {
        text.parse()
    }
}

impl From<Ready> for String {
    fn from(ready: Ready) -> String {
        ready.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shows_readiness_is_read_and_written() {
        for (text, written) in [
            ("tcp:80", "tcp:127.0.0.1:80"),
            ("tcp:[::1]:80", "tcp:[::1]:80"),
            ("tcp:web:80", "tcp:web:80"),
            (
                "http://10.0.0.1/health?a=b",
                "http://10.0.0.1:80/health?a=b",
            ),
            ("http://[fd00::1]:8080", "http://[fd00::1]:8080/"),
            ("exec:test -e /ready", "exec:test -e /ready"),
        ] {
            let ready: Ready = text.parse().unwrap();
            assert_eq!(ready.to_string(), written);
            assert_eq!(written.parse(), Ok(ready));
        }
        for bad in [
            "",
            "tcp:",
            "tcp:0",
            "tcp:70000",
            "tcp:a b:1",
            "tcp:::1:80",
            "http://",
            "http:///x",
            "http://a/x y",
            "http://a/\r\nHost: b",
            "http://[fd00::1/",
            "https://a/",
            "exec: ",
            &format!("exec:{}", "a".repeat(READY_BYTES_MAX)),
            // With its port it would be too long for the agent.
            &format!("http://a/{}", "a".repeat(READY_BYTES_MAX - 9)),
        ] {
            assert!(bad.parse::<Ready>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn digests_have_one_form() {
        let digest = Digest::of(&[0xab; 32]);
        let text = String::from(digest.clone());
        assert_eq!(Digest::try_from(text.clone()), Ok(digest));
        for bad in ["", &text[1..], &text.to_uppercase(), &format!("{text}0")] {
            assert!(Digest::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
