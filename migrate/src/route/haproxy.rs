//! Two servers of a backend of HAProxy's, steered by its runtime API: requests go to the second instead of the first.
//!
//! ```text
//! haproxy:SOCKET/BACKEND/OLD->NEW        haproxy:/run/haproxy/admin.sock/web/here->there
//! ```
//!
//! | step | the server NEW | the server OLD |
//! |---|---|---|
//! | switch | a weight of 0 becomes OLD's, `state ready`, waits until it is up | then `state drain`: its connections go on |
//! | given back | then its weight and state as they were | its weight and state as they were |

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

/// How long one command may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Longest answer, bytes: a line for each server of a backend.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// How long the second server may take to be up, by HAProxy's health checks.
const UP_LIMIT: Duration = Duration::from_secs(30);

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Bits of `srv_admin_state`: maintenance, and no new connections, each if somebody asked for it.
const FORCED_MAINTENANCE: u32 = 0x01;
const FORCED_DRAIN: u32 = 0x08;

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Haproxy {
    /// A unix socket's path, or HOST:PORT.
    socket: String,
    backend: String,
    old: String,
    new: String,
}

/// A server as HAProxy shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Server {
    /// The weight that was set last.
    weight: u32,
    admin_state: u32,
    /// Whether it is up.
    up: bool,
}

impl Server {
    /// The word that brings this state back.
    fn state_word(self) -> &'static str {
        match self.admin_state {
            bits if bits & FORCED_MAINTENANCE != 0 => "maint",
            bits if bits & FORCED_DRAIN != 0 => "drain",
            _ => "ready",
        }
    }
}

/// Whether HAProxy could have this name, and a command line of it takes it as one word.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
}

