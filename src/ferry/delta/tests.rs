//! The memory against a plain map, and its rules one by one.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::ferry::gather::Run;
use crate::ferry::hash::HashKey;

const PAGE: PageSize = PageSize::KIB_4;
const TARGET: Target = Target::Process(1);

/// Contents in few variants: 0 is zeros, small numbers differ little, large ones everywhere.
fn contents(variant: u8) -> Vec<u8> {
    let mut page = vec![0; PAGE.as_usize()];
    if variant == 0 {
        return page;
    }
    let fill = if variant < 8 { 0xaa } else { variant };
    page.fill(fill);
    page[usize::from(variant) * 16] = variant;
    page
}

fn run_at(number: u64) -> Run {
    let start = number * PAGE.bytes();
    Run {
        range: PageRange::new(start, start + PAGE.bytes()),
        flags: PageFlags::PRESENT,
    }
}

fn judge(memory: &mut PageMemory, hasher: &PageHasher, number: u64, page: &[u8]) -> Verdicts {
    let mut verdicts = Verdicts::default();
    let print = hasher.fingerprint(page);
    let batch = PlainBatch {
        target: TARGET,
        runs: &[run_at(number)],
        plain: page,
    };
    memory.judge(batch, &[print], hasher, &mut verdicts);
    verdicts
}

#[derive(Clone, Debug)]
enum Step {
    Page(u64, u8),
    Hole(u64, u64),
    Commit,
    Fail,
    Learn(u64, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Two neighbouring chunks and one far away.
    let number = prop_oneof![500_u64..530, 100_000_u64..100_003];
    let step = prop_oneof![
        12 => (number.clone(), 0_u8..12).prop_map(|(number, variant)| Step::Page(number, variant)),
        2 => (number.clone(), 1_u64..20).prop_map(|(number, pages)| Step::Hole(number, pages)),
        2 => Just(Step::Commit),
        1 => Just(Step::Fail),
        1 => (number, 0_u8..12).prop_map(|(number, variant)| Step::Learn(number, variant)),
    ];
    prop::collection::vec(step, 0..120)
}

/// What the receiver has: the base version, and the round that is going on.
#[derive(Default)]
struct Model {
    base: BTreeMap<u64, u8>,
    round: BTreeMap<u64, u8>,
    /// Whether the base version is being told.
    learning: bool,
}

impl Model {
    /// Checks the verdict on page `number`, which holds `variant` now.
    fn expect(
        &self,
        verdicts: &Verdicts,
        hasher: &PageHasher,
        number: u64,
        variant: u8,
        complete: bool,
    ) {
        let first_time = !self.round.contains_key(&number);
        let base = self.base.get(&number).filter(|_| first_time);
        let page = contents(variant);
        match (verdicts.pages[0], base) {
            (Verdict::Same(hash), Some(base)) => {
                assert_eq!(*base, variant);
                assert_eq!(hash, hasher.hash(&page));
            }
            (Verdict::Delta(hash), Some(base)) => {
                let old = contents(*base);
                assert_eq!(hash, hasher.hash(&old));
                let sum = verdicts.xor.iter().zip(&old).map(|(a, b)| a ^ b);
                assert!(sum.eq(page.iter().copied()));
                assert_ne!(*base, variant);
            }
            (Verdict::Zero, base) => {
                assert_eq!(variant, 0);
                assert!(!complete || base != Some(&0));
            }
            (Verdict::Fresh, base) => {
                assert_ne!(variant, 0);
                assert!(!complete || base != Some(&variant));
            }
            (verdict, _) => panic!("{verdict:?} without a base version"),
        }
    }

