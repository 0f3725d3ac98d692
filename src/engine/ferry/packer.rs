//! Threads that turn gathered batches into frames: hash, judge, compress.
//!
//! ```text
//! gathering thread ── batches 7, 8, 9 ──> packer threads ── in the order of their numbers ──> SenderSession
//!        ^                                    │
//!        └──────────── empty buffers <────────┘
//! ```
//!
//! Invariant: at most one batch more than there are threads is under way. So memory stays bounded, and the gathering
//! thread waits when the link is slower.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::Scope;
use std::time::Instant;

use crate::criu::header::Target;
use crate::engine::ferry::lock;
use crate::engine::ferry::sender_session::{Agreed, SenderSession};
use crate::error::{Error, Kind, Result};
use crate::ferry::encode::{EncodeCounters, Encoder, PlainBatch, Verdicts};
use crate::ferry::frame::OpenFrame;
use crate::ferry::gather::{Run, present_pages};
use crate::ferry::hash::{Fingerprint, PageHasher};
use crate::ferry::hello::Features;
use crate::ferry::level_control::Level;
use crate::limits::FERRY_BATCH_BYTES_MAX;
use crate::sync::Mutex;
use crate::units::{PageSize, Vaddr};

/// A gathered batch.
#[derive(Debug)]
pub(crate) struct Job {
    /// Whose pages.
    pub(crate) target: Target,
    /// Which pages.
    pub(crate) runs: Vec<Run>,
    /// A buffer that begins with the contents of the PRESENT ones.
    pub(crate) buffer: Vec<u8>,
    /// How much of the buffer they take, bytes.
    pub(crate) filled: usize,
    /// Whether the receiver has a base version, or will be asked for one later: hashes are worth
    /// their price.
    pub(crate) hashed: bool,
    /// Which of the PRESENT pages go by the hash that is known of the receiver's base version: their contents are not
    /// in the buffer.
    pub(crate) kept: Vec<Range<usize>>,
}

/// The gathering side of the threads. They end when it is dropped.
pub(crate) struct Packer<'s> {
    sending: &'s SenderSession,
    jobs: SyncSender<(u64, Job)>,
    spare: Receiver<Vec<u8>>,
    made: usize,
    buffers_max: usize,
    issued: u64,
}

impl<'s> Packer<'s> {
    /// Starts `threads` threads in `scope`, for a receiver with which `agreed` holds.
    pub(crate) fn start<'env>(
        scope: &'s Scope<'s, 'env>,
        sending: &'s SenderSession,
        agreed: &Agreed,
        page: PageSize,
        threads: usize,
    ) -> Result<Packer<'s>> {
        sending.set_encoders(threads);
        let (jobs, inbox) = sync_channel(1);
        let (back, spare) = channel();
        let inbox = Arc::new(Mutex::new(inbox));
        for _ in 0..threads {
            let encoder = Encoder::new(page)
                .map_err(|error| Error::wrap(Kind::Io, "cannot set up zstd", error))?;
            let mut worker = Worker {
                sending,
                agreed: agreed.clone(),
                page,
                encoder,
                verdicts: Verdicts::default(),
                prints: Vec::new(),
                frame_bytes: 0,
            };
            let (inbox, back) = (Arc::clone(&inbox), back.clone());
            scope.spawn(move || worker.run(&inbox, &back));
        }
        Ok(Packer {
            sending,
            jobs,
            spare,
            made: 0,
            // One each, one on the way, one that is being filled.
            buffers_max: threads + 2,
            issued: 0,
        })
    }

    /// A buffer of the length of a batch. Waits while all are in use.
    pub(crate) fn buffer(&mut self) -> Result<Vec<u8>> {
        if let Ok(buffer) = self.spare.try_recv() {
            return Ok(buffer);
        }
        if self.made < self.buffers_max {
            self.made += 1;
            return Ok(vec![0; FERRY_BATCH_BYTES_MAX]);
        }
        self.spare.recv().map_err(|_| self.failure())
    }

    /// Waits until no more than `most_unsent` bytes of frames wait for a connection, those counted that are
    /// being made, and another one has room in the receiver's window.
    pub(crate) fn wait_for_room(&self, most_unsent: u64) -> Result<()> {
        self.sending.wait_for_room(self.issued, most_unsent)
    }

    /// Hands a batch over.
    pub(crate) fn push(&mut self, job: Job) -> Result<()> {
        let handed_over = self.jobs.send((self.issued, job));
        handed_over.map_err(|_| self.failure())?;
        self.issued += 1;
        Ok(())
    }

    /// Waits until all batches have been numbered, so that what is asked next comes behind them.
    pub(crate) fn flush(&self) -> Result<()> {
        self.sending.wait_for_batches_before(self.issued)
    }

    /// Why the threads have ended.
    fn failure(&self) -> Error {
        let gone = || Error::new(Kind::PeerLost, "the session with the far end is over");
        self.flush().err().unwrap_or_else(gone)
    }
}

