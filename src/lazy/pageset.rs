//! A set of page numbers, one bit each: 32 KiB for a GiB of 4 KiB pages.

use std::ops::Range;

/// Page numbers below a fixed length.
#[derive(Clone, Debug)]
pub struct PageSet {
    words: Vec<u64>,
    len: u64,
    count: u64,
}

impl PageSet {
    /// An empty set of numbers below `len`.
    pub fn new(len: u64) -> PageSet {
        let words =
            usize::try_from(len.div_ceil(64)).expect("a bit for each page fits into memory");
        PageSet {
            words: vec![0; words],
            len,
            count: 0,
        }
    }

    /// How many numbers are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether every number is in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    /// Puts `numbers`, all below the length, into the set.
    pub fn insert(&mut self, numbers: Range<u64>) {
        self.each_word(numbers, |word, mask| word | mask);
    }

    /// Takes `numbers`, all below the length, out of the set.
    pub fn remove(&mut self, numbers: Range<u64>) {
        self.each_word(numbers, |word, mask| word & !mask);
    }

    /// Whether `number`, which is below the length, is in the set.
    pub fn contains(&self, number: u64) -> bool {
        self.next_in(number..number + 1, true) == number
    }

    /// The first number from `from` on that is in the set, or is not, as `present` says; the length if
    /// there is none. Looks at everything up to there: only for those who go through the set once.
    pub fn next(&self, from: u64, present: bool) -> u64 {
        self.next_in(from..self.len, present)
    }

    /// The first of `numbers` that is in the set, or is not, as `present` says; their end if there is none.
    pub fn next_in(&self, numbers: Range<u64>, present: bool) -> u64 {
        let end = numbers.end.min(self.len);
        let mut at = numbers.start;
        while at < end {
            #[cfg(test)]
            tests::count_word();
            let word = self.words[index(at)];
            let wanted = if present { word } else { !word };
            let left = wanted >> (at % 64);
            if left != 0 {
                return (at + u64::from(left.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn each_word(&mut self, numbers: Range<u64>, change: impl Fn(u64, u64) -> u64) {
        assert!(numbers.end <= self.len, "numbers are below the length");
        let mut at = numbers.start;
        while at < numbers.end {
            let end = ((at / 64 + 1) * 64).min(numbers.end);
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            let word = &mut self.words[index(at)];
            let before = u64::from(word.count_ones());
            *word = change(*word, mask);
            self.count = self.count - before + u64::from(word.count_ones());
            at = end;
        }
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number / 64).expect("below the length")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const LEN: u64 = 200;

    thread_local! {
        static WORDS: Cell<u64> = const { Cell::new(0) };
    }

    pub(super) fn count_word() {
        WORDS.set(WORDS.get() + 1);
    }

    /// How many words of sets this thread has looked at so far.
    pub(crate) fn words_seen() -> u64 {
        WORDS.get()
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(
            changes in prop::collection::vec((any::<bool>(), 0..LEN, 0..90_u64), 0..40),
        ) {
            let (mut set, mut model) = (PageSet::new(LEN), BTreeSet::new());
            for (insert, start, length) in changes {
                let numbers = start..(start + length).min(LEN);
                if insert {
                    set.insert(numbers.clone());
                    model.extend(numbers);
                } else {
                    set.remove(numbers.clone());
                    model.retain(|number| !numbers.contains(number));
                }
                prop_assert_eq!(set.count(), model.len() as u64);
                prop_assert_eq!(set.is_full(), model.len() as u64 == LEN);
                for from in 0..=LEN {
                    let there = (from..LEN).find(|number| model.contains(number));
                    prop_assert_eq!(set.next(from, true), there.unwrap_or(LEN));
                    let absent = (from..LEN).find(|number| !model.contains(number));
                    prop_assert_eq!(set.next(from, false), absent.unwrap_or(LEN));
                }
            }
            for from in (0..LEN).step_by(7) {
                let end = (from + 70).min(LEN);
                prop_assert_eq!(set.next_in(from..end, true), set.next(from, true).min(end));
                prop_assert_eq!(set.next_in(from..end, false), set.next(from, false).min(end));
            }
        }
    }
}