    /// How far a hole from `start` on reaches: the parent must have its pages, and the round must not
    /// have been there.
    fn end_of_hole(&self, start: u64, end: u64) -> u64 {
        (start..end)
            .find(|number| !self.base.contains_key(number) || self.round.contains_key(number))
            .unwrap_or(end)
    }
}

/// The pages `numbers` are said to be in the parent.
fn judge_hole(memory: &mut PageMemory, hasher: &PageHasher, numbers: Range<u64>) {
    let range = PageRange::new(numbers.start * PAGE.bytes(), numbers.end * PAGE.bytes());
    let flags = PageFlags::PARENT;
    let mut verdicts = Verdicts::default();
    let batch = PlainBatch {
        target: TARGET,
        runs: &[Run { range, flags }],
        plain: &[],
    };
    memory.judge(batch, &[], hasher, &mut verdicts);
    assert!(verdicts.pages.is_empty());
}

/// Plays `steps` on memory and model. `complete` says that the budget leaves nothing out.
fn play(steps: Vec<Step>, budget_bytes: u64, complete: bool) {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let mut memory = PageMemory::new(PAGE, budget_bytes);
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Page(number, variant) => {
                let page = contents(variant);
                let verdicts = judge(&mut memory, &hasher, number, &page);
                model.expect(&verdicts, &hasher, number, variant, complete);
                model.round.insert(number, variant);
            }
            Step::Hole(number, pages) => {
                let end = model.end_of_hole(number, number + pages);
                if end > number {
                    judge_hole(&mut memory, &hasher, number..end);
                    for number in number..end {
                        model.round.insert(number, model.base[&number]);
                    }
                }
            }
            Step::Commit => {
                memory.commit(StateId([1; 16]));
                model.base = std::mem::take(&mut model.round);
                model.learning = false;
            }
            Step::Fail => {
                memory.forget();
                assert!(memory.adopt(TARGET, StateId([2; 16])));
                model = Model {
                    learning: true,
                    ..Model::default()
                };
            }
            Step::Learn(number, variant) => {
                // A base version is told once. What was replaced in this round stays replaced,
                // and after the round nothing more is learned.
                let variant = *model.base.get(&number).unwrap_or(&variant);
                let hash = hasher.hash(&contents(variant));
                memory.learn(TARGET, run_at(number).range, &[hash.0]);
                if model.learning && !model.round.contains_key(&number) {
                    model.base.insert(number, variant);
                }
            }
        }
        assert!(memory.remembered().bytes <= budget_bytes);
        check_slots(&memory);
    }
}

/// Cached contents and the slots of the chunks point at each other, and the sums are right.
fn check_slots(memory: &PageMemory) {
    let (mut pointed, mut bytes) = (0, 0);
    for (target, chunks) in &memory.targets {
        for (number, chunk) in chunks {
            bytes += chunk.bytes();
            for at in 0..CHUNK_PAGES {
                if let Some(slot) = chunk.slot(at) {
                    let location = memory.cache.location(slot).expect("a slot in use");
                    assert_eq!(location.target, *target);
                    assert_eq!(location.number, number * CHUNK_PAGES as u64 + at as u64);
                    pointed += 1;
                }
            }
        }
    }
    assert_eq!(memory.cache.count(), pointed);
    assert_eq!(memory.chunk_bytes, bytes);
}

proptest! {
    #[test]
    fn verdicts_are_those_of_a_plain_map(steps in steps()) {
        play(steps, 64 << 20, true);
    }

    #[test]
    fn a_small_budget_is_kept_and_leads_to_no_wrong_verdict(
        steps in steps(),
        budget in prop::sample::select(vec![
            0, CHUNK_BYTES, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 3 * SLOTS_BYTES + 40_000,
        ]),
    ) {
        play(steps, budget, false);
    }
}

#[test]
fn a_page_that_changed_is_sent_as_its_difference_and_hashes_alone_cannot_tell_it() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    for (budget, delta) in [(1 << 20, true), (CHUNK_BYTES, false)] {
        let mut memory = PageMemory::new(PAGE, budget);
        judge(&mut memory, &hasher, 5, &contents(1));
        memory.commit(StateId([1; 16]));
        let verdicts = judge(&mut memory, &hasher, 5, &contents(2));
        let is_delta = matches!(verdicts.pages[0], Verdict::Delta(_));
        assert_eq!(is_delta, delta, "budget {budget}");
    }
}

