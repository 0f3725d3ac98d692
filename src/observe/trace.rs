//! A trace of faults in a file, for people who study access patterns.
//!
//! Little-endian, fixed size:
//!
//! ```text
//! 0         8          12         16
//! | PFTRACE2 | page size | 0       |                          header
//!
//! 0         8          12           16        24      32      40       44       46       48
//! | time µs  | pid      | latency µs | address | start | bytes | thread | access | answer |    one fault, in the order of service
//! ```
//!
//! Traces of version 0.1.0 begin with `PFTRACE1`. Their records end before `start`; what follows reads as zero.
//!
//! The time is when the fault was read, counted from the start of the trace; the latency lasts until
//! its page was there; the pid is the image's, so a forked child has its ancestor's; the address is
//! that of the page at the time. A file that ends inside a record was cut short there.
//!
//! Records are written by a thread of their own: a slow disk delays no fault. It is started with the first
//! record, for a process that is still to be forked may have no thread.

mod open_faults;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use bytemuck::{Pod, Zeroable};

pub use self::open_faults::{OpenFault, OpenFaults};
use crate::error::{Error, Kind, Result};
use crate::units::PageSize;

/// The first line of a trace printed as CSV: names of columns.
pub const CSV_HEAD: &str = "time_us,pid,address,latency_us,access,answer,start,bytes,thread";

const MAGIC: [u8; 8] = *b"PFTRACE2";

/// That of version 0.1.0.
const MAGIC_1: [u8; 8] = *b"PFTRACE1";

/// Length of a record of version 0.1.0, bytes.
const RECORD_1_BYTES: usize = 24;

/// Records handed to the writing thread at once.
const BATCH_RECORDS: usize = 512;

/// Batches that may wait for the writing thread. Beyond that faults are left out of the trace, and
/// counted.
const BATCHES_MAX: usize = 256;

/// One fault. See the module's text for the units.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct FaultRecord {
    /// When the fault was read, µs from the start of the trace.
    pub time_us: u64,
    /// The process's pid in the images.
    pub pid: u32,
    /// How long it took until the page was there, µs.
    pub latency_us: u32,
    /// The page's address.
    pub address: u64,
    /// Where the memory begins that was filled in one with the page; 0 if it is not known.
    pub start: u64,
    /// How many bytes it has.
    pub bytes: u64,
    /// The thread that waited first, as this host calls it; 0 if the kernel does not say, as for a userfaultfd of CRIU's.
    pub thread: u32,
    /// Number of the [`Access`].
    pub access: u16,
    /// Number of the [`Answer`].
    pub answer: u16,
}

/// What the thread that waited first was about to do.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Access {
    /// Not known.
    #[default]
    Unknown = 0,
    /// It reads.
    Read = 1,
    /// It writes.
    Write = 2,
}

/// How a fault was answered.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Answer {
    /// Not known.
    #[default]
    Unknown = 0,
    /// With a page that was requested for this fault.
    Fault = 1,
    /// With a page that was requested for its neighbour's fault.
    Around = 2,
    /// With a page of the background stream, or of a push.
    Stream = 3,
    /// With a page of a local image.
    Local = 4,
    /// With zeros: no image has the page.
    Zero = 5,
    /// The page is not missing any more: unmapped, given back, or filled before.
    Gone = 6,
    /// With SIGBUS: the page is lost.
    Poisoned = 7,
}

/// The names of [`Access`] in CSV, by number.
const ACCESSES: [&str; 3] = ["unknown", "read", "write"];

/// The names of [`Answer`] in CSV, by number.
const ANSWERS: [&str; 8] = [
    "unknown", "fault", "around", "stream", "local", "zero", "gone", "poisoned",
];