struct Worker<'s> {
    sending: &'s SenderSession,
    agreed: Agreed,
    page: PageSize,
    encoder: Encoder,
    verdicts: Verdicts,
    prints: Vec<Fingerprint>,
    /// Length of the last frame: the next one is likely to be as long.
    frame_bytes: usize,
}

impl Worker<'_> {
    fn run(&mut self, inbox: &Mutex<Receiver<(u64, Job)>>, back: &Sender<Vec<u8>>) {
        loop {
            let next = lock(inbox).recv();
            let Ok((sequence, job)) = next else {
                return;
            };
            if let Err(error) = self.pack(sequence, &job) {
                // A thread that waits for the session gets the error there.
                self.sending.abort(&error.to_string());
                return;
            }
            // The gathering side may have ended.
            let _ = back.send(job.buffer);
        }
    }

    fn pack(&mut self, sequence: u64, job: &Job) -> Result<()> {
        if let Some(last) = job.runs.last() {
            self.sending.await_hashes(job.target, last.range.end())?;
        }
        let batch = PlainBatch {
            target: job.target,
            runs: &job.runs,
            plain: &job.buffer[..job.filled],
        };
        let hasher = Arc::clone(&self.agreed.hasher);
        self.look_at(job, &hasher)?;
        let mut memory = self.sending.memory();
        memory.judge(batch, &self.prints, &hasher, &mut self.verdicts);
        drop(memory);
        if !self.agreed.features.has(Features::DELTA) {
            self.verdicts.send_deltas_in_full();
        }
        let level = self.sending.level_control().level();
        let mut frame = self.sending.frame_buffer();
        frame.reserve(self.frame_bytes);
        let open = OpenFrame::begin(&mut frame);
        let start = Instant::now();
        let counters = self
            .encoder
            .encode(batch, &self.verdicts, &hasher, level, &mut frame)
            .map_err(|error| Error::wrap(Kind::Io, "zstd failed", error))?;
        self.frame_bytes = frame.len();
        self.observe(level, &counters, start);
        self.sending.submit_batch(sequence, open, frame, &counters)
    }

    /// Finds the fingerprints of the pages of `job`.
    fn look_at(&mut self, job: &Job, hasher: &PageHasher) -> Result<()> {
        let page = self.page.as_usize();
        let mut kept = job.kept.iter().cloned().flatten().peekable();
        self.prints.clear();
        for (at, contents) in job.buffer[..job.filled].chunks_exact(page).enumerate() {
            let is_kept = kept.next_if_eq(&at).is_some();
            self.prints.push(match job.hashed {
                _ if is_kept => Fingerprint::default(),
                true => hasher.fingerprint(contents),
                false => Fingerprint::without_hash(contents),
            });
        }
        if job.kept.is_empty() {
            return Ok(());
        }
        let addresses: Vec<Vaddr> = present_pages(&job.runs, self.page).collect();
        let memory = self.sending.memory();
        for at in job.kept.iter().cloned().flatten() {
            let vaddr = addresses[at];
            let hash = memory.base_of(job.target, vaddr).ok_or_else(|| {
                let text = format!(
                    "the page at {vaddr} of {} is said to be at the far end, of which it is not known",
                    job.target
                );
                Error::new(Kind::Protocol, text)
            })?;
            self.prints[at].hash = Some(hash);
        }
        Ok(())
    }

    /// Tells the level control what the fresh pages cost.
    fn observe(&self, level: Level, counters: &EncodeCounters, start: Instant) {
        let raw = counters.raw << self.page.shift();
        let (plain, packed) = match level {
            Level::None => (raw, raw),
            Level::Zstd(_) => (counters.tried_bytes, counters.tried_packed_bytes),
        };
        let mut level_control = self.sending.level_control();
        level_control.observe_batch(level, plain, packed, start.elapsed());
    }
}