#[test]
fn hashes_are_asked_for_once_per_target_of_an_unknown_version() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let (first, second) = (StateId([1; 16]), StateId([2; 16]));
    let other = Target::Shmem(1);
    let mut memory = PageMemory::new(PAGE, 1 << 20);
    // A first round: the receiver has nothing.
    for target in [TARGET, other] {
        assert!(!memory.adopt(target, StateId::NONE));
        judge(&mut memory, &hasher, 5, &contents(1));
    }
    memory.commit(first);
    // A second: it has the first.
    assert!(!memory.adopt(TARGET, first));
    assert_eq!(
        judge(&mut memory, &hasher, 5, &contents(1)).pages[0],
        Verdict::Same(hasher.hash(&contents(1)))
    );
    // A third: it has another, and nothing of a third target.
    for (target, ask) in [(TARGET, true), (other, true), (TARGET, false)] {
        assert_eq!(memory.adopt(target, second), ask);
    }
    assert!(!memory.adopt(Target::Process(3), StateId::NONE));
    assert_eq!(
        judge(&mut memory, &hasher, 5, &contents(1)).pages[0],
        Verdict::Fresh
    );
}

#[test]
fn a_target_that_the_receiver_lacks_is_forgotten_alone() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let state = StateId([1; 16]);
    let mut memory = PageMemory::new(PAGE, 1 << 20);
    judge(&mut memory, &hasher, 5, &contents(1));
    memory.commit(state);
    assert!(!memory.adopt(TARGET, StateId::NONE));
    assert_eq!(
        memory.remembered().kept_pages,
        1,
        "contents are candidates still"
    );
    assert_eq!(
        judge(&mut memory, &hasher, 5, &contents(1)).pages[0],
        Verdict::Fresh
    );
    check_slots(&memory);
}

#[test]
fn hashes_push_out_contents() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let room = CHUNK_BYTES + SLOTS_BYTES + 3 * (PAGE.bytes() + CACHED_EXTRA_BYTES) + SLOTS_BYTES;
    let mut memory = PageMemory::new(PAGE, room);
    for number in 0..3 {
        judge(&mut memory, &hasher, number, &contents(9));
    }
    assert_eq!(memory.remembered().kept_pages, 3);
    judge(&mut memory, &hasher, 1_000_000, &contents(9));
    assert_eq!(memory.targets[&TARGET].len(), 2);
    assert!(memory.remembered().kept_pages < 3);
    assert_eq!(memory.remembered().left_out_pages, 0);
}

#[test]
fn contents_outlive_a_round_that_failed_and_serve_where_the_receiver_has_them() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let mut memory = PageMemory::new(PAGE, 1 << 20);
    for (number, variant) in [(5, 1), (6, 1)] {
        judge(&mut memory, &hasher, number, &contents(variant));
    }
    memory.commit(StateId([1; 16]));
    // A round that fails has replaced the contents of one page.
    judge(&mut memory, &hasher, 6, &contents(2));
    memory.forget();
    assert!(memory.adopt(TARGET, StateId([7; 16])));
    for number in [5, 6] {
        let hash = hasher.hash(&contents(1));
        memory.learn(TARGET, run_at(number).range, &[hash.0]);
    }
    let verdict = |memory: &mut PageMemory, number| {
        let verdicts = judge(memory, &hasher, number, &contents(3));
        verdicts.pages[0]
    };
    assert!(matches!(verdict(&mut memory, 5), Verdict::Delta(_)));
    assert_eq!(verdict(&mut memory, 6), Verdict::Fresh);
    check_slots(&memory);
}

#[test]
fn a_memory_for_hashes_has_room_for_all_of_them_and_keeps_no_contents() {
    let hasher = PageHasher::new(HashKey([3; 16]), PAGE);
    let at = |number: u64| number * PAGE.bytes();
    // Two runs in one chunk, one over a border, one of somebody else at the same place.
    let other = Target::Process(2);
    let runs = [
        (TARGET, PageRange::new(at(3), at(5))),
        (TARGET, PageRange::new(at(500), at(530))),
        (other, PageRange::new(at(500), at(530))),
    ];
    let mut memory = PageMemory::for_hashes_of(PAGE, runs);
    assert!(memory.adopt(TARGET, StateId([7; 16])) && memory.adopt(other, StateId([7; 16])));
    let old = hasher.hash(&contents(9));
    for (target, run) in runs {
        let pages = usize::try_from(run.pages(PAGE).get()).expect("few");
        memory.learn(target, run, &vec![old.0; pages]);
        for vaddr in present_pages(
            &[Run {
                range: run,
                flags: PageFlags::PRESENT,
            }],
            PAGE,
        ) {
            assert_eq!(
                memory.base_of(target, vaddr),
                Some(old),
                "{vaddr} of {target}"
            );
        }
    }
    assert_eq!(memory.base_of(TARGET, Vaddr(at(1000))), None);
    assert_eq!(
        judge(&mut memory, &hasher, 510, &contents(9)).pages,
        [Verdict::Same(old)]
    );
    assert_eq!(
        judge(&mut memory, &hasher, 511, &contents(10)).pages,
        [Verdict::Fresh]
    );
    assert_eq!(memory.base_of(TARGET, Vaddr(at(511))), None, "sent already");
    let remembered = memory.remembered();
    assert_eq!((remembered.kept_pages, remembered.left_out_pages), (0, 0));
}

