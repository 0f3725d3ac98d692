//! Peers that attack TLS: sessions that are cut, and negotiated anew.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod hostile;
mod place;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::process::{Command, Stdio};

use common::{FIRST_PAGE, Run, check_images, naive_memory, tls_args};
use dump_bytes::{bare, bytes_of, frame};
use hostile::{ATTACKED, HONEST, expect_logged, opened, pages};
use pageferry::criu::header::{Op, PageFlags, Wire};
use pageferry::tls::Tls;
use place::Place;
use testbed::gate;
use testbed::pki::{Authority, Credentials, Host};
use testbed::process::Spawned;
use testbed::wait::{GENEROUS, until};

fn secured(place: &Place) -> (Spawned, Credentials, Tls) {
    let authority = Authority::new(place.root.path(), "ca").unwrap();
    let credentials = authority.issue(&Host::LOOPBACK).unwrap();
    let options = credentials.options();
    let mut words = vec!["--keep"];
    words.extend(options.iter().map(String::as_str));
    let server = place.start(&words);
    let tls = Tls::load(&tls_args(&credentials)).unwrap().unwrap();
    (server, credentials, tls)
}

/// TCP ends without TLS's own end: whoever cuts the connection on the way must not be taken for the dump's end.
#[test]
fn a_truncated_tls_session_is_no_dump() {
    let place = Place::new();
    let (server, _, tls) = secured(&place);
    let close = bytes_of(&bare(Op::Close, ATTACKED), Wire::V2);
    let whole = opened(&[pages(FIRST_PAGE, 2), close.clone()]);
    for bytes in [40, whole.len() - close.len(), whole.len() - 1] {
        let socket = place.connect();
        let peer = socket.local_addr().unwrap();
        let cut = socket.try_clone().unwrap();
        let mut stream = tls.connect(socket.into(), "127.0.0.1").unwrap();
        stream.write_all(&whole[..bytes]).unwrap();
        stream.flush().unwrap();
        stream.read_exact(&mut [9]).unwrap();
        cut.shutdown(Shutdown::Write).unwrap();
        // Whatever else it says.
        let _ = stream.read_to_end(&mut Vec::new());
        expect_logged(&place, "a truncated session", peer);
        until("no images", GENEROUS, || {
            Ok(place.image_names().is_empty().then_some(()))
        })
        .unwrap();
    }
    let mut stream = tls.connect(place.connect().into(), "127.0.0.1").unwrap();
    stream.write_all(&whole).unwrap();
    stream.flush().unwrap();
    let mut answers = [9; 5];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, [0; 5]);
    drop(server);
}

#[test]
fn tls_is_not_negotiated_anew() {
    let found = Command::new("openssl").arg("version").output();
    let Some(_) = gate::need("openssl", found) else {
        return;
    };
    let place = Place::new();
    let (server, credentials, tls) = secured(&place);
    let mut honest = tls.connect(place.connect().into(), "127.0.0.1").unwrap();
    honest
        .write_all(&bytes_of(&bare(Op::Open2, HONEST), Wire::V2))
        .unwrap();
    honest.flush().unwrap();
    honest.read_exact(&mut [9]).unwrap();

    let port = place.wait_for("port");
    let mut client = Command::new("openssl")
        .args([
            "s_client",
            "-tls1_2",
            "-connect",
            &format!("127.0.0.1:{}", port.trim()),
        ])
        .arg("-cert")
        .arg(&credentials.cert)
        .arg("-key")
        .arg(&credentials.key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A line with an R alone makes it negotiate; it comes once the session is there.
    let mut stdin = client.stdin.take().unwrap();
    let mut stdout = client.stdout.take().unwrap();
    let mut text = Vec::new();
    while !is_connected(&text) {
        let mut piece = [0; 4096];
        let bytes = stdout.read(&mut piece).unwrap();
        assert!(bytes > 0, "{}", String::from_utf8_lossy(&text));
        text.extend(&piece[..bytes]);
    }
    stdin.write_all(b"R\n").unwrap();
    let output = client.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        stderr.contains("no renegotiation") || stderr.contains("alert"),
        "{stderr}"
    );
    drop(stdin);

    let run = Run::present(FIRST_PAGE, 2, PageFlags::default(), 5);
    honest.write_all(&frame(HONEST, &run, Wire::V2)).unwrap();
    honest
        .write_all(&bytes_of(&bare(Op::Close, HONEST), Wire::V2))
        .unwrap();
    honest.flush().unwrap();
    let mut status = [9; 4];
    honest.read_exact(&mut status).unwrap();
    assert_eq!(status, [0; 4]);
    check_images(&place.images(), HONEST, &naive_memory(&[vec![run]]));
    drop(server);
}

/// What s_client prints last when it is connected.
fn is_connected(text: &[u8]) -> bool {
    String::from_utf8_lossy(text).contains("Extended master secret")
}
