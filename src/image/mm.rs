//! The mappings of a dumped process, from `mm-PID.img`.
//!
//! CRIU writes them by address, and from 4.2.1 on appends guard regions (MADV_GUARD_INSTALL) behind them:
//!
//! ```text
//! mappings   [=========)[====)      [=================)
//! guards         [##)                    [####)          in file order at the end, inside the others
//! fillable   [==)    [==)[====)     [===)      [======)
//! ```
//!
//! So nothing is taken for granted about the order or the nesting of the entries. Any border of an entry cuts:
//! no single UFFDIO_COPY may cross one.

use std::collections::BTreeSet;

use super::proto::Vma;
use crate::lazy::huge_pages::{HugeAdvice, HugeMapping};
use crate::lazy::working_set::{Mapping, MappingKind};
use crate::units::{PageRange, PageSize};

/// Bit of `Vma::status` (VMA_AREA_GUARD): the range is a guard region, whose pages raise SIGSEGV.
const STATUS_GUARD: u32 = 1 << 16;

/// Bit of `Vma::status` (VMA_EXT_PLUGIN): a plugin of CRIU's provides the mapping.
const STATUS_PLUGIN: u32 = 1 << 27;

/// Bit of `Vma::status` (VMA_AREA_REGULAR): an ordinary mapping.
const STATUS_REGULAR: u32 = 1 << 0;

/// Bit of `Vma::status` (VMA_FILE_PRIVATE).
const STATUS_FILE_PRIVATE: u32 = 1 << 6;

/// Bit of `Vma::status` (VMA_ANON_SHARED).
const STATUS_ANON_SHARED: u32 = 1 << 8;

/// Bit of `Vma::status` (VMA_ANON_PRIVATE).
const STATUS_ANON_PRIVATE: u32 = 1 << 9;

/// Bit of `Vma::status` (VMA_AREA_SYSVIPC): its memory is in the images of the IPC namespace.
const STATUS_SYSVIPC: u32 = 1 << 10;

/// Bit of `Vma::status` (VMA_AREA_AIORING): the ring of io_setup(2), restored as private memory is.
const STATUS_AIO_RING: u32 = 1 << 13;

/// Bits of `Vma::status` that say what a mapping is; others say how CRIU treats it.
const STATUS_KIND: u32 = 0xffff;

/// Bit of `Vma::flags` (MAP_HUGETLB), set for anonymous huge pages and for those of a memfd.
const FLAG_HUGETLB: u32 = 0x4_0000;

/// Bit of `Vma::madv` (1 << MADV_WIPEONFORK): children that are forked find zeros in the range.
const MADV_WIPEONFORK: u64 = 1 << 18;

/// Bit of `Vma::madv` (1 << MADV_DONTFORK): children do not have the mapping.
const MADV_DONTFORK: u64 = 1 << 10;

/// Bits of `Vma::madv` (1 << MADV_HUGEPAGE, 1 << MADV_NOHUGEPAGE).
const MADV_HUGEPAGE: u64 = 1 << 14;
const MADV_NOHUGEPAGE: u64 = 1 << 15;

/// Where the memory of a process may be filled, and what a fork does to it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Mappings {
    /// Ranges within mappings and outside guard regions, by address, disjoint, cut at every border.
    pub fillable: Vec<PageRange>,
    /// Ranges whose pages children do not inherit: they find zeros or no mapping there. By address, disjoint.
    pub wiped_on_fork: Vec<PageRange>,
    /// Ranges of which CRIU takes the pages from the image directory alone and never from its parents, by
    /// address, disjoint.
    pub without_parents: Vec<PageRange>,
    /// Ranges whose pages CRIU restores from the pagemap of the process, by address, disjoint. It refuses pages
    /// of a process anywhere else.
    pub private: Vec<PageRange>,
    /// Mappings that can have transparent huge pages, by address.
    pub huge: Vec<HugeMapping>,
    /// All mappings, guard regions aside, by address: what a working set names pages by.
    pub all: Vec<Mapping>,
    /// The anonymous shared memory that is mapped: each has a pagemap of its own.
    pub shared_memory: BTreeSet<u64>,
    /// Whether the mappings (guard regions aside) stand in the order of their addresses. CRIU refuses others.
    pub ordered: bool,
}

