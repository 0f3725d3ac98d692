//! Guessing cheaply what zstd would gain, and how often to check the guess.

/// Whether to try something that has failed lately: again at growing distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    /// Whether it was worth it the last time.
    pub(super) pays: bool,
    wait: u32,
    misses: u32,
}

impl Trial {
    /// After how many batches something that pays is measured again.
    const RECHECK: u32 = 16;
    /// Something that does not pay is tried in one of 256 batches at the least.
    const MISSES_MAX: u32 = 8;

    /// Something that is believed to pay, or not, and is tried at once.
    pub(super) fn new(pays: bool) -> Trial {
        Trial {
            pays,
            wait: 0,
            misses: 0,
        }
    }

    /// Whether this batch is one for trying it.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.wait == 0;
        self.wait = self.wait.saturating_sub(1);
        due
    }

    /// It was tried.
    pub(super) fn learn(&mut self, pays: bool) {
        self.pays = pays;
        if pays {
            self.misses = 0;
            self.wait = Trial::RECHECK;
        } else {
            self.misses = (self.misses + 1).min(Trial::MISSES_MAX);
            self.wait = (1 << self.misses) - 1;
        }
    }
}

/// How many bytes of a page are looked at, in four places.
const SAMPLE_BYTES: usize = 128;

/// 128 random bytes have 101 different values on average, with a deviation of 4.5; text has fewer
/// than 60, pointers and small numbers fewer still.
const RANDOM_FROM: u32 = 86;

/// Whether a sample of the page has so many different bytes that zstd is unlikely to gain.
pub(super) fn looks_random(page: &[u8]) -> bool {
    let mut seen = [0_u64; 4];
    for quarter in page.chunks_exact(page.len() / 4) {
        // Not at its front: allocators keep their headers there.
        let middle = quarter.len() / 2;
        for byte in &quarter[middle..middle + SAMPLE_BYTES / 4] {
            seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
        }
    }
    seen.iter().map(|word| word.count_ones()).sum::<u32>() >= RANDOM_FROM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_at_growing_distances_and_what_pays_is_checked_now_and_then() {
        let mut trial = Trial::new(false);
        let mut tries = Vec::new();
        for batch in 0..300 {
            if trial.is_due() {
                tries.push(batch);
                trial.learn(false);
            }
        }
        assert_eq!(tries, [0, 2, 6, 14, 30, 62, 126, 254]);
        trial.learn(true);
        let due = (0..100).position(|_| trial.is_due());
        assert_eq!(due, Some(16));
    }

    #[test]
    fn the_probe_tells_random_pages_from_others() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..1000 {
            let random: Vec<_> = std::iter::repeat_with(|| rng.u8(..)).take(4096).collect();
            assert!(looks_random(&random));
            let base64: Vec<_> = random.iter().map(|byte| b'0' + (byte & 63)).collect();
            assert!(!looks_random(&base64));
            let pointers = std::iter::repeat_with(|| 0x7f00_0000_0000 + rng.u64(..1 << 30));
            let pointers: Vec<_> = pointers.take(512).flat_map(u64::to_le_bytes).collect();
            assert!(!looks_random(&pointers));
        }
    }
}
