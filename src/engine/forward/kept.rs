//! Pages that are as the far end has them: whoever sends them has compared their hashes, and no contents come.
//!
//! They go as pages that are the same, by the hashes that are known here, so the far end compares these with what it has.

use super::Forward;
use crate::criu::header::PageFlags;
use crate::error::Result;
use crate::ferry::gather::Run;
use crate::units::{PageRange, Vaddr};

/// Flags of such pages. CRIU never sends these.
pub const KEPT: PageFlags = PageFlags::PARENT.with(PageFlags::LAZY);

impl Forward<'_> {
    /// Whether it is known by hash what the far end has of `range`.
    pub(super) fn is_known(&self, range: PageRange) -> bool {
        let Some(target) = self.target.filter(|_| self.hashed) else {
            return false;
        };
        let memory = self.sending.memory();
        let mut addresses = (range.start().get()..range.end().get()).step_by(self.page.as_usize());
        addresses.all(|at| memory.base_of(target, Vaddr(at)).is_some())
    }

    /// Takes pages of which no contents come: the far end compares their hashes with what it has.
    pub(super) fn keep_run(&mut self, range: PageRange) -> Result<()> {
        self.pages += range.pages(self.page).get();
        let flags = PageFlags::PRESENT.with(PageFlags::LAZY);
        let mut rest = Some(Run { range, flags });
        while let Some(run) = rest.take() {
            rest = self.gathered.push(run);
            // Their place in the buffer stays as it is: nobody looks at it.
            let first = self.filled >> self.page.shift();
            self.filled += self.room();
            self.kept.push(first..self.filled >> self.page.shift());
            if rest.is_some() {
                self.hand_over()?;
            }
        }
        Ok(())
    }
}