fn name(names: &[&'static str], number: u16) -> &'static str {
    names.get(usize::from(number)).copied().unwrap_or("unknown")
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FileHeader {
    magic: [u8; 8],
    page_bytes: u32,
    reserved: u32,
}

impl fmt::Display for FaultRecord {
    /// A line of CSV, without its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FaultRecord {
            time_us,
            pid,
            latency_us,
            address,
            start,
            bytes,
            thread,
            access,
            answer,
        } = self;
        let (access, answer) = (name(&ACCESSES, *access), name(&ANSWERS, *answer));
        write!(
            f,
            "{time_us},{pid},{address:#x},{latency_us},{access},{answer},{start:#x},{bytes},{thread}"
        )
    }
}

/// Writes a trace.
#[derive(Debug)]
pub struct TraceWriter {
    path: PathBuf,
    batch: Vec<FaultRecord>,
    left_out: u64,
    output: Output,
}

/// Where records go.
#[derive(Debug)]
enum Output {
    /// There has been none.
    File(BufWriter<File>),
    Thread(SyncSender<Vec<FaultRecord>>, JoinHandle<io::Result<()>>),
    Failed(io::Error),
}

impl TraceWriter {
    /// Begins a trace in the new file `path`.
    pub fn create(path: &Path, page: PageSize) -> Result<TraceWriter> {
        let failed = |error| Error::file("write the trace", path, error);
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        let page_bytes = u32::try_from(page.bytes()).expect("pages are at most 64 KiB");
        let header = FileHeader {
            magic: MAGIC,
            page_bytes,
            reserved: 0,
        };
        file.write_all(bytemuck::bytes_of(&header))
            .map_err(failed)?;
        Ok(TraceWriter {
            path: path.to_owned(),
            batch: Vec::with_capacity(BATCH_RECORDS),
            left_out: 0,
            output: Output::File(file),
        })
    }

    /// Adds a fault. Never waits.
    pub fn record(&mut self, record: FaultRecord) {
        if matches!(self.output, Output::File(_)) {
            self.start();
        }
        self.batch.push(record);
        if self.batch.len() == BATCH_RECORDS {
            self.hand_over();
        }
    }

    fn start(&mut self) {
        let begun = Output::Failed(io::ErrorKind::Other.into());
        let Output::File(mut file) = std::mem::replace(&mut self.output, begun) else {
            return;
        };
        let (sender, batches) = sync_channel::<Vec<FaultRecord>>(BATCHES_MAX);
        let thread = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || {
                for batch in batches {
                    file.write_all(bytemuck::cast_slice(&batch))?;
                }
                file.flush()
            });
        self.output = match thread {
            Ok(thread) => Output::Thread(sender, thread),
            Err(error) => Output::Failed(error),
        };
    }

    fn hand_over(&mut self) {
        let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH_RECORDS));
        let lost = match &self.output {
            Output::Thread(sender, _) => match sender.try_send(batch) {
                Ok(()) => 0,
                Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) => batch.len(),
            },
            Output::File(_) | Output::Failed(_) => batch.len(),
        };
        self.left_out += lost as u64;
    }

    /// Writes what is left and closes the file. Returns how many faults were left out because the
    /// disk could not keep up.
    pub fn finish(self) -> Result<u64> {
        let written = match self.output {
            Output::File(mut file) => file.flush(),
            Output::Failed(error) => Err(error),
            Output::Thread(sender, thread) => {
                // A failed thread says why below.
                let _ = sender.send(self.batch);
                drop(sender);
                thread.join().unwrap_or(Ok(()))
            }
        };
        written
            .map(|()| self.left_out)
            .map_err(|error| Error::file("write the trace", &self.path, error))
    }
}

/// Reads a trace, fault after fault.
#[derive(Debug)]
pub struct TraceReader {
    path: PathBuf,
    file: BufReader<File>,
    page_bytes: u32,
    /// How long a record is in this file, bytes.
    record_bytes: usize,
}

impl TraceReader {
    /// Opens the trace in `path`.
    pub fn open(path: &Path) -> Result<TraceReader> {
        let failed = |error| Error::file("read the trace", path, error);
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let mut header = FileHeader::zeroed();
        match file.read_exact(bytemuck::bytes_of_mut(&mut header)) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                // Too short for a header, so it has none.
                header = FileHeader::zeroed();
            }
            read => read.map_err(failed)?,
        }
        let record_bytes = match header.magic {
            MAGIC => size_of::<FaultRecord>(),
            MAGIC_1 => RECORD_1_BYTES,
            _ => {
                let text = format!("{} is not a fault trace of lazy-client", path.display());
                return Err(Error::new(Kind::Usage, text));
            }
        };
        Ok(TraceReader {
            path: path.to_owned(),
            file,
            page_bytes: header.page_bytes,
            record_bytes,
        })
    }

    /// The page size of the machine that was traced, bytes.
    pub fn page_bytes(&self) -> u32 {
        self.page_bytes
    }
}

impl Iterator for TraceReader {
    type Item = Result<FaultRecord>;

