//! A thread that writes what it is handed while its owner goes on.
//!
//! ```text
//! owner   --job-->     writer thread: WriteJob::write
//!         <--job--
//! ```
//!
//! What was written comes back in its order, to be used again. Behind a failure nothing is written.

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use crate::error::{Error, Kind, Result};

/// Something with its place in the files.
pub(in crate::engine) trait WriteJob: fmt::Debug + Send + 'static {
    /// Writes all of it with plain calls. The error names the file.
    fn write(&mut self) -> Result<()>;
}

/// The thread, seen from its owner's.
#[derive(Debug)]
pub(in crate::engine) struct Writer<C: WriteJob> {
    /// `None` when the thread is to end.
    job: Option<Sender<C>>,
    /// What was written.
    results: Receiver<Result<C>>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl<C: WriteJob> Writer<C> {
    /// Starts the thread, which calls `written` after each result.
    pub(in crate::engine) fn start(written: impl Fn() + Send + 'static) -> Result<Writer<C>> {
        let (job, inbox) = channel();
        let (outbox, results) = channel();
        let thread = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || write_all(&inbox, &outbox, &written))
            .map_err(|error| Error::wrap(Kind::Io, "cannot start the writer thread", error))?;
        Ok(Writer {
            job: Some(job),
            results,
            in_flight: 0,
            thread: Some(thread),
        })
    }

    /// Hands `job` to the thread.
    pub(in crate::engine) fn submit(&mut self, job: C) -> Result<()> {
        self.in_flight += 1;
        let sent = self.job.as_ref().map(|outlet| outlet.send(job));
        match sent {
            Some(Ok(())) => Ok(()),
            // The thread ends by itself only behind an error.
            _ => self.next_result().map(|_| ()),
        }
    }

    /// The next that is written, waiting for it.
    pub(in crate::engine) fn next_result(&mut self) -> Result<C> {
        let result = self.results.recv().map_err(|_| gone())?;
        self.in_flight -= 1;
        result
    }

    /// The next that is written already.
    pub(in crate::engine) fn result_now(&mut self) -> Result<Option<C>> {
        match self.results.try_recv() {
            Ok(result) => {
                self.in_flight -= 1;
                result.map(Some)
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(gone()),
        }
    }

    /// Waits until everything is written.
    pub(in crate::engine) fn drain(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            self.next_result()?;
        }
        Ok(())
    }
}

impl<C: WriteJob> Drop for Writer<C> {
    fn drop(&mut self) {
        self.job = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the writer has been told by the panic hook.
            let _ = thread.join();
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::Io, "the writer thread has ended")
}

/// The thread: writes what it gets in its order until there is no more, or a write fails.
fn write_all<C: WriteJob>(inbox: &Receiver<C>, results: &Sender<Result<C>>, written: &impl Fn()) {
    for mut job in inbox {
        let done = job.write();
        let failed = done.is_err();
        let is_received = results.send(done.map(|()| job)).is_ok();
        written();
        if failed || !is_received {
            return;
        }
    }
}
