//! Both ends of a connection, over loopback.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use proptest::prelude::*;
use testbed::pki::{Authority, Credentials, Host};

use super::session::RECORD_BYTES;
use super::*;

/// What both sides came to.
type Outcome = (Result<TlsStream>, Result<TlsStream>);

fn args(credentials: &Credentials) -> TlsArgs {
    TlsArgs {
        tls: true,
        tls_cacert: Some(credentials.cacert.clone()),
        tls_cert: Some(credentials.cert.clone()),
        tls_key: Some(credentials.key.clone()),
        ..TlsArgs::default()
    }
}

fn load(args: &TlsArgs) -> Tls {
    Tls::load(args).unwrap().unwrap()
}

fn sockets() -> (Socket, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client.into(), listener.accept().unwrap().0.into())
}

/// A handshake between the two, whose first exchange of bytes is part of it: in TLS 1.3 a client
/// learns only then that it was refused.
fn shake_hands(client: &TlsArgs, server: &TlsArgs, host: &str) -> Outcome {
    let (client_socket, server_socket) = sockets();
    let (client, server) = (load(client), load(server));
    let exchange = |stream: Result<TlsStream>| {
        stream.and_then(|mut stream| {
            let exchanged = stream.write_all(b"x").and_then(|()| stream.flush());
            let exchanged = exchanged.and_then(|()| stream.read_exact(&mut [0]));
            let failed = |error| Error::wrap(Kind::PeerLost, "the first exchange", error);
            exchanged.map_err(failed).map(|()| stream)
        })
    };
    thread::scope(|scope| {
        let server = scope.spawn(|| exchange(server.accept(server_socket, "the client")));
        let client = exchange(client.connect(client_socket, host));
        (client, server.join().unwrap())
    })
}

#[test]
fn both_sides_trust_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let both = args(&authority.issue(&Host::LOOPBACK).unwrap());
    for host in ["127.0.0.1", "localhost"] {
        let (client, server) = shake_hands(&both, &both, host);
        client.unwrap();
        server.unwrap();
    }
}

/// Both sides' errors as text.
fn refusal((client, server): Outcome) -> (String, String) {
    (
        client.unwrap_err().to_string(),
        server.unwrap_err().to_string(),
    )
}

#[test]
fn a_bad_certificate_is_named_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let other = Authority::new(dir.path(), "other-ca").unwrap();
    let good = args(&authority.issue(&Host::LOOPBACK).unwrap());
    let expired = Host {
        name: "expired",
        serial: 8,
        expired: true,
        ..Host::LOOPBACK
    };
    let expired = args(&authority.issue(&expired).unwrap());
    let revoked = Host {
        name: "revoked",
        serial: 9,
        ..Host::LOOPBACK
    };
    let revoked = args(&authority.issue(&revoked).unwrap());
    let foreign = Host {
        name: "foreign",
        ..Host::LOOPBACK
    };
    let foreign = TlsArgs {
        tls_cacert: good.tls_cacert.clone(),
        ..args(&other.issue(&foreign).unwrap())
    };
    let strict = TlsArgs {
        tls_cacrl: Some(authority.revoke(&[9], 2099).unwrap()),
        ..good.clone()
    };
    let cases = [
        (&expired, "CN=expired", "expired", "CertificateExpired"),
        (&revoked, "CN=revoked", "revoked", "CertificateRevoked"),
        (&foreign, "CN=foreign", "--tls-cacert", "UnknownCA"),
    ];
    for (bad, whose, here, there) in cases {
        let (client, server) = refusal(shake_hands(bad, &strict, "127.0.0.1"));
        assert!(server.contains(whose) && server.contains(here), "{server}");
        assert!(client.contains(whose) && client.contains(there), "{client}");
        let (client, server) = refusal(shake_hands(&strict, bad, "127.0.0.1"));
        assert!(client.contains(whose) && client.contains(here), "{client}");
        assert!(server.contains(whose) && server.contains(there), "{server}");
    }
    // The list says nothing of others.
    shake_hands(&good, &strict, "127.0.0.1").0.unwrap();

    let stale = TlsArgs {
        tls_cacrl: Some(authority.revoke(&[], 2022).unwrap()),
        ..good.clone()
    };
    let (_, server) = refusal(shake_hands(&good, &stale, "127.0.0.1"));
    assert!(server.contains("out of date"), "{server}");
}