impl Mappings {
    /// Sorts out the entries of an `mm-PID.img`, in any order.
    ///
    /// # Errors
    ///
    /// An entry is no range of whole pages: says which.
    pub fn new<'a>(
        vmas: impl IntoIterator<Item = &'a Vma>,
        page: PageSize,
    ) -> Result<Mappings, String> {
        let mut borders = Vec::new();
        let mut shared_memory = BTreeSet::new();
        let (mut huge, mut all) = (Vec::new(), Vec::new());
        let (mut ordered, mut last_start) = (true, 0);
        for vma in vmas {
            if vma.status & STATUS_GUARD == 0 {
                ordered &= last_start <= vma.start;
                last_start = vma.start;
            }
            if vma.status & (STATUS_ANON_SHARED | STATUS_SYSVIPC) == STATUS_ANON_SHARED {
                shared_memory.insert(vma.shmid);
            }
            let (start, end) = (vma.start, vma.end);
            huge.extend(huge_mapping(vma));
            if !page.divides(start) || !page.divides(end) || start >= end {
                return Err(format!("{start:#x}-{end:#x} is not a mapping"));
            }
            if vma.status & STATUS_GUARD == 0 {
                let kind = kind_of(vma);
                let range = PageRange::new(start, end);
                all.push(Mapping { range, kind });
            }
            borders.push((start, Change::of(vma, 1)));
            borders.push((end, Change::of(vma, -1)));
        }
        borders.sort_unstable_by_key(|(address, _)| *address);
        huge.sort_unstable_by_key(|mapping: &HugeMapping| mapping.range.start());
        all.sort_unstable_by_key(|mapping| mapping.range.start());
        let mut mappings = Mappings {
            all,
            shared_memory,
            huge,
            ordered,
            ..Mappings::default()
        };
        let (mut depth, mut since) = (Change::default(), 0);
        for (address, change) in borders {
            if address > since {
                let range = PageRange::new(since, address);
                if depth.mapped > 0 && depth.guarded == 0 {
                    mappings.fillable.push(range);
                }
                if depth.alone > 0 {
                    mappings.without_parents.push(range);
                }
                if depth.wiped > 0 {
                    mappings.wiped_on_fork.push(range);
                }
                if depth.private > 0 {
                    mappings.private.push(range);
                }
                since = address;
            }
            depth.add(change);
        }
        Ok(mappings)
    }
}

fn kind_of(vma: &Vma) -> MappingKind {
    MappingKind {
        status: vma.status & STATUS_KIND,
        prot: vma.prot,
        flags: vma.flags,
        file_offset: vma.pgoff,
    }
}

/// Whether `vma` is private anonymous memory, and no guard region in it.
pub(super) fn is_private_anonymous(vma: &Vma) -> bool {
    let is = |bits| vma.status & bits != 0;
    is(STATUS_REGULAR) && is(STATUS_ANON_PRIVATE) && !is(STATUS_GUARD)
}

/// `vma`, if transparent huge pages can be in it.
fn huge_mapping(vma: &Vma) -> Option<HugeMapping> {
    if !is_private_anonymous(vma) || vma.flags & FLAG_HUGETLB != 0 || vma.start >= vma.end {
        return None;
    }
    let advised = vma.madv.unwrap_or(0);
    let advice = match (advised & MADV_HUGEPAGE != 0, advised & MADV_NOHUGEPAGE != 0) {
        (_, true) => HugeAdvice::Against,
        (true, false) => HugeAdvice::For,
        (false, false) => HugeAdvice::None,
    };
    Some(HugeMapping {
        range: PageRange::new(vma.start, vma.end),
        advice,
    })
}