    fn next(&mut self) -> Option<Result<FaultRecord>> {
        let mut record = FaultRecord::zeroed();
        let bytes = &mut bytemuck::bytes_of_mut(&mut record)[..self.record_bytes];
        let mut read = 0;
        while read < bytes.len() {
            match self.file.read(&mut bytes[read..]) {
                Ok(0) if read == 0 => return None,
                Ok(0) => {
                    let text = format!(
                        "{} ends inside a record: it was cut short",
                        self.path.display()
                    );
                    return Some(Err(Error::new(Kind::Io, text)));
                }
                Ok(more) => read += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Some(Err(Error::file("read the trace", &self.path, error))),
            }
        }
        Some(Ok(record))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn the_documented_table_is_the_layout() {
        let document = include_str!("../../docs/reference/outputs.md");
        let field = |name: &str, start: usize, bytes: usize| {
            let (end, bits) = (start + bytes - 1, bytes * 8);
            format!("| {start} to {end} | u{bits} | `{name}` | ")
        };
        let rows = [
            field("time_us", offset_of!(FaultRecord, time_us), 8),
            field("pid", offset_of!(FaultRecord, pid), 4),
            field("latency_us", offset_of!(FaultRecord, latency_us), 4),
            field("address", offset_of!(FaultRecord, address), 8),
            field("start", offset_of!(FaultRecord, start), 8),
            field("bytes", offset_of!(FaultRecord, bytes), 8),
            field("thread", offset_of!(FaultRecord, thread), 4),
            field("access", offset_of!(FaultRecord, access), 2),
            field("answer", offset_of!(FaultRecord, answer), 2),
            format!("a header of {} bytes", size_of::<FileHeader>()),
            format!("a record of {} bytes", size_of::<FaultRecord>()),
            format!("`{CSV_HEAD}`"),
            format!("`{}`", String::from_utf8_lossy(&MAGIC)),
        ];
        for row in rows {
            assert!(document.contains(&row), "{row}");
        }
        let record = FaultRecord {
            time_us: 1,
            pid: 2,
            latency_us: 4,
            address: 0x3000,
            start: 0x2000,
            bytes: 0x4000,
            thread: 0,
            access: Access::Write as u16,
            answer: Answer::Around as u16,
        };
        let line = "1,2,0x3000,4,write,around,0x2000,16384,0";
        assert_eq!(record.to_string(), line);
        assert_eq!(CSV_HEAD.split(',').count(), line.split(',').count());
        for (number, name) in ACCESSES
            .iter()
            .enumerate()
            .chain(ANSWERS.iter().enumerate())
        {
            assert!(document.contains(&format!("{number} `{name}`")), "{name}");
        }
    }

    #[test]
    fn a_trace_of_the_first_version_has_no_more_than_times_and_pages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let mut bytes = MAGIC_1.to_vec();
        bytes.extend(4096_u64.to_le_bytes());
        for number in 1..3_u64 {
            bytes.extend(number.to_le_bytes());
            bytes.extend((7_u64 | (5 << 32)).to_le_bytes());
            bytes.extend((number << 12).to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let lines: Vec<String> = TraceReader::open(&path)
            .unwrap()
            .map(|record| record.unwrap().to_string())
            .collect();
        assert_eq!(
            lines,
            [
                "1,7,0x1000,5,unknown,unknown,0x0,0,0",
                "2,7,0x2000,5,unknown,unknown,0x0,0,0"
            ]
        );
    }

    #[test]
    fn a_trace_comes_back_and_a_cut_one_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let record = |index: u32| FaultRecord {
            time_us: u64::from(index) * 10,
            pid: 7,
            latency_us: index,
            address: u64::from(index) << 12,
            start: u64::from(index) << 12,
            bytes: 4096,
            thread: index % 3,
            access: Access::Read as u16,
            answer: Answer::Stream as u16,
        };
        let mut writer = TraceWriter::create(&path, PageSize::KIB_4).unwrap();
        (0..2000).for_each(|index| writer.record(record(index)));
        assert_eq!(writer.finish().unwrap(), 0);
        let reader = TraceReader::open(&path).unwrap();
        assert_eq!(reader.page_bytes(), 4096);
        let read: Vec<_> = reader.map(Result::unwrap).collect();
        assert_eq!(read, (0..2000).map(record).collect::<Vec<_>>());

        let length = std::fs::metadata(&path).unwrap().len();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length - 1)
            .unwrap();
        assert!(TraceReader::open(&path).unwrap().last().unwrap().is_err());
        for other in ["", "PFTRACE2", "no trace, but long enough for a header"] {
            std::fs::write(&path, other).unwrap();
            let error = TraceReader::open(&path).unwrap_err().to_string();
            assert!(error.contains("is not a fault trace"), "{error}");
        }
    }
}
