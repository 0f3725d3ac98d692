//! Whether a container that was started is ready, asked in its own network.

use std::fs::File;
use std::io;
use std::net::{TcpStream as StdStream, ToSocketAddrs};
use std::thread;
use std::time::Duration;

use axum::body::Body;
use hyper::client::conn::http1::handshake;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use nix::sched::{CloneFlags, setns};
use pageferry::migration::messages::{ContainerId, Ready};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::runtime::Runtime;

/// How long one attempt may take.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);

/// A container whose readiness is checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadinessCheck<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) id: &'a ContainerId,
    /// Its first process.
    pub(super) pid: i32,
}

impl ReadinessCheck<'_> {
    /// Asks once. Returns why it is not ready.
    pub(super) async fn is_ready(self, ready: &Ready) -> Result<(), String> {
        let asked = async {
            match ready {
                Ready::Tcp { host, port } => self.connect(host, *port).await.map(drop),
                Ready::Http { host, port, path } => {
                    let stream = self.connect(host, *port).await?;
                    get(stream, host, path).await
                }
                Ready::Exec(text) => match self.runtime.exec(self.id, text, ATTEMPT_LIMIT).await {
                    true => Ok(()),
                    false => Err("the command fails".to_owned()),
                },
            }
        };
        let late = || format!("no answer for {} s", ATTEMPT_LIMIT.as_secs());
        timeout(ATTEMPT_LIMIT, asked)
            .await
            .unwrap_or_else(|_| Err(late()))
    }

    /// A connection within the container's network.
    async fn connect(self, host: &str, port: u16) -> Result<TcpStream, String> {
        let network = format!("/proc/{}/ns/net", self.pid);
        let host = host.to_owned();
        let (sender, connected) = oneshot::channel();
        // A thread of its own: it never leaves the network that it enters.
        thread::spawn(move || {
            let connect = || -> io::Result<StdStream> {
                setns(File::open(&network)?, CloneFlags::CLONE_NEWNET)?;
                let mut last = io::Error::from(io::ErrorKind::NotFound);
                for address in (host.as_str(), port).to_socket_addrs()? {
                    match StdStream::connect_timeout(&address, ATTEMPT_LIMIT) {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            };
            // Whoever asked may have given up.
            let _ = sender.send(connect());
        });
        let stream = connected.await.map_err(|error| error.to_string())?;
        let stream = stream.map_err(|error| error.to_string())?;
        stream
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(stream))
            .map_err(|error| error.to_string())
    }
}

/// Whether a GET is answered well.
async fn get(stream: TcpStream, host: &str, path: &str) -> Result<(), String> {
    let failed = |error: hyper::Error| error.to_string();
    let (mut connection, driver) = handshake::<_, Body>(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        // What goes wrong is told to whoever waits for an answer.
        let _ = driver.await;
    });
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::CONNECTION, "close")
        .body(Body::empty())
        .map_err(|error| error.to_string())?;
    let status = connection
        .send_request(request)
        .await
        .map_err(failed)?
        .status();
    match status.is_success() || status.is_redirection() {
        true => Ok(()),
        false => Err(format!("it answers {status}")),
    }
}
