//! The agent's socket, plain or under TLS, for axum.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::CLIENTS_MAX;
use pageferry::tls::Tls;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait when no connection can be accepted (too many descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepted connections, ready for HTTP.
pub(super) struct Listener {
    port: Option<u16>,
    ready: mpsc::Receiver<(Connection, From)>,
}

/// Who is at the other end: the address, or loopback for a unix socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct From(pub(super) IpAddr);

impl Connected<IncomingStream<'_, Listener>> for From {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> From {
        *stream.remote_addr()
    }
}

/// A stream of any kind.
pub(super) struct Connection(Box<dyn Stream>);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

impl Listener {
    /// Listens at `place`.
    pub(super) async fn bind(place: &Peer, tls: Option<&Tls>) -> Result<Listener> {
        let failed = |error| {
            let text = format!("cannot listen on {place} (is the port in use? 0 takes a free one)");
            Error::wrap(Kind::Usage, text, error)
        };
        let (give, ready) = mpsc::channel(CLIENTS_MAX);
        let port = match place {
            Peer::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).await;
                let listener = listener.map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let acceptor = match tls {
                    Some(tls) => Some(TlsAcceptor::from(tls.server_config()?)),
                    None => None,
                };
                tokio::spawn(accept_tcp(listener, acceptor, give));
                Some(port)
            }
            Peer::Unix(path) => {
                tokio::spawn(accept_unix(UnixListener::bind(path).map_err(failed)?, give));
                None
            }
        };
        Ok(Listener { port, ready })
    }

    /// The TCP port.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = From;

    async fn accept(&mut self) -> (Connection, From) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task has ended with its socket: nobody comes any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<From> {
        Ok(From(Ipv4Addr::UNSPECIFIED.into()))
    }
}

fn not_accepted(error: io::Error) -> Error {
    Error::wrap(Kind::Io, "cannot accept a connection", error)
}

async fn accept_tcp(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    give: mpsc::Sender<(Connection, From)>,
) {
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("{}", not_accepted(error));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let from = From(address.ip().to_canonical());
        // A place is taken before the handshake, so that silent peers are bounded in number.
        let Ok(place) = give.clone().reserve_owned().await else {
            return;
        };
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            if let Some(connection) = secure(stream, acceptor, address.to_string()).await {
                place.send((connection, from));
            }
        });
    }
}

async fn secure(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    peer: String,
) -> Option<Connection> {
    // An improvement that a connection can do without.
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else {
        return Some(Connection(Box::new(stream)));
    };
    match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(Connection(Box::new(stream))),
        Ok(Err(error)) => {
            tracing::warn!("{peer}: no TLS connection: {error}");
            None
        }
        Err(_) => {
            tracing::warn!(
                "{peer}: no TLS handshake within {} s",
                HANDSHAKE_TIMEOUT.as_secs()
            );
            None
        }
    }
}

async fn accept_unix(listener: UnixListener, give: mpsc::Sender<(Connection, From)>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let from = From(Ipv4Addr::LOCALHOST.into());
                if give
                    .send((Connection(Box::new(stream)), from))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!("{}", not_accepted(error));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
