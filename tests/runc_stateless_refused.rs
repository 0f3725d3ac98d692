//! What an agent refuses of containers that are to be started anew: what a hostile source says, and what the host's
//! runtime does not make.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::web::{self, Web};
use testbed::{gate, runc};

/// A place with the service, unless there is no runc.
fn with_web(test: impl FnOnce(&Web) -> Result<()>) {
    with_criu(
        Suite::Sid,
        |test_dir: &TestDir, criu: &Criu| match gate::need("runc", runc::find()) {
            Some(()) => test(&Web::start(test_dir, criu, "runc")?),
            None => Ok(()),
        },
    );
}

/// An answer of the agent's: its status and its text.
fn ask(agent: SocketAddr, request: &str, body: &[u8]) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(agent)?;
    stream.set_read_timeout(Some(GENEROUS))?;
    let head = format!(
        "{request} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, text))
}

#[test]
fn what_a_hostile_source_says_is_refused() {
    with_web(|web| {
        let agent = web.agent.address();
        let ask = |request: &str, body: &[u8]| {
            let (request, body) = (request.to_owned(), body.to_owned());
            web.three.client.enter(move || ask(agent, &request, &body))
        };
        let config = json!({"process": {"args": ["/bin/answers"]}, "root": {"path": "/etc"}});
        let container = json!({"id": web::name(), "runtime": "runc", "bundle": "/etc", "bundle_is_given": true,
            "config": config, "resources": null});
        let begin = |id: &str, container: &Value| {
            let begin = json!({"id": id, "container": container, "timeout_s": 600});
            ask("POST /v1/containers", begin.to_string().as_bytes())
        };
        for id in ["../x", "", "a/b"] {
            ensure!(begin(id, &container)?.0 == 400, "{id}");
        }
        let mut bound = container.clone();
        bound["config"]["mounts"] =
            json!([{"destination": "/x", "type": "bind", "source": "/nonexistent/x"}]);
        ensure!(begin("bound", &bound)?.0 == 409);
        ensure!(begin("one", &container)?.0 == 200);
        ensure!(begin("one", &container)?.0 == 409);
        let post = |what: &str, body: &Value| {
            ask(
                &format!("POST /v1/containers/one/{what}"),
                body.to_string().as_bytes(),
            )
        };
        let sum = json!({"sha256": "0".repeat(64)});
        // Nothing can be done in another order, and an image is what it is said to be.
        ensure!(post("create", &sum)?.0 == 400);
        ensure!(post("create", &json!({"sha256": "x"}))?.0 == 400);
        ensure!(post("start", &json!({"ready": null, "limit_ms": 1}))?.0 == 409);
        ensure!(post("start", &json!({"ready": "http://a/\r\nb", "limit_ms": 1}))?.0 == 400);
        ensure!(post("keep", &Value::Null)?.0 == 409);
        ensure!(post("addresses", &json!({"up": true}))?.0 == 409);
        ensure!(ask("PUT /v1/containers/one/image", b"no image")?.0 == 400);
        ensure!(post("create", &sum)?.0 == 400);
        let (status, said) = post("cancel", &Value::Null)?;
        ensure!(status == 200 && said.contains("aborted"), "{said}");
        ensure!(ask("PUT /v1/containers/one/image", b"")?.0 == 409);
        ensure!(!web.bundle_there("one").exists());
        ensure!(web.state_there()?.is_none());
        Ok(())
    });
}

/// The controllers of version 2 beside those of version 1, if this host has both.
fn controllers_of_both() -> Option<String> {
    let groups = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(groups.join("unified/cgroup.controllers")).ok()?;
    let has_both = !groups.join("cgroup.controllers").exists() && !controllers.trim().is_empty();
    has_both.then(|| controllers.trim().to_owned())
}

#[test]
fn a_host_with_both_control_groups_takes_no_container_of_crun() {
    with_web(|web| {
        let Some(crun) = found("crun") else {
            return Ok(());
        };
        let bundle = web.bundle().to_owned();
        let container = json!({"id": web::name(), "runtime": "crun", "bundle": bundle, "bundle_is_given": true,
            "config": {"process": {"args": ["/bin/answers"]}, "root": {"path": "rootfs"}}, "resources": null});
        let begin = json!({"id": "crun", "container": container, "timeout_s": 600}).to_string();
        let agent = web.agent.address();
        let (status, said) = web
            .three
            .client
            .enter(move || ask(agent, "POST /v1/containers", begin.as_bytes()))?;
        match controllers_of_both() {
            // crun itself says so, of the same bundle.
            Some(controllers) => {
                ensure!(
                    status == 409 && said.contains(&format!("({controllers})")),
                    "{said}"
                );
                let mut run = web.three.source.net.command(crun);
                run.args(["run", "--detach", "--bundle"]).arg(web.bundle());
                let refused = run.arg("refused").output()?;
                let words = String::from_utf8_lossy(&refused.stderr).into_owned();
                ensure!(
                    !refused.status.success() && words.contains("hybrid"),
                    "{words}"
                );
            }
            None => ensure!(status == 200, "{said}"),
        }
        Ok(())
    });
}

/// A runtime of this machine.
fn found(runtime: &'static str) -> Option<&'static str> {
    let mut version = Command::new(runtime);
    let found = testbed::process::run(version.arg("--version"));
    gate::need(runtime, found.map(|_| runtime))
}
