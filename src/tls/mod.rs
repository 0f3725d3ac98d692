//! TLS as CRIU has it: X.509 certificates on both sides, from the first byte of a connection.
//!
//! ```text
//! files --> Tls --> accept, connect --> TlsStream: a handshake, then read and write
//!                          |
//!                   verify: chain, dates, revocation, name      session: rustls
//! ```
//!
//! Both sides show a certificate and check the other's. A client also checks that the server's
//! certificate is for the address it connects to, unless told not to (`--tls-no-cn-verify`). Trust
//! comes from the CA file alone: unlike CRIU, the authorities that the system trusts for the web
//! are never asked, for any of their customers could then read and write memory.
//!
//! A refused certificate is an error on both sides: here with whose it was and what is wrong, there
//! by a TLS alert, which is sent before the connection ends.

mod files;
mod session;
mod stream;
#[cfg(test)]
mod tests;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::SingleCertAndKey;
use rustls::{CipherSuite, ClientConfig, ServerConfig, SupportedCipherSuite};
use socket2::Socket;

use crate::error::{Error, Kind, Result};
#[doc(hidden)]
pub use session::{Plain, TlsSession};
pub use stream::TlsStream;
use verify::{PeerVerifier, Trust};

/// CRIU's TLS options, with its spelling and defaults.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsArgs {
    /// Secure the connection by TLS, with certificates on both sides
    #[arg(help_heading = "TLS", long)]
    pub tls: bool,

    /// The authorities that are trusted [default: /etc/pki/CA/cacert.pem]
    ///
    /// Peers whose certificates these authorities issued are trusted, and no others.
    #[arg(help_heading = "TLS", long, value_name = "FILE")]
    pub tls_cacert: Option<PathBuf>,

    /// Revoked certificates [default: /etc/pki/CA/cacrl.pem, if it is there]
    #[arg(help_heading = "TLS", long, value_name = "FILE")]
    pub tls_cacrl: Option<PathBuf>,

    /// This host's certificate [default: /etc/pki/criu/cert.pem]
    #[arg(help_heading = "TLS", long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// Its private key [default: /etc/pki/criu/private/key.pem]
    #[arg(help_heading = "TLS", long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// As a client, accept a server's certificate for another name than --address
    #[arg(help_heading = "TLS", long)]
    pub tls_no_cn_verify: bool,
}

impl TlsArgs {
    fn names_a_file(&self) -> bool {
        let files = [
            &self.tls_cacert,
            &self.tls_cacrl,
            &self.tls_cert,
            &self.tls_key,
        ];
        files.iter().any(|file| file.is_some())
    }
}

/// Who this host is and whom it trusts; makes connections secure.
#[derive(Clone, Debug)]
pub struct Tls {
    provider: Arc<CryptoProvider>,
    trust: Arc<Trust>,
    identity: Arc<SingleCertAndKey>,
    /// This host's certificate in words.
    own: Arc<str>,
    verify_name: bool,
}

impl Tls {
    /// What `args` say: `None` without `--tls`. Fails with [`Kind::Usage`] and the file's name if a
    /// file is missing or holds something else, or if certificate and key do not belong together.
    pub fn load(args: &TlsArgs) -> Result<Option<Tls>> {
        if !args.tls {
            if args.names_a_file() {
                tracing::warn!(
                    "connections are not secured: certificates are given, but --tls is not"
                );
            }
            return Ok(None);
        }
        let provider = Arc::new(quick_provider());
        let identity = files::identity(args, &provider)?;
        let trust = Arc::new(Trust {
            anchors: files::anchors(args)?,
            revocations: files::revocations(args)?,
        });
        Ok(Some(Tls {
            provider,
            trust,
            own: identity.description.into(),
            identity: Arc::new(SingleCertAndKey::from(identity.key)),
            verify_name: !args.tls_no_cn_verify,
        }))
    }

    /// Secures an accepted connection: waits for the client's handshake and checks its certificate.
    /// `peer` names it in errors.
    pub fn accept(&self, socket: Socket, peer: &str) -> Result<TlsStream> {
        let (session, verifier) = self.server_session()?;
        let mut stream = TlsStream::new(socket, session, verifier, Arc::clone(&self.own));
        match shake_hands(&mut stream, peer) {
            Err(_) if stream.has_received_nothing() => Err(Error::nothing_came(peer)),
            shaken => shaken.map(|()| stream),
        }
    }

    /// Secures a connection to the server `host`, the address or name that it was connected by.
    pub fn connect(&self, socket: Socket, host: &str) -> Result<TlsStream> {
        let mut stream = self.begin(socket, host)?;
        shake_hands(&mut stream, host)?;
        Ok(stream)
    }

