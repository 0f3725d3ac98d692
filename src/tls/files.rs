//! Reads certificates, keys and revocation lists, all PEM.

use std::path::{Path, PathBuf};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, TrustAnchor};
use rustls::sign::CertifiedKey;
use webpki::{CertRevocationList, OwnedCertRevocationList, anchor_from_trusted_cert};

use super::TlsArgs;
use super::verify::CertificateSummary;
use crate::error::{Error, Kind, Result};

/// Where CRIU looks without the options.
const CACERT: &str = "/etc/pki/CA/cacert.pem";
const CACRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";

/// What this host shows to peers.
pub(super) struct Identity {
    pub(super) key: CertifiedKey,
    /// The certificate in words.
    pub(super) description: String,
}

/// A file with the option that names it, for messages.
struct File {
    path: PathBuf,
    option: &'static str,
    /// What should be in it.
    holds: &'static str,
}

impl File {
    fn new(
        given: Option<&PathBuf>,
        default: &str,
        option: &'static str,
        holds: &'static str,
    ) -> File {
        File {
            path: given.map_or_else(|| PathBuf::from(default), PathBuf::clone),
            option,
            holds,
        }
    }

    fn unusable(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        // The whole path: a relative one is looked for in the work directory, as for CRIU.
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let path = path.display();
        Error::wrap(
            Kind::Usage,
            format!("cannot use {path} ({})", self.option),
            error,
        )
    }

    /// All items of one sort in the file, at least one.
    fn read_all<T: PemObject>(&self) -> Result<Vec<T>> {
        let items = T::pem_file_iter(&self.path).and_then(Iterator::collect);
        let items: Vec<T> = items.map_err(|error| self.unreadable(error))?;
        if items.is_empty() {
            return Err(self.unusable(self.holds_something_else()));
        }
        Ok(items)
    }

    /// The error for a file that is no PEM file, or not the expected one.
    fn unreadable(&self, error: pem::Error) -> Error {
        match error {
            pem::Error::NoItemsFound => self.unusable(self.holds_something_else()),
            pem::Error::Io(error) => self.unusable(error),
            error => self.unusable(format!("it is not a valid PEM file: {error:?}")),
        }
    }

    /// What the file holds instead of what the option names.
    fn holds_something_else(&self) -> String {
        let wanted = self.holds;
        let text = std::fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut kinds: Vec<&str> = text
            .lines()
            .filter_map(|line| {
                line.trim()
                    .strip_prefix("-----BEGIN ")?
                    .strip_suffix("-----")
            })
            .collect();
        kinds.dedup();
        match kinds.is_empty() {
            true if text.trim().is_empty() => {
                format!("it is empty; it should hold {wanted} in PEM form")
            }
            true => format!("it holds nothing in PEM form; it should hold {wanted}"),
            false => format!("it holds {}, not {wanted}", kinds.join(", ")),
        }
    }
}

/// This host's certificate chain and key.
pub(super) fn identity(args: &TlsArgs, provider: &CryptoProvider) -> Result<Identity> {
    let cert = File::new(args.tls_cert.as_ref(), CERT, "--tls-cert", "a certificate");
    let key = File::new(args.tls_key.as_ref(), KEY, "--tls-key", "a private key");
    let chain: Vec<CertificateDer<'static>> = cert.read_all()?;
    let description = CertificateSummary(&chain[0]).to_string();
    let private = PrivateKeyDer::from_pem_file(&key.path).map_err(|error| key.unreadable(error))?;
    let key = CertifiedKey::from_der(chain, private, provider).map_err(|error| {
        let cert = cert.path.display();
        key.unusable(error).within(format!("as the key of {cert}"))
    })?;
    Ok(Identity { key, description })
}

/// The authorities that are trusted.
pub(super) fn anchors(args: &TlsArgs) -> Result<Vec<TrustAnchor<'static>>> {
    let file = File::new(
        args.tls_cacert.as_ref(),
        CACERT,
        "--tls-cacert",
        "certificates",
    );
    let certificates: Vec<CertificateDer<'static>> = file.read_all()?;
    let anchor =
        |certificate| anchor_from_trusted_cert(certificate).map(|anchor| anchor.to_owned());
    let anchors = certificates
        .iter()
        .map(anchor)
        .collect::<std::result::Result<_, _>>();
    anchors.map_err(|error| file.unusable(error))
}

/// The revocation lists; none if there is no file and none was named.
pub(super) fn revocations(args: &TlsArgs) -> Result<Vec<CertRevocationList<'static>>> {
    if args.tls_cacrl.is_none() && !Path::new(CACRL).exists() {
        return Ok(Vec::new());
    }
    let file = File::new(
        args.tls_cacrl.as_ref(),
        CACRL,
        "--tls-cacrl",
        "revocation lists",
    );
    let lists: Vec<CertificateRevocationListDer<'static>> = file.read_all()?;
    let parse = |list: &CertificateRevocationListDer<'_>| {
        OwnedCertRevocationList::from_der(list).map(CertRevocationList::from)
    };
    let lists = lists
        .iter()
        .map(parse)
        .collect::<std::result::Result<_, _>>();
    lists.map_err(|error| file.unusable(error))
}
