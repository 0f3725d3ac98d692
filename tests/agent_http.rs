//! The agent's interface is what docs/openapi.json says: each path and method, and the fields of the answers.

#[path = "common/agent_client.rs"]
mod agent_client;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;

use agent_client::{ask, document, send};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::agent::Agent;
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

const METHODS: [&str; 5] = ["get", "post", "put", "delete", "patch"];

/// The fields of an answer are those of the schema.
fn expect_fields(document: &Value, schema: &str, answer: &Value) -> Result<()> {
    let schema = &document["components"]["schemas"][schema];
    let names = |value: &Value| -> BTreeSet<String> {
        value
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect()
    };
    let (told, known) = (names(answer), names(&schema["properties"]));
    ensure!(
        !known.is_empty() && told == known,
        "{told:?} instead of {known:?}"
    );
    for (name, property) in schema["properties"].as_object().context("properties")? {
        let value = &answer[name];
        let fits = match property["type"].as_str() {
            _ if value.is_null() => property["nullable"] == true,
            Some("string") => value.is_string(),
            Some("integer") => value.is_u64(),
            Some("boolean") => value.is_boolean(),
            Some("array") => value.is_array(),
            Some("object") => value.is_object(),
            _ => true,
        };
        ensure!(fits, "{name} is {value}");
        if let Some(choice) = property["enum"].as_array() {
            ensure!(choice.contains(value), "{name} is {value}");
        }
    }
    Ok(())
}

/// Each documented method is answered as one, and each other method is not.
fn expect_routes(document: &Value, agent: SocketAddr) -> Result<()> {
    for (path, methods) in document["paths"].as_object().context("paths")? {
        let concrete = path.replace("{id}", "unknown").replace("{number}", "1");
        let concrete = concrete.replace("{digest}", "unknown");
        let concrete = concrete.replace("{name}", "events");
        let concrete = concrete.replace("{offset}", "0");
        for method in METHODS {
            let request = format!("{} {concrete}", method.to_uppercase());
            let answer = ask(agent, &request, "")?;
            // What is no route is refused without a word.
            let is_route = answer.status != 405 && !answer.body.is_empty();
            let is_known = !methods[method].is_null();
            ensure!(is_route == is_known, "{request}: {}", answer.status);
            if is_known {
                let status = answer.status.to_string();
                let said = &methods[method]["responses"][&status];
                ensure!(
                    !said.is_null(),
                    "{request} answers {status}: {}",
                    answer.body
                );
                if answer.status != 200 {
                    expect_fields(document, "Problem", &answer.json()?)?;
                }
            }
        }
    }
    ensure!(ask(agent, "GET /v2/host", "")?.status == 404);
    Ok(())
}

/// The next event of a stream of them: its name and its data.
fn next_event(stream: &mut impl BufRead) -> Result<(String, Value)> {
    let (mut name, mut data) = (None, None);
    while name.is_none() || data.is_none() {
        let mut line = String::new();
        ensure!(stream.read_line(&mut line)? > 0, "the stream has ended");
        if let Some(text) = line.strip_prefix("event: ") {
            name = Some(text.trim().to_owned());
        } else if let Some(text) = line.strip_prefix("data: ") {
            data = Some(serde_json::from_str(text)?);
        }
    }
    name.zip(data).context("an event")
}

#[test]
fn the_interface_is_as_documented() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let document = document()?;
        let host = Agent::in_test(test_dir, criu, "agent")?;
        let agent = host.address();
        expect_routes(&document, agent)?;
        expect_fields(
            &document,
            "HostFacts",
            &ask(agent, "GET /v1/host", "")?.json()?,
        )?;
        let wanted = json!({"container": null, "addresses": [
            {"address": "10.0.0.5", "prefix": 24, "device": "no-such-device"}]});
        let check = ask(agent, "POST /v1/check", &wanted.to_string())?.json()?;
        expect_fields(&document, "Check", &check)?;
        ensure!(
            check["problems"]
                .as_array()
                .is_some_and(|list| list.len() == 1),
            "{check}"
        );
        let mut begin = json!({"id": "one", "mode": "cold", "pids": [77], "memory_bytes": 4096,
            "tcp": "refuse", "timeout_s": 60});
        let begun = ask(agent, "POST /v1/migrations", &begin.to_string())?;
        ensure!(begun.status == 200, "{}", begun.body);
        expect_fields(&document, "Status", &begun.json()?)?;
        // Twice is once too often, and what cannot be is refused.
        ensure!(ask(agent, "POST /v1/migrations", &begin.to_string())?.status == 409);
        begin["id"] = json!("../two");
        ensure!(ask(agent, "POST /v1/migrations", &begin.to_string())?.status == 400);
        let list = ask(agent, "GET /v1/migrations", "")?.json()?;
        expect_fields(&document, "Status", &list[0])?;
        expect_events(&document, agent)?;
        expect_logs(agent)?;
        let metrics = ask(agent, "GET /metrics", "")?;
        ensure!(metrics.kind.starts_with("text/plain"), "{}", metrics.kind);
        ensure!(
            metrics.body.contains("{state=\"aborted\"} 1"),
            "{}",
            metrics.body
        );
        Ok(())
    });
}

/// Who accepts a stream of events hears of each change, by either path.
fn expect_events(document: &Value, agent: SocketAddr) -> Result<()> {
    let accept = "Accept: text/event-stream\r\n";
    let streams = [
        send(agent, "GET /v1/migrations/one", accept, b"")?,
        send(agent, "GET /v1/migrations/one/events", "", b"")?,
    ];
    let mut streams = streams.map(BufReader::new);
    for stream in &mut streams {
        let (name, status) = next_event(stream)?;
        ensure!(
            name == "status" && status["state"] == "receiving",
            "{name}: {status}"
        );
        expect_fields(document, "Status", &status)?;
    }
    let plain = ask(agent, "GET /v1/migrations/one", "")?;
    ensure!(plain.kind == "application/json", "{}", plain.kind);
    ask(agent, "POST /v1/migrations/one/cancel", "null")?;
    for stream in &mut streams {
        let (_, status) = next_event(stream)?;
        ensure!(status["state"] == "aborted", "{status}");
    }
    Ok(())
}

/// What happened is told in the log of events; what is no log of a migration is not answered.
fn expect_logs(agent: SocketAddr) -> Result<()> {
    let log = ask(agent, "GET /v1/logs/one/events", "")?;
    ensure!(log.kind.starts_with("text/plain"), "{}", log.kind);
    let mut steps = Vec::new();
    for line in log.body.lines() {
        let event: Value = serde_json::from_str(line)?;
        testbed::schema::expect("event", &event)?;
        ensure!(
            event["migration"] == "one" && event["side"] == "destination",
            "{line}"
        );
        steps.push(event["step"].as_str().unwrap_or_default().to_owned());
    }
    ensure!(steps == ["begin", "discard"], "{steps:?}");
    for (path, status) in [
        ("one/criu", 404),
        ("one/begin.json", 404),
        ("one/..%2Fbegin.json", 404),
        ("two/events", 404),
        ("..%2Fone/events", 400),
    ] {
        let answer = ask(agent, &format!("GET /v1/logs/{path}"), "")?;
        ensure!(answer.status == status, "{path}: {}", answer.status);
    }
    Ok(())
}
