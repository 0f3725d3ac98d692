//! An ordered map of runs of missing pages: where they are now, and where they were in the dump.
//!
//! A process moves its memory (mremap) while its pages are still on the way; the source knows only
//! the addresses of the dump. So each run carries both addresses:
//!
//! ```text
//! now     0x7000 [=======)          0x9000 [====)
//! image   0x1000 [=======)          0x5000 [====)
//! ```
//!
//! Every operation is O(log n) in the number of runs, plus the runs it touches. Runs never overlap
//! and are never merged, so that one made within the borders of a mapping stays within them.

use std::collections::BTreeMap;

use crate::units::{PageRange, Vaddr};

/// A run of pages: `at` are its addresses now, `image` is the first one's address in the dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Addresses in the process now.
    pub at: PageRange,
    /// Address in the dump of the page at `at.start()`.
    pub image: Vaddr,
}

impl Piece {
    /// The addresses in the dump.
    pub fn image_range(self) -> PageRange {
        PageRange::new(self.image.get(), self.image.get() + self.at.bytes())
    }

    /// The part of the piece at `sub`, which lies within it.
    #[must_use]
    pub fn part(self, sub: PageRange) -> Piece {
        let skipped = sub.start().get() - self.at.start().get();
        Piece {
            at: sub,
            image: Vaddr(self.image.get() + skipped),
        }
    }

    /// The part of the piece whose pages lie in `image` in the dump, if there is one.
    pub fn part_of_image(self, image: PageRange) -> Option<Piece> {
        let sub = self.image_range().intersect(image)?;
        let start = self.at.start().get() + (sub.start().get() - self.image.get());
        Some(Piece {
            at: PageRange::new(start, start + sub.bytes()),
            image: sub.start(),
        })
    }
}

/// What else is kept for each run of an [`ExtentMap`]: nothing, or an [`ImageIndex`].
pub trait Index {
    /// A run was added.
    fn added(&mut self, piece: Piece);
    /// A run was taken out.
    fn removed(&mut self, piece: Piece);
    /// What finds runs by their addresses in the dump, if that is kept.
    fn by_image(&self) -> Option<&ImageIndex>;
}

impl Index for () {
    fn added(&mut self, _: Piece) {}
    fn removed(&mut self, _: Piece) {}
    fn by_image(&self) -> Option<&ImageIndex> {
        None
    }
}

/// An index that is kept where it is needed.
impl Index for Option<ImageIndex> {
    fn added(&mut self, piece: Piece) {
        if let Some(index) = self {
            index.added(piece);
        }
    }

    fn removed(&mut self, piece: Piece) {
        if let Some(index) = self {
            index.removed(piece);
        }
    }

    fn by_image(&self) -> Option<&ImageIndex> {
        self.as_ref()
    }
}

/// Finds runs by their addresses in the dump, which are unique within a process.
#[derive(Clone, Default, Debug)]
pub struct ImageIndex(BTreeMap<u64, u64>);

impl Index for ImageIndex {
    fn added(&mut self, piece: Piece) {
        self.0.insert(piece.image.get(), piece.at.start().get());
    }

    fn removed(&mut self, piece: Piece) {
        self.0.remove(&piece.image.get());
    }

    fn by_image(&self) -> Option<&ImageIndex> {
        Some(self)
    }
}

#[derive(Clone, Copy, Debug)]
struct Run {
    end: u64,
    image: u64,
}

/// Runs of pages, ordered by where they are now.
#[derive(Clone, Default, Debug)]
pub struct ExtentMap<I = ()> {
    runs: BTreeMap<u64, Run>,
    bytes: u64,
    index: I,
}

impl<I: Index> ExtentMap<I> {
    /// The same runs, which `index` finds.
    #[must_use]
    pub fn with_index<J: Index>(self, index: J) -> ExtentMap<J> {
        let mut map = ExtentMap {
            runs: BTreeMap::new(),
            bytes: 0,
            index,
        };
        self.iter().for_each(|piece| map.insert(piece));
        map
    }

