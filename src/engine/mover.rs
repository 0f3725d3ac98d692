//! A session's driver with its few buffers: what the engine asks to move bytes.
//!
//! Where a CPU may be free the driver writes while the next buffer is filled. Where there is none,
//! what goes to another thread only costs the way there: then a buffer is written before the next
//! one is filled, and its bytes are still in this CPU's cache. Which it is may change from buffer to
//! buffer ([`Writes::LargeBeside`]): each run has its place in the file, so the order is free.

use std::ops::Range;

use super::batch::{Batch, Plan};
use super::driver::{Completion, Driver, Operation, Writes};
use crate::error::{Error, Kind, Result};
use crate::limits::{RECEIVE_BUFFER_BYTES, RECEIVE_BUFFERS_MAX};
use crate::sys::buffers::Buffer;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Mover {
    driver: Box<dyn Driver>,
    writes: Writes,
    free: Vec<Buffer>,
    made: usize,
}

impl Mover {
    pub(super) fn new(driver: Box<dyn Driver>, writes: Writes) -> Mover {
        Mover {
            driver,
            writes,
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

    /// Writes `buffer` where `plan` says, some time before [`Mover::drain`] returns.
    pub(super) fn write(&mut self, buffer: Buffer, plan: Plan) -> Result<()> {
        if plan.is_empty() {
            self.free.push(buffer);
            return Ok(());
        }
        let beside = self.writes.are_beside(&plan);
        let batch = Batch { buffer, plan };
        if beside {
            return self.driver.submit(Operation::Write(batch));
        }
        batch.write()?;
        self.free.push(batch.buffer);
        Ok(())
    }

    /// Waits until all bytes are in their files.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.driver.drain()
    }

    fn keep(&mut self, completion: Completion) {
        match completion {
            Completion::Written(batch) => self.free.push(batch.buffer),
            Completion::Received { buffer, .. } => self.free.push(buffer),
        }
    }
}
