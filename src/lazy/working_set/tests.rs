use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::units::Vaddr;

const PAGE: PageSize = PageSize::KIB_4;

fn mapping(start: u64, pages: u64, status: u32) -> Mapping {
    let kind = MappingKind {
        status,
        ..MappingKind::default()
    };
    Mapping {
        range: pages_at(start, pages),
        kind,
    }
}

fn pages_at(first: u64, pages: u64) -> PageRange {
    PageRange::new(first << 12, (first + pages) << 12)
}

/// A process with two mappings that are alike, a heap and a stack, `moved` pages further up.
fn mappings(moved: u64, heap: u64, stack: u64) -> Vec<Mapping> {
    vec![
        mapping(moved + 100, 50, 1),
        mapping(moved + 200, heap, 1 | STATUS_HEAP),
        mapping(moved + 1000, 50, 1),
        mapping(moved + 2000 - stack, stack, 1 | STATUS_STACK),
    ]
}

fn recorded(touches: &[(usize, u64, u64)]) -> WorkingSet {
    let mut recorder = Recorder::new(PAGE);
    for (place, page, ms) in touches {
        recorder.touch(*place, Vaddr(page << 12), ms * 1000);
    }
    let both = [(0, mappings(0, 64, 16)), (1, mappings(0, 64, 16))];
    recorder.finish(&BTreeMap::from(both))
}

fn numbers(ranges: &[PageRange]) -> Vec<(u64, u64)> {
    let ranges = ranges.iter();
    ranges
        .map(|range| (range.start().get() >> 12, range.bytes() >> 12))
        .collect()
}

#[test]
fn pages_are_found_where_the_mappings_of_another_dump_are() {
    // Two threads by turns, the heap, the end of the stack, and a page of no mapping.
    let touched = [1010, 110, 1011, 111, 110, 205, 1999, 1998, 999, 112];
    let touches: Vec<_> = (0..).zip(touched).map(|(ms, page)| (0, page, ms)).collect();
    let set = recorded(&touches);
    let expected = [(1010, 2), (110, 3), (205, 1), (1998, 2)];
    assert_eq!(numbers(&set.ranges(0, &mappings(0, 64, 16))), expected);
    assert_eq!((set.pages(), set.extents()), (8, 4));
    // Elsewhere, with a longer heap and stack.
    let moved = expected.map(|(first, pages)| (first + 7000, pages));
    assert_eq!(numbers(&set.ranges(0, &mappings(7000, 90, 20))), moved);
    // The heap has not grown so far yet, and one of the two that are alike is not there.
    let mut others = mappings(0, 4, 16);
    others.remove(2);
    assert_eq!(numbers(&set.ranges(0, &others)), [(110, 3), (1998, 2)]);
    assert!(set.ranges(1, &mappings(0, 64, 16)).is_empty());
    let foreign = [mapping(100, 51, 1), mapping(1000, 50, 3 << 8)];
    assert!(set.ranges(0, &foreign).is_empty(), "another program");
}

#[test]
fn what_was_touched_long_after_is_an_extent_of_its_own() {
    let set = recorded(&[(1, 100, 0), (1, 101, 10), (1, 102, 500)]);
    let found = set.ranges(1, &mappings(0, 64, 16));
    assert_eq!(numbers(&found), [(100, 2), (102, 1)]);
    assert_eq!(set.processes(), 2);
}

#[test]
fn recordings_are_merged_in_the_order_of_the_earliest_touch() {
    let mut set = recorded(&[(0, 100, 0), (0, 1005, 300)]);
    let other = recorded(&[(0, 210, 0), (0, 100, 100), (0, 1005, 200), (1, 120, 201)]);
    set.merge(&other).unwrap();
    let found = numbers(&set.ranges(0, &mappings(0, 64, 16)));
    assert_eq!(found, [(100, 1), (210, 1), (1005, 1)]);
    assert_eq!(numbers(&set.ranges(1, &mappings(0, 64, 16))), [(120, 1)]);
    let large = WorkingSet::empty(PageSize::new(1 << 16).unwrap());
    assert!(set.merge(&large).is_err());
}