#[test]
fn a_server_must_be_the_one_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let issue = |name: &str, alternative_names: &[&str]| {
        let host = Host {
            name,
            alternative_names,
            ..Host::LOOPBACK
        };
        args(&authority.issue(&host).unwrap())
    };
    let elsewhere = issue("elsewhere", &["10.1.2.3", "elsewhere.example"]);
    let (client, server) = refusal(shake_hands(&elsewhere, &elsewhere, "127.0.0.1"));
    assert!(client.contains("is not for 127.0.0.1"), "{client}");
    assert!(server.contains("BadCertificate"), "{server}");
    let lax = TlsArgs {
        tls_no_cn_verify: true,
        ..elsewhere.clone()
    };
    shake_hands(&lax, &elsewhere, "127.0.0.1").0.unwrap();

    // A common name counts where there is no other.
    for host in ["127.0.0.1", "server.example"] {
        let common = issue(host, &[]);
        shake_hands(&common, &common, host).0.unwrap();
        assert!(shake_hands(&common, &common, "127.0.0.2").0.is_err());
        let both = issue(host, &["10.1.2.3"]);
        assert!(shake_hands(&both, &both, host).0.is_err());
    }
}

#[test]
fn a_peer_without_tls_is_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = load(&args(&authority.issue(&Host::LOOPBACK).unwrap()));
    let silent_bytes = [0_u8; 24];
    let (client, server) = sockets();
    (&client).write_all(&silent_bytes).unwrap();
    let error = tls.accept(server, "the client").unwrap_err().to_string();
    assert!(error.contains("--tls"), "{error}");

    let (client, server) = sockets();
    drop(server);
    let error = tls.connect(client, "127.0.0.1").unwrap_err().to_string();
    assert!(error.contains("--tls"), "{error}");
}

#[test]
fn files_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let good = args(&authority.issue(&Host::LOOPBACK).unwrap());
    let other = authority
        .issue(&Host {
            name: "other",
            ..Host::LOOPBACK
        })
        .unwrap();
    let missing = dir.path().join("missing.pem");
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let cases = [
        (
            TlsArgs {
                tls_cacert: Some(missing.clone()),
                ..good.clone()
            },
            "--tls-cacert",
        ),
        (
            TlsArgs {
                tls_cacert: Some(empty.clone()),
                ..good.clone()
            },
            "--tls-cacert",
        ),
        (
            TlsArgs {
                tls_cert: Some(missing.clone()),
                ..good.clone()
            },
            "--tls-cert",
        ),
        (
            TlsArgs {
                tls_key: Some(empty),
                ..good.clone()
            },
            "--tls-key",
        ),
        (
            TlsArgs {
                tls_key: Some(other.key),
                ..good.clone()
            },
            "--tls-key",
        ),
        (
            TlsArgs {
                tls_cacrl: Some(missing),
                ..good.clone()
            },
            "--tls-cacrl",
        ),
    ];
    for (args, option) in cases {
        let error = Tls::load(&args).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains(option), "{error}");
    }
    assert!(Tls::load(&TlsArgs::default()).unwrap().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Whatever is written arrives, in pieces of any length, and then the end.
    #[test]
    fn bytes_arrive_as_they_were_written(
        writes in prop::collection::vec(1..3 * RECORD_BYTES, 1..20),
        reads in prop::collection::vec(1..70_000_usize, 1..20),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path(), "ca").unwrap();
        let both = args(&authority.issue(&Host::LOOPBACK).unwrap());
        let (client, server) = shake_hands(&both, &both, "127.0.0.1");
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        let total: usize = writes.iter().sum();
        let sent: Vec<u8> = (0..=250).cycle().take(total).collect();
        let got = thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let (mut got, mut reads) = (Vec::<u8>::new(), reads.iter().cycle());
                loop {
                    let mut buffer = vec![0; *reads.next().unwrap()];
                    match server.read(&mut buffer).unwrap() {
                        0 => return got,
                        bytes => got.extend(&buffer[..bytes]),
                    }
                }
            });
            let mut rest = sent.as_slice();
            for bytes in &writes {
                let (now, later) = rest.split_at(*bytes);
                client.write_all(now).unwrap();
                rest = later;
            }
            client.close().unwrap();
            reader.join().unwrap()
        });
        prop_assert!(got == sent);
    }
}

/// Moves ciphertext from one session to the other.
fn carry(from: &mut TlsSession, to: &mut TlsSession) -> usize {
    let bytes = from.outgoing().len().min(to.room().len());
    to.room()[..bytes].copy_from_slice(&from.outgoing()[..bytes]);
    to.filled(bytes);
    from.sent(bytes);
    bytes
}

