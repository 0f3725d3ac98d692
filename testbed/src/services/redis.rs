//! A Redis whose clients count and read back what they have written.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail, ensure};

use super::client::{ServiceClient, connect, send};
use crate::net::NetNs;

/// Clients.
const CLIENTS: u64 = 4;

/// Bytes of a value.
const VALUE_BYTES: usize = 1200;

/// Bytes of memory for a key with its value, roughly.
const KEY_BYTES: u64 = 1400;

/// Values that are sent at once while it is filled.
const BATCH: u64 = 100;

/// Longest answer that a client takes, bytes.
const ANSWER_MAX: usize = 64 << 10;

pub(super) fn command(port: u16) -> String {
    format!(
        "exec setsid redis-server --port {port} --bind 0.0.0.0 --protected-mode no --save '' \
         --appendonly no --dir /tmp"
    )
}

/// Clients that fill it with `mib` MiB.
pub(super) fn talks(net: &NetNs, at: SocketAddr, mib: u32) -> Result<Vec<Box<dyn ServiceClient>>> {
    // Whole batches.
    let keys = ((u64::from(mib) << 20) / KEY_BYTES / CLIENTS).next_multiple_of(BATCH);
    (0..CLIENTS)
        .map(|number| {
            let mut talk = Redis {
                stream: connect(net, at)?,
                number,
                count: 0,
                versions: vec![0; usize::try_from(keys)?],
            };
            talk.fill()?;
            Ok(Box::new(talk) as Box<dyn ServiceClient>)
        })
        .collect()
}

/// One client, with keys that are its own.
struct Redis {
    stream: BufReader<TcpStream>,
    number: u64,
    /// What its counter must be.
    count: u64,
    /// The number in each value.
    versions: Vec<u64>,
}

impl Redis {
    fn keys(&self) -> u64 {
        u64::try_from(self.versions.len()).unwrap_or(u64::MAX)
    }

    fn key(&self, key: u64) -> String {
        format!("{}:{key}", self.number)
    }

    fn value(&self, key: u64, version: u64) -> Vec<u8> {
        let text = format!("{}-{key}-{version};", self.number).into_bytes();
        text.into_iter().cycle().take(VALUE_BYTES).collect()
    }

    fn fill(&mut self) -> Result<()> {
        for first in (0..self.keys()).step_by(usize::try_from(BATCH)?) {
            let mut batch = Vec::new();
            for key in first..first + BATCH {
                batch.extend(words(&[
                    b"SET",
                    self.key(key).as_bytes(),
                    &self.value(key, 0),
                ]));
            }
            send(&mut self.stream, &batch)?;
            for _ in 0..BATCH {
                self.expect(b"OK")?;
            }
        }
        Ok(())
    }

    fn expect(&mut self, wanted: &[u8]) -> Result<()> {
        let got = answer(&mut self.stream)?;
        ensure!(
            got == wanted,
            "{:?} instead of {:?}",
            String::from_utf8_lossy(&got),
            String::from_utf8_lossy(wanted)
        );
        Ok(())
    }

    fn get(&mut self, key: u64) -> Result<()> {
        let question = words(&[b"GET", self.key(key).as_bytes()]);
        send(&mut self.stream, &question)?;
        let version = self.versions[usize::try_from(key)?];
        self.expect(&self.value(key, version))
            .with_context(|| format!("key {key}"))
    }
}

impl ServiceClient for Redis {
    fn ask(&mut self) -> Result<bool> {
        self.count += 1;
        let counter = format!("counter:{}", self.number);
        send(&mut self.stream, &words(&[b"INCR", counter.as_bytes()]))?;
        self.expect(self.count.to_string().as_bytes())
            .context("the counter")?;
        // Prime to their number: each key has its turn, in another order than they lie.
        let key = self.count * 7919 % self.keys();
        let version = &mut self.versions[usize::try_from(key)?];
        *version += 1;
        let version = *version;
        let value = self.value(key, version);
        let set = words(&[b"SET", self.key(key).as_bytes(), &value]);
        send(&mut self.stream, &set)?;
        self.expect(b"OK")?;
        self.get(self.count * 104_729 % self.keys())?;
        Ok(true)
    }

    fn finish(&mut self) -> Result<()> {
        (0..self.keys()).try_for_each(|key| self.get(key))
    }
}

/// A command, as Redis wants it.
fn words(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(format!("${}\r\n", word.len()).bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// What an answer says: a word, a number, or a value.
fn answer(stream: &mut BufReader<TcpStream>) -> Result<Vec<u8>> {
    let mut line = String::new();
    stream.read_line(&mut line).context("waiting for Redis")?;
    let Some(line) = line.strip_suffix("\r\n") else {
        bail!("the connection has ended");
    };
    let Some(length) = line.strip_prefix('$') else {
        let rest = line.strip_prefix(['+', ':']);
        return Ok(rest.context(line.to_owned())?.as_bytes().to_owned());
    };
    let length: usize = length.parse().with_context(|| line.to_owned())?;
    ensure!(length <= ANSWER_MAX, "a value of {length} bytes");
    let mut value = vec![0; length + 2];
    stream.read_exact(&mut value)?;
    value.truncate(length);
    Ok(value)
}
