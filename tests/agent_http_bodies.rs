//! Bodies of requests that are not what docs/openapi.json says: each is refused with a word, changes nothing, and the
//! agent answers whoever comes next.

#[path = "common/agent_client.rs"]
mod agent_client;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;

use agent_client::{Answer, ask, ask_bytes, document};
use anyhow::{Context, Result, ensure};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use serde_json::{Value, json};
use testbed::agent::Agent;
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

/// The migration that requests are about.
const KNOWN: &str = "one";

/// The schema that is meant: behind a reference, or alone in a list of them.
fn resolve<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    if let Some(path) = schema["$ref"].as_str() {
        let path = path.trim_start_matches('#');
        let found = document.pointer(path).expect("references lead somewhere");
        return resolve(document, found);
    }
    match schema["allOf"].get(0) {
        Some(only) => resolve(document, only),
        None => schema,
    }
}

/// A value as the schema wants it.
fn honest(document: &Value, schema: &Value) -> Value {
    let schema = resolve(document, schema);
    if let Some(word) = schema["enum"].get(0) {
        return word.clone();
    }
    match schema["type"].as_str() {
        Some("object") => {
            let properties = schema["properties"].as_object().into_iter().flatten();
            let values = properties.map(|(name, of)| (name.clone(), honest(document, of)));
            Value::Object(values.collect())
        }
        Some("array") => json!([honest(document, &schema["items"])]),
        Some("integer" | "number") => json!(1),
        Some("boolean") => json!(false),
        _ => json!("x"),
    }
}

/// Values that no schema of this type takes.
fn wrong(schema: &Value) -> Vec<Value> {
    if schema["enum"].is_array() {
        return vec![json!("no-such-word"), json!(7)];
    }
    match schema["type"].as_str() {
        Some("object") if schema["properties"].is_object() => vec![json!("text"), json!(7)],
        Some("array") => vec![json!({}), json!("text")],
        Some("integer") if schema["minimum"].is_u64() => {
            vec![json!("seven"), json!(-1), json!(1.5), json!(1e300)]
        }
        Some("integer") => vec![json!("seven"), json!(1.5), json!(1e300), json!([])],
        Some("number") => vec![json!("seven"), json!({})],
        Some("boolean") => vec![json!("yes"), json!(1)],
        Some("string") => vec![json!(7), json!([]), json!({})],
        // Anything goes.
        _ => Vec::new(),
    }
}

/// The value with one thing wrong, for each thing that can be.
fn damaged(document: &Value, schema: &Value, value: &Value) -> Vec<Value> {
    let schema = resolve(document, schema);
    let mut all = wrong(schema);
    if let Some(fields) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten() {
            let mut without = fields.clone();
            without.remove(name.as_str().unwrap_or_default());
            all.push(Value::Object(without));
        }
        for (name, field) in fields {
            for bad in damaged(document, &schema["properties"][name], field) {
                let mut with = fields.clone();
                with.insert(name.clone(), bad);
                all.push(Value::Object(with));
            }
        }
    }
    if let Some(item) = value.get(0) {
        let bad = damaged(document, &schema["items"], item);
        all.extend(bad.into_iter().map(|bad| json!([bad])));
    }
    all
}

/// Bodies that are no JSON of any kind.
fn broken(honest: &str) -> Vec<Vec<u8>> {
    let deep = b"[".repeat(200_000);
    let deep_object = br#"{"id":"#.repeat(50_000);
    let mut all = vec![
        Vec::new(),
        b"\0".to_vec(),
        b"\xff\xfe{}".to_vec(),
        deep,
        deep_object,
        format!("{honest}{honest}").into_bytes(),
    ];
    let cuts = (1..8).map(|part| honest.len() * part / 8);
    all.extend(cuts.map(|cut| honest.as_bytes()[..cut].to_vec()));
    all
}

/// Streams that are no archives, batches or layers.
fn streams() -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..3000_u32)
        .map(|number| ((number * 167) >> 3).to_le_bytes()[0])
        .collect();
    let mut header = vec![0; 512];
    header[..4].copy_from_slice(b"name");
    vec![
        b"x".to_vec(),
        vec![7; 511],
        header,
        noise,
        b"PFFB".repeat(100),
    ]
}

/// What is sent to an agent, and where.
struct Bodies<'d> {
    document: &'d Value,
    agent: SocketAddr,
    count: usize,
}

