//! Buffers of frames, kept for the next frames. Fresh memory costs a fault and a zeroed page for each 4 KiB, and the
//! allocator gives memory as large as a batch's frame back at once.

use crate::engine::ferry::lock;
use crate::sync::Mutex;

/// Most buffers kept: a window of full batches.
const POOLED_MAX: usize = 96;

/// Smaller ones are not worth keeping, bytes.
const BYTES_MIN: usize = 32 << 10;

/// See the module's text.
#[derive(Debug, Default)]
pub(in crate::engine) struct BufferPool(Mutex<Vec<Vec<u8>>>);

impl BufferPool {
    /// A buffer with anything in it, or an empty one.
    pub(in crate::engine) fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    /// A buffer that is not needed any more.
    pub(in crate::engine) fn give(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= BYTES_MIN {
            let mut kept = lock(&self.0);
            if kept.len() < POOLED_MAX {
                kept.push(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_kept_up_to_a_number() {
        let pool = BufferPool::default();
        assert_eq!(pool.take().capacity(), 0);
        pool.give(vec![1; BYTES_MIN - 1]);
        assert_eq!(pool.take().capacity(), 0);
        for _ in 0..=POOLED_MAX {
            pool.give(vec![1; BYTES_MIN]);
        }
        let kept = std::iter::from_fn(|| Some(pool.take()).filter(|buffer| !buffer.is_empty()));
        assert_eq!(kept.count(), POOLED_MAX);
    }
}
