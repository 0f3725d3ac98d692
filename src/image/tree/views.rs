//! Which process another one was forked from, judged by their pages, and what it shares with it.
//!
//! ```text
//! member 0 (first to come)     own: all its pages
//! member 1, view of 0          own: what differs from 0
//! member 2, view of 1          own: what differs from 1, seen over 0
//! ```
//!
//! The view of a member is its own pages over the view that it is based on. A process that was forked from another
//! one has nearly all of that one's view. Which one that is nobody says, so a sample of its pages is compared with
//! every view.
//!
//! Pure. Invariants: a member's base came before it; members without own pages are nobody's base.

use crate::criu::header::{Target, Wire};
use crate::ferry::hash::PageHash;
use crate::limits::TREE_LAYERS_MAX;
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages of a sample that are compared with every view; the whole sample is compared with the best of them alone.
const FIRST_LOOK_PAGES: usize = 64;

/// So many views are compared with the whole sample.
const CLOSE_LOOKS: usize = 8;

/// A view that comes within this part of the sample of the best one is preferred if it is older: the pages that
/// forks have in common by chance are few, and those in which each of them differs from the others are not.
const MARGIN_PART: usize = 16;

/// Adds `range`, which lies behind all of `ranges`.
pub(super) fn push(ranges: &mut Vec<PageRange>, range: PageRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.start() => {
            *last = PageRange::new(last.start().get(), range.end().get());
        }
        _ => ranges.push(range),
    }
}

/// `ranges` without what `others` cover; both are sorted and disjoint.
pub(super) fn without(
    ranges: &[PageRange],
    others: impl Iterator<Item = PageRange>,
) -> Vec<PageRange> {
    let mut left = Vec::new();
    let mut others = others.peekable();
    for range in ranges {
        let (mut at, end) = (range.start().get(), range.end().get());
        while at < end {
            while others.next_if(|other| other.end().get() <= at).is_some() {}
            let next = others.peek().map_or(end, |other| other.start().get());
            if next > at {
                push(&mut left, PageRange::new(at, next.min(end)));
            }
            let covered = others.peek().map_or(end, |other| other.end().get());
            at = covered.max(at);
        }
    }
    left
}

/// Pages with their hashes, by address.
#[derive(Debug, Default)]
pub(super) struct Pages {
    runs: Vec<Run>,
    hashes: Vec<PageHash>,
}

#[derive(Debug)]
struct Run {
    range: PageRange,
    /// Where the hash of the first page stands.
    first: usize,
}

impl Pages {
    /// Adds a page, which lies behind all others.
    pub(super) fn push(&mut self, page: PageRange, hash: PageHash) {
        match self.runs.last_mut() {
            Some(last) if last.range.end() == page.start() => {
                last.range = PageRange::new(last.range.start().get(), page.end().get());
            }
            _ => self.runs.push(Run {
                range: page,
                first: self.hashes.len(),
            }),
        }
        self.hashes.push(hash);
    }

    /// The hash of the page at `vaddr`.
    fn find(&self, vaddr: Vaddr, page: PageSize) -> Option<PageHash> {
        self.hashes.get(self.place(vaddr, page)?).copied()
    }

    /// How many pages were added before the one at `vaddr`.
    fn place(&self, vaddr: Vaddr, page: PageSize) -> Option<usize> {
        let index = self.runs.partition_point(|run| run.range.end() <= vaddr);
        let run = self.runs.get(index)?;
        if !run.range.contains(vaddr) {
            return None;
        }
        let pages = (vaddr.get() - run.range.start().get()) >> page.shift();
        Some(run.first + usize::try_from(pages).ok()?)
    }

    /// The runs of pages.
    pub(super) fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs.iter().map(|run| run.range)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// One process, or one piece of shared memory that has pages in the parent.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) target: Target,
    pub(super) wire: Wire,
    /// Number of the pages file with its own pages.
    pub(super) pages_id: u32,
    /// The member whose view it shares pages with.
    pub(super) base: Option<usize>,
    /// How many views its base's view is made of.
    pub(super) depth: usize,
    /// Pages that no view that it is based on has.
    pub(super) own: Pages,
    /// All pages that are to be looked for below the image directory: own ones, those of the base's view, and those
    /// of the directory's parent.
    pub(super) needed: Vec<PageRange>,
}

