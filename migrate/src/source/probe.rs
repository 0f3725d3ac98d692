//! `--probe`: when the service answers again, as somebody outside sees it.

use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

/// How long one attempt may take.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);

/// Between two of them.
const AGAIN: Duration = Duration::from_millis(5);

/// How long the service may take to answer.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// How to ask the service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Probe {
    /// A connection to this port is taken.
    Tcp(u16),
    /// This command of a shell's succeeds.
    Command(String),
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Probe, String> {
        match text.strip_prefix("tcp:") {
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => Ok(Probe::Tcp(port)),
                _ => Err(format!("{port:?} is not a TCP port")),
            },
            None if text.is_empty() => Err("an empty command".to_owned()),
            None => Ok(Probe::Command(text.to_owned())),
        }
    }
}

impl Probe {
    /// Asks the service at `host` until it answers, for at most [`PROBE_LIMIT`].
    pub(super) async fn wait(&self, host: &str) -> Result<()> {
        let answered = async {
            while !matches!(timeout(ATTEMPT_LIMIT, self.attempt(host)).await, Ok(true)) {
                sleep(AGAIN).await;
            }
        };
        timeout(PROBE_LIMIT, answered).await.map_err(|_| {
            let text = format!(
                "the service did not answer the probe for {} s",
                PROBE_LIMIT.as_secs()
            );
            Error::new(Kind::PeerLost, text)
        })
    }

    async fn attempt(&self, host: &str) -> bool {
        match self {
            Probe::Tcp(port) => TcpStream::connect((host, *port)).await.is_ok(),
            Probe::Command(text) => {
                let mut command = Command::new("sh");
                command
                    .args(["-c", text])
                    .env("PAGEFERRY_HOST", host)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .kill_on_drop(true);
                command.status().await.is_ok_and(|status| status.success())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_a_port_or_a_command() {
        assert_eq!("tcp:80".parse(), Ok(Probe::Tcp(80)));
        assert_eq!("true".parse(), Ok(Probe::Command("true".to_owned())));
        for bad in ["tcp:0", "tcp:x", "tcp:70000", ""] {
            assert!(bad.parse::<Probe>().is_err(), "{bad}");
        }
    }
}
