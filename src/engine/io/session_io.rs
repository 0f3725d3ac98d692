//! A session's driver with its few buffers, and pipes for what nobody looks at: what the engine asks to
//! move bytes.
//!
//! Where a CPU may be free the driver writes while the next buffer is filled. Where there is none,
//! what goes to another thread only costs the way there: then a buffer is written before the next
//! one is filled, and its bytes are still in this CPU's cache. Pipes are filled and written in the same
//! way, beside the buffers: each run has its place in the file, so the order is free.

use std::ops::Range;

use crate::engine::io::batch::{Batch, Plan};
use crate::engine::io::driver::{Completion, Driver, Link, Operation, Writes};
use crate::engine::io::splice_path::{Pipe, SpliceWrite};
use crate::engine::io::writer::{WriteJob, Writer};
use crate::error::{Error, Kind, Result};
use crate::image::writer::Destination;
use crate::limits::{RECEIVE_BUFFER_BYTES, RECEIVE_BUFFERS_MAX, RECEIVE_PIPES_MAX};
use crate::sys::buffers::Buffer;

/// See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct SessionIo {
    driver: Box<dyn Driver>,
    writes: Writes,
    free: Vec<Buffer>,
    made: usize,
    pipes: Pipes,
}

/// The pipes of a session.
#[derive(Debug, Default)]
struct Pipes {
    free: Vec<Pipe>,
    made: usize,
    /// What writes beside, once something is to be written so.
    writer: Option<Writer<SpliceWrite>>,
}

impl SessionIo {
    pub(in crate::engine) fn new(driver: Box<dyn Driver>, writes: Writes) -> SessionIo {
        SessionIo {
            driver,
            writes,
            free: Vec::new(),
            made: 0,
            pipes: Pipes::default(),
        }
    }

    /// A buffer to fill. Waits for a write if all of them are on the way.
    pub(in crate::engine) fn buffer(&mut self) -> Result<Buffer> {
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
    pub(in crate::engine) fn receive(
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

    /// Writes `buffer` where `plan` says, some time before [`SessionIo::drain`] returns.
    pub(in crate::engine) fn write(&mut self, buffer: Buffer, plan: Plan) -> Result<()> {
        if plan.is_empty() {
            self.free.push(buffer);
            return Ok(());
        }
        let mut batch = Batch { buffer, plan };
        if self.writes == Writes::Beside {
            return self.driver.submit(Operation::Write(batch));
        }
        batch.write()?;
        self.free.push(batch.buffer);
        Ok(())
    }

    /// Moves bytes from the socket to `to`, at most `most`, that nobody looks at, and says how many;
    /// 0 is the end of the stream. They are in their file some time before [`SessionIo::drain`] returns.
    /// `None`: the kernel gives no pipes, and so they are to be received.
    pub(in crate::engine) fn pass(
        &mut self,
        link: &Link,
        most: usize,
        to: Destination,
    ) -> Result<Option<usize>> {
        let Some(pipe) = self.pipes.next()? else {
            return Ok(None);
        };
        let bytes = pipe.fill(link, most)?;
        self.pipes
            .write(SpliceWrite::new(pipe, bytes, to), self.writes)?;
        Ok(Some(bytes))
    }

    /// Waits until all bytes are in their files.
    pub(in crate::engine) fn drain(&mut self) -> Result<()> {
        self.driver.drain()?;
        self.pipes.writer.as_mut().map_or(Ok(()), Writer::drain)
    }

    fn keep(&mut self, completion: Completion) {
        match completion {
            Completion::Written(batch) => self.free.push(batch.buffer),
            Completion::Received { buffer, .. } => self.free.push(buffer),
        }
    }
}

impl Pipes {
    /// A pipe to fill, if any is to be had. Waits for a write if all of them are on the way.
    fn next(&mut self) -> Result<Option<Pipe>> {
        if let Some(pipe) = self.free.pop() {
            return Ok(Some(pipe));
        }
        if self.made < RECEIVE_PIPES_MAX {
            let made = Pipe::new();
            let made = made.map_err(|error| Error::wrap(Kind::Io, "cannot make a pipe", error))?;
            self.made += usize::from(made.is_some());
            if made.is_some() || self.made == 0 {
                return Ok(made);
            }
        }
        match &mut self.writer {
            Some(writer) => Ok(Some(writer.next_result()?.into_pipe())),
            None => Ok(None),
        }
    }

    fn write(&mut self, mut splice: SpliceWrite, writes: Writes) -> Result<()> {
        if writes == Writes::Between {
            splice.write()?;
            self.free.push(splice.into_pipe());
            return Ok(());
        }
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.writer.insert(Writer::start(|| {})?),
        };
        writer.submit(splice)?;
        while let Some(splice) = writer.result_now()? {
            self.free.push(splice.into_pipe());
        }
        Ok(())
    }
}
