//! What a page of the load must contain: computed, never stored.

use serde::{Deserialize, Serialize};

/// Kind of bytes that fill an area's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Pages that were written with zeros.
    Zero,
    /// One word repeated, another one on each page.
    Constant,
    /// The same page everywhere.
    Same,
    /// Words of English: compresses about three to one.
    Text,
    /// Does not compress.
    Random,
    /// A page of any of the other kinds, by its index.
    Mixed,
}

/// Names one version of one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageId {
    /// The load's seed.
    pub seed: u64,
    /// Number of the area within the load.
    pub area: u32,
    /// Number of the page within the area.
    pub index: u32,
    /// How often the page was rewritten.
    pub generation: u32,
}

const WORDS: [[u8; 8]; 16] = [
    *b"process ",
    *b"memory  ",
    *b"page of ",
    *b"the old ",
    *b"and then",
    *b" it was ",
    *b"written ",
    *b"between ",
    *b"another ",
    *b"session ",
    *b"request ",
    *b"answer: ",
    *b"customer",
    *b" number ",
    *b"\ntotal  ",
    *b"nothing ",
];

/// Mixes `value` into 64 well-spread bits (the finaliser of SplitMix64, Steele et al. 2014).
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl PageId {
    fn key(self) -> u64 {
        let place = (u64::from(self.area) << 32) | u64::from(self.index);
        mix(mix(self.seed ^ mix(place)) ^ u64::from(self.generation))
    }

    /// Fills `words` with the beginning of the page's content.
    pub fn fill(self, content: Content, words: &mut [u64]) {
        let key = self.key();
        let content = match content {
            Content::Mixed => match mix(key) % 8 {
                0 => Content::Zero,
                1 => Content::Same,
                2 => Content::Constant,
                3 | 4 => Content::Text,
                _ => Content::Random,
            },
            other => other,
        };
        match content {
            Content::Zero => words.fill(0),
            Content::Constant => words.fill(key | 1),
            Content::Same => words.fill(mix(self.seed) | 1),
            Content::Text => {
                for (word, n) in words.iter_mut().zip(0u64..) {
                    let pick = mix(key ^ n);
                    *word = u64::from_le_bytes(WORDS[usize::from(pick.to_le_bytes()[0] & 15)]);
                }
            }
            Content::Random | Content::Mixed => {
                for (word, n) in words.iter_mut().zip(0u64..) {
                    *word = mix(key.wrapping_add(n << 1)) | 1;
                }
            }
        }
    }
}

/// A page's digest, bound to its place so that swapped pages do not cancel out.
pub fn digest(area: u32, index: u32, words: &[u64]) -> u64 {
    let start = mix((u64::from(area) << 32) | u64::from(index));
    words.iter().fold(start, |hash, &word| {
        (hash ^ word)
            .wrapping_mul(0x2545_f491_4f6c_dd1d)
            .rotate_left(29)
    })
}

/// The marker that stands at the beginning of a page whose content was lost (SIGBUS); no content
/// generates it in its first two words.
pub const POISON_MARK: [u64; 2] = [0x504f_4953_4f4e_4544, 0xdead_dead_dead_dead];

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = PageId {
        seed: 7,
        area: 1,
        index: 2,
        generation: 0,
    };

    #[test]
    fn versions_differ_and_repeat() {
        for content in [Content::Constant, Content::Text, Content::Random] {
            let (mut a, mut b, mut again) = ([0; 512], [0; 512], [0; 512]);
            ID.fill(content, &mut a);
            PageId {
                generation: 1,
                ..ID
            }
            .fill(content, &mut b);
            ID.fill(content, &mut again);
            assert_ne!(a, b, "{content:?}");
            assert_eq!(a, again, "{content:?}");
        }
    }

    #[test]
    fn a_prefix_is_the_beginning_of_the_page() {
        for content in [
            Content::Same,
            Content::Text,
            Content::Random,
            Content::Mixed,
        ] {
            let (mut whole, mut prefix) = ([0; 512], [0; 8]);
            ID.fill(content, &mut whole);
            ID.fill(content, &mut prefix);
            assert_eq!(whole[..8], prefix, "{content:?}");
        }
    }

    #[test]
    fn digests_notice_swapped_pages() {
        let (mut a, mut b) = ([0; 512], [0; 512]);
        ID.fill(Content::Random, &mut a);
        PageId { index: 3, ..ID }.fill(Content::Random, &mut b);
        let straight = digest(1, 2, &a).wrapping_add(digest(1, 3, &b));
        let swapped = digest(1, 2, &b).wrapping_add(digest(1, 3, &a));
        assert_ne!(straight, swapped);
    }
}
