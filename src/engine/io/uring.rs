//! The driver over io_uring: a receive waits in the ring together with the writes beside it, and the
//! kernel's own threads write while this one receives.
//!
//! ```text
//! session thread   recv: what is there now
//!                  Recv: else        --+
//!                  Writev            --+--> ring --> kernel: Writev, in threads of its own
//!                  completions       <-+
//! ```
//!
//! What has come already is taken by a plain call: through the ring each receive costs more.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::engine::io::batch::{Batch, Plan};
use crate::engine::io::driver::{Completion, Driver, Link, Operation, is_retryable};
use crate::error::{Error, Kind, Result};
use crate::sys::buffers::Buffer;
use crate::sys::ring::{Descriptor, Done, Ring, Token};

/// What an operation of the ring is for.
#[derive(Debug)]
enum Purpose {
    Receive,
    Write(Writing),
}

/// A batch that is being written, run by run.
#[derive(Debug)]
struct Writing {
    plan: Plan,
    /// Number of the run that is being written.
    run: usize,
    /// Bytes of the run that are in the file.
    written: u64,
}

/// The driver. See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct UringDriver {
    link: Link,
    purposes: HashMap<Token, Purpose>,
    /// What was received without the ring, for the next wait.
    received: Option<Completion>,
    ring: Ring,
}

impl UringDriver {
    pub(in crate::engine) fn new(link: Link) -> Result<UringDriver> {
        let ring = Ring::new();
        Ok(UringDriver {
            link,
            purposes: HashMap::new(),
            received: None,
            ring: ring.map_err(|error| Error::wrap(Kind::Unsupported, "no io_uring", error))?,
        })
    }

    /// Waits for one operation of the ring and goes on with what it is part of.
    fn step(&mut self) -> Result<Option<Completion>> {
        let from_socket = |purpose: &Purpose| matches!(purpose, Purpose::Receive);
        let listens = self.purposes.values().any(from_socket);
        let timeout = self.link.idle_timeout.filter(|_| listens);
        let done = self.ring.wait(timeout).map_err(ring_failed)?;
        let Done {
            token,
            result,
            buffer,
        } = done.ok_or_else(|| self.link.silent())?;
        match (self.purposes.remove(&token), buffer) {
            (Some(Purpose::Receive), Some(buffer)) => match result {
                Ok(bytes) => Ok(Some(Completion::Received {
                    buffer,
                    bytes: bytes as usize,
                })),
                Err(error) => Err(self.link.lost(error)),
            },
            (Some(Purpose::Write(writing)), Some(buffer)) => self.wrote(writing, buffer, result),
            _ => Ok(None),
        }
    }

    fn receive(&mut self, mut buffer: Buffer, window: Range<usize>) -> Result<()> {
        match self.link.receive_now(&mut buffer[window.clone()]) {
            Ok(bytes) => {
                self.received = Some(Completion::Received { buffer, bytes });
                return Ok(());
            }
            Err(error) if is_retryable(&error) => {}
            Err(error) => return Err(self.link.lost(error)),
        }
        let socket = Arc::clone(&self.link.socket) as Descriptor;
        let token = self.ring.receive(&socket, buffer, window);
        self.purposes
            .insert(token.map_err(ring_failed)?, Purpose::Receive);
        Ok(())
    }

    /// Begins to write what is left of a batch's current run.
    fn write(&mut self, writing: Writing, buffer: Buffer) -> Result<()> {
        let run = &writing.plan.runs()[writing.run];
        let ranges = behind(writing.plan.ranges(run), writing.written);
        let file: Descriptor = Arc::clone(&run.part) as Descriptor;
        let offset = run.offset + writing.written;
        let token = self.ring.write(&file, buffer, &ranges, offset);
        let token = token.map_err(ring_failed)?;
        self.purposes.insert(token, Purpose::Write(writing));
        Ok(())
    }

    fn wrote(
        &mut self,
        mut writing: Writing,
        buffer: Buffer,
        result: io::Result<u32>,
    ) -> Result<Option<Completion>> {
        let run = &writing.plan.runs()[writing.run];
        match result {
            Ok(0) => return Err(run.part.write_error(io::ErrorKind::WriteZero)),
            Ok(bytes) => writing.written += u64::from(bytes),
            Err(error) if is_retryable(&error) => {}
            Err(error) => return Err(run.part.write_error(error)),
        }
        if writing.written == run.bytes {
            writing.run += 1;
            writing.written = 0;
        }
        if writing.run == writing.plan.runs().len() {
            let plan = writing.plan;
            return Ok(Some(Completion::Written(Batch { buffer, plan })));
        }
        self.write(writing, buffer)?;
        Ok(None)
    }
}

impl Driver for UringDriver {
    fn submit(&mut self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Receive { buffer, window } => self.receive(buffer, window),
            Operation::Write(Batch { buffer, plan }) => {
                let writing = Writing {
                    plan,
                    run: 0,
                    written: 0,
                };
                self.write(writing, buffer)
            }
        }
    }

    fn wait(&mut self) -> Result<Completion> {
        if let Some(received) = self.received.take() {
            return Ok(received);
        }
        loop {
            if let Some(completion) = self.step()? {
                return Ok(completion);
            }
        }
    }

    fn drain(&mut self) -> Result<()> {
        while !self.purposes.is_empty() {
            self.step()?;
        }
        Ok(())
    }
}

/// What is left of `ranges` behind their first `bytes` bytes.
fn behind(ranges: &[Range<usize>], bytes: u64) -> Vec<Range<usize>> {
    let mut skip = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut left = Vec::with_capacity(ranges.len());
    for range in ranges {
        let skipped = skip.min(range.len());
        skip -= skipped;
        if skipped < range.len() {
            left.push(range.start + skipped..range.end);
        }
    }
    left
}

fn ring_failed(error: io::Error) -> Error {
    Error::wrap(Kind::Io, "io_uring failed", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_write_goes_on_behind_what_was_written() {
        let ranges = [2..4, 10..13, 20..21];
        assert_eq!(behind(&ranges, 0), ranges);
        assert_eq!(behind(&ranges, 1), [3..4, 10..13, 20..21]);
        assert_eq!(behind(&ranges, 2), [10..13, 20..21]);
        assert_eq!(behind(&ranges, 4), [12..13, 20..21]);
        assert!(behind(&ranges, 6).is_empty());
    }
}
