//! io_uring with operations that own what they use.
//!
//! The kernel reads and writes the memory of an operation until its completion is reaped. So a
//! [`Ring`] takes the buffer and holds the descriptors of every operation, gives the buffer back with
//! the completion, and, when it is dropped, cancels what is in flight and waits for it: nobody else
//! can touch the memory meanwhile.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::buffers::Buffer;

/// Operations that a ring has room for before it has to tell the kernel of them.
const ENTRIES: u32 = 64;

/// User data of cancellations: no operation has it.
const CANCELLATION: u64 = u64::MAX;

/// A descriptor that an operation keeps open.
pub type Descriptor = Arc<dyn AsFd + Send + Sync>;

/// Names an operation of a ring.
pub type Token = u64;

/// An operation that is over.
#[derive(Debug)]
pub struct Done {
    /// Which one.
    pub token: Token,
    /// Bytes moved, or why none were.
    pub result: io::Result<u32>,
    /// Its buffer, if it had one.
    pub buffer: Option<Buffer>,
}

/// What an operation in flight uses.
struct InFlight {
    buffer: Option<Buffer>,
    /// The kernel reads these when the operation begins, which may be late.
    _slices: Vec<libc::iovec>,
    _descriptor: Descriptor,
}

/// A ring. See the module's text.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    in_flight: ManuallyDrop<HashMap<Token, InFlight>>,
    next: Token,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring with {} operations in flight", self.in_flight.len())
    }
}

impl Ring {
    /// Makes a ring for the thread that calls this. Fails where the kernel refuses io_uring, or lacks
    /// an operation.
    pub fn new() -> io::Result<Ring> {
        let mut quick = IoUring::builder();
        quick.setup_single_issuer().setup_defer_taskrun();
        // Kernels before 6.1 know neither.
        let ring: IoUring = quick.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Recv::CODE,
            opcode::Writev::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code))
            || !ring.params().is_feature_ext_arg()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Ring {
            ring: ManuallyDrop::new(ring),
            in_flight: ManuallyDrop::new(HashMap::new()),
            next: 0,
        })
    }

    /// Begins to receive into the window of `buffer`.
    pub fn receive(
        &mut self,
        socket: &Descriptor,
        mut buffer: Buffer,
        window: Range<usize>,
    ) -> io::Result<Token> {
        let into = &mut buffer[window];
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let entry = opcode::Recv::new(fd(socket), into.as_mut_ptr(), len).build();
        let operation = InFlight {
            buffer: Some(buffer),
            _slices: Vec::new(),
            _descriptor: Arc::clone(socket),
        };
        self.push(entry, operation)
    }

    /// Begins to write the `ranges` of `buffer`, one behind the other, to `offset` of `file`. A thread
    /// of the kernel does it, so that this one can go on.
    pub fn write(
        &mut self,
        file: &Descriptor,
        buffer: Buffer,
        ranges: &[Range<usize>],
        offset: u64,
    ) -> io::Result<Token> {
        let slices: Vec<libc::iovec> = ranges
            .iter()
            .map(|range| {
                let bytes = &buffer[range.clone()];
                libc::iovec {
                    iov_base: bytes.as_ptr().cast_mut().cast(),
                    iov_len: bytes.len(),
                }
            })
            .collect();
        let count = u32::try_from(slices.len()).unwrap_or(u32::MAX);
        let entry = opcode::Writev::new(fd(file), slices.as_ptr(), count)
            .offset(offset)
            .build()
            .flags(Flags::ASYNC);
        let operation = InFlight {
            buffer: Some(buffer),
            _slices: slices,
            _descriptor: Arc::clone(file),
        };
        let token = self.push(entry, operation)?;
        // Now, not when this thread waits next: until then it may do without the ring.
        self.ring.submit()?;
        Ok(token)
    }

    /// Waits for an operation to end; `None` when `timeout` is over before.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<Done>> {
        loop {
            while let Some(completion) = self.ring.completion().next() {
                let token = completion.user_data();
                // A cancellation that was still to come back is of no interest.
                if let Some(operation) = self.in_flight.remove(&token) {
                    let code = completion.result();
                    let result =
                        u32::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code));
                    return Ok(Some(Done {
                        token,
                        result,
                        buffer: operation.buffer,
                    }));
                }
            }
            match self.enter(timeout) {
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                entered => entered?,
            }
        }
    }

    /// Tells the kernel of new operations and sleeps until one ends.
    fn enter(&self, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.ring.submitter();
        match timeout {
            None => submitter.submit_and_wait(1).map(|_| ()),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                submitter.submit_with_args(1, &args).map(|_| ())
            }
        }
    }

    fn push(&mut self, entry: Entry, operation: InFlight) -> io::Result<Token> {
        let token = self.next;
        self.next += 1;
        self.in_flight.insert(token, operation);
        let pushed = self.push_entry(&entry.user_data(token));
        if pushed.is_err() {
            // The kernel never saw it.
            self.in_flight.remove(&token);
        }
        pushed.map(|()| token)
    }

    fn push_entry(&mut self, entry: &Entry) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.ring.submit()?;
        }
        // SAFETY: what the entry points to is held by what is in flight, which lives until the operation's
        // completion is reaped (in `wait` or in `drop`); a cancellation points to nothing.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }

    /// Cancels everything in flight and waits for it.
    fn give_up(&mut self) -> io::Result<()> {
        let tokens: Vec<Token> = self.in_flight.keys().copied().collect();
        for token in tokens {
            let cancel = opcode::AsyncCancel::new(token).build();
            self.push_entry(&cancel.user_data(CANCELLATION))?;
        }
        while !self.in_flight.is_empty() {
            self.wait(None)?;
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(error) = self.give_up() {
            // The kernel may still use the memory: better lost than shared.
            tracing::warn!("cannot cancel {} operations: {error}", self.in_flight.len());
            return;
        }
        // SAFETY: nothing is in flight, and neither field is used again.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        // SAFETY: as above; the map is empty.
        unsafe { ManuallyDrop::drop(&mut self.in_flight) };
    }
}

