//! Hashes of blocks, under a key that the destination draws: a container cannot know it, so it cannot make two
//! contents with one hash. Pure.

use std::fmt::Write as _;

use pageferry::ferry::hash::{HashKey, PageHasher};
use pageferry::units::PageSize;

use super::index::BlockHash;

/// Computes hashes under one key.
#[derive(Clone, Debug)]
pub(super) struct BlockHasher {
    key: HashKey,
    mac: PageHasher,
}

impl BlockHasher {
    pub(super) fn new(key: [u8; 16]) -> BlockHasher {
        let key = HashKey(key);
        BlockHasher {
            key,
            mac: PageHasher::new(key, PageSize::KIB_4),
        }
    }

    /// Under a key that nobody has had before.
    pub(super) fn random() -> BlockHasher {
        BlockHasher::new(std::array::from_fn(|_| fastrand::u8(..)))
    }

    pub(super) fn key(&self) -> [u8; 16] {
        self.key.0
    }

    /// The hash of a block, whatever zeros it ends with.
    pub(super) fn hash(&self, block: &[u8]) -> BlockHash {
        let end = block.iter().rposition(|byte| *byte != 0);
        match end {
            None => BlockHash::ZEROS,
            Some(end) => BlockHash(self.mac.hash(&block[..=end]).0),
        }
    }
}

/// Digits of a digest.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_zeros_do_not_count_and_keys_do() {
        let (a, b) = (BlockHasher::new([1; 16]), BlockHasher::new([2; 16]));
        assert_eq!(a.hash(&[0; 100]), BlockHash::ZEROS);
        assert_eq!(a.hash(b"ab"), a.hash(b"ab\0\0"));
        assert_ne!(a.hash(b"ab"), a.hash(b"\0ab"));
        assert_ne!(a.hash(b"ab"), b.hash(b"ab"));
        assert_eq!(hexadecimal(&[0, 255]), "00ff");
    }
}
