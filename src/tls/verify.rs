//! Whether a peer's certificate is to be believed: its chain, its dates, its revocation, its name.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::SignatureScheme;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Authorities whose signatures are trusted, and revoked certificates.
#[derive(Debug)]
pub(super) struct Trust {
    pub(super) anchors: Vec<TrustAnchor<'static>>,
    pub(super) revocations: Vec<CertRevocationList<'static>>,
}

/// Checks the certificate of the peer of one connection.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    trust: Arc<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
    /// The name that the certificate must be for, if that matters.
    name: Option<ServerName<'static>>,
    /// What was wrong with it, for the log: rustls has no room for more than a kind.
    problem: Mutex<Option<String>>,
}

impl PeerVerifier {
    pub(super) fn new(
        trust: Arc<Trust>,
        algorithms: WebPkiSupportedAlgorithms,
        name: Option<ServerName<'static>>,
    ) -> PeerVerifier {
        PeerVerifier {
            trust,
            algorithms,
            name,
            problem: Mutex::new(None),
        }
    }

    /// What was wrong with the peer's certificate, if something was.
    pub(super) fn problem(&self) -> Option<String> {
        let problem = self.problem.lock();
        problem.unwrap_or_else(PoisonError::into_inner).take()
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let verified = self
            .verify_chain(end_entity, intermediates, now)
            .map_err(|error| (kind_of(&error), explain(&error)))
            .and_then(|()| match &self.name {
                Some(name) if !is_for(end_entity, name) => Err((
                    CertificateError::NotValidForName,
                    format!("is not for {}", name.to_str()),
                )),
                _ => Ok(()),
            });
        verified.map_err(|(kind, explanation)| {
            let text = format!(
                "the certificate of {} {explanation}",
                CertificateSummary(end_entity)
            );
            let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
            *problem = Some(text);
            rustls::Error::InvalidCertificate(kind)
        })
    }

    fn verify_chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let certificate = EndEntityCert::try_from(end_entity)?;
        let revocations: Vec<_> = self.trust.revocations.iter().collect();
        // Authorities without a list are believed, as by CRIU; a list out of date is not.
        let revocation = RevocationOptionsBuilder::new(&revocations)
            .ok()
            .map(|options| {
                let options = options.with_status_policy(UnknownStatusPolicy::Allow);
                options
                    .with_expiration_policy(ExpirationPolicy::Enforce)
                    .build()
            });
        let verify = |usage| {
            let anchors = &self.trust.anchors;
            let algorithms = self.algorithms.all;
            certificate
                .verify_for_usage(
                    algorithms,
                    anchors,
                    intermediates,
                    now,
                    usage,
                    revocation,
                    None,
                )
                .map(|_| ())
        };
        // A host has one certificate for both roles and CRIU looks at neither purpose.
        match verify(KeyUsage::server_auth()) {
            Err(webpki::Error::RequiredEkuNotFoundContext(_)) => verify(KeyUsage::client_auth()),
            result => result,
        }
    }
}

/// What both verifiers say of signatures, whose traits have methods of the same names.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, dss, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now)
            .map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}

/// The kind that gives the peer the right alert.
fn kind_of(error: &webpki::Error) -> CertificateError {
    match error {
        webpki::Error::BadDer | webpki::Error::TrailingData(_) => CertificateError::BadEncoding,
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::CrlExpired { .. } => CertificateError::ExpiredRevocationList,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other.clone()))),
    }
}

/// What an operator can do something about.
fn explain(error: &webpki::Error) -> String {
    match error {
        webpki::Error::CertExpired { .. } => "has expired".to_owned(),
        webpki::Error::CertNotValidYet { .. } => {
            "is not valid yet: is the clock of this host right?".to_owned()
        }
        webpki::Error::CertRevoked => "was revoked (--tls-cacrl)".to_owned(),
        webpki::Error::CrlExpired { .. } => {
            "cannot be checked: the revocation list (--tls-cacrl) is out of date".to_owned()
        }
        webpki::Error::UnknownIssuer => {
            "was not issued by an authority that is trusted here (--tls-cacert)".to_owned()
        }
        webpki::Error::CaUsedAsEndEntity => {
            "is that of an authority: give the host one that the authority issued".to_owned()
        }
        other => format!("is not acceptable: {other}"),
    }
}

/// Whether a certificate is for `name`. One that has no alternative names is for its common name, as
/// GnuTLS has it: CRIU's documentation makes such certificates.
fn is_for(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok(parsed) = EndEntityCert::try_from(certificate) else {
        return false;
    };
    parsed.verify_is_valid_for_subject_name(name).is_ok() || is_common_name(certificate, name)
}

fn is_common_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let names_hosts = |general: &GeneralName<'_>| {
        matches!(general, GeneralName::DNSName(_) | GeneralName::IPAddress(_))
    };
    match parsed.subject_alternative_name() {
        Ok(Some(names)) if names.value.general_names.iter().any(names_hosts) => return false,
        Ok(_) => {}
        Err(_) => return false,
    }
    let mut common_names = parsed.subject().iter_common_name();
    common_names.any(|common| match (common.as_str(), name) {
        (Ok(text), ServerName::DnsName(dns)) => text.eq_ignore_ascii_case(dns.as_ref()),
        (Ok(text), ServerName::IpAddress(address)) => text.parse() == Ok(IpAddr::from(*address)),
        _ => false,
    })
}

/// A certificate in words: whose it is, who issued it, until when.
pub(super) struct CertificateSummary<'a>(pub(super) &'a CertificateDer<'a>);

impl fmt::Display for CertificateSummary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok((_, parsed)) = X509Certificate::from_der(self.0) else {
            return f.write_str("somebody (it cannot be read)");
        };
        write!(
            f,
            "\"{}\" (issued by \"{}\", serial {}, valid from {} to {})",
            parsed.subject().to_string().escape_debug(),
            parsed.issuer().to_string().escape_debug(),
            parsed.raw_serial_as_string(),
            parsed.validity().not_before,
            parsed.validity().not_after,
        )
    }
}
