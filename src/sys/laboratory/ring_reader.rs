//! Messages of a userfaultfd read by io_uring: one operation, and one system call, for each read.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

use super::super::shared::Shared;
use super::super::uffd::{Message, MessageBuffer, Uffd};

/// The offset that says: wherever the file is.
const CURRENT: u64 = u64::MAX;

/// A ring, and room for the messages of one read that stays mapped for good: the kernel may write to it at any time.
pub struct RingReader {
    ring: IoUring,
    room: Shared<MessageBuffer>,
}

impl fmt::Debug for RingReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RingReader")
    }
}

impl RingReader {
    /// For the thread that calls this.
    ///
    /// # Errors
    ///
    /// The kernel refuses io_uring, or there is no memory.
    pub fn new() -> io::Result<RingReader> {
        let mut quick = IoUring::builder();
        quick.setup_single_issuer().setup_defer_taskrun();
        // Kernels before 6.1 know neither.
        let ring = quick.build(2).or_else(|_| IoUring::new(2))?;
        let room = Shared::new()?;
        Ok(RingReader { ring, room })
    }

    /// Waits for messages of `uffd`, whose reads must block, and hands them to `each`.
    ///
    /// # Errors
    ///
    /// As a read fails.
    pub fn read(&mut self, uffd: &Uffd, mut each: impl FnMut(Message)) -> io::Result<()> {
        self.room.clear();
        let length = u32::try_from(size_of::<MessageBuffer>()).map_err(io::Error::other)?;
        let from = Fd(uffd.as_fd().as_raw_fd());
        let read = opcode::Read::new(from, self.room.start(), length).offset(CURRENT);
        // SAFETY: the room stays mapped for good, is as long as told, and is reached by atomics alone. The kernel holds
        // the file until the operation is over.
        unsafe { self.ring.submission().push(&read.build()) }.map_err(io::Error::other)?;
        let code = loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                break done.result();
            }
        };
        if code < 0 {
            return Err(io::Error::from_raw_os_error(-code));
        }
        for message in self.room.messages() {
            each(message?);
        }
        Ok(())
    }
}