impl FromStr for Haproxy {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Haproxy, String> {
        let wrong = || {
            format!(
                "{text:?} names no servers of HAProxy's: SOCKET/BACKEND/OLD->NEW, as \
                 /run/haproxy/admin.sock/web/here->there; SOCKET is a path or HOST:PORT"
            )
        };
        let mut parts = text.rsplitn(3, '/');
        let mut next = || parts.next().ok_or_else(wrong);
        let (servers, backend, socket) = (next()?, next()?, next()?);
        let (old, new) = servers.split_once("->").ok_or_else(wrong)?;
        let found = match socket.starts_with('/') {
            true => socket.len() > 1,
            false => Peer::parse(socket).is_ok(),
        };
        match found && [backend, old, new].into_iter().all(is_name) && old != new {
            true => Ok(Haproxy {
                socket: socket.to_owned(),
                backend: backend.to_owned(),
                old: old.to_owned(),
                new: new.to_owned(),
            }),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for Haproxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Haproxy {
            socket,
            backend,
            old,
            new,
        } = self;
        write!(f, "{socket}/{backend}/{old}->{new}")
    }
}

impl Haproxy {
    /// Looks at both servers.
    ///
    /// # Errors
    /// HAProxy does not answer, or does not send requests to the first one.
    pub(super) async fn look(&self) -> Result<[Server; 2]> {
        let both = self.servers().await?;
        let [old, _] = both;
        if old.state_word() != "ready" || old.weight == 0 {
            let text = format!(
                "the route haproxy:{self}: server {} takes no requests (its weight is {}, its state {})",
                self.old,
                old.weight,
                old.state_word()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(both)
    }

    /// Leads new connections to the second server.
    pub(super) async fn switch(&self) -> Result<()> {
        let [old, new] = self.servers().await?;
        if new.weight == 0 {
            self.set(&self.new, &format!("weight {}", old.weight))
                .await?;
        }
        self.set(&self.new, "state ready").await?;
        let start = Instant::now();
        while !self.servers().await?[1].up {
            if start.elapsed() > UP_LIMIT {
                let text = format!(
                    "the route haproxy:{self}: server {} is not up after {} s by HAProxy's checks",
                    self.new,
                    UP_LIMIT.as_secs()
                );
                return Err(Error::new(Kind::PeerLost, text));
            }
            sleep(LOOK_AGAIN).await;
        }
        self.set(&self.old, "state drain").await
    }

    /// Brings both servers back to where they were, the first one first.
    pub(super) async fn give_back(&self, before: &[Server; 2]) -> Result<()> {
        let now = self.servers().await?;
        let servers = [&self.old, &self.new].into_iter().zip(before).zip(now);
        for ((name, before), now) in servers {
            if now.weight != before.weight {
                self.set(name, &format!("weight {}", before.weight)).await?;
            }
            if now.state_word() != before.state_word() {
                let state = format!("state {}", before.state_word());
                self.set(name, &state).await?;
            }
        }
        Ok(())
    }

    async fn set(&self, server: &str, what: &str) -> Result<()> {
        let command = format!("set server {}/{server} {what}", self.backend);
        let answer = self.ask(&command).await?;
        match answer.trim() {
            "" => Ok(()),
            line => {
                let text = format!("HAProxy at {} answers `{command}`: {line}", self.socket);
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    async fn servers(&self) -> Result<[Server; 2]> {
        let command = format!("show servers state {}", self.backend);
        let answer = self.ask(&command).await?;
        let find = |name: &str| {
            server(&answer, name).ok_or_else(|| {
                let line = answer.trim().lines().next().unwrap_or_default();
                let text = format!(
                    "HAProxy at {} shows no server {}/{name}: {line}",
                    self.socket, self.backend
                );
                Error::new(Kind::Usage, text)
            })
        };
        Ok([find(&self.old)?, find(&self.new)?])
    }

    /// Asks one command, over a connection of its own.
    async fn ask(&self, command: &str) -> Result<String> {
        let lost = |error: io::Error| {
            let text = format!(
                "HAProxy's runtime API at {} (`stats socket ... level admin` in its configuration)",
                self.socket
            );
            Error::wrap(Kind::Usage, text, error)
        };
        let asked = async {
            match self.socket.starts_with('/') {
                true => exchange(UnixStream::connect(self.path()).await?, command).await,
                false => exchange(TcpStream::connect(&self.socket).await?, command).await,
            }
        };
        timeout(ANSWER_LIMIT, asked)
            .await
            .map_err(|_| lost(io::ErrorKind::TimedOut.into()))?
            .map_err(lost)
    }

    fn path(&self) -> PathBuf {
        Path::new(&self.socket).to_owned()
    }
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    command: &str,
) -> io::Result<String> {
    stream.write_all(format!("{command}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_string(&mut answer)
        .await?;
    Ok(answer)
}

/// Finds a server in what `show servers state BACKEND` says: a version, a line of names, a line for each server.
fn server(answer: &str, name: &str) -> Option<Server> {
    let names = answer.lines().find_map(|line| line.strip_prefix("# "))?;
    let column = |wanted: &str| names.split(' ').position(|name| name == wanted);
    let at = ["srv_name", "srv_uweight", "srv_admin_state", "srv_op_state"].map(column);
    let [
        Some(of_name),
        Some(of_weight),
        Some(of_admin),
        Some(of_state),
    ] = at
    else {
        return None;
    };
    answer
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(' ').collect::<Vec<&str>>())
        .find(|words| words.get(of_name) == Some(&name))
        .and_then(|words| {
            let number = |at: usize| words.get(at)?.parse::<u32>().ok();
            Some(Server {
                weight: number(of_weight)?,
                admin_state: number(of_admin)?,
                // 0 is stopped, 1 starting, 2 running, 3 stopping.
                up: matches!(number(of_state)?, 1 | 2),
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight\n\
        3 web 1 here 10.0.0.1 2 0 7 1\n3 web 2 there 10.0.0.2 0 1 0 0\n\n";

    #[test]
    fn servers_are_found_by_the_names_of_columns() {
        let here = server(SHOWN, "here").unwrap();
        assert_eq!(
            (here.weight, here.state_word(), here.up),
            (7, "ready", true)
        );
        let there = server(SHOWN, "there").unwrap();
        assert_eq!(
            (there.weight, there.state_word(), there.up),
            (0, "maint", false)
        );
        assert_eq!(server(SHOWN, "elsewhere"), None);
        assert_eq!(server("No such backend.\n", "here"), None);
    }

    #[test]
    fn the_state_that_was_asked_for_comes_back() {
        let of = |admin_state| {
            Server {
                weight: 1,
                admin_state,
                up: true,
            }
            .state_word()
        };
        // A drain by the configuration's weight of 0 is no request of anybody's.
        assert_eq!(
            [0, 0x10, 0x08, 0x01, 0x09].map(of),
            ["ready", "ready", "drain", "maint", "maint"]
        );
    }
}