    /// Adds a run. It may not overlap one that is there.
    pub fn insert(&mut self, piece: Piece) {
        debug_assert!(
            self.next_from(piece.at.start())
                .is_none_or(|next| next.at.start() >= piece.at.end())
        );
        self.bytes += piece.at.bytes();
        self.index.added(piece);
        let run = Run {
            end: piece.at.end().get(),
            image: piece.image.get(),
        };
        self.runs.insert(piece.at.start().get(), run);
    }

    /// Whether no page is in the map.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many runs there are.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// How many bytes the runs cover together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The run around `addr`.
    pub fn find(&self, addr: Vaddr) -> Option<Piece> {
        let (start, run) = self.runs.range(..=addr.get()).next_back()?;
        (addr.get() < run.end).then(|| piece(*start, *run))
    }

    /// What is there at or above `addr`: the rest of the run around it, else the next run.
    pub fn next_from(&self, addr: Vaddr) -> Option<Piece> {
        let next = self.around_or_above(addr)?;
        let start = next.at.start().max(addr);
        Some(next.part(PageRange::new(start.get(), next.at.end().get())))
    }

    /// The whole run around `addr`, else the next one above.
    fn around_or_above(&self, addr: Vaddr) -> Option<Piece> {
        self.find(addr).or_else(|| {
            let (start, run) = self.runs.range(addr.get()..).next()?;
            Some(piece(*start, *run))
        })
    }

    /// All runs, by address.
    pub fn iter(&self) -> impl Iterator<Item = Piece> + '_ {
        self.runs.iter().map(|(start, run)| piece(*start, *run))
    }

    /// The first address behind all runs.
    pub fn end(&self) -> Option<Vaddr> {
        let (_, last) = self.runs.last_key_value()?;
        Some(Vaddr(last.end))
    }

    /// Takes out what lies in `range`, splitting the runs at its borders; `taken` sees each part.
    pub fn take(&mut self, range: PageRange, mut taken: impl FnMut(Piece)) {
        let mut at = range.start();
        while at < range.end()
            && let Some(whole) = self.around_or_above(at)
            && let Some(cut) = whole.at.intersect(range)
        {
            self.remove(whole);
            let before = PageRange::new(whole.at.start().get(), cut.start().get());
            let after = PageRange::new(cut.end().get(), whole.at.end().get());
            for rest in [before, after] {
                if !rest.is_empty() {
                    self.insert(whole.part(rest));
                }
            }
            taken(whole.part(cut));
            at = cut.end();
        }
    }

    /// Moves what lies in `from` so that `from.start()` becomes `to`.
    pub fn shift(&mut self, from: PageRange, to: Vaddr) {
        let mut moved = Vec::new();
        self.take(from, |piece| moved.push(piece));
        for piece in moved {
            let start = to.get() + (piece.at.start().get() - from.start().get());
            self.insert(Piece {
                at: PageRange::new(start, start + piece.at.bytes()),
                ..piece
            });
        }
    }

    fn remove(&mut self, piece: Piece) {
        self.runs.remove(&piece.at.start().get());
        self.bytes -= piece.at.bytes();
        self.index.removed(piece);
    }
}

impl<I: Index> ExtentMap<I> {
    /// The first part of a run, by address in the dump, whose pages lie in `image`; `None` without an
    /// [`ImageIndex`].
    pub fn find_image(&self, image: PageRange) -> Option<Piece> {
        let start = image.start().get();
        let index = self.index.by_image()?;
        let before = index.0.range(..start).next_back();
        let behind = index.0.range(start..image.end().get()).next();
        [before, behind].into_iter().flatten().find_map(|(_, at)| {
            let run = self.runs.get(at)?;
            piece(*at, *run).part_of_image(image)
        })
    }
}