/// The members so far.
#[derive(Debug)]
pub(super) struct Views {
    page: PageSize,
    members: Vec<Member>,
}

impl Views {
    pub(super) fn new(page: PageSize) -> Views {
        Views {
            page,
            members: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, member: Member) {
        self.members.push(member);
    }

    pub(super) fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members whose own pages make the view of member `view`, the topmost first.
    pub(super) fn line(&self, view: Option<usize>) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(view, |member| self.members[*member].base)
    }

    /// The hash of the page at `vaddr` in a view, if it has one.
    pub(super) fn find(&self, view: Option<usize>, vaddr: Vaddr) -> Option<PageHash> {
        self.line(view)
            .find_map(|member| self.members[member].own.find(vaddr, self.page))
    }

    /// Whose own page the one at `vaddr` in a view is, and how many pages that member has before it.
    pub(super) fn place(&self, view: Option<usize>, vaddr: Vaddr) -> Option<(usize, usize)> {
        self.line(view).find_map(|member| {
            let place = self.members[member].own.place(vaddr, self.page)?;
            Some((member, place))
        })
    }

    /// How many views are below the own pages of somebody who is based on `view`.
    pub(super) fn depth_on(&self, view: Option<usize>) -> usize {
        view.map_or(0, |view| self.members[view].depth + 1)
    }

    /// Whether somebody can be based on any view.
    pub(super) fn has_candidates(&self) -> bool {
        self.candidates().next().is_some()
    }