    /// The same without waiting: reading from the stream goes on with the handshake, and fails if it
    /// fails.
    pub fn begin(&self, socket: Socket, host: &str) -> Result<TlsStream> {
        let name = server_name(host)?;
        let (session, verifier) = self.client_session(name)?;
        let mut stream = TlsStream::new(socket, session, verifier, Arc::clone(&self.own));
        stream.begin().map_err(|error| no_connection(host, error))?;
        Ok(stream)
    }

    /// The configuration of a server that takes part in rustls by another way than [`Tls::accept`].
    pub fn server_config(&self) -> Result<Arc<ServerConfig>> {
        Ok(self
            .server_config_with(Arc::new(self.verifier(None)))?
            .into())
    }

    /// The configuration of a client of the server `host`, and the name to connect by.
    pub fn client_config(&self, host: &str) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
        let name = server_name(host)?;
        let verifier = Arc::new(self.verifier(self.verify_name.then(|| name.clone())));
        Ok((self.client_config_with(verifier)?.into(), name))
    }

    fn server_config_with(&self, verifier: Arc<PeerVerifier>) -> Result<ServerConfig> {
        let config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_client_cert_verifier(verifier as Arc<_>);
        let mut config = config.with_cert_resolver(Arc::clone(&self.identity) as Arc<_>);
        // A ticket is a record that no reader expects, and no session is ever resumed.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(config)
    }

    fn client_config_with(&self, verifier: Arc<PeerVerifier>) -> Result<ClientConfig> {
        let config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(verifier as Arc<_>);
        let mut config = config.with_client_cert_resolver(Arc::clone(&self.identity) as Arc<_>);
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// Both ends of a connection to the server `host`, without sockets: for fuzzers.
    ///
    /// # Errors
    /// `host` is no name that a certificate can be for.
    #[doc(hidden)]
    pub fn sessions(&self, host: &str) -> Result<(TlsSession, TlsSession)> {
        let (client, _) = self.client_session(server_name(host)?)?;
        let (server, _) = self.server_session()?;
        Ok((client, server))
    }

    fn server_session(&self) -> Result<(TlsSession, Arc<PeerVerifier>)> {
        let verifier = Arc::new(self.verifier(None));
        let config = self.server_config_with(Arc::clone(&verifier))?;
        let server = UnbufferedServerConnection::new(Arc::new(config)).map_err(unusable)?;
        Ok((TlsSession::from(server), verifier))
    }

    fn client_session(&self, name: ServerName<'static>) -> Result<(TlsSession, Arc<PeerVerifier>)> {
        let checked = self.verify_name.then(|| name.clone());
        let verifier = Arc::new(self.verifier(checked));
        let config = self.client_config_with(Arc::clone(&verifier))?;
        let client = UnbufferedClientConnection::new(Arc::new(config), name).map_err(unusable)?;
        Ok((TlsSession::from(client), verifier))
    }

    fn verifier(&self, name: Option<ServerName<'static>>) -> PeerVerifier {
        let algorithms = self.provider.signature_verification_algorithms;
        PeerVerifier::new(Arc::clone(&self.trust), algorithms, name)
    }
}

/// The provider with the suites of AES-128 before those of AES-256, which take longer and protect
/// memory that is written to images unencrypted no better.
fn quick_provider() -> CryptoProvider {
    let mut provider = default_provider();
    let is_slow = |suite: &SupportedCipherSuite| {
        !matches!(
            suite.suite(),
            CipherSuite::TLS13_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
    };
    // Stable: newer versions of TLS stay first.
    let version = |suite: &SupportedCipherSuite| suite.tls13().is_none();
    provider
        .cipher_suites
        .sort_by_key(|suite| (version(suite), is_slow(suite)));
    provider
}

fn server_name(host: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).map_err(|error| {
        let text = format!("{host:?} is not a name that a certificate can be for");
        Error::wrap(Kind::Usage, text, error)
    })
}

fn shake_hands(stream: &mut TlsStream, peer: &str) -> Result<()> {
    stream
        .handshake()
        .map_err(|error| no_connection(peer, error))
}

fn no_connection(peer: &str, error: std::io::Error) -> Error {
    Error::wrap(
        Kind::PeerLost,
        format!("no TLS connection with {peer}"),
        error,
    )
}

fn unusable(error: rustls::Error) -> Error {
    Error::wrap(Kind::Usage, "TLS cannot be set up", error)
}
