//! The sender of a post-copy: which of the held pages are pushed next, and what a fault brings.
//!
//! ```text
//! held pages by number   |####..####..........|
//! given                  |##..................|   pushed, or sent as answers: each page once
//!                           ^ next batch: 64 KiB of one process, once as much has come
//! ```
//!
//! Fragmented memory comes from the dump page by page. A batch that took what has just come would be of a page or two, so
//! that each run cost a frame, a message and an acknowledgement of its own.
//!
//! A page that is asked for when it is in the push already is not sent twice: who asks is told to wait for it
//! there. For a thread that reads here and there that may take longer than its answer would, so as long as
//! little was sent twice it gets its page, and nothing else.
//!
//! Invariants: a page is pushed once at most, and only when it is held; what was an answer is not pushed;
//! batches are in the order of the numbers, so in that of each process's addresses.

use std::ops::Range;

use super::delta::PageMemory;
use super::encode::{Verdict, Verdicts};
use super::gather::{Gathered, Run};
use super::hash::{PageHasher, is_zero};
use super::message::Fault;
use crate::criu::header::{PageFlags, Target};
use crate::lazy::drain::DrainPlan;
use crate::lazy::pageset::PageSet;
use crate::limits::{FERRY_BATCH_BYTES_MAX, FERRY_RUNS_MAX, WANTED_PAGES_MAX};
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

/// Pages in a batch of the push, bytes. The receiver looks for faults between any two batches, so they are
/// smaller than those of a dump.
pub const PUSH_BYTES: u64 = 64 << 10;

/// Flags of all pages that are pushed or answered.
const FLAGS: PageFlags = PageFlags::PRESENT.with(PageFlags::LAZY);

/// A fault that welcomes so many pages or fewer is one of a thread that reads here and there.
const LONE_PAGES_MAX: u64 = 8;

/// Pages that may be sent twice at most, unless told otherwise: so many, and
const REPEATED_PAGES: u64 = 64;

/// one of so many that were given.
const REPEATED_ONE_OF: u64 = 50;

/// What is to be pushed next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Everything was given.
    Done,
    /// The next pages have not come from the dump, as many as are pushed together.
    Wait,
    /// Pages of this process, by [`PushPlanner::take_batch`].
    Push(u32),
}

/// Pages that are pushed together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PushBatch {
    /// Which pages, in the order of their addresses.
    pub runs: Vec<Run>,
    /// Their numbers.
    pub numbers: Vec<Range<u64>>,
    /// How many they are.
    pub pages: PageCount,
}

/// What a fault brings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// The dump does not have the page.
    Nothing,
    /// Pages with these numbers, as soon as all of them have come.
    Awaited(Range<u64>),
    /// The pages of these numbers and addresses, the faulting one among them.
    Pages(Range<u64>, PageRange),
}

/// What one receiver was given and will be given. See the module's text.
#[derive(Debug)]
pub struct PushPlanner {
    page: PageSize,
    given: PageSet,
    /// Which of them were pushed.
    pushed: PageSet,
    /// How many were sent as answers although they had been pushed.
    repeated: u64,
    /// How many may be, however little was given.
    may_repeat: u64,
    /// Number of the next page.
    at: u64,
}

impl PushPlanner {
    /// A planner for so many `pages`.
    pub fn new(page: PageSize, pages: PageCount) -> PushPlanner {
        PushPlanner {
            page,
            given: PageSet::new(pages.get()),
            pushed: PageSet::new(pages.get()),
            repeated: 0,
            may_repeat: REPEATED_PAGES,
            at: 0,
        }
    }

    /// The same, which sends no more than so many `pages` twice, and a fiftieth of what was given.
    #[must_use]
    pub fn repeating(self, pages: u64) -> PushPlanner {
        PushPlanner {
            may_repeat: pages,
            ..self
        }
    }

