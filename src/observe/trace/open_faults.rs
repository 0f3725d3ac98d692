//! What a trace has to know of faults that are not answered yet.

use std::collections::BTreeMap;

use super::{Access, Answer};
use crate::units::{PageRange, Vaddr};

/// What is known of a fault besides its times.
#[derive(Clone, Copy, Debug)]
pub struct OpenFault {
    /// What the thread does.
    pub access: Access,
    /// Which thread it is; 0 if that is not known.
    pub thread: u32,
    /// How it is answered.
    pub answer: Answer,
    /// What was filled with the page.
    pub range: PageRange,
}

impl Default for OpenFault {
    fn default() -> OpenFault {
        OpenFault {
            access: Access::default(),
            thread: 0,
            answer: Answer::default(),
            range: PageRange::new(0, 0),
        }
    }
}

/// Faults from the kernel's message to the woken thread, by process and page.
#[derive(Debug)]
pub struct OpenFaults<Id>(BTreeMap<(Id, Vaddr), OpenFault>);

impl<Id> Default for OpenFaults<Id> {
    fn default() -> OpenFaults<Id> {
        OpenFaults(BTreeMap::new())
    }
}

impl<Id: Copy + Ord> OpenFaults<Id> {
    /// A thread waits. If another one waits for the same page already, that one counts.
    pub fn begin(&mut self, at: (Id, Vaddr), access: Access, thread: u32) {
        self.0.entry(at).or_insert(OpenFault {
            access,
            thread,
            ..OpenFault::default()
        });
    }

    /// The page is there, together with the rest of `range`.
    pub fn answer(&mut self, at: (Id, Vaddr), answer: Answer, range: PageRange) {
        if let Some(fault) = self.0.get_mut(&at) {
            (fault.answer, fault.range) = (answer, range);
        }
    }

    /// The fault is over.
    pub fn remove(&mut self, at: (Id, Vaddr)) -> OpenFault {
        self.0.remove(&at).unwrap_or_default()
    }

    /// All faults of `id` are over.
    pub fn forget(&mut self, id: Id) {
        self.0.retain(|(of, _), _| *of != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_thread_that_waits_for_a_page_counts() {
        let mut open = OpenFaults::default();
        let at = |id: u32, page: u64| (id, Vaddr(page << 12));
        open.begin(at(1, 5), Access::Write, 10);
        open.begin(at(1, 5), Access::Read, 11);
        open.begin(at(2, 5), Access::Read, 20);
        let range = PageRange::new(4 << 12, 6 << 12);
        open.answer(at(1, 5), Answer::Local, range);
        open.answer(at(3, 5), Answer::Local, range);
        let fault = open.remove(at(1, 5));
        assert_eq!(
            (fault.access, fault.thread, fault.answer, fault.range),
            (Access::Write, 10, Answer::Local, range)
        );
        open.forget(2);
        assert_eq!(open.remove(at(2, 5)).access, Access::Unknown);
        assert!(open.0.is_empty());
    }
}
