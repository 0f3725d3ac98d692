//! How fast a tree changes its memory, found by reading it twice.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::criu::header::Target;
use pageferry::error::Result;
use pageferry::ferry::hash::{HashKey, PageHash, PageHasher};
use pageferry::units::{PageSize, Vaddr};

use super::tree::Tree;
use super::{PageSink, read};

/// What two looks at a tree show.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct DirtyRate {
    /// Pages of the second look.
    pub(crate) pages: u64,
    /// Of those, the ones that were not there before or had other contents.
    pub(crate) changed: u64,
    /// Between the two looks at a page, on average.
    pub(crate) between: Duration,
}

impl DirtyRate {
    /// Pages that change in a second, as far as two looks tell: one that is written over and over counts
    /// once.
    pub(crate) fn pages_per_s(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let changed = self.changed as f64;
        changed / self.between.as_secs_f64().max(1e-3)
    }
}

/// Reads all memory of `tree` twice, with `pause` between.
pub(crate) fn watch_changes(tree: &Tree, page: PageSize, pause: Duration) -> Result<DirtyRate> {
    let mut counter = ChangeCounter {
        hasher: PageHasher::new(HashKey::default(), page),
        page,
        target: Target::Process(0),
        known: HashMap::new(),
        pages: 0,
        changed: 0,
    };
    let start = Instant::now();
    read(tree, page, &mut counter, None)?;
    thread::sleep(pause);
    (counter.pages, counter.changed) = (0, 0);
    let between = start.elapsed();
    read(tree, page, &mut counter, None)?;
    Ok(DirtyRate {
        pages: counter.pages,
        changed: counter.changed,
        between,
    })
}

struct ChangeCounter {
    hasher: PageHasher,
    page: PageSize,
    target: Target,
    known: HashMap<(u64, u64), PageHash>,
    pages: u64,
    changed: u64,
}

impl PageSink for ChangeCounter {
    fn open(&mut self, target: Target) -> Result<()> {
        self.target = target;
        Ok(())
    }

    fn lazily(&mut self, _lazily: bool) {}

    fn holes_at(&mut self, _at: Vaddr, _pages: u64) -> Result<()> {
        Ok(())
    }

    fn pages_at(&mut self, at: Vaddr, bytes: &[u8]) -> Result<()> {
        for (index, page) in (0..).zip(bytes.chunks_exact(self.page.as_usize())) {
            let address = at.get() + (index << self.page.shift());
            let hash = self.hasher.hash(page);
            let before = self.known.insert((self.target.dst_id(), address), hash);
            self.pages += 1;
            self.changed += u64::from(before != Some(hash));
        }
        Ok(())
    }
}
