//! Received bytes on their way to files: a buffer, and which of its ranges go where.
//!
//! ```text
//! buffer   | header | page 0 | header | page 1 | header | page 2 ...
//! ranges              ^^^^^^            ^^^^^^            ^^^^^^
//! file            ... | page 0 | page 1 | page 2 | ...          one pwritev
//! ```
//!
//! Frames of one page each leave headers between the pages in the buffer, but none in the file: what
//! is one run in the file is written by one call, from many ranges, without a copy.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::uio::pwritev;

use crate::engine::io::writer::WriteJob;
use crate::error::Result;
use crate::image::writer::PagesPart;
use crate::limits::WRITE_RANGES_MAX;
use crate::sys::buffers::Buffer;

/// What is one run in a file.
#[derive(Debug)]
pub struct Run {
    /// The file.
    pub part: Arc<PagesPart>,
    /// Offset of the run in the file, bytes.
    pub offset: u64,
    /// Length of the run, bytes.
    pub bytes: u64,
    /// Which of the plan's ranges make up the run.
    ranges: Range<usize>,
}

/// Which ranges of a buffer go where.
#[derive(Debug, Default)]
pub struct Plan {
    runs: Vec<Run>,
    ranges: Vec<Range<usize>>,
}

impl Plan {
    /// Plans that `range` of the buffer goes to `offset` of `part`.
    pub fn push(&mut self, part: &Arc<PagesPart>, offset: u64, range: Range<usize>) {
        let bytes = range.len() as u64;
        let goes_on = |run: &&mut Run| {
            Arc::ptr_eq(&run.part, part)
                && run.offset + run.bytes == offset
                && run.ranges.len() < WRITE_RANGES_MAX
        };
        if let Some(run) = self.runs.last_mut().filter(goes_on) {
            run.bytes += bytes;
            match self.ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => {
                    self.ranges.push(range);
                    run.ranges.end += 1;
                }
            }
            return;
        }
        let first = self.ranges.len();
        self.ranges.push(range);
        self.runs.push(Run {
            part: Arc::clone(part),
            offset,
            bytes,
            ranges: first..first + 1,
        });
    }

    /// Whether nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs, in the order in which they were planned.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The ranges of the buffer that make up `run`.
    pub fn ranges(&self, run: &Run) -> &[Range<usize>] {
        &self.ranges[run.ranges.clone()]
    }

    /// Forgets everything but the room.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.ranges.clear();
    }
}

/// A buffer with its plan, ready to be written.
#[derive(Debug)]
pub struct Batch {
    /// The bytes.
    pub buffer: Buffer,
    /// Where they go.
    pub plan: Plan,
}

impl WriteJob for Batch {
    fn write(&mut self) -> Result<()> {
        for run in self.plan.runs() {
            let ranges = self.plan.ranges(run).iter();
            let mut slices: Vec<IoSlice<'_>> = ranges
                .map(|range| IoSlice::new(&self.buffer[range.clone()]))
                .collect();
            write_all(&mut slices, &run.part, run.offset)?;
        }
        Ok(())
    }
}

/// Writes all of `slices`, one behind the other, from `offset` of `part` on. The error names the
/// file.
pub(in crate::engine) fn write_all(
    mut slices: &mut [IoSlice<'_>],
    part: &PagesPart,
    mut offset: u64,
) -> Result<()> {
    while !slices.is_empty() {
        let at = i64::try_from(offset).map_err(|_| part.write_error(Errno::EFBIG))?;
        match pwritev(part.file(), slices, at) {
            Ok(0) => return Err(part.write_error(io::ErrorKind::WriteZero)),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut slices, written);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(part.write_error(errno)),
        }
    }
    Ok(())
}
