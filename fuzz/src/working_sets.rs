//! Files of working sets, with a checksum that fits.

use std::collections::BTreeMap;

use pageferry::lazy::working_set::{Mapping, MappingKind, Recorder, WorkingSet};
use pageferry::limits::WORKING_SET_PAGES_MAX;
use pageferry::units::{PageRange, PageSize, Vaddr};

use crate::canary;

const PAGE: PageSize = PageSize::KIB_4;

/// Bytes in front of what the checksum is of.
const HEAD_BYTES: usize = 24;

/// Two mappings of each process.
fn mappings() -> Vec<Mapping> {
    let of = |start: u64, status| Mapping {
        range: PageRange::new(start << 12, (start + 64) << 12),
        kind: MappingKind {
            status,
            prot: 3,
            flags: 2,
            file_offset: 0,
        },
    };
    vec![of(100, 1), of(300, 3)]
}

/// The number of processes, then what stands behind the head.
pub(crate) fn decode(data: &[u8]) {
    let Some((processes, body)) = data.split_first() else {
        return;
    };
    let mut bytes = WorkingSet::empty(PAGE).encode();
    bytes[12] = processes % 4;
    bytes[16..20].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    bytes.extend_from_slice(body);
    let Ok(set) = WorkingSet::decode(&bytes) else {
        return;
    };
    let encoded = set.encode();
    assert_eq!(encoded.len(), bytes.len());
    assert!(WorkingSet::decode(&encoded).is_ok_and(|again| again == set));
    assert!(set.pages() <= WORKING_SET_PAGES_MAX);
    let mappings = mappings();
    for place in 0..4 {
        for range in set.ranges(place, &mappings) {
            let is_within = |mapping: &Mapping| {
                mapping.range.start() <= range.start() && range.end() <= mapping.range.end()
            };
            assert!(!range.is_empty() && mappings.iter().any(is_within));
            canary(place == 1);
        }
    }
    // To write the pages out takes memory for each of them.
    if set.pages() < 1 << 12 {
        let mut twice = set.clone();
        assert!(twice.merge(&set).is_ok());
        assert!(twice.pages() <= set.pages());
    }
}

/// Recordings of two processes.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let touched = [(0, 101), (0, 102), (1, 363), (1, 362), (0, 110)];
    let mut recorder = Recorder::new(PAGE);
    for (place, page) in touched {
        recorder.touch(place, Vaddr(page << 12), 7000);
    }
    let both = BTreeMap::from([(0, mappings()), (1, mappings())]);
    let bytes = recorder.finish(&both).encode();
    let mut seed = vec![2];
    seed.extend_from_slice(&bytes[HEAD_BYTES..]);
    vec![vec![0], seed]
}
