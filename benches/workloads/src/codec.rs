//! What all benchmarks of ferry's codec share: memory like a program's, and a sender's half of a round.

use pageferry::criu::header::{PageFlags, Target};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::gather::Run;
use pageferry::ferry::hash::{Fingerprint, HashKey, PageHasher};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::StateId;
use pageferry::limits::FERRY_BATCH_BYTES_MAX;
use pageferry::units::{PageRange, PageSize};

/// The size of all pages.
pub const PAGE: PageSize = PageSize::KIB_4;

const TARGET: Target = Target::Process(1);

/// `bytes` bytes like a heap: pointers, small numbers, text, and zeros between them.
pub fn heap(bytes: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut memory = Vec::with_capacity(bytes);
    while memory.len() < bytes {
        match rng.u8(0..4) {
            0 => memory.extend_from_slice(&(0x7f00_0000_0000 + rng.u64(..1 << 28)).to_le_bytes()),
            1 => memory.extend_from_slice(&rng.u64(..1 << 10).to_le_bytes()),
            2 => memory.extend(std::iter::repeat_with(|| rng.alphanumeric() as u8).take(16)),
            _ => memory.extend_from_slice(&[0; 16]),
        }
    }
    memory.truncate(bytes);
    memory
}

/// A copy of `memory` in which a few bytes of two of a hundred pages have changed.
pub fn dirtied(memory: &[u8]) -> Vec<u8> {
    let mut memory = memory.to_vec();
    let mut rng = fastrand::Rng::with_seed(3);
    for page in memory.chunks_exact_mut(PAGE.as_usize()) {
        if rng.u8(0..50) == 0 {
            for _ in 0..20 {
                page[rng.usize(0..4096)] = rng.u8(..);
            }
        }
    }
    memory
}

/// A hasher of pages under a fixed key.
pub fn hasher() -> PageHasher {
    PageHasher::new(HashKey([1; 16]), PAGE)
}

/// What a sender keeps between two rounds.
pub struct Codec {
    hasher: PageHasher,
    memory: PageMemory,
    encoder: Encoder,
    verdicts: Verdicts,
}

impl std::fmt::Debug for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Codec({:?})", self.memory)
    }
}

impl Default for Codec {
    fn default() -> Codec {
        Codec {
            hasher: hasher(),
            memory: PageMemory::new(PAGE, 1 << 30),
            encoder: Encoder::new(PAGE).expect("zstd works"),
            verdicts: Verdicts::default(),
        }
    }
}

impl Codec {
    /// Packs `memory` batch by batch and hands each body to `done`.
    ///
    /// # Panics
    /// zstd fails.
    pub fn round(&mut self, memory: &[u8], level: Level, mut done: impl FnMut(&[u8])) {
        let mut out = Vec::new();
        let batches = memory.chunks(FERRY_BATCH_BYTES_MAX);
        for (start, plain) in (0_u64..).step_by(FERRY_BATCH_BYTES_MAX).zip(batches) {
            let runs = [Run {
                range: PageRange::new(start, start + plain.len() as u64),
                flags: PageFlags::PRESENT,
            }];
            let pages = plain.chunks_exact(PAGE.as_usize());
            let prints: Vec<Fingerprint> = pages.map(|p| self.hasher.fingerprint(p)).collect();
            let batch = PlainBatch {
                target: TARGET,
                runs: &runs,
                plain,
            };
            self.memory
                .judge(batch, &prints, &self.hasher, &mut self.verdicts);
            out.clear();
            self.encoder
                .encode(batch, &self.verdicts, &self.hasher, level, &mut out)
                .expect("zstd works");
            done(&out);
        }
    }

    /// The receiver has stored the round: the next one may build on it.
    pub fn commit(&mut self) {
        self.memory.commit(StateId([1; 16]));
    }
}