fn fd(descriptor: &Descriptor) -> Fd {
    Fd(descriptor.as_fd().as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// `None`, with a log line, where this kernel refuses io_uring.
    fn ring() -> Option<Ring> {
        let ring = Ring::new();
        match ring {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("skipped: no io_uring here: {error}");
                None
            }
        }
    }

    fn pair() -> (Descriptor, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Arc::new(ours), theirs)
    }

    #[test]
    fn what_is_received_comes_back_with_its_buffer() {
        let Some(mut ring) = ring() else { return };
        let (socket, mut peer) = pair();
        let token = ring
            .receive(&socket, Buffer::new(64).unwrap(), 10..20)
            .unwrap();
        peer.write_all(b"0123456789abc").unwrap();
        let done = ring.wait(None).unwrap().unwrap();
        assert_eq!((done.token, done.result.unwrap()), (token, 10));
        assert_eq!(&done.buffer.unwrap()[8..22], b"\0\x000123456789\0\0");
    }

    #[test]
    fn ranges_are_written_one_behind_the_other() {
        let Some(mut ring) = ring() else { return };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file: Descriptor = Arc::new(std::fs::File::create(&path).unwrap());
        let mut buffer = Buffer::new(16).unwrap();
        buffer.copy_from_slice(b"0123456789abcdef");
        ring.write(&file, buffer, &[2..4, 10..13], 3).unwrap();
        let done = ring.wait(None).unwrap().unwrap();
        assert_eq!(done.result.unwrap(), 5);
        assert_eq!(std::fs::read(&path).unwrap(), b"\0\0\x0023abc");
    }

    #[test]
    fn a_wait_ends_in_time_and_dropping_cancels() {
        let Some(mut ring) = ring() else { return };
        let (socket, _peer) = pair();
        ring.receive(&socket, Buffer::new(64).unwrap(), 0..64)
            .unwrap();
        let timeout = Some(Duration::from_millis(1));
        assert!(ring.wait(timeout).unwrap().is_none());
        drop(ring);
        assert_eq!(Arc::strong_count(&socket), 1);
    }
}