    /// Which of the pages `numbers` the answer to `fault` brings, whose own page is number `awaited` of them:
    /// those need not be pushed any more. `None`: that page is in the push, where a requester waits for it
    /// that `may_wait`.
    pub fn answer(
        &mut self,
        numbers: Range<u64>,
        awaited: u64,
        fault: &Fault,
        may_wait: bool,
    ) -> Option<Range<u64>> {
        if fault.in_full || fault.once_more {
            self.given.insert(numbers.clone());
            return Some(numbers);
        }
        let alone = awaited..awaited + 1;
        if self.pushed.contains(awaited) {
            let is_lone = fault.around.pages(self.page).get() <= LONE_PAGES_MAX;
            let most = self.may_repeat + self.given.count() / REPEATED_ONE_OF;
            let may_repeat = self.repeated < most;
            if may_wait && !(is_lone && may_repeat) {
                return None;
            }
            self.repeated += 1;
            return Some(alone);
        }
        // Neighbours that were given are on their way, or there.
        let before = (numbers.start..awaited).rev();
        let start = before
            .take_while(|number| !self.given.contains(*number))
            .last()
            .unwrap_or(awaited);
        let end = self.given.next_in(alone.end..numbers.end, true);
        self.given.insert(start..end);
        Some(start..end)
    }

    /// What is to be pushed next of what `plan` has drained.
    pub fn next_step(&mut self, plan: &DrainPlan) -> Step {
        self.at = self.given.next(self.at, false);
        if self.at == plan.pages().get() {
            return Step::Done;
        }
        if !self.is_batch_there(plan) {
            return Step::Wait;
        }
        let (pid, _) = plan.addresses(self.at, self.at + 1);
        Step::Push(pid)
    }

    /// Whether the next pages that are to be pushed have come: as many as a batch has, or all.
    fn is_batch_there(&self, plan: &DrainPlan) -> bool {
        let all = plan.pages().get();
        let (mut at, mut left) = (self.at, PUSH_BYTES >> self.page.shift());
        while left > 0 && at < all {
            let end = self.given.next_in(at..all.min(at + left), true);
            if plan.held_part(at..end).end < end {
                return false;
            }
            left -= end - at;
            at = self.given.next(end, false);
        }
        true
    }

    /// The next pages of `pid` that have come, no more than `most_bytes`.
    pub fn take_batch(&mut self, plan: &DrainPlan, pid: u32, most_bytes: u64) -> PushBatch {
        let mut gathered = Gathered::new(self.page);
        let mut batch = Vec::new();
        let most = most_bytes.min(FERRY_BATCH_BYTES_MAX as u64) >> self.page.shift();
        while gathered.present().get() < most && gathered.runs().len() < FERRY_RUNS_MAX {
            let start = self.given.next(self.at, false);
            let room = most - gathered.present().get();
            let end = self.given.next_in(start..start.saturating_add(room), true);
            let there = plan.held_part(start..end);
            if there.is_empty() {
                break;
            }
            let (whose, range) = plan.addresses(there.start, there.end);
            if whose != pid {
                break;
            }
            let numbers = there.start..there.start + range.pages(self.page).get();
            let flags = FLAGS;
            let rest = gathered.push(Run { range, flags });
            assert!(rest.is_none(), "it was asked for no more than fits");
            self.given.insert(numbers.clone());
            self.pushed.insert(numbers.clone());
            self.at = numbers.end;
            batch.push(numbers);
        }
        PushBatch {
            runs: gathered.runs().to_vec(),
            numbers: batch,
            pages: gathered.present(),
        }
    }
}

/// Finds the page that `fault` names with those of its neighbours that lie in one run with it.
pub fn find(plan: &DrainPlan, page: PageSize, fault: &Fault) -> Found {
    let Target::Process(pid) = fault.target else {
        return Found::Nothing;
    };
    let most = WANTED_PAGES_MAX.min((FERRY_BATCH_BYTES_MAX >> page.shift()) as u64);
    for start in [fault.around.start(), fault.vaddr] {
        let wanted = PageRange::new(start.get(), fault.around.end().get());
        let Some(numbers) = plan.locate(pid, wanted) else {
            continue;
        };
        let numbers = numbers.start..numbers.end.min(numbers.start + most);
        let (_, range) = plan.addresses(numbers.start, numbers.end);
        if !range.contains(fault.vaddr) {
            continue;
        }
        return match plan.held_part(numbers.clone()) == numbers {
            true => Found::Pages(numbers, range),
            false => Found::Awaited(numbers),
        };
    }
    Found::Nothing
}