    /// The members whose views are all that there are, the oldest first.
    fn candidates(&self) -> impl Iterator<Item = usize> + '_ {
        let members = self.members.iter().enumerate();
        members
            .filter(|(_, member)| !member.own.is_empty() && member.depth + 1 < TREE_LAYERS_MAX)
            .map(|(index, _)| index)
    }

    /// The view that somebody with the pages of `sample` shares most with: of those that are nearly as good as the
    /// best the oldest. `None` if no view has one of them.
    pub(super) fn choose(&self, sample: &[(Vaddr, PageHash)]) -> Option<usize> {
        let every = (sample.len() / FIRST_LOOK_PAGES).max(1);
        let mut views: Vec<(usize, usize)> = self
            .candidates()
            .map(|view| (self.matches(view, sample.iter().step_by(every)), view))
            .filter(|(matches, _)| *matches > 0)
            .collect();
        views.sort_by_key(|(matches, view)| (std::cmp::Reverse(*matches), *view));
        views.truncate(CLOSE_LOOKS);
        for (matches, view) in &mut views {
            *matches = self.matches(*view, sample.iter());
        }
        let most = views.iter().map(|(matches, _)| *matches).max()?;
        let least = most - (sample.len() / MARGIN_PART).min(most / 2);
        let good = views.iter().filter(|(matches, _)| *matches >= least);
        good.map(|(_, view)| *view).min()
    }

    fn matches<'a>(
        &self,
        view: usize,
        sample: impl Iterator<Item = &'a (Vaddr, PageHash)>,
    ) -> usize {
        sample
            .filter(|(vaddr, hash)| self.find(Some(view), *vaddr) == Some(*hash))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start << 12, end << 12)
    }

    fn hash(content: u8) -> PageHash {
        PageHash([content; 16])
    }

    /// A member with own pages from `start` on, of these contents.
    fn member(base: Option<usize>, depth: usize, pages: &[(u64, u8)]) -> Member {
        let mut own = Pages::default();
        for (number, content) in pages {
            own.push(range(*number, *number + 1), hash(*content));
        }
        Member {
            target: Target::Process(1),
            wire: Wire::V2,
            pages_id: 1,
            base,
            depth,
            own,
            needed: Vec::new(),
        }
    }

    fn views(members: Vec<Member>) -> Views {
        Views {
            page: PAGE,
            members,
        }
    }

    fn sample(pages: &[(u64, u8)]) -> Vec<(Vaddr, PageHash)> {
        let pages = pages.iter();
        pages
            .map(|(number, content)| (Vaddr(number << 12), hash(*content)))
            .collect()
    }

    fn pages(count: u64, changed: &[(u64, u8)]) -> Vec<(u64, u8)> {
        let mut pages: Vec<(u64, u8)> = (0..count).map(|number| (number, 1)).collect();
        for (number, content) in changed {
            pages[usize::try_from(*number).unwrap()].1 = *content;
        }
        pages
    }

    #[test]
    fn a_view_is_own_pages_over_those_of_its_base() {
        let views = views(vec![
            member(None, 0, &[(1, 1), (2, 1), (9, 1)]),
            member(Some(0), 1, &[(2, 2), (5, 2)]),
        ]);
        let find = |view, number: u64| views.find(view, Vaddr(number << 12));
        let seen = [1, 2, 5, 9].map(|number| find(Some(1), number));
        assert_eq!(seen, [1, 2, 2, 1].map(|content| Some(hash(content))));
        assert_eq!((find(Some(0), 5), find(None, 1)), (None, None));
    }

    #[test]
    fn of_forks_that_differ_alike_the_parent_is_chosen() {
        let parent = member(None, 0, &pages(1000, &[]));
        // Each fork has changed ten pages; two of the first are those of the new one as well.
        let changed: Vec<(u64, u8)> = (0..10).map(|number| (number * 7, 2)).collect();
        let views = views(vec![parent, member(Some(0), 1, &changed)]);
        let chosen = views.choose(&sample(&pages(1000, &changed[..2])));
        assert_eq!(chosen, Some(0));
    }

    #[test]
    fn who_shares_much_more_with_a_fork_is_based_on_that() {
        let changed: Vec<(u64, u8)> = (0..500).map(|number| (number, 2)).collect();
        let parent = member(None, 0, &pages(1000, &[]));
        let views = views(vec![parent, member(Some(0), 1, &changed)]);
        let chosen = views.choose(&sample(&pages(1000, &changed)));
        assert_eq!(chosen, Some(1));
    }

    #[test]
    fn who_shares_nothing_is_based_on_nobody() {
        let other = member(None, 0, &pages(100, &[]));
        let own: Vec<(u64, u8)> = (200..300).map(|number| (number, 1)).collect();
        assert_eq!(views(vec![other]).choose(&sample(&own)), None);
    }

    #[test]
    fn members_without_own_pages_and_too_deep_ones_are_nobodys_base() {
        let mut deep = member(None, TREE_LAYERS_MAX - 1, &[(1, 1)]);
        assert!(!views(vec![member(None, 0, &[])]).has_candidates());
        assert!(!views(vec![deep]).has_candidates());
        deep = member(None, TREE_LAYERS_MAX - 2, &[(1, 1)]);
        assert!(views(vec![deep]).has_candidates());
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_the_others_do_not_cover(
            ranges in prop::collection::vec((0..4u64, 1..6u64), 0..12),
            others in prop::collection::vec((0..4u64, 1..6u64), 0..12),
        ) {
            let lay = |gaps: Vec<(u64, u64)>| {
                let mut at = 0;
                let mut ranges = Vec::new();
                for (gap, pages) in gaps {
                    ranges.push(range(at + gap, at + gap + pages));
                    at += gap + pages;
                }
                ranges
            };
            let (ranges, others) = (lay(ranges), lay(others));
            let has = |ranges: &[PageRange], number: u64| {
                ranges.iter().any(|range| range.contains(Vaddr(number << 12)))
            };
            let left = without(&ranges, others.iter().copied());
            for number in 0..120 {
                let expected = has(&ranges, number) && !has(&others, number);
                prop_assert_eq!(has(&left, number), expected, "page {}", number);
            }
        }
    }
}
