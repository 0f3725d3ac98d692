//! Locked memory whose children have pages that it lacks, as with MLOCK_ONFAULT.
//!
//! CRIU maps locked memory with MAP_LOCKED, so that the kernel fills all of it, and forks the children. Before a child goes on
//! CRIU takes those pages out of it that the parent's pagemap has and the child's has not, or has as LAZY:
//!
//! ```text
//! parent, locked   pagemap A A . .    mapped   A A 0 0
//! child            pagemap l . l .    forked   A A 0 0   taken out of it   . . 0 0   (l: a lazy restore brings it)
//!                                                                              ^ is there, and never asked for
//! ```
//!
//! So the child reads zeros. With the zeros in the parent's pagemap, which gets them in any case, CRIU takes them out of the
//! child as well.

use std::collections::BTreeMap;

use super::dir::ImageDir;
use super::extents::Extents;
use super::file::Magic;
use super::mm::is_private_anonymous;
use super::proto::{Mm, PstreeEntry, Vma};
use crate::criu::header::{PageFlags, Target};
use crate::error::Result;
use crate::units::PageRange;

/// Bits of `Vma::flags`.
const MAP_GROWSDOWN: u32 = 0x100;
const MAP_LOCKED: u32 = 0x2000;

/// A process of the images.
struct Member {
    pid: u32,
    /// An earlier member, which forks this one: both run the same program.
    parent: Option<usize>,
    /// Its private anonymous mappings by their first addresses.
    mappings: BTreeMap<u64, Vma>,
}

/// The pages that the pagemaps of locked memory lack, by pid: by address, disjoint. Only those which a child has that
/// inherits the memory, and that a lazy restore leaves out.
pub(super) fn lacking(dir: &ImageDir) -> Result<BTreeMap<u32, Vec<PageRange>>> {
    let members = members(dir)?;
    let mut lacking: BTreeMap<u32, Vec<PageRange>> = BTreeMap::new();
    let is_locked = |member: &Member| member.mappings.values().any(is_locked);
    if !members.iter().any(is_locked) {
        return Ok(lacking);
    }
    for (at, member) in members.iter().enumerate() {
        let inherited: Vec<(PageRange, usize)> = member
            .mappings
            .values()
            .filter_map(|vma| Some((range_of(vma), locked_origin(&members, at, vma)?)))
            .collect();
        if inherited.is_empty() {
            continue;
        }
        for lazy in ranges(dir, member.pid, |flags| flags.has(PageFlags::LAZY))? {
            let first = inherited.partition_point(|(range, _)| range.end() <= lazy.start());
            for (range, origin) in &inherited[first..] {
                let Some(common) = range.intersect(lazy) else {
                    break;
                };
                let of = lacking.entry(members[*origin].pid).or_default();
                of.push(common);
            }
        }
    }
    for (pid, wanted) in &mut lacking {
        *wanted = without(
            merged(std::mem::take(wanted)),
            &ranges(dir, *pid, |_| true)?,
        );
    }
    lacking.retain(|_, wanted| !wanted.is_empty());
    Ok(lacking)
}

fn is_locked(vma: &Vma) -> bool {
    vma.flags & MAP_LOCKED != 0
}

fn range_of(vma: &Vma) -> PageRange {
    PageRange::new(vma.start, vma.end)
}

/// The processes as `pstree.img` lists them, parents first.
fn members(dir: &ImageDir) -> Result<Vec<Member>> {
    let tasks: Option<Vec<PstreeEntry>> =
        dir.messages(&dir.path().join("pstree.img"), Magic::Pstree)?;
    let (mut members, mut programs) = (Vec::new(), Vec::new());
    let mut known: BTreeMap<u32, usize> = BTreeMap::new();
    for task in tasks.into_iter().flatten() {
        let path = dir.path().join(format!("mm-{}.img", task.pid));
        // A zombie has none.
        let mm: Option<Vec<Mm>> = dir.messages(&path, Magic::Mm)?;
        let mm = mm.into_iter().flatten().next().unwrap_or_default();
        let parent = known.get(&task.ppid).copied();
        let program = mm.exe_file_id;
        members.push(Member {
            pid: task.pid,
            parent: parent.filter(|parent| programs[*parent] == program),
            mappings: mm
                .vmas
                .into_iter()
                .filter(|vma| is_private_anonymous(vma) && vma.start < vma.end)
                .map(|vma| (vma.start, vma))
                .collect(),
        });
        programs.push(program);
        known.entry(task.pid).or_insert(members.len() - 1);
    }
    Ok(members)
}

