//! A session's driver with its few buffers: what the engine asks to move bytes.

use std::ops::Range;

use super::batch::{Batch, Plan};
use super::driver::{Completion, Driver, Operation};
use crate::error::{Error, Kind, Result};
use crate::image::writer::Destination;
use crate::limits::{RECEIVE_BUFFER_BYTES, RECEIVE_BUFFERS_MAX};
use crate::sys::buffers::Buffer;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Mover {
    driver: Box<dyn Driver>,
    free: Vec<Buffer>,
    made: usize,
}

impl Mover {
    pub(super) fn new(driver: Box<dyn Driver>) -> Mover {
        Mover {
            driver,
            free: Vec::new(),
            made: 0,
        }
    }

    /// A buffer to fill. Waits for a write if all of them are on the way.
    pub(super) fn buffer(&mut self) -> Result<Buffer> {
        loop {
            if let Some(buffer) = self.free.pop() {
                return Ok(buffer);
            }
            if self.made < RECEIVE_BUFFERS_MAX {
                self.made += 1;
                return Buffer::new(RECEIVE_BUFFER_BYTES)
                    .map_err(|error| Error::wrap(Kind::Io, "cannot allocate a buffer", error));
            }
            let completion = self.driver.wait()?;
            self.keep(completion);
        }
    }

    /// Receives into the window of `buffer` and says how much came; 0 is the end of the stream.
    pub(super) fn receive(
        &mut self,
        buffer: Buffer,
        window: Range<usize>,
    ) -> Result<(Buffer, usize)> {
        self.driver.submit(Operation::Receive { buffer, window })?;
        loop {
            match self.driver.wait()? {
                Completion::Received { buffer, bytes } => return Ok((buffer, bytes)),
                other => self.keep(other),
            }
        }
    }

    /// Moves `bytes` bytes from the socket to `to`; they have left the socket when this returns.
    pub(super) fn splice(&mut self, to: Destination, bytes: u64) -> Result<()> {
        let Destination { part, offset } = to;
        self.driver.submit(Operation::Splice {
            part,
            offset,
            bytes,
        })?;
        loop {
            match self.driver.wait()? {
                Completion::Spliced => return Ok(()),
                other => self.keep(other),
            }
        }
    }

    /// Writes `buffer` where `plan` says, some time before [`Mover::drain`] returns.
    pub(super) fn write(&mut self, buffer: Buffer, plan: Plan) -> Result<()> {
        if plan.is_empty() {
            self.free.push(buffer);
            return Ok(());
        }
        self.driver.submit(Operation::Write(Batch { buffer, plan }))
    }

    /// Waits until all bytes are in their files.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.driver.drain()
    }

    fn keep(&mut self, completion: Completion) {
        match completion {
            Completion::Written(batch) => self.free.push(batch.buffer),
            Completion::Received { buffer, .. } => self.free.push(buffer),
            Completion::Spliced => {}
        }
    }
}
