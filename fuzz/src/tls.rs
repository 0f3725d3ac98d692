//! TLS sessions: what a peer, or somebody between, makes of the records.

use std::fs;
use std::sync::LazyLock;

use pageferry::tls::{Plain, Tls, TlsArgs, TlsSession};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::{byte, canary, scratch, take};

/// Most plaintext that is written at once: more than two records.
const WRITE_BYTES_MAX: usize = 40_000;

/// A host that trusts itself.
static TLS: LazyLock<Tls> = LazyLock::new(|| {
    let made = certificates().expect("certificates are made");
    let place = scratch::directory();
    let [ca, cert, key] = ["ca", "cert", "key"].map(|name| place.path().join(name));
    for (path, text) in [&ca, &cert, &key].into_iter().zip(made) {
        fs::write(path, text).expect("a file is written");
    }
    let args = TlsArgs {
        tls: true,
        tls_cacert: Some(ca),
        tls_cert: Some(cert),
        tls_key: Some(key),
        ..TlsArgs::default()
    };
    let loaded = Tls::load(&args).expect("what was written is read");
    loaded.expect("TLS is on")
});

/// An authority's certificate, a host's, and the key of that.
fn certificates() -> Result<[String; 3], rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate()?;
    let ca = params.self_signed(&key)?.pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate()?;
    let host = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let cert = host.signed_by(&key, &issuer)?.pem();
    Ok([ca, cert, key.serialize_pem()])
}

/// Moves at most so many bytes of ciphertext, and lets `change` have them on their way.
fn carry(
    from: &mut TlsSession,
    to: &mut TlsSession,
    most: usize,
    change: impl FnOnce(&mut [u8]),
) -> usize {
    let bytes = from.outgoing().len().min(to.room().len()).min(most);
    let room = &mut to.room()[..bytes];
    room.copy_from_slice(&from.outgoing()[..bytes]);
    change(room);
    to.filled(bytes);
    from.sent(bytes);
    bytes
}

/// Bytes that come from nowhere.
fn insert(to: &mut TlsSession, bytes: &[u8]) {
    let room = to.room();
    let length = bytes.len().min(room.len());
    room[..length].copy_from_slice(&bytes[..length]);
    to.filled(length);
}

fn length(data: &mut &[u8]) -> usize {
    usize::from(u16::from_le_bytes(take(data)))
}

/// Whatever happens to the records, a reader gets a prefix of what was written, or an error.
pub(crate) fn records(mut data: &[u8]) {
    let (mut client, mut server) = TLS.sessions("127.0.0.1").expect("sessions are made");
    if byte(&mut data).is_multiple_of(4) {
        return handshake(client, server, data);
    }
    while !(client.handshake().expect("an honest server") & server.handshake().expect("a client")) {
        carry(&mut client, &mut server, usize::MAX, |_| {});
        carry(&mut server, &mut client, usize::MAX, |_| {});
    }
    let mut reader = Reader::default();
    let (mut written, mut disturbed) = (Vec::new(), false);
    while !data.is_empty() {
        match byte(&mut data) % 8 {
            0 | 1 if reader.is_open && written.len() < 4 * WRITE_BYTES_MAX => {
                let from = written.len();
                let bytes = length(&mut data) % WRITE_BYTES_MAX;
                let pattern = (from..from + bytes).map(|at| (at >> 3).to_le_bytes()[0]);
                written.extend(pattern);
                if client.write(&written[from..]).is_err() {
                    written.truncate(from);
                }
            }
            2 | 3 => drop(carry(&mut client, &mut server, length(&mut data), |_| {})),
            4 => {
                let (most, at, with) = (length(&mut data), length(&mut data), byte(&mut data));
                carry(&mut client, &mut server, most, |bytes| {
                    if let Some(byte) = bytes.get_mut(at) {
                        disturbed |= with != 0;
                        *byte ^= with;
                    }
                });
            }
            5 => {
                let bytes = length(&mut data).min(client.outgoing().len());
                disturbed |= bytes > 0;
                client.sent(bytes);
            }
            6 => {
                let most = usize::from(byte(&mut data));
                let (bytes, rest) = data.split_at(data.len().min(most));
                disturbed |= !bytes.is_empty();
                insert(&mut server, bytes);
                data = rest;
            }
            _ => {
                let _ = client.close();
                reader.is_open = false;
            }
        }
        if !reader.read(&mut server, usize::from(byte(&mut data)) * 80 + 1, &written) {
            assert!(disturbed, "an honest peer is understood");
            return;
        }
    }
    if disturbed {
        return;
    }
    while carry(&mut client, &mut server, usize::MAX, |_| {}) > 0 {
        assert!(reader.read(&mut server, 9000, &written), "it is understood");
    }
    assert_eq!(reader.got, written.len(), "all has come");
    canary(reader.got > WRITE_BYTES_MAX && reader.has_ended);
}