/// Which member maps the memory that the one at `at` has as `vma`, if it is another one and locks it.
fn locked_origin(members: &[Member], at: usize, vma: &Vma) -> Option<usize> {
    let (mut origin, mut origin_vma) = (at, vma);
    while let Some(parent) = members[origin].parent {
        let like = members[parent].mappings.get(&vma.start);
        let Some(like) = like.filter(|like| is_inherited(vma, like)) else {
            break;
        };
        (origin, origin_vma) = (parent, like);
    }
    (origin != at && is_locked(origin_vma)).then_some(origin)
}

/// Whether CRIU lets a child that has `vma` inherit the memory that its parent has as `of`.
fn is_inherited(vma: &Vma, of: &Vma) -> bool {
    range_of(vma) == range_of(of) && (vma.flags ^ of.flags) & MAP_GROWSDOWN == 0
}

/// What the pagemap of the process `pid` has that `wanted` says, by address.
fn ranges(dir: &ImageDir, pid: u32, wanted: impl Fn(PageFlags) -> bool) -> Result<Vec<PageRange>> {
    let mut ranges = Vec::new();
    let Some(mut extents) = Extents::open(dir, Target::Process(pid))? else {
        return Ok(ranges);
    };
    while let Some(extent) = extents.next()? {
        if wanted(extent.flags) {
            ranges.push(extent.range);
        }
    }
    Ok(merged(ranges))
}

