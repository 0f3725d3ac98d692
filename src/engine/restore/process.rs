//! Opens a restored process: which of its memory is missing, and whether the source or a local image has it.

use std::path::Path;

use super::huge_pages::HugePageRestorer;
use crate::criu::header::{Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::image::chain::{Chain, Missing, Place};
use crate::image::dir::ImageDir;
use crate::image::proto::{PagemapEntry, PagemapHead};
use crate::lazy::huge_pages::Regions;
use crate::lazy::space::Space;
use crate::lazy::working_set::Mapping;
use crate::units::PageRange;

/// A process's missing memory, and the images that have some of it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) space: Space,
    /// `None` if no local image has anything that is missing.
    pub(super) chain: Option<Chain>,
    /// What is to become huge pages again, if the system has any.
    pub(super) huge: Option<Regions>,
    /// Its mappings, by address.
    pub(super) mappings: Vec<Mapping>,
}

/// Opens the memory of `pid`. CRIU restores by itself what is not LAZY, so only that is missing.
pub(super) fn open(
    images: &ImageDir,
    pid: u32,
    has_source: bool,
    huge: &HugePageRestorer,
) -> Result<Opened> {
    let missing = if has_source {
        Missing::Leave
    } else {
        Missing::Refuse
    };
    let chain = Chain::open(images, Target::Process(pid), missing)?;
    let mappings = images.mappings(pid)?;
    let huge = huge.of(&mappings, &chain);
    let vmas = mappings.fillable;
    let (mut remote, mut local) = (Vec::new(), Vec::new());
    for extent in chain.extents().iter().filter(|extent| extent.lazy) {
        let kind = match extent.place {
            Place::Absent { .. } => &mut remote,
            Place::Raw { .. } | Place::Blocks { .. } => &mut local,
        };
        kind.extend(within_mappings(extent.range, &vmas));
    }
    let chain = (!local.is_empty()).then_some(chain);
    let mut space = Space::new(pid, images.page(), remote, local);
    space.wipe_on_fork(&mappings.wiped_on_fork);
    Ok(Opened {
        space,
        chain,
        huge,
        mappings: mappings.all,
    })
}

/// The directory of the round before `images`: `named`, which may be relative to theirs, or else what
/// their parent link leads to.
pub(super) fn earlier_round(images: &ImageDir, named: Option<&Path>) -> Result<Option<ImageDir>> {
    let earlier = match named {
        Some(named) => {
            let dir = ImageDir::open(&images.path().join(named), images.page())
                .map_err(|error| error.within("--prev-images-dir"))?;
            Some(dir)
        }
        None => images.parent()?,
    };
    if let Some(earlier) = &earlier {
        tracing::info!("using the earlier round in {}", earlier.path().display());
    }
    Ok(earlier)
}

/// `range` cut at the borders of the mappings, which are sorted: no copy may cross one.
fn within_mappings(range: PageRange, vmas: &[PageRange]) -> impl Iterator<Item = PageRange> + '_ {
    let first = vmas.partition_point(|vma| vma.end() <= range.start());
    let behind = move |vma: &&PageRange| vma.start() < range.end();
    vmas[first..]
        .iter()
        .take_while(behind)
        .filter_map(move |vma| vma.intersect(range))
}

/// Which header layout the CRIU speaks whose dump the images are ([`PagemapEntry::wire`]). Images without any entry say nothing; they need no pages.
pub(in crate::engine) fn wire_of(images: &ImageDir) -> Result<Wire> {
    for pid in images.processes()? {
        let Some((path, mut reader)) = images.pagemap(Target::Process(pid))? else {
            continue;
        };
        let damaged = |error| {
            Error::wrap(
                Kind::Image,
                format!("cannot read {}", path.display()),
                error,
            )
        };
        reader.read::<PagemapHead>().map_err(damaged)?;
        if let Some(entry) = reader.read::<PagemapEntry>().map_err(damaged)? {
            return Ok(entry.wire());
        }
    }
    Ok(Wire::V2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_the_borders_of_mappings() {
        let vmas = [(0x1000, 0x3000), (0x3000, 0x4000), (0x6000, 0x9000)]
            .map(|(start, end)| PageRange::new(start, end));
        let cut = |start, end| {
            within_mappings(PageRange::new(start, end), &vmas)
                .map(|range| (range.start().get(), range.end().get()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            cut(0x2000, 0x7000),
            [(0x2000, 0x3000), (0x3000, 0x4000), (0x6000, 0x7000)]
        );
        assert_eq!(cut(0x4000, 0x6000), []);
        assert_eq!(cut(0x7000, 0xf000), [(0x7000, 0x9000)]);
    }
}
