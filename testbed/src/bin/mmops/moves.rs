//! mremap: moves, growth, what is cut off and what is left behind.

use anyhow::{Context, Result};
use testbed::sys::mappings::{self, Remap};

use crate::model::{Kind, MOST_PAGES, Model, PAGE, Page, Value};

/// Pages by which a mapping grows at most.
const MOST_GROWTH: usize = 20;

impl Model {
    /// Moves a mapping or a part of one; it may grow, or leave an empty one behind.
    pub(crate) fn move_away(&mut self) -> Result<()> {
        let Some((start, whole)) = self.pick_mapping()? else {
            return Ok(());
        };
        let (at, pages) = self.part_of(start, whole);
        let first = self.pages[&at];
        let keeps = self.random.below(4) == 0 && !first.locked && !self.leaves_out("dontunmap");
        let grows = !keeps && first.kind == Kind::Anonymous && self.random.below(3) == 0;
        let growth = match grows {
            true if self.pages.len() < MOST_PAGES => 1 + self.random.below(MOST_GROWTH),
            _ => 0,
        };
        let Some(to) = self.gap(pages + growth, 1) else {
            return Ok(());
        };
        let what = format!("moves {at:#x}+{pages} to {to:#x}, {growth} more, leaves {keeps}");
        self.note(at, pages, &what);
        self.note(to, pages + growth, &what);
        let how = match keeps {
            true => Remap::LeaveEmpty(to),
            false => Remap::MoveTo(to),
        };
        mappings::remap(at, pages * PAGE, (pages + growth) * PAGE, how)
            .with_context(|| format!("{}: {what}{}", self.name, self.history(at)))?;
        let moved: Vec<Page> = (0..pages).map(|n| self.pages[&(at + n * PAGE)]).collect();
        for (n, page) in moved.into_iter().enumerate() {
            self.pages.insert(to + n * PAGE, page);
            if keeps {
                let left = Page {
                    value: page.emptied(),
                    guarded: false,
                    ..page
                };
                self.pages.insert(at + n * PAGE, left);
            } else {
                self.pages.remove(&(at + n * PAGE));
            }
        }
        self.add_growth(to + pages * PAGE, growth, first);
        Ok(())
    }

    /// Cuts the end of a mapping off, or lets it grow where it is.
    pub(crate) fn resize(&mut self) -> Result<()> {
        let Some((start, whole)) = self.pick_mapping()? else {
            return Ok(());
        };
        let first = self.pages[&start];
        if self.random.below(2) == 0 && whole > 1 {
            let (at, pages) = self.part_of(start, whole);
            let kept = self.random.below(pages);
            if kept == 0 {
                return Ok(());
            }
            self.note(at, pages, &format!("cuts off behind {kept} pages"));
            mappings::remap(at, pages * PAGE, kept * PAGE, Remap::InPlace)?;
            for n in kept..pages {
                self.pages.remove(&(at + n * PAGE));
            }
            return Ok(());
        }
        let growth = 1 + self.random.below(MOST_GROWTH);
        let end = start + whole * PAGE;
        let is_free = self.is_free(end, growth);
        if first.kind != Kind::Anonymous || !is_free || self.pages.len() > MOST_PAGES {
            return Ok(());
        }
        let last = 1 + self.random.below(whole);
        let at = end - last * PAGE;
        let what = format!("lets {at:#x}+{last} grow by {growth}");
        self.note(at, last + growth, &what);
        mappings::remap(at, last * PAGE, (last + growth) * PAGE, Remap::InPlace)
            .with_context(|| format!("{}: {what}", self.name))?;
        self.add_growth(end, growth, first);
        Ok(())
    }

    fn add_growth(&mut self, at: usize, pages: usize, like: Page) {
        for n in 0..pages {
            let page = Page {
                value: Value::Zero,
                guarded: false,
                ..like
            };
            self.pages.insert(at + n * PAGE, page);
        }
    }

    fn part_of(&mut self, start: usize, whole: usize) -> (usize, usize) {
        if self.random.below(2) == 0 {
            return (start, whole);
        }
        let skipped = self.random.below(whole);
        (
            start + skipped * PAGE,
            1 + self.random.below(whole - skipped),
        )
    }
}
