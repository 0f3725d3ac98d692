//! Which pages a restore needs first: recorded in one restore, streamed first in others.
//!
//! ```text
//! recorded   place 0   mapping [heap]      pages 3-7, 40   in the order of first touch
//!                      mapping [anon, #2]  pages 0-1
//! applied    place 0   the same mappings of other images -> addresses of those images
//! ```
//!
//! A process is named by its place in the process tree (its index in `pstree.img`), a mapping by its kind, its length
//! and its number among the mappings that are alike. So a recording holds for every restore of the same images, and for
//! another dump of the same program: neither pids nor addresses need be the same. The heap and stacks may have another
//! length; pages of a stack are counted from its end.
//!
//! A recording that fits nothing names no page. It can cost order, never a page: what it does not name the stream brings
//! behind it. The file's format: docs/working-set.md.

mod format;
mod recorder;

use std::collections::{BTreeMap, BTreeSet};

pub use self::format::Damage;
pub use self::recorder::Recorder;
use crate::limits::WORKING_SET_PAGES_MAX;
use crate::units::{PageRange, PageSize};

/// Bits of CRIU's `VmaEntry.status`: the mapping grows while its process runs (VMA_AREA_STACK, VMA_AREA_HEAP).
const STATUS_STACK: u32 = 1 << 1;
const STATUS_HEAP: u32 = 1 << 5;

/// Pages that were first touched so long apart do not share an extent, ms.
const JOIN_MS: u32 = 50;

/// Extents that a touch may lengthen: the last ones, as threads read in several places by turns.
const OPEN_EXTENTS: usize = 8;

/// What kind of mapping it is, as every dump of the same program says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct MappingKind {
    /// CRIU's VMA_AREA_* bits.
    pub status: u32,
    /// PROT_* bits.
    pub prot: u32,
    /// MAP_* bits.
    pub flags: u32,
    /// Where in its file it begins, bytes.
    pub file_offset: u64,
}

impl MappingKind {
    fn is_stack(self) -> bool {
        self.status & STATUS_STACK != 0
    }

    fn may_grow(self) -> bool {
        self.status & (STATUS_STACK | STATUS_HEAP) != 0
    }
}

/// One mapping of a process in the images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Its addresses in the dump.
    pub range: PageRange,
    /// What kind it is.
    pub kind: MappingKind,
}

/// How a mapping is recognised.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Name {
    kind: MappingKind,
    /// Its length, 0 where that may differ.
    pages: u64,
    /// Its number among those of the same kind and length, by address.
    number: u32,
}

/// Pages of one mapping, first touched one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Extent {
    /// Index of the mapping's name.
    mapping: u32,
    /// Number of the first page: from the mapping's start, or for a stack backwards from its end.
    first: u64,
    pages: u32,
    /// When the first was touched: ms since the first touch of all.
    at_ms: u32,
}

/// The working set of one process, in the order of first touch.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Part {
    names: Vec<Name>,
    extents: Vec<Extent>,
}

/// What a working set names of one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Totals {
    /// Mappings with such pages.
    pub mappings: usize,
    /// Runs of pages.
    pub extents: usize,
    /// Pages.
    pub pages: u64,
    /// When the last run was begun to be touched, ms since the first touch of all.
    pub last_ms: u32,
}

/// The working set of a process tree. See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkingSet {
    page: PageSize,
    /// By place in the tree.
    parts: Vec<Part>,
}

/// Two recordings of machines with different page sizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("one was recorded with pages of {0} bytes, the other with pages of {1}")]
pub struct PageSizesDiffer(u64, u64);

impl WorkingSet {
    /// One that names no page.
    pub fn empty(page: PageSize) -> WorkingSet {
        WorkingSet {
            page,
            parts: Vec::new(),
        }
    }

    /// The page size of the machine where it was recorded.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// How many pages it names, in all processes.
    pub fn pages(&self) -> u64 {
        let extents = self.parts.iter().flat_map(|part| &part.extents);
        extents.map(|extent| u64::from(extent.pages)).sum()
    }

    /// In how many runs they are.
    pub fn extents(&self) -> usize {
        self.parts.iter().map(|part| part.extents.len()).sum()
    }

    /// What it names of each process, by place in the tree.
    pub fn totals(&self) -> impl Iterator<Item = Totals> {
        self.parts.iter().map(|part| Totals {
            mappings: part.names.len(),
            extents: part.extents.len(),
            pages: part.extents.iter().map(|one| u64::from(one.pages)).sum(),
            last_ms: part.extents.iter().map(|one| one.at_ms).max().unwrap_or(0),
        })
    }

    /// How many processes the tree had in which a page was touched, or that come before such a one.
    pub fn processes(&self) -> usize {
        self.parts.len()
    }

