//! Descriptors and memory that are set aside at the start for the moment when pages are lost. Descriptors are needed
//! then to receive the children of a process that forks, and to read /proc.

use std::fs::File;
use std::hint::black_box;

use crate::error::{Error, Kind, Result};

/// Descriptors: one to read a directory, one for a file in it, and as many as are received in between.
const DESCRIPTORS: usize = 8;

/// Pieces of memory, and the bytes of one: small enough to stay with this process when they are freed.
const PIECES: usize = 16;
const PIECE_BYTES: usize = 32 << 10;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Reserve {
    files: Vec<File>,
    memory: Vec<Vec<u8>>,
}

impl Reserve {
    pub(super) fn new() -> Result<Reserve> {
        let mut reserve = Reserve {
            files: Vec::with_capacity(DESCRIPTORS),
            memory: Vec::with_capacity(PIECES),
        };
        reserve.fill().map_err(|error| {
            let text = "cannot keep descriptors in reserve";
            Error::wrap(Kind::Io, text, error)
        })?;
        Ok(reserve)
    }

    fn fill(&mut self) -> std::io::Result<()> {
        while self.files.len() < DESCRIPTORS {
            self.files.push(File::open("/dev/null")?);
        }
        while self.memory.len() < PIECES {
            // Written, so that it is there.
            self.memory.push(black_box(vec![1; PIECE_BYTES]));
        }
        Ok(())
    }

    /// Gives everything to whoever needs it now.
    pub(super) fn release(&mut self) {
        self.files.clear();
        self.memory.clear();
    }

    /// Takes back what can be had.
    pub(super) fn refill(&mut self) {
        // What is short now stays so: there is less in reserve the next time.
        let _ = self.fill();
    }
}
