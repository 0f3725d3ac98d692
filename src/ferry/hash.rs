//! Hashes of pages: how two ends agree that they hold the same bytes.
//!
//! A hash is the 128-bit AEGIS-128L MAC of a page under a key that the receiver draws at random. A
//! process whose memory is carried cannot know the key, so it cannot craft two pages that collide;
//! that is what a plain checksum would allow. Chosen over BLAKE3 (a third of the speed on 4 KiB
//! pages) and XXH3 (faster, not cryptographic): see docs/ferry.md, section 5.

use std::fmt;

use aegis::aegis128l::Aegis128LMac;

use crate::units::{PageRange, PageSize, Vaddr};

/// Length of a hash, bytes.
pub const HASH_BYTES: usize = 16;

/// The hash of a page's contents under some [`HashKey`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageHash(pub [u8; HASH_BYTES]);

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The key of a receiver's hashes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct HashKey(pub [u8; 16]);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

/// Computes hashes under one key.
#[derive(Clone, Debug)]
pub struct PageHasher {
    mac: Aegis128LMac<HASH_BYTES>,
    zero_page: PageHash,
}

impl PageHasher {
    /// A hasher for pages of `page` bytes.
    pub fn new(key: HashKey, page: PageSize) -> PageHasher {
        let mac = Aegis128LMac::new(&key.0);
        let zero_page = mac_of(&mac, &vec![0; page.as_usize()]);
        PageHasher { mac, zero_page }
    }

    /// The hash of `page`.
    pub fn hash(&self, page: &[u8]) -> PageHash {
        mac_of(&self.mac, page)
    }

    /// The hash of a page of zeros.
    pub fn zero_page(&self) -> PageHash {
        self.zero_page
    }

    /// What is to be known of `page` before it is compared with anything.
    pub fn fingerprint(&self, page: &[u8]) -> Fingerprint {
        let zero = is_zero(page);
        Fingerprint {
            zero,
            hash: Some(if zero {
                self.zero_page
            } else {
                self.hash(page)
            }),
        }
    }

    /// One hash over many, in their order.
    pub fn digest(&self, hashes: impl IntoIterator<Item = PageHash>) -> PageHash {
        let mut mac = self.mac.clone();
        for hash in hashes {
            mac.update(&hash.0);
        }
        PageHash(mac.finalize())
    }
}

fn mac_of(mac: &Aegis128LMac<HASH_BYTES>, bytes: &[u8]) -> PageHash {
    let mut mac = mac.clone();
    mac.update(bytes);
    PageHash(mac.finalize())
}

/// What is known of a page's contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fingerprint {
    /// Whether the page is all zeros.
    pub zero: bool,
    /// Its hash; `None` where nobody will compare it.
    pub hash: Option<PageHash>,
}

impl Fingerprint {
    /// The fingerprint of `page` without a hash, for a session without memory of earlier rounds.
    pub fn without_hash(page: &[u8]) -> Fingerprint {
        Fingerprint {
            zero: is_zero(page),
            hash: None,
        }
    }
}

/// Whether all of `page` is zero.
pub fn is_zero(page: &[u8]) -> bool {
    // Compared with itself one byte further on: the C library's memcmp runs at memory speed and
    // stops at the first difference.
    match page.split_first() {
        Some((first, rest)) => *first == 0 && page[..rest.len()] == *rest,
        None => true,
    }
}

/// Hashes of a part of an earlier version of the memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HashStep {
    /// Which pages, in the order of their addresses.
    pub runs: Vec<PageRange>,
    /// Their hashes, one after another.
    pub hashes: Vec<PageHash>,
    /// Where to go on; `None` when these were the last.
    pub next: Option<Vaddr>,
}

impl HashStep {
    /// Goes on with `next`, whose pages lie behind.
    pub fn append(&mut self, next: HashStep) {
        next.runs.into_iter().for_each(|run| self.add_run(run));
        self.hashes.extend(next.hashes);
        self.next = next.next;
    }

    /// Goes on with the pages `run`, whose hashes are added by the caller.
    pub fn add_run(&mut self, run: PageRange) {
        match self.runs.last_mut() {
            Some(last) if last.end() == run.start() => {
                *last = PageRange::new(last.start().get(), run.end().get());
            }
            _ => self.runs.push(run),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_contents_make_different_hashes() {
        let page = PageSize::KIB_4;
        let (a, b) = (
            PageHasher::new(HashKey([1; 16]), page),
            PageHasher::new(HashKey([2; 16]), page),
        );
        let mut contents = vec![0; page.as_usize()];
        assert_eq!(a.hash(&contents), a.zero_page());
        assert_ne!(a.hash(&contents), b.hash(&contents));
        for at in [0, 1, 2047, 4095] {
            contents[at] ^= 1;
            assert!(!is_zero(&contents), "byte {at}");
            assert_ne!(a.hash(&contents), a.zero_page(), "byte {at}");
            contents[at] ^= 1;
        }
        assert!(is_zero(&contents));
    }

    #[test]
    fn a_digest_depends_on_order() {
        let hasher = PageHasher::new(HashKey::default(), PageSize::KIB_4);
        let (a, b) = (PageHash([1; 16]), PageHash([2; 16]));
        assert_eq!(hasher.digest([a, b]), hasher.digest([a, b]));
        assert_ne!(hasher.digest([a, b]), hasher.digest([b, a]));
    }
}
