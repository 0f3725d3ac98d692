//! The source's side of the agent's HTTP interface.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::messages::Problem;
use pageferry::tls::Tls;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What went wrong at an agent's host, as it reports it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct AgentProblem(pub(crate) String);

/// Whether an error is one that an agent has reported.
pub(crate) fn is_of_agent(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<AgentProblem>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Speaks to one agent. Connections are kept for the next request.
#[derive(Clone)]
pub(crate) struct AgentClient {
    peer: Peer,
    tls: Option<Tls>,
    idle: Arc<Mutex<Vec<SendRequest<Body>>>>,
}

impl fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentClient of {}", self.peer)
    }
}

impl AgentClient {
    /// Of the agent at `peer`.
    pub(crate) fn new(peer: Peer, tls: Option<Tls>) -> AgentClient {
        AgentClient {
            peer,
            tls,
            idle: Arc::default(),
        }
    }

    /// Where the agent is.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Makes connections now that are needed when every millisecond counts.
    pub(crate) async fn warm(&self, connections: usize) -> Result<()> {
        for _ in 0..connections {
            let connection = self.connect().await?;
            self.put_back(connection);
        }
        Ok(())
    }

    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        self.call(Method::GET, path, Body::empty()).await
    }

    pub(crate) async fn post<R: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<R> {
        let text = serde_json::to_vec(body)
            .map_err(|error| Error::wrap(Kind::Usage, "a request cannot be written", error))?;
        self.call(Method::POST, path, Body::from(text)).await
    }

    /// Sends `text`, which is JSON.
    pub(crate) async fn post_text<R: DeserializeOwned>(
        &self,
        path: &str,
        text: Vec<u8>,
    ) -> Result<R> {
        self.call(Method::POST, path, Body::from(text)).await
    }

    /// Sends `body` as it comes.
    pub(crate) async fn put<R: DeserializeOwned>(&self, path: &str, body: Body) -> Result<R> {
        self.call(Method::PUT, path, body).await
    }

    /// The bytes of an answer that is no JSON, at most `limit` of them.
    pub(crate) async fn get_bytes(&self, path: &str, limit: usize) -> Result<Bytes> {
        self.exchange((Method::GET, path), Body::empty(), limit)
            .await
    }

    async fn call<R: DeserializeOwned>(&self, method: Method, path: &str, body: Body) -> Result<R> {
        let request = (method, path);
        let bytes = self.exchange(request, body, MIGRATION_JSON_BYTES_MAX);
        serde_json::from_slice(&bytes.await?).map_err(|error| {
            let text = format!(
                "the agent at {} answers {path} in a form that is not known here",
                self.peer
            );
            Error::wrap(Kind::Protocol, text, error)
        })
    }

    /// Asks, and takes the answer's bytes, at most `limit`.
    async fn exchange(
        &self,
        (method, path): (Method, &str),
        body: Body,
        limit: usize,
    ) -> Result<Bytes> {
        let lost = |error: hyper::Error| {
            Error::wrap(
                Kind::PeerLost,
                format!("the agent at {} is lost", self.peer),
                error,
            )
        };
        let mut connection = match self.take_idle() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "agent")
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| Error::wrap(Kind::Usage, "a request cannot be made", error))?;
        let response = connection.send_request(request).await.map_err(lost)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limit);
        let body = body.collect().await.map_err(|error| {
            Error::wrap(
                Kind::PeerLost,
                format!("the answer of the agent at {}", self.peer),
                error,
            )
        })?;
        let bytes = body.to_bytes();
        self.put_back(connection);
        if status != StatusCode::OK {
            let text = serde_json::from_slice::<Problem>(&bytes)
                .map_or_else(|_| status.to_string(), |problem| problem.error);
            let of = format!("the agent at {}", self.peer);
            return Err(Error::wrap(Kind::Protocol, of, AgentProblem(text)));
        }
        Ok(bytes)
    }

    fn take_idle(&self) -> Option<SendRequest<Body>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(connection) = idle.pop() {
            if connection.is_ready() {
                return Some(connection);
            }
        }
        None
    }

    fn put_back(&self, connection: SendRequest<Body>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(connection);
    }

    async fn connect(&self) -> Result<SendRequest<Body>> {
        let lost = |error: std::io::Error| {
            let advice = match error.kind() {
                std::io::ErrorKind::ConnectionRefused => {
                    " (start `pageferry agent --listen` there)"
                }
                std::io::ErrorKind::TimedOut => " (does a firewall drop its port?)",
                _ => "",
            };
            let text = format!("cannot reach the agent at {}{advice}", self.peer);
            Error::wrap(Kind::PeerLost, text, error)
        };
        let slow = |_| lost(std::io::ErrorKind::TimedOut.into());
        match &self.peer {
            Peer::Tcp { host, port } => {
                let made = TcpStream::connect((host.as_str(), *port));
                let stream = timeout(CONNECT_TIMEOUT, made)
                    .await
                    .map_err(slow)?
                    .map_err(lost)?;
                stream.set_nodelay(true).map_err(lost)?;
                match &self.tls {
                    None => http_client(stream).await,
                    Some(tls) => {
                        let (config, name) = tls.client_config(host)?;
                        let secured = TlsConnector::from(config).connect(name, stream);
                        let secured = timeout(CONNECT_TIMEOUT, secured).await.map_err(slow)?;
                        http_client(secured.map_err(lost)?).await
                    }
                }
            }
            Peer::Unix(path) => http_client(UnixStream::connect(path).await.map_err(lost)?).await,
        }
    }
}

async fn http_client<S>(stream: S) -> Result<SendRequest<Body>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |error| Error::wrap(Kind::PeerLost, "the agent does not speak HTTP", error);
    let (connection, driver) = handshake(TokioIo::new(stream)).await.map_err(failed)?;
    tokio::spawn(async move {
        // What goes wrong is told to whoever waits for an answer.
        let _ = driver.await;
    });
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_of_an_agent_are_told_from_problems_here() {
        let of_agent = Error::wrap(
            Kind::Protocol,
            "the agent at x:1",
            AgentProblem("no".to_owned()),
        );
        assert_eq!(of_agent.to_string(), "the agent at x:1: no");
        assert!(is_of_agent(&of_agent));
        let outer = Error::wrap(Kind::Protocol, "begin", of_agent);
        assert!(is_of_agent(&outer));
        assert!(is_of_agent(&outer.within("more")));
        assert!(!is_of_agent(&Error::new(
            Kind::PeerLost,
            "the agent is lost"
        )));
    }
}