/// `ranges` by address, those joined that touch or overlap.
fn merged(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    ranges.sort_unstable();
    let mut merged: Vec<PageRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start() <= last.end() => {
                let end = last.end().max(range.end());
                *last = PageRange::new(last.start().get(), end.get());
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// What of `ranges` is in none of `others`; both are by address and disjoint.
fn without(ranges: Vec<PageRange>, others: &[PageRange]) -> Vec<PageRange> {
    let mut left = Vec::new();
    for range in ranges {
        let mut at = range.start();
        let first = others.partition_point(|other| other.end() <= at);
        for common in others[first..]
            .iter()
            .map_while(|other| other.intersect(range))
        {
            if at < common.start() {
                left.push(PageRange::new(at.get(), common.start().get()));
            }
            at = common.end();
        }
        if at < range.end() {
            left.push(PageRange::new(at.get(), range.end().get()));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::super::file::MessageWriter;
    use super::super::rewrite::finish;
    use super::super::store::{ImageStore, Sync};
    use super::*;
    use crate::criu::header::Wire;
    use crate::units::PageSize;

    /// REGULAR and ANON_PRIVATE.
    const ANONYMOUS: u32 = 1 | 1 << 9;

    fn write<M: prost::Message>(path: &Path, magic: Magic, messages: &[M]) {
        let mut writer = MessageWriter::new(File::create(path).unwrap(), magic).unwrap();
        for message in messages {
            writer.write(message).unwrap();
        }
    }

    /// Pid, parent, flags of the mapping of the pages 0 to 16, and its pages.
    type Imaged<'a> = (u32, u32, u32, &'a [(PageRange, PageFlags)]);

    /// Images of `processes` in `dir`.
    fn images(dir: &Path, processes: &[Imaged<'_>]) -> ImageDir {
        let store = ImageStore::open(dir, PageSize::KIB_4, None, Sync::None).unwrap();
        let mut tasks = Vec::new();
        let mut images = store.begin();
        for (pid, ppid, flags, pages) in processes {
            tasks.push(PstreeEntry {
                pid: *pid,
                ppid: *ppid,
                threads: Vec::new(),
            });
            let vma = Vma {
                end: 16 << 12,
                flags: *flags,
                status: ANONYMOUS,
                ..Vma::default()
            };
            let mm = Mm {
                vmas: vec![vma],
                ..Mm::default()
            };
            write(&dir.join(format!("mm-{pid}.img")), Magic::Mm, &[mm]);
            images.open(Target::Process(*pid), Wire::V2).unwrap();
            for (range, flags) in *pages {
                images.append(*range, *flags).unwrap();
            }
        }
        images.commit().unwrap();
        write(&dir.join("pstree.img"), Magic::Pstree, &tasks);
        ImageDir::open(dir, PageSize::KIB_4).unwrap()
    }

    #[test]
    fn locked_memory_gets_zeros_where_children_have_pages_that_are_lazy() {
        let (here, lazy) = (PageFlags::PRESENT, PageFlags::LAZY.with(PageFlags::PRESENT));
        let first = [(at(2, 4), here), (at(8, 9), here)];
        let child = [(at(1, 3), lazy), (at(5, 6), lazy), (at(8, 10), lazy)];
        let grandchild = [(at(0, 1), here), (at(14, 16), lazy)];
        let of = |flags| {
            let tmp = tempfile::tempdir().unwrap();
            let members: [(u32, u32, u32, &[_]); 3] = [
                (7, 0, flags, &first),
                (8, 7, 0, &child),
                (9, 8, 0, &grandchild),
            ];
            let dir = images(tmp.path(), &members);
            let done = finish(&dir).unwrap();
            // Once is enough.
            assert_eq!(finish(&dir).unwrap().pagemaps, 0);
            let pages = |pid| ranges(&dir, pid, |_| true).unwrap();
            (done.zero_pages, pages(7), pages(8))
        };
        let of_child = vec![at(1, 3), at(5, 6), at(8, 10)];
        let all = vec![at(1, 4), at(5, 6), at(8, 10), at(14, 16)];
        assert_eq!(of(MAP_LOCKED), (5, all, of_child.clone()));
        let unlocked = vec![at(2, 4), at(8, 9)];
        assert_eq!(of(0), (0, unlocked, of_child));
    }

    fn at(start: u64, end: u64) -> PageRange {
        PageRange::new(start << 12, end << 12)
    }

    fn member(parent: Option<usize>, vmas: &[(u64, u64, u32)]) -> Member {
        let vma = |(start, end, flags): &(u64, u64, u32)| Vma {
            start: start << 12,
            end: end << 12,
            flags: *flags,
            ..Vma::default()
        };
        Member {
            pid: 1,
            parent,
            mappings: vmas.iter().map(vma).map(|vma| (vma.start, vma)).collect(),
        }
    }

    #[test]
    fn ranges_are_joined_and_taken_out() {
        let some = merged(vec![at(9, 12), at(1, 3), at(3, 5), at(2, 4)]);
        assert_eq!(some, [at(1, 5), at(9, 12)]);
        let others = [at(0, 2), at(3, 4), at(10, 11), at(20, 21)];
        let left = [at(2, 3), at(4, 5), at(9, 10), at(11, 12)];
        assert_eq!(without(some.clone(), &others), left);
        assert_eq!(without(some.clone(), &[]), some);
        assert_eq!(without(some, &[at(0, 30)]), []);
    }

    #[test]
    fn memory_is_of_the_first_who_has_the_same_mapping() {
        let locked = MAP_LOCKED;
        let members = [
            member(None, &[(1, 9, locked), (10, 12, 0), (20, 22, locked)]),
            member(Some(0), &[(1, 9, 0), (10, 12, locked), (20, 23, 0)]),
            member(Some(1), &[(1, 9, 0), (10, 12, 0), (20, 22, 0)]),
            member(None, &[(1, 9, 0)]),
            member(Some(0), &[(1, 9, MAP_GROWSDOWN)]),
        ];
        let origin = |of: usize, start: u64| {
            let vma = members[of].mappings.get(&(start << 12)).unwrap();
            locked_origin(&members, of, vma)
        };
        assert_eq!(
            (origin(0, 1), origin(1, 1), origin(2, 1)),
            (None, Some(0), Some(0))
        );
        // Whoever maps it does not lock it; what a child locks itself is not lazy.
        assert_eq!((origin(1, 10), origin(2, 10)), (None, None));
        // Another end, at one of them or between two.
        assert_eq!((origin(1, 20), origin(2, 20)), (None, None));
        assert_eq!((origin(3, 1), origin(4, 1)), (None, None));
    }
}