/// How many entries of each kind begin (or, below 0, end) at an address.
#[derive(Clone, Copy, Default)]
struct Change {
    mapped: i64,
    guarded: i64,
    wiped: i64,
    alone: i64,
    private: i64,
}

impl Change {
    fn of(vma: &Vma, by: i64) -> Change {
        if vma.status & STATUS_GUARD != 0 {
            return Change {
                guarded: by,
                ..Change::default()
            };
        }
        let wiped = vma.madv.unwrap_or(0) & (MADV_WIPEONFORK | MADV_DONTFORK) != 0;
        let alone = vma.flags & FLAG_HUGETLB != 0 || vma.status & STATUS_PLUGIN != 0;
        let is = |bits| vma.status & bits != 0;
        let private = is(STATUS_AIO_RING)
            || (is(STATUS_REGULAR) && is(STATUS_ANON_PRIVATE | STATUS_FILE_PRIVATE))
            || is(STATUS_PLUGIN);
        Change {
            mapped: by,
            wiped: if wiped { by } else { 0 },
            alone: if alone { by } else { 0 },
            private: if private { by } else { 0 },
            ..Change::default()
        }
    }

    fn add(&mut self, change: Change) {
        self.mapped += change.mapped;
        self.guarded += change.guarded;
        self.wiped += change.wiped;
        self.alone += change.alone;
        self.private += change.private;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUARD: u32 = STATUS_GUARD;

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            ..Vma::default()
        }
    }

    fn guard(start: u64, end: u64) -> Vma {
        Vma {
            status: GUARD,
            ..vma(start, end)
        }
    }

    fn fillable(vmas: &[Vma]) -> Vec<(u64, u64)> {
        let mappings = Mappings::new(vmas, PageSize::KIB_4).unwrap();
        let ranges = mappings.fillable.iter();
        ranges
            .map(|range| (range.start().get() >> 12, range.end().get() >> 12))
            .collect()
    }

    fn pages(vmas: &[(u64, u64, bool)]) -> Vec<Vma> {
        let vmas = vmas.iter();
        vmas.map(|(start, end, guards)| match guards {
            true => guard(start << 12, end << 12),
            false => vma(start << 12, end << 12),
        })
        .collect()
    }

    #[test]
    fn guards_are_no_places_to_fill_wherever_they_stand() {
        let ordered = pages(&[(1, 9, false), (9, 12, false), (3, 4, true), (8, 10, true)]);
        let expected = [(1, 3), (4, 8), (10, 12)];
        assert_eq!(fillable(&ordered), expected);
        let mut reversed = ordered;
        reversed.reverse();
        assert_eq!(fillable(&reversed), expected);
        // A whole mapping, one that covers several, and guards that touch or repeat each other.
        assert_eq!(fillable(&pages(&[(1, 3, false), (1, 3, true)])), []);
        let wide = pages(&[(1, 3, false), (3, 5, false), (0, 9, true)]);
        assert_eq!(fillable(&wide), []);
        let touching = pages(&[(0, 9, false), (2, 4, true), (4, 5, true), (2, 5, true)]);
        assert_eq!(fillable(&touching), [(0, 2), (5, 9)]);
    }

    #[test]
    fn mappings_in_any_order_are_cut_at_every_border() {
        let vmas = pages(&[(5, 6, false), (1, 5, false), (2, 3, false)]);
        assert_eq!(fillable(&vmas), [(1, 2), (2, 3), (3, 5), (5, 6)]);
    }

    #[test]
    fn what_is_wiped_on_fork_is_known() {
        let mut vmas = [
            vma(0x1000, 0x3000),
            vma(0x3000, 0x6000),
            vma(0x7000, 0x8000),
        ];
        vmas[1].madv = Some(MADV_WIPEONFORK | 1 << 14);
        vmas[0].madv = Some(1 << 14);
        vmas[2].madv = Some(MADV_DONTFORK);
        let mappings = Mappings::new(&vmas, PageSize::KIB_4).unwrap();
        let expected = [(0x3000, 0x6000), (0x7000, 0x8000)];
        let expected = expected.map(|(start, end)| PageRange::new(start, end));
        assert_eq!(mappings.wiped_on_fork, expected);
    }

    #[test]
    fn what_can_have_huge_pages_is_known_with_its_advice() {
        let of = |start: u64, status, madv, flags| Vma {
            status,
            madv,
            flags,
            ..vma(start << 12, (start + 1) << 12)
        };
        let anonymous = STATUS_REGULAR | STATUS_ANON_PRIVATE;
        let vmas = [
            of(7, anonymous, Some(MADV_NOHUGEPAGE), 0),
            of(1, anonymous, None, 0),
            of(2, anonymous, Some(MADV_HUGEPAGE), 0),
            of(3, anonymous, None, FLAG_HUGETLB),
            of(4, STATUS_REGULAR | STATUS_FILE_PRIVATE, None, 0),
            of(5, STATUS_REGULAR | STATUS_ANON_SHARED, None, 0),
            guard(1 << 12, 2 << 12),
        ];
        let mappings = Mappings::new(&vmas, PageSize::KIB_4).unwrap();
        let huge = mappings.huge.iter();
        let huge: Vec<_> = huge
            .map(|mapping| (mapping.range.start().get() >> 12, mapping.advice))
            .collect();
        let expected = [
            (1, HugeAdvice::None),
            (2, HugeAdvice::For),
            (7, HugeAdvice::Against),
        ];
        assert_eq!(huge, expected);
    }

    #[test]
    fn what_is_private_and_what_is_shared_is_known() {
        let of = |start: u64, status| Vma {
            status,
            shmid: start,
            ..vma(start << 12, (start + 1) << 12)
        };
        let (private, shared) = (STATUS_ANON_PRIVATE, STATUS_ANON_SHARED);
        let vmas = [
            of(1, STATUS_REGULAR | private),
            of(2, private),
            of(3, STATUS_REGULAR | shared),
            of(4, STATUS_REGULAR | shared | STATUS_SYSVIPC),
            of(5, STATUS_AIO_RING),
        ];
        let mappings = Mappings::new(&vmas, PageSize::KIB_4).unwrap();
        let pages = [
            PageRange::new(0x1000, 0x2000),
            PageRange::new(0x5000, 0x6000),
        ];
        assert_eq!(mappings.private, pages);
        assert_eq!(mappings.shared_memory, BTreeSet::from([3]));
        assert!(mappings.ordered);
        let [a, b, ..] = vmas;
        assert!(!Mappings::new(&[b, a], PageSize::KIB_4).unwrap().ordered);
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for bad in [
            vma(0x1001, 0x3000),
            vma(0x1000, 0x3001),
            vma(0x3000, 0x3000),
            vma(0x3000, 0x1000),
        ] {
            assert!(Mappings::new(&[bad], PageSize::KIB_4).is_err());
        }
    }
    #[test]
    fn mappings_are_known_by_their_kind_without_the_guards() {
        let vmas = [
            Vma {
                status: STATUS_REGULAR | 1 << 27,
                prot: 3,
                pgoff: 0x2000,
                flags: 2,
                ..vma(0x5000, 0x6000)
            },
            vma(0x1000, 0x3000),
            guard(0x1000, 0x2000),
        ];
        let mappings = Mappings::new(&vmas, PageSize::KIB_4).unwrap();
        let kind = MappingKind {
            status: STATUS_REGULAR,
            prot: 3,
            flags: 2,
            file_offset: 0x2000,
        };
        let known: Vec<_> = mappings
            .all
            .iter()
            .map(|one| (one.range, one.kind))
            .collect();
        let expected = [
            (PageRange::new(0x1000, 0x3000), MappingKind::default()),
            (PageRange::new(0x5000, 0x6000), kind),
        ];
        assert_eq!(known, expected);
    }
}
