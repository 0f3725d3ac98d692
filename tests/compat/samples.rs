//! What the samples hold.

use pageferry::criu::header::{PageFlags, Wire};

use crate::common::{FIRST_PAGE, Run};

/// An image directory among the samples.
pub(crate) struct Image {
    pub(crate) name: &'static str,
    /// How the dump spoke.
    pub(crate) wire: Wire,
    /// What the dump held, then what its parent holds.
    pub(crate) levels: Vec<Vec<Run>>,
    /// Options of the page-server.
    pub(crate) options: &'static [&'static str],
}

/// A run of pages with these seeds.
fn seeded(start_page: u64, seeds: &[u32]) -> Run {
    Run {
        seeds: seeds.to_vec(),
        ..Run::present(start_page, seeds.len() as u64, PageFlags::LAZY, 1)
    }
}

/// What the first dump holds, which all page maps can say.
fn first() -> Vec<Run> {
    vec![
        seeded(FIRST_PAGE, &[1, 2, 3, 4, 0, 5]),
        Run::present(FIRST_PAGE + 8, 2, PageFlags::default(), 100),
        Run::absent(FIRST_PAGE + 12, 20, PageFlags::LAZY),
        seeded(FIRST_PAGE + 40, &[7, 9, 11]),
    ]
}

/// A dump with pages that CRIU has compressed.
fn compressed() -> Vec<Run> {
    let run = Run {
        compressed: true,
        ..seeded(FIRST_PAGE + 50, &[13, 14, 0, 15])
    };
    let mut runs = first();
    runs.push(run);
    runs
}

/// The memory of a process of which dumps are made in two rounds: some pages are the same in the second, one has
/// changed in its first bytes alone (505 is 3 to those who make contents), others are new.
pub(crate) fn round(number: u32) -> Vec<Run> {
    let mut runs = first();
    if number == 2 {
        runs[0] = seeded(FIRST_PAGE, &[1, 2, 505, 6, 0, 0]);
    }
    runs
}

/// The memory that goes by post-copy.
pub(crate) fn whole() -> Vec<Run> {
    vec![seeded(FIRST_PAGE, &[1, 2, 3, 4, 0, 5, 7, 8])]
}

/// The image directories; a parent comes before its child.
pub(crate) fn images() -> Vec<Image> {
    let image = |name, wire, levels, options| Image {
        name,
        wire,
        levels,
        options,
    };
    vec![
        image("v1", Wire::V1, vec![first()], &[]),
        image("v2", Wire::V2, vec![compressed()], &[]),
        image(
            "child",
            Wire::V2,
            vec![round(2), compressed()],
            &["--prev-images-dir", "../v2", "--dedup-content"],
        ),
        image("compressed", Wire::V2, vec![first()], &["--compress"]),
    ]
}