/// What one end has got.
struct Reader {
    got: usize,
    has_ended: bool,
    /// The other end may write.
    is_open: bool,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader {
            got: 0,
            has_ended: false,
            is_open: true,
        }
    }
}

impl Reader {
    /// Reads what there is. False after an error, of which the session does not recover.
    fn read(&mut self, server: &mut TlsSession, room: usize, written: &[u8]) -> bool {
        let mut out = vec![0; room];
        loop {
            match server.read(&mut out) {
                Ok(Plain::Bytes(bytes)) => {
                    let expected = written.get(self.got..self.got + bytes);
                    assert_eq!(Some(&out[..bytes]), expected, "what was written comes");
                    self.got += bytes;
                }
                Ok(Plain::NeedsInput) => return true,
                Ok(Plain::Ended) => {
                    self.has_ended = true;
                    return true;
                }
                Err(_) => {
                    assert!(server.read(&mut out).is_err(), "there is no more of it");
                    return false;
                }
            }
        }
    }
}

/// A handshake that somebody disturbs fails or waits for more; it does not end well with other words than were said.
fn handshake(mut client: TlsSession, mut server: TlsSession, mut data: &[u8]) {
    for _ in 0..byte(&mut data) % 3 {
        let _ = (client.handshake(), server.handshake());
        carry(&mut client, &mut server, usize::MAX, |_| {});
        carry(&mut server, &mut client, usize::MAX, |_| {});
    }
    let _ = client.handshake();
    let (at, with) = (length(&mut data), byte(&mut data));
    carry(&mut client, &mut server, usize::MAX, |bytes| {
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= with;
        }
    });
    for piece in data.chunks(700) {
        insert(&mut server, piece);
        if server.handshake().is_err() {
            assert!(server.handshake().is_err());
            assert!(server.read(&mut [0; 10]).is_err());
            return;
        }
    }
}

/// Some writes that arrive; a cut; damage; an end.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let all = [2, 0xff, 0xff, 100];
    let write = [0, 0, 40, 100];
    let end = [7, 100];
    let long = [0, 0x30, 0x75, 255];
    vec![
        [&[1][..], &long, &all, &all, &long, &all, &all, &end, &all].concat(),
        [&[1][..], &write, &all].concat(),
        [&[1][..], &write, &[2, 9, 1, 1], &write, &all, &all, &end].concat(),
        [&[1][..], &write, &[4, 0xff, 0xff, 30, 0, 1, 1]].concat(),
        [&[1][..], &write, &[5, 9, 0, 1], &all].concat(),
        [&[1][..], &[6, 5, 23, 3, 3, 0, 1, 1]].concat(),
        vec![0, 1, 9, 0, 3, 22, 3, 3, 0, 4, 1, 0, 0, 0],
        vec![0, 0, 0, 0, 0, 22, 3, 1, 0, 4, 1, 0, 0, 0],
    ]
}