/// Judges one page of `target`.
fn judge_of(memory: &mut PageMemory, target: Target, number: u64, page: &[u8]) -> Verdict {
    let hasher = PageHasher::new(HashKey([1; 16]), PAGE);
    let mut verdicts = Verdicts::default();
    let batch = PlainBatch {
        target,
        runs: &[run_at(number)],
        plain: page,
    };
    memory.judge(batch, &[hasher.fingerprint(page)], &hasher, &mut verdicts);
    verdicts.pages[0]
}

#[test]
fn what_another_target_has_sent_in_this_session_is_named() {
    let [parent, child, grandchild] = [1, 2, 3].map(Target::Process);
    let mut memory = PageMemory::new(PAGE, 1 << 20);
    memory.begin_session(true, true);
    let [first, written, zero] = [9, 10, 0].map(contents);
    let hash = |page: &[u8]| PageHasher::new(HashKey([1; 16]), PAGE).hash(page);
    let shared = |page: &[u8], of| Verdict::Shared {
        hash: hash(page),
        of,
    };
    memory.adopt(parent, StateId::NONE);
    assert_eq!(judge_of(&mut memory, parent, 500, &first), Verdict::Fresh);
    assert_eq!(judge_of(&mut memory, parent, 501, &zero), Verdict::Zero);
    // The same contents elsewhere are not compared.
    assert_eq!(judge_of(&mut memory, parent, 502, &first), Verdict::Fresh);
    memory.adopt(child, StateId::NONE);
    assert_eq!(judge_of(&mut memory, child, 500, &first), shared(&first, 0));
    assert_eq!(judge_of(&mut memory, child, 501, &zero), Verdict::Zero);
    assert_eq!(judge_of(&mut memory, child, 502, &written), Verdict::Fresh);
    memory.adopt(grandchild, StateId::NONE);
    // The child's page was only named, so it is the parent's that is named again.
    assert_eq!(
        judge_of(&mut memory, grandchild, 500, &first),
        shared(&first, 0)
    );
    assert_eq!(
        judge_of(&mut memory, grandchild, 502, &written),
        shared(&written, 1)
    );
    memory.commit(StateId([1; 16]));

    // In the next session nothing has come yet, and what each has in its base version needs no other.
    memory.begin_session(true, true);
    memory.adopt(parent, StateId([1; 16]));
    let same = |page: &[u8]| Verdict::Same(hash(page));
    assert_eq!(judge_of(&mut memory, parent, 500, &first), same(&first));
    memory.adopt(child, StateId([1; 16]));
    assert_eq!(judge_of(&mut memory, child, 500, &first), same(&first));
    // A child that is new has no base version, and its parent's page has not come in this session.
    let new = Target::Process(4);
    memory.adopt(new, StateId::NONE);
    assert_eq!(judge_of(&mut memory, new, 500, &first), Verdict::Fresh);
}

#[test]
fn nothing_is_named_for_a_receiver_that_does_not_understand_it() {
    let mut memory = PageMemory::new(PAGE, 1 << 20);
    memory.begin_session(false, true);
    let page = contents(9);
    for target in [1, 2].map(Target::Process) {
        memory.adopt(target, StateId::NONE);
        assert_eq!(judge_of(&mut memory, target, 500, &page), Verdict::Fresh);
    }
}