#[test]
fn what_is_no_working_set_says_why() {
    let bytes = recorded(&[(0, 100, 0), (1, 120, 0)]).encode();
    let damage = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        WorkingSet::decode(&bytes).unwrap_err()
    };
    // As somebody would who means harm: with a checksum that fits.
    let forged = |at: usize, value: u32| {
        damage(&|bytes| {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            let checksum = crc32fast::hash(&bytes[24..]);
            bytes[16..20].copy_from_slice(&checksum.to_le_bytes());
        })
    };
    assert_eq!(damage(&|bytes| bytes[0] = 0), Damage::Magic);
    assert_eq!(damage(&|bytes| bytes.truncate(7)), Damage::Magic);
    assert_eq!(damage(&|bytes| bytes.truncate(20)), Damage::Short);
    assert_eq!(damage(&|bytes| bytes.truncate(60)), Damage::Checksum);
    assert_eq!(damage(&|bytes| bytes.push(0)), Damage::Checksum);
    assert_eq!(forged(8, 4095), Damage::PageBytes(4095));
    assert_eq!(forged(12, u32::MAX), Damage::Value("number of processes"));
    assert_eq!(forged(12, 1), Damage::Long);
    assert_eq!(forged(12, 3), Damage::Short);
    // Names and extents of the first process: counts at 24, one name, one extent at 64.
    for at in [24, 28] {
        assert_eq!(forged(at, u32::MAX), Damage::Short);
    }
    assert_eq!(forged(64, 1), Damage::Value("mapping of an extent"));
    assert_eq!(forged(80, 0), Damage::Value("extent"));
    assert_eq!(forged(80, u32::MAX), Damage::Value("number of pages"));
}

fn touches() -> impl Strategy<Value = Vec<(usize, u64, u64)>> {
    let page = prop_oneof![100..150u64, 200..264u64, 1000..1050u64, 1984..2000u64];
    let touch = (0..2usize, page, 0..30u64);
    prop::collection::vec(touch, 0..200).prop_map(|mut touches| {
        let mut now = 0;
        for touch in &mut touches {
            now += touch.2;
            touch.2 = now;
        }
        touches
    })
}

fn pages_of(set: &WorkingSet) -> BTreeSet<(usize, u64)> {
    let mappings = mappings(0, 64, 16);
    let of = |place| {
        let ranges = numbers(&set.ranges(place, &mappings)).into_iter();
        ranges.flat_map(move |(first, pages)| (first..first + pages).map(move |page| (place, page)))
    };
    of(0).chain(of(1)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_page_that_was_touched_is_named_once(one in touches(), other in touches()) {
        let set = recorded(&one);
        let touched: BTreeSet<_> = one.iter().map(|(place, page, _)| (*place, *page)).collect();
        prop_assert_eq!(&pages_of(&set), &touched);
        prop_assert_eq!(set.pages(), touched.len() as u64);
        prop_assert_eq!(&WorkingSet::decode(&set.encode()).unwrap(), &set);
        let mut twice = set.clone();
        twice.merge(&set).unwrap();
        prop_assert_eq!(&pages_of(&twice), &touched);
        let added = recorded(&other);
        let mut both = set;
        both.merge(&added).unwrap();
        let expected: BTreeSet<_> = touched.union(&pages_of(&added)).copied().collect();
        prop_assert_eq!(both.pages(), expected.len() as u64);
        prop_assert_eq!(pages_of(&both), expected);
        prop_assert_eq!(&WorkingSet::decode(&both.encode()).unwrap(), &both);
    }

    #[test]
    fn no_bytes_do_harm(mut bytes in prop::collection::vec(any::<u8>(), 24..400), processes in 0..4u32) {
        bytes[..8].copy_from_slice(b"PFWSET01");
        bytes[8..12].copy_from_slice(&4096u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&processes.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[24..]);
        bytes[16..20].copy_from_slice(&checksum.to_le_bytes());
        if let Ok(set) = WorkingSet::decode(&bytes) {
            let _ = set.ranges(0, &mappings(0, 64, 16));
        }
    }
}
