//! What an operator watches of a page-server: its metrics, and the summaries of its sessions.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use serde_json::Value;
use testbed::schema;
use testbed::wait::{GENEROUS, until};
use testbed::workspace::root;

/// Fails unless the metrics of the server that writes `log` have all of `lines`.
pub(crate) fn expect_metrics(log: &str, lines: &[&str]) {
    let (_, address) = log.split_once("http://").unwrap();
    let (address, _) = address.split_once("/metrics").unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut metrics = String::new();
    client.read_to_string(&mut metrics).unwrap();
    for line in lines {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    expect_documented(&metrics);
}

/// Fails unless each metric of an answer is documented, with its type.
fn expect_documented(metrics: &str) {
    let document = fs::read_to_string(root().join("docs/reference/metrics.md")).unwrap();
    let types = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    let types: Vec<(&str, &str)> = types.filter_map(|line| line.split_once(' ')).collect();
    assert!(!types.is_empty(), "{metrics}");
    for (name, kind) in types {
        let row = format!("| `{name}` | {kind} | ");
        assert!(document.contains(&row), "{row} is not documented");
    }
}

/// The lines of the summaries in `file`, as soon as there are `count`.
pub(crate) fn summaries(file: &Path, count: usize) -> Vec<Value> {
    until("summaries", GENEROUS, || {
        let text = fs::read_to_string(file)?;
        let lines = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        let lines: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
        for line in &lines {
            schema::expect("page-server-summary", line)?;
        }
        Ok((lines.len() == count).then_some(lines))
    })
    .unwrap()
}
