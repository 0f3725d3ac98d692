//! Asks an agent over HTTP, a connection for each request, and reads what docs/openapi.json says.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::wait::GENEROUS;

/// What an agent has answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Its Content-Type.
    pub(crate) kind: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| self.body.clone())
    }

    fn parse(text: &str) -> Result<Answer> {
        let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let kind = head.lines().find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-type: ")
                .map(str::to_owned)
        });
        Ok(Answer {
            status,
            kind: kind.unwrap_or_default(),
            body: body.to_owned(),
        })
    }
}

/// Sends a request over a connection of its own.
pub(crate) fn send(
    agent: SocketAddr,
    request: &str,
    headers: &str,
    body: &[u8],
) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(agent)?;
    stream.set_read_timeout(Some(GENEROUS))?;
    let length = body.len();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n"
    )?;
    // An agent may have refused by now what it has not read.
    let _ = stream.write_all(body);
    Ok(stream)
}

pub(crate) fn ask(agent: SocketAddr, request: &str, body: &str) -> Result<Answer> {
    ask_bytes(agent, request, body.as_bytes())
}

pub(crate) fn ask_bytes(agent: SocketAddr, request: &str, body: &[u8]) -> Result<Answer> {
    let mut text = Vec::new();
    let read = send(agent, request, "", body)?.read_to_end(&mut text);
    let answer = Answer::parse(&String::from_utf8_lossy(&text));
    // An end before the answer, not behind it, is the one to be told of.
    read.or_else(|error| match &answer {
        Ok(_) => Ok(0),
        Err(_) => Err(error),
    })?;
    answer
}

/// What is documented of the interface.
pub(crate) fn document() -> Result<Value> {
    let path = testbed::workspace::root().join("docs/openapi.json");
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}