fn piece(start: u64, run: Run) -> Piece {
    Piece {
        at: PageRange::new(start, run.end),
        image: Vaddr(run.image),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// The model: page by page, address now -> address in the dump.
    type Pages = BTreeMap<u64, u64>;

    #[derive(Clone, Debug)]
    enum Operation {
        Insert { at: u64, image: u64, pages: u64 },
        Take { at: u64, pages: u64 },
        Shift { from: u64, to: u64, pages: u64 },
    }

    fn operations() -> impl Strategy<Value = Vec<Operation>> {
        let one = prop_oneof![
            (0..64u64, 0..4096u64, 1..16u64).prop_map(|(at, image, pages)| Operation::Insert {
                at,
                image,
                pages
            }),
            (0..64u64, 1..16u64).prop_map(|(at, pages)| Operation::Take { at, pages }),
            (0..64u64, 0..64u64, 1..16u64).prop_map(|(from, to, pages)| Operation::Shift {
                from,
                to,
                pages
            }),
        ];
        prop::collection::vec(one, 1..60)
    }

    fn range(at: u64, pages: u64) -> PageRange {
        PageRange::new(at * PAGE, (at + pages) * PAGE)
    }

    fn insert_free(
        map: &mut ExtentMap<ImageIndex>,
        model: &mut Pages,
        at: u64,
        image: u64,
        pages: u64,
    ) {
        let free = (at..at + pages).all(|page| !model.contains_key(&page));
        let fresh = (image..image + pages).all(|page| !model.values().any(|used| *used == page));
        if free && fresh {
            map.insert(Piece {
                at: range(at, pages),
                image: Vaddr(image * PAGE),
            });
            model.extend((0..pages).map(|page| (at + page, image + page)));
        }
    }

    fn shift_pages(model: &mut Pages, from: u64, to: u64, pages: u64) {
        let moved: Vec<_> = (from..from + pages)
            .filter_map(|page| model.remove_entry(&page))
            .collect();
        model.extend(
            moved
                .into_iter()
                .map(|(page, image)| (page - from + to, image)),
        );
    }

    proptest! {
        #[test]
        fn behaves_like_a_map_of_pages(operations in operations()) {
            let mut map = ExtentMap::<ImageIndex>::default();
            let mut model = Pages::new();
            for operation in operations {
                match operation {
                    Operation::Insert { at, image, pages } => {
                        insert_free(&mut map, &mut model, at, image, pages);
                    }
                    Operation::Take { at, pages } => {
                        let mut taken = Pages::new();
                        map.take(range(at, pages), |piece| taken.extend(pages_of(piece)));
                        let expected: Pages =
                            (at..at + pages).filter_map(|page| model.remove_entry(&page)).collect();
                        prop_assert_eq!(taken, expected);
                    }
                    Operation::Shift { from, to, pages } => {
                        // As the kernel does, what is at the target is unmapped first.
                        map.take(range(to, pages), |_| {});
                        model.retain(|page, _| !(to..to + pages).contains(page));
                        map.shift(range(from, pages), Vaddr(to * PAGE));
                        shift_pages(&mut model, from, to, pages);
                    }
                }
                prop_assert_eq!(map.iter().flat_map(pages_of).collect::<Pages>(), model.clone());
                prop_assert_eq!(map.bytes(), model.len() as u64 * PAGE);
                for (page, image) in &model {
                    let found = map.find_image(range(*image, 1)).map(pages_of);
                    prop_assert_eq!(found, Some(vec![(*page, *image)]));
                    prop_assert!(map.find(Vaddr(page * PAGE + 7)).is_some());
                }
                for page in 0..96 {
                    let next = map.next_from(Vaddr(page * PAGE)).map(|piece| piece.at.start().get() / PAGE);
                    prop_assert_eq!(next, model.range(page..).next().map(|(page, _)| *page));
                }
            }
        }
    }

    fn pages_of(piece: Piece) -> Vec<(u64, u64)> {
        let (at, image) = (piece.at.start().get() / PAGE, piece.image.get() / PAGE);
        (0..piece.at.bytes() / PAGE)
            .map(|page| (at + page, image + page))
            .collect()
    }
}