fn sessions(tls: &Tls) -> (TlsSession, TlsSession) {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let (client, _) = tls.client_session(name).unwrap();
    let (server, _) = tls.server_session().unwrap();
    (client, server)
}

#[test]
fn quick_suites_come_first_within_each_version() {
    let suites = quick_provider().cipher_suites;
    let older = suites.iter().position(|suite| suite.tls13().is_none());
    let older = older.unwrap();
    assert_eq!(suites[0].suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert!(suites[older..].iter().all(|suite| suite.tls13().is_none()));
    let name = format!("{:?}", suites[older].suite());
    assert!(name.ends_with("AES_128_GCM_SHA256"), "{name}");
    assert_eq!(suites.len(), default_provider().cipher_suites.len());
}

#[test]
fn each_write_begins_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let tls = load(&args(&authority.issue(&Host::LOOPBACK).unwrap()));
    let (mut client, mut server) = sessions(&tls);
    while !(client.handshake().unwrap() & server.handshake().unwrap()) {
        carry(&mut client, &mut server);
        carry(&mut server, &mut client);
    }
    assert!(server.outgoing().is_empty());
    for bytes in [32, 4096, 32, 2 * RECORD_BYTES + 1] {
        server.write(&vec![1; bytes]).unwrap();
    }
    let (mut rest, mut records) = (server.outgoing(), 0);
    while let [_, _, _, high, low, ..] = *rest {
        rest = &rest[5 + usize::from(u16::from_be_bytes([high, low]))..];
        records += 1;
    }
    assert_eq!((records, rest.len()), (6, 0));
}

proptest! {
    /// Whatever a peer says instead of a handshake, or in the middle of one, is an error or awaits
    /// more; and after an error there is no more of it.
    #[test]
    fn no_peer_can_break_a_session(
        garbage in prop::collection::vec(any::<u8>(), 1..600),
        clean in 0..4_usize, at in any::<prop::sample::Index>(), overwrite: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path(), "ca").unwrap();
        let tls = load(&args(&authority.issue(&Host::LOOPBACK).unwrap()));
        let (mut client, mut server) = sessions(&tls);
        for _ in 0..clean {
            let _ = (client.handshake(), server.handshake());
            carry(&mut client, &mut server);
            carry(&mut server, &mut client);
        }
        let _ = client.handshake();
        let flight = client.outgoing().to_vec();
        let mut said = flight.clone();
        let at = at.index(flight.len() + 1);
        let until = if overwrite { (at + garbage.len()).min(said.len()) } else { at };
        said.splice(at..until, garbage);
        for piece in said.chunks(700) {
            server.room()[..piece.len()].copy_from_slice(piece);
            server.filled(piece.len());
            if server.handshake().is_err() {
                server.queue_alert();
                prop_assert!(server.handshake().is_err());
                prop_assert!(server.read(&mut [0; 10]).is_err());
                return Ok(());
            }
        }
    }
}

#[test]
fn a_file_of_another_kind_is_named_with_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca").unwrap();
    let issued = authority.issue(&Host::LOOPBACK).unwrap();
    let good = args(&issued);
    let text = dir.path().join("text");
    std::fs::write(&text, "no certificate\n").unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let swapped = [
        (
            TlsArgs {
                tls_cert: Some(issued.key.clone()),
                ..good.clone()
            },
            "--tls-cert",
            "PRIVATE KEY",
        ),
        (
            TlsArgs {
                tls_key: Some(issued.cert.clone()),
                ..good.clone()
            },
            "--tls-key",
            "CERTIFICATE",
        ),
        (
            TlsArgs {
                tls_cacert: Some(issued.key.clone()),
                ..good.clone()
            },
            "--tls-cacert",
            "PRIVATE KEY",
        ),
        (
            TlsArgs {
                tls_cacrl: Some(issued.cert.clone()),
                ..good.clone()
            },
            "--tls-cacrl",
            "CERTIFICATE",
        ),
        (
            TlsArgs {
                tls_cert: Some(text),
                ..good.clone()
            },
            "--tls-cert",
            "nothing in PEM form",
        ),
        (
            TlsArgs {
                tls_cacert: Some(empty),
                ..good
            },
            "--tls-cacert",
            "is empty",
        ),
    ];
    for (args, option, holds) in swapped {
        let error = Tls::load(&args).unwrap_err().to_string();
        assert!(error.contains(option) && error.contains(holds), "{error}");
    }
}