    /// The addresses to bring first, in order, in the process at `place` of a tree whose mappings these are, by
    /// address.
    pub fn ranges(&self, place: usize, mappings: &[Mapping]) -> Vec<PageRange> {
        let Some(part) = self.parts.get(place) else {
            return Vec::new();
        };
        let named: BTreeMap<Name, PageRange> = names(mappings, self.page)
            .into_iter()
            .zip(mappings.iter().map(|mapping| mapping.range))
            .collect();
        let address = |extent: &Extent| {
            let name = part.names.get(extent.mapping as usize)?;
            self.located(extent, *name, *named.get(name)?)
        };
        part.extents.iter().filter_map(address).collect()
    }

    /// Where `extent` is in the mapping `range`, as far as that reaches.
    fn located(&self, extent: &Extent, name: Name, range: PageRange) -> Option<PageRange> {
        let whole = range.pages(self.page).get();
        let end = whole.min(extent.first.saturating_add(extent.pages.into()));
        let (first, end) = match name.kind.is_stack() {
            _ if extent.first >= end => return None,
            true => (whole - end, whole - extent.first),
            false => (extent.first, end),
        };
        let address = |page: u64| range.start().get() + (page << self.page.shift());
        Some(PageRange::new(address(first), address(end)))
    }

    /// Adds what `other` names. A page that both name counts as touched when it was earlier.
    ///
    /// # Errors
    ///
    /// They have different page sizes.
    pub fn merge(&mut self, other: &WorkingSet) -> Result<(), PageSizesDiffer> {
        if self.page != other.page {
            return Err(PageSizesDiffer(self.page.bytes(), other.page.bytes()));
        }
        let places = self.parts.len().max(other.parts.len());
        self.parts.resize(places, Part::default());
        let mut room = WORKING_SET_PAGES_MAX;
        for (place, part) in self.parts.iter_mut().enumerate() {
            let nothing = Part::default();
            let added = other.parts.get(place).unwrap_or(&nothing);
            *part = merged(part, added, &mut room);
        }
        Ok(())
    }
}

/// Both parts as one, of at most `room` pages, which it lowers.
fn merged(one: &Part, other: &Part, room: &mut u64) -> Part {
    let mut names = one.names.clone();
    let mut numbers: BTreeMap<Name, u32> =
        (0..).zip(&names).map(|(at, name)| (*name, at)).collect();
    let mut touches: Vec<(u32, u32, u64)> = Vec::new();
    for part in [one, other] {
        for extent in &part.extents {
            let name = part.names[extent.mapping as usize];
            let number = *numbers.entry(name).or_insert_with(|| {
                names.push(name);
                u32::try_from(names.len() - 1).unwrap_or(u32::MAX)
            });
            let pages = extent.first..extent.first + u64::from(extent.pages);
            touches.extend(pages.map(|page| (extent.at_ms, number, page)));
        }
    }
    // Stable: what was touched in the same millisecond keeps its order.
    touches.sort_by_key(|(at_ms, ..)| *at_ms);
    let mut seen = BTreeSet::new();
    let mut extents = Extents::default();
    for (at_ms, mapping, page) in touches {
        if *room > 0 && seen.insert((mapping, page)) {
            *room -= 1;
            extents.add(mapping, page, at_ms);
        }
    }
    Part {
        names,
        extents: extents.0,
    }
}

/// Extents as pages are touched one after the other.
#[derive(Default, Debug)]
struct Extents(Vec<Extent>);

impl Extents {
    fn add(&mut self, mapping: u32, page: u64, at_ms: u32) {
        let open = self.0.len().saturating_sub(OPEN_EXTENTS);
        let goes_on = |extent: &&mut Extent| {
            extent.mapping == mapping
                && extent.first + u64::from(extent.pages) == page
                && at_ms.saturating_sub(extent.at_ms) <= JOIN_MS
        };
        match self.0[open..].iter_mut().find(goes_on) {
            Some(extent) if extent.pages < u32::MAX => extent.pages += 1,
            _ => self.0.push(Extent {
                mapping,
                first: page,
                pages: 1,
                at_ms,
            }),
        }
    }
}

/// The names of `mappings`, which are in the order of their addresses.
fn names(mappings: &[Mapping], page: PageSize) -> Vec<Name> {
    let mut alike: BTreeMap<(MappingKind, u64), u32> = BTreeMap::new();
    let name = |mapping: &Mapping| {
        let pages = match mapping.kind.may_grow() {
            true => 0,
            false => mapping.range.pages(page).get(),
        };
        let next = alike.entry((mapping.kind, pages)).or_default();
        let number = *next;
        *next += 1;
        Name {
            kind: mapping.kind,
            pages,
            number,
        }
    };
    mappings.iter().map(name).collect()
}

#[cfg(test)]
mod tests;