/// The run of an answer with the pages `range`, unless there are none.
pub fn answer_run(range: PageRange) -> Option<Run> {
    let flags = FLAGS;
    (!range.is_empty()).then_some(Run { range, flags })
}

/// Decides how the pages `range`, whose contents are `plain`, are told in the answer to `fault`, to a receiver
/// that has what is in `memory`.
pub fn judge_answer(
    memory: &PageMemory,
    hasher: &PageHasher,
    page: PageSize,
    fault: &Fault,
    range: PageRange,
    plain: &[u8],
    verdicts: &mut Verdicts,
) {
    let base_of = |vaddr| match fault.in_full {
        true => None,
        false => memory.base_of(fault.target, vaddr),
    };
    let addresses = (range.start().get()..).step_by(page.as_usize()).map(Vaddr);
    let pages = plain.chunks_exact(page.as_usize()).zip(addresses);
    verdicts.clear();
    for (contents, vaddr) in pages {
        verdicts.pages.push(match base_of(vaddr) {
            _ if is_zero(contents) => Verdict::Zero,
            Some(base) if hasher.hash(contents) == base => Verdict::Same(base),
            _ => Verdict::Fresh,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(first << 12, (first + count) << 12)
    }

    fn plan(held: &[(u32, PageRange)]) -> DrainPlan {
        let runs = [(7, pages(10, 30)), (7, pages(50, 4)), (9, pages(10, 5))];
        let mut plan = DrainPlan::new(PAGE, runs);
        while let Some((pid, range)) = plan.next_request(PageCount(1)) {
            let here = |part: &(u32, PageRange)| {
                part.0 == pid && part.1.intersect(range).is_some_and(|both| both == range)
            };
            if held.iter().any(here) {
                plan.arrived(pid, range);
            }
        }
        plan
    }

    fn fault(pid: u32, first: u64, vaddr: u64, count: u64) -> Fault {
        Fault {
            target: Target::Process(pid),
            vaddr: Vaddr(vaddr << 12),
            around: pages(first, count),
            in_full: false,
            once_more: false,
        }
    }

    #[test]
    fn every_page_that_comes_is_pushed_once_and_answers_are_left_out() {
        let all = plan(&[(7, pages(0, 100)), (9, pages(0, 100))]);
        let mut push_planner = PushPlanner::new(PAGE, all.pages());
        let asked = fault(7, 13, 13, 2);
        assert_eq!(push_planner.answer(3..5, 3, &asked, true), Some(3..5));
        let mut pushed = Vec::new();
        while let Step::Push(pid) = push_planner.next_step(&all) {
            let batch = push_planner.take_batch(&all, pid, PUSH_BYTES);
            assert!((1..=16).contains(&batch.pages.get()));
            let ranges = batch.runs.iter().map(|run| run.range.bytes() >> 12);
            assert_eq!(ranges.sum::<u64>(), batch.pages.get());
            pushed.extend(batch.numbers.into_iter().flatten());
        }
        assert_eq!(push_planner.next_step(&all), Step::Done);
        let wanted: Vec<u64> = (0..3).chain(5..39).collect();
        assert_eq!(pushed, wanted);
    }

    #[test]
    fn what_is_in_the_push_is_waited_for_there() {
        let all = plan(&[(7, pages(0, 100)), (9, pages(0, 100))]);
        let mut push = PushPlanner::new(PAGE, all.pages());
        // Numbers 0 to 15 are in the push.
        assert_eq!(push.take_batch(&all, 7, PUSH_BYTES).pages, PageCount(16));
        let in_order = fault(7, 12, 12, 20);
        assert_eq!(push.answer(2..22, 2, &in_order, true), None);
        // Who does not understand gets the page itself, and who reads here and there too.
        assert_eq!(push.answer(2..22, 2, &in_order, false), Some(2..3));
        let lone = fault(7, 12, 12, 4);
        assert_eq!(push.answer(2..6, 2, &lone, true), Some(2..3));
        // Behind the push: what was not given, and that is not pushed.
        let behind = fault(7, 24, 28, 8);
        assert_eq!(push.answer(14..22, 18, &behind, true), Some(16..22));
        assert_eq!(push.answer(14..26, 19, &behind, true), Some(19..20));
        let next = push.take_batch(&all, 7, PUSH_BYTES).numbers;
        assert_eq!(next, [22..30, 30..34]);
        // What did not come in either way comes all the same.
        let once_more = Fault {
            once_more: true,
            ..in_order
        };
        assert_eq!(push.answer(2..22, 2, &once_more, true), Some(2..22));
    }

    #[test]
    fn few_pages_are_sent_twice_however_many_are_asked_for() {
        const RUN: u64 = 1 << 14;
        let mut plan = DrainPlan::new(PAGE, [(7, pages(0, RUN))]);
        while let Some((pid, range)) = plan.next_request(PageCount(64)) {
            plan.arrived(pid, range);
        }
        let mut push = PushPlanner::new(PAGE, plan.pages());
        let (mut pushed, mut repeated) = (0, 0);
        while let Step::Push(pid) = push.next_step(&plan) {
            for numbers in push.take_batch(&plan, pid, PUSH_BYTES).numbers {
                pushed += numbers.end - numbers.start;
                for number in numbers {
                    let lone = fault(7, number, number, 1);
                    let answer = push.answer(number..number + 1, number, &lone, true);
                    repeated += u64::from(answer.is_some());
                }
            }
        }
        assert_eq!(pushed, RUN);
        assert!(repeated <= 64 + RUN / 50, "{repeated} of {RUN} pages twice");
    }

    #[test]
    fn the_push_waits_for_pages_that_have_not_come() {
        let some = plan(&[(7, pages(10, 18))]);
        let mut push_planner = PushPlanner::new(PAGE, some.pages());
        assert_eq!(push_planner.next_step(&some), Step::Push(7));
        assert_eq!(
            push_planner.take_batch(&some, 7, PUSH_BYTES).pages,
            PageCount(16)
        );
        assert_eq!(push_planner.next_step(&some), Step::Wait);
    }

    #[test]
    fn fragmented_memory_that_comes_page_by_page_is_pushed_in_whole_batches() {
        const PAGES: u64 = 1000;
        let every_second = (0..PAGES).map(|n| (7, pages(2 * n, 1)));
        let mut plan = DrainPlan::new(PAGE, every_second);
        let mut push = PushPlanner::new(PAGE, plan.pages());
        let (mut batches, mut pushed) = (0, 0);
        while let Some((pid, range)) = plan.next_request(PageCount(64)) {
            plan.arrived(pid, range);
            // As quickly as pages come.
            while let Step::Push(pid) = push.next_step(&plan) {
                batches += 1;
                pushed += push.take_batch(&plan, pid, PUSH_BYTES).pages.get();
            }
        }
        assert_eq!((batches, pushed), (PAGES.div_ceil(16), PAGES));
    }

    #[test]
    fn a_fault_brings_its_page_and_what_lies_in_one_run_with_it() {
        let some = plan(&[(7, pages(10, 20)), (9, pages(10, 5))]);
        let found = |pid, first, vaddr, count| find(&some, PAGE, &fault(pid, first, vaddr, count));
        assert_eq!(found(7, 12, 12, 4), Found::Pages(2..6, pages(12, 4)));
        assert_eq!(found(7, 28, 29, 4), Found::Awaited(18..22));
        // The neighbours below are not there, or belong to another run.
        assert_eq!(found(9, 8, 11, 6), Found::Pages(35..38, pages(11, 3)));
        assert_eq!(found(7, 39, 50, 12), Found::Awaited(30..31));
        assert_eq!(found(7, 60, 60, 1), Found::Nothing);
        assert_eq!(found(8, 10, 10, 1), Found::Nothing);
    }
}