impl Bodies<'_> {
    /// Sends a body that must be refused.
    fn expect_refused(&mut self, request: &str, body: &[u8]) -> Result<()> {
        let answer = ask_bytes(self.agent, request, body);
        let start = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
        let answer = answer.with_context(|| format!("{request}: {start}"))?;
        self.count += 1;
        ensure!(
            matches!(answer.status, 400 | 404 | 409 | 413),
            "{request} answers {}: {}\n{start}",
            answer.status,
            answer.body
        );
        is_problem(&answer).with_context(|| format!("{request}: {start}"))
    }

    /// Everything that is wrong, for each request with a body.
    fn expect_all_refused(&mut self) -> Result<()> {
        let document = self.document;
        for (path, methods) in document["paths"].as_object().context("paths")? {
            for method in ["post", "put"] {
                let content = &methods[method]["requestBody"]["content"];
                let Some((kind, content)) = content.as_object().and_then(|all| all.iter().next())
                else {
                    continue;
                };
                let mut requests = BTreeSet::new();
                for id in ["unknown", KNOWN, "..", "%2e%2e%2fx", "a%0ab"] {
                    let path = path.replace("{id}", id).replace("{number}", "0");
                    let path = path
                        .replace("{digest}", id)
                        .replace("{offset}", "0")
                        .replace("{name}", "events");
                    let request = format!("{} {path}", method.to_uppercase());
                    // A path without a name is the same for all.
                    if !requests.insert(request.clone()) {
                        continue;
                    }
                    match kind.as_str() {
                        "application/json" => self.json(&request, &content["schema"])?,
                        _ => {
                            for stream in streams() {
                                self.expect_refused(&request, &stream)?;
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn json(&mut self, request: &str, schema: &Value) -> Result<()> {
        // What is said with nothing to say is not looked at.
        if schema["$ref"].is_null() {
            return Ok(());
        }
        let honest = honest(self.document, schema);
        for bad in damaged(self.document, schema, &honest) {
            self.expect_refused(request, bad.to_string().as_bytes())?;
        }
        for bad in broken(&honest.to_string()) {
            self.expect_refused(request, &bad)?;
        }
        let long = format!("{honest}{}", " ".repeat(MIGRATION_JSON_BYTES_MAX));
        self.expect_refused(request, long.as_bytes())
    }
}

/// A refusal says why. That of a body which is too long comes before anybody looks at the request.
fn is_problem(answer: &Answer) -> Result<()> {
    if answer.status == 413 {
        return Ok(());
    }
    if answer.status == 404 && answer.body.is_empty() {
        // No such path.
        return Ok(());
    }
    let why = answer.json()?["error"].as_str().map(str::len);
    ensure!(why > Some(3), "it says {:?}", answer.body);
    Ok(())
}

/// Names of all files in a directory and below it.
fn names(dir: &Path, out: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => names(&path, out)?,
            false => drop(out.insert(path.display().to_string())),
        }
    }
    Ok(())
}

/// Requests that are no HTTP, or end before they are whole, end with their connections.
fn expect_broken_requests_to_end(agent: SocketAddr) -> Result<()> {
    let long = format!(
        "GET /v1/host HTTP/1.1\r\nX: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    let requests: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /v1/host\r\n\r\n",
        b"POST /v1/migrations HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{\"id\":",
        b"POST /v1/migrations HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/migrations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{",
        long.as_bytes(),
    ];
    for request in requests {
        let mut stream = TcpStream::connect(agent)?;
        stream.set_read_timeout(Some(GENEROUS))?;
        // It may have been refused by now.
        let _ = stream.write_all(request);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let is_refused = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        ensure!(is_refused, "{}: {answer}", String::from_utf8_lossy(request));
        // A reset is an end as well; a connection that stays is none.
        let stays = ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        ensure!(!stays, "{}", String::from_utf8_lossy(request));
    }
    Ok(())
}

#[test]
fn what_is_no_body_is_refused_and_changes_nothing() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let document = document()?;
        let dir = test_dir.path("agent");
        let host = Agent::start(&criu.path, &dir, None, &[])?;
        let agent = host.address();
        let begin = json!({"id": KNOWN, "mode": "cold", "pids": [77], "memory_bytes": 4096,
            "tcp": "refuse", "timeout_s": 600});
        let begun = ask(agent, "POST /v1/migrations", &begin.to_string())?;
        ensure!(begun.status == 200, "{}", begun.body);
        let (mut before, mut after) = (BTreeSet::new(), BTreeSet::new());
        names(&dir, &mut before)?;
        let known = ask(agent, "GET /v1/migrations", "")?.body;

        let mut bodies = Bodies {
            document: &document,
            agent,
            count: 0,
        };
        let refused = bodies.expect_all_refused();
        refused.with_context(|| host.log())?;
        eprintln!("{} bodies are refused", bodies.count);
        ensure!(bodies.count > 1000, "only {}", bodies.count);
        expect_broken_requests_to_end(agent)?;

        names(&dir, &mut after)?;
        ensure!(before == after, "{before:?} became {after:?}");
        let still = ask(agent, "GET /v1/migrations", "")?.body;
        ensure!(known == still, "{known} became {still}");
        ensure!(!host.log().contains("panicked"), "{}", host.log());
        let cancelled = ask(agent, "POST /v1/migrations/one/cancel", "null")?.json()?;
        ensure!(cancelled["state"] == "aborted", "{cancelled}");
        Ok(())
    });
}
