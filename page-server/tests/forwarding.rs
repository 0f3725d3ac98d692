//! Two page-server processes and ferry between them.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;
mod watch;

use std::io::{Read, Write};

use nix::sys::signal::Signal;
use place::{Place, fail, send_dump, succeed, whole_dump};
use serde_json::Value;
use watch::{expect_metrics, summaries};

/// Forwarding `options` to the server of `far`.
fn forwarding(far: &Place, options: &[&str]) -> Vec<String> {
    let far = format!("127.0.0.1:{}", far.wait_for("port").trim());
    let mut all = vec!["--forward".to_owned(), far];
    all.extend(options.iter().map(ToString::to_string));
    all
}

fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

#[test]
fn a_dump_is_forwarded_and_both_end_by_themselves() {
    let (far, near) = (Place::new(), Place::new());
    let far_server = far.start(&[]);
    let near_server = near.start(&strs(&forwarding(&far, &["--streams", "2"])));
    send_dump(&mut near.connect());
    succeed(near_server);
    succeed(far_server);
    far.check_images();
    assert_eq!(near.image_names(), Vec::<String>::new());
}

#[test]
fn kept_servers_forward_and_sum_up_session_by_session() {
    let (far, near) = (Place::new(), Place::new());
    let keep = ["--keep", "--summary-json", "sessions"];
    let template = ["--images-dir-template", "{seq}"];
    let mut far_server = far.start(&[&keep[..], &template].concat());
    let options = [&keep[..], &["--metrics", "127.0.0.1:0"]].concat();
    let mut near_server = near.start(&strs(&forwarding(&far, &options)));
    send_dump(&mut near.connect());
    summaries(&near.sessions(), 1);
    let mut cut = near.connect();
    let dump = whole_dump();
    cut.write_all(&dump[..dump.len() / 2]).unwrap();
    drop(cut);
    let (sent, received) = (
        summaries(&near.sessions(), 2),
        summaries(&far.sessions(), 2),
    );
    assert_eq!(sent[0]["forwarded"], true);
    assert_eq!(sent[0]["received_bytes"], 100 * 4096);
    let kinds = ["zero", "same", "shared", "delta", "zstd", "raw"];
    let pages = |line: &Value, kind: &str| line["sent"][kind]["pages"].as_u64().unwrap();
    assert_eq!(
        kinds.map(|kind| pages(&sent[0], kind)).iter().sum::<u64>(),
        100
    );
    assert_eq!(received[0]["stored"], true);
    assert_eq!(received[0]["wire_bytes"], sent[0]["frame_bytes"]);
    assert_eq!(received[0]["pages"]["received"], 100);
    assert_eq!(sent[1]["forwarded"], false);
    assert!(sent[1]["error"].as_str().unwrap().contains("pid 7"));
    assert_eq!(received[1]["stored"], false);
    // The failed session's directory is gone with it.
    assert_eq!(far.image_names(), ["1"]);

    let lines = [
        "pageferry_sessions_total{outcome=\"succeeded\"} 1",
        "pageferry_sessions_total{outcome=\"failed\"} 1",
        "pageferry_forwarded_pages_total{kind=\"raw\"}",
        "pageferry_forwarded_frame_bytes_total",
    ];
    expect_metrics(&near.log(), &lines);
    for server in [&mut near_server, &mut far_server] {
        server.signal(Signal::SIGTERM).unwrap();
    }
    succeed(near_server);
    succeed(far_server);
}

#[test]
fn received_pages_are_stored_as_the_far_end_is_told() {
    let (far, near) = (Place::new(), Place::new());
    let options = ["--compress", "--summary-json", "sessions"];
    let far_server = far.start(&options);
    let near_server = near.start(&strs(&forwarding(&far, &[])));
    send_dump(&mut near.connect());
    succeed(near_server);
    succeed(far_server);
    far.check_images();
    let stored = summaries(&far.sessions(), 1)[0]["kept"]["stored_bytes"]
        .as_u64()
        .unwrap();
    assert!(stored > 0 && stored < 90 * 4096, "{stored} bytes");
}

#[test]
fn a_far_end_that_is_not_there_fails_the_dump() {
    let near = Place::new();
    let nobody = ["--forward", "127.0.0.1:1", "--reconnect-timeout", "1"];
    let near_server = near.start(&nobody);
    let mut dump = near.connect();
    // The server hangs up at any word.
    let _ = dump.write_all(&whole_dump());
    let mut answers = Vec::new();
    let _ = dump.read_to_end(&mut answers);
    assert!(answers.is_empty());
    fail(near_server);
    assert!(near.log().contains("--reconnect-timeout"), "{}", near.log());
}
