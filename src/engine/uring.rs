//! The driver over io_uring: one system call submits a receive and the writes beside it, and the
//! kernel's own threads write while this one receives.
//!
//! ```text
//! session thread   Recv, Splice in   --+
//!                                      +--> ring --> kernel: Writev, Splice out, in threads of its own
//!                  completions       <-+
//! ```
//!
//! At most one splice is in flight at either end of the pipe: two at one end would share its bytes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::batch::{Batch, Plan};
use super::driver::{Completion, Driver, Link, Operation, is_patience};
use super::pipe::{Inlet, Outlet, pipe};
use crate::error::{Error, Kind, Result};
use crate::image::writer::PagesPart;
use crate::sys::buffers::Buffer;
use crate::sys::ring::{Descriptor, Done, Ring, Token};

/// Most bytes of one splice: what the kernel counts in 32 bits, less than which no pipe holds.
const SPLICE_BYTES_MAX: u64 = 1 << 30;

/// What an operation of the ring is for.
#[derive(Debug)]
enum Purpose {
    Receive,
    Write(Writing),
    TakeIn,
    PutOut,
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

/// What a splice still has to put into its file.
#[derive(Debug)]
struct Put {
    part: Arc<PagesPart>,
    offset: u64,
    bytes_left: u64,
}

/// The driver. See the module's text.
#[derive(Debug)]
pub(super) struct UringDriver {
    link: Link,
    purposes: HashMap<Token, Purpose>,
    /// Bytes that the splice under way has still to take from the socket.
    take_left: u64,
    /// Bytes on their way through the pipe, or about to be; the first is being put into its file.
    puts: VecDeque<Put>,
    pipe: Option<Pipe>,
    ring: Ring,
}

impl UringDriver {
    pub(super) fn new(link: Link) -> Result<UringDriver> {
        let ring = Ring::new();
        Ok(UringDriver {
            link,
            purposes: HashMap::new(),
            take_left: 0,
            puts: VecDeque::new(),
            pipe: None,
            ring: ring.map_err(|error| Error::wrap(Kind::Unsupported, "no io_uring", error))?,
        })
    }

    /// Waits for one operation of the ring and goes on with what it is part of.
    fn step(&mut self) -> Result<Option<Completion>> {
        let from_socket = |purpose: &Purpose| matches!(purpose, Purpose::Receive | Purpose::TakeIn);
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
            (Some(Purpose::TakeIn), _) => self.took(result),
            (Some(Purpose::PutOut), _) => self.put(result).map(|()| None),
            _ => Ok(None),
        }
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
            Err(error) if is_patience(&error) => {}
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

    fn pipe(&mut self) -> Result<&Pipe> {
        match &mut self.pipe {
            Some(pipe) => Ok(pipe),
            empty @ None => {
                let (inlet, outlet) = pipe()?;
                let (inlet, outlet) = (Arc::new(inlet), Arc::new(outlet));
                Ok(empty.insert(Pipe { inlet, outlet }))
            }
        }
    }

    fn take(&mut self) -> Result<()> {
        let inlet = Arc::clone(&self.pipe()?.inlet) as Descriptor;
        let socket = Arc::clone(&self.link.socket) as Descriptor;
        let bytes = at_most(self.take_left);
        let token = self.ring.splice(&socket, &inlet, None, bytes);
        self.purposes
            .insert(token.map_err(ring_failed)?, Purpose::TakeIn);
        Ok(())
    }

    fn took(&mut self, result: io::Result<u32>) -> Result<Option<Completion>> {
        match result {
            Ok(0) => return Err(self.link.cut()),
            Ok(bytes) => self.take_left = self.take_left.saturating_sub(u64::from(bytes)),
            Err(error) if is_patience(&error) => {}
            Err(error) => return Err(self.link.lost(error)),
        }
        if self.take_left == 0 {
            return Ok(Some(Completion::Spliced));
        }
        self.take()?;
        Ok(None)
    }

    /// Begins to put the next bytes into their file, if there are any.
    fn put_next(&mut self) -> Result<()> {
        let Some(put) = self.puts.front() else {
            return Ok(());
        };
        let file = Arc::clone(&put.part) as Descriptor;
        let offset = i64::try_from(put.offset)
            .map_err(|_| put.part.write_error(io::ErrorKind::FileTooLarge))?;
        let bytes = at_most(put.bytes_left);
        let outlet = Arc::clone(&self.pipe()?.outlet) as Descriptor;
        let token = self.ring.splice(&outlet, &file, Some(offset), bytes);
        self.purposes
            .insert(token.map_err(ring_failed)?, Purpose::PutOut);
        Ok(())
    }

    fn put(&mut self, result: io::Result<u32>) -> Result<()> {
        let Some(put) = self.puts.front_mut() else {
            return Ok(());
        };
        match result {
            Ok(bytes) => {
                put.offset += u64::from(bytes);
                put.bytes_left = put.bytes_left.saturating_sub(u64::from(bytes));
            }
            Err(error) if is_patience(&error) => {}
            Err(error) => return Err(put.part.write_error(error)),
        }
        if put.bytes_left == 0 {
            self.puts.pop_front();
        }
        self.put_next()
    }
}

impl Driver for UringDriver {
    fn submit(&mut self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Receive { buffer, window } => {
                let socket = Arc::clone(&self.link.socket) as Descriptor;
                let token = self.ring.receive(&socket, buffer, window);
                self.purposes
                    .insert(token.map_err(ring_failed)?, Purpose::Receive);
                Ok(())
            }
            Operation::Write(Batch { buffer, plan }) => {
                let writing = Writing {
                    plan,
                    run: 0,
                    written: 0,
                };
                self.write(writing, buffer)
            }
            Operation::Splice {
                part,
                offset,
                bytes,
            } => {
                self.take_left = bytes;
                self.take()?;
                self.puts.push_back(Put {
                    part,
                    offset,
                    bytes_left: bytes,
                });
                // Whoever is in front of it begins it otherwise.
                if self.puts.len() == 1 {
                    self.put_next()?;
                }
                Ok(())
            }
        }
    }

    fn wait(&mut self) -> Result<Completion> {
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

/// The two ends of the pipe that large frames pass through.
#[derive(Debug)]
struct Pipe {
    inlet: Arc<Inlet>,
    outlet: Arc<Outlet>,
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

fn at_most(bytes: u64) -> u32 {
    u32::try_from(bytes.min(SPLICE_BYTES_MAX)).unwrap_or(u32::MAX)
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
