//! Certificates as an operator would make them, good and bad ones, as files that CRIU and pageferry
//! read.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};

/// An authority, with its certificate in a file.
pub struct Authority {
    dir: PathBuf,
    name: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate is to say.
#[derive(Clone, Debug)]
pub struct Host<'a> {
    /// Its common name; also the names of its files.
    pub name: &'a str,
    /// Names and addresses in its list of alternative names; without any it has no such list.
    pub alternative_names: &'a [&'a str],
    /// Number in revocation lists.
    pub serial: u64,
    /// Whether its time is over.
    pub expired: bool,
}

impl Host<'_> {
    /// A certificate for loopback, as a test mostly needs it.
    pub const LOOPBACK: Host<'static> = Host {
        name: "loopback",
        alternative_names: &["127.0.0.1", "localhost"],
        serial: 7,
        expired: false,
    };
}

/// The files of a host.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Certificate of the authority, PEM.
    pub cacert: PathBuf,
    /// Certificate of the host, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

impl Credentials {
    /// CRIU's options for them, `--tls` included.
    pub fn options(&self) -> Vec<String> {
        let option = |name: &str, path: &Path| [name.to_owned(), path.display().to_string()];
        let mut options = vec!["--tls".to_owned()];
        options.extend(option("--tls-cacert", &self.cacert));
        options.extend(option("--tls-cert", &self.cert));
        options.extend(option("--tls-key", &self.key));
        options
    }
}

impl Authority {
    /// A new authority whose files go to `dir`.
    pub fn new(dir: &Path, name: &str) -> Result<Authority> {
        let mut params = params(name, &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let path = dir.join(format!("{name}.pem"));
        fs::write(path, certificate.pem())?;
        Ok(Authority {
            dir: dir.to_owned(),
            name: name.to_owned(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Path of the authority's certificate.
    pub fn cacert(&self) -> PathBuf {
        self.dir.join(format!("{}.pem", self.name))
    }

    /// A certificate and key for `host`.
    pub fn issue(&self, host: &Host<'_>) -> Result<Credentials> {
        let mut params = params(host.name, host.alternative_names)?;
        params.serial_number = Some(SerialNumber::from(host.serial));
        params.use_authority_key_identifier_extension = true;
        if host.expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let credentials = Credentials {
            cacert: self.cacert(),
            cert: self.dir.join(format!("{}-cert.pem", host.name)),
            key: self.dir.join(format!("{}-key.pem", host.name)),
        };
        fs::write(&credentials.cert, certificate.pem())?;
        fs::write(&credentials.key, key.serialize_pem())?;
        Ok(credentials)
    }

    /// A list that says that the certificates with these numbers are revoked; it ends with the year
    /// `until`.
    pub fn revoke(&self, serials: &[u64], until: i32) -> Result<PathBuf> {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2021, 1, 1),
            next_update: date_time_ymd(until, 12, 31),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer)?;
        let path = self.dir.join(format!("{}-crl-{until}.pem", self.name));
        fs::write(&path, list.pem()?)?;
        Ok(path)
    }
}

fn params(name: &str, alternative_names: &[&str]) -> Result<CertificateParams> {
    let names: Vec<String> = alternative_names
        .iter()
        .map(|name| (*name).to_owned())
        .collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}
