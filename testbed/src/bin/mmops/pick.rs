//! Chooses ranges at random.

use std::fs;

use anyhow::Result;

use crate::model::{ARENA, ARENA_PAGES, Model, PAGE, Page};

/// How often a range is looked for.
const TRIES: usize = 12;

impl Model {
    /// A random mapped page for which `fits` holds, and as many behind it, `most` at most.
    pub(crate) fn pick(
        &mut self,
        most: usize,
        fits: impl Fn(&Page) -> bool,
    ) -> Option<(usize, usize)> {
        let most = 1 + self.random.below(most);
        for _ in 0..TRIES {
            let from = ARENA + self.random.below(ARENA_PAGES) * PAGE;
            let behind = self.pages.range(from..).find(|(_, page)| fits(page));
            let Some((&first, _)) = behind.or_else(|| self.pages.iter().find(|(_, p)| fits(p)))
            else {
                continue;
            };
            let mut pages = 0;
            for (&address, page) in self.pages.range(first..).take(most) {
                if address != first + pages * PAGE || !fits(page) {
                    break;
                }
                pages += 1;
            }
            return Some((first, pages));
        }
        None
    }

    /// A free range, often beside a mapping.
    pub(crate) fn gap(&mut self, pages: usize, aligned: usize) -> Option<usize> {
        for _ in 0..TRIES {
            let mut at = ARENA + self.random.below(ARENA_PAGES - pages) * PAGE;
            if self.random.below(2) == 0
                && let Some((&next, _)) = self.pages.range(at..).next()
            {
                // Right in front of what is there.
                at = next.saturating_sub(pages * PAGE).max(ARENA);
            }
            at = at.next_multiple_of(aligned * PAGE);
            let end = at + pages * PAGE;
            if end <= ARENA + ARENA_PAGES * PAGE && self.pages.range(at..end).next().is_none() {
                return Some(at);
            }
        }
        None
    }

    /// The whole mapping of the kernel's around a random page: its address and pages, all in the model.
    pub(crate) fn pick_mapping(&mut self) -> Result<Option<(usize, usize)>> {
        let Some((inside, _)) = self.pick(1, |_| true) else {
            return Ok(None);
        };
        let maps = fs::read_to_string("/proc/self/maps")?;
        let range = |line: &str| -> Option<(usize, usize)> {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(from)?, number(to)?))
        };
        let around = maps
            .lines()
            .filter_map(range)
            .find(|(from, to)| (*from..*to).contains(&inside));
        Ok(around.map(|(from, to)| (from, (to - from) / PAGE)))
    }

    /// The pages of a range, to be changed.
    pub(crate) fn range(
        &mut self,
        at: usize,
        pages: usize,
    ) -> impl Iterator<Item = (&usize, &mut Page)> {
        self.pages.range_mut(at..at + pages * PAGE)
    }
}
