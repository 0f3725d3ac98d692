//! Small writers of image directories, with the content of each page known.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::pagemap::encode_entry;
use pageferry::image::proto::{CompressedBlocks, PagemapHead};
use pageferry::tls::TlsArgs;
use pageferry::units::{PageRange, PageSize};
use proptest::prelude::*;
use testbed::pki::Credentials;

pub(crate) const PAGE: PageSize = PageSize::KIB_4;

/// The process whose memory the tests write.
pub(crate) const TARGET: Target = Target::Process(7);

/// Page number that [`level`] begins at: above all addresses that look like pids.
pub(crate) const FIRST_PAGE: u64 = 0x1000;

/// What one page of a test holds: told from its seed; 0 is a zero page, odd seeds compress well.
pub(crate) fn page_content(seed: u32) -> Vec<u8> {
    let mut state = seed;
    let noise = |i: usize| {
        if seed % 2 == 1 && i >= 64 {
            return (seed % 251) as u8;
        }
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..PAGE.as_usize()).map(noise).collect()
}

/// A run of an entry: flags, and for PRESENT the seed of each page.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) start_page: u64,
    pub(crate) pages: u64,
    pub(crate) flags: PageFlags,
    /// Seeds of the pages if the run is PRESENT.
    pub(crate) seeds: Vec<u32>,
    pub(crate) compressed: bool,
}

impl Run {
    pub(crate) fn range(&self) -> PageRange {
        let at = |page: u64| page << PAGE.shift();
        PageRange::new(at(self.start_page), at(self.start_page + self.pages))
    }

    /// A raw PRESENT run with the seeds `first_seed`, `first_seed + 1`...
    pub(crate) fn present(start_page: u64, pages: u64, flags: PageFlags, first_seed: u32) -> Run {
        Run {
            start_page,
            pages,
            flags: flags.with(PageFlags::PRESENT),
            seeds: (first_seed..).take(pages as usize).collect(),
            compressed: false,
        }
    }

    /// A run without bytes.
    pub(crate) fn absent(start_page: u64, pages: u64, flags: PageFlags) -> Run {
        Run {
            start_page,
            pages,
            flags,
            seeds: Vec::new(),
            compressed: false,
        }
    }
}

/// Writes the pagemap of `target` and its pages file into `dir`.
pub(crate) fn write_target(dir: &Path, target: Target, wire: Wire, pages_id: u32, runs: &[Run]) {
    let map = File::create(dir.join(target.pagemap_name())).unwrap();
    let mut map = MessageWriter::new(map, Magic::Pagemap).unwrap();
    map.write(&PagemapHead { pages_id }).unwrap();
    let mut pages = Vec::new();
    for run in runs {
        let (flags, blocks) = write_payload(run, &mut pages);
        let entry = encode_entry(run.range(), flags, blocks, wire, PAGE);
        map.write(&entry).unwrap();
    }
    let mut file = File::create(dir.join(format!("pages-{pages_id}.img"))).unwrap();
    file.write_all(&pages).unwrap();
}

fn write_payload(run: &Run, pages: &mut Vec<u8>) -> (PageFlags, Option<CompressedBlocks>) {
    if !run.compressed {
        pages.extend(run.seeds.iter().flat_map(|seed| page_content(*seed)));
        return (run.flags, None);
    }
    let blocks: Vec<Vec<u8>> = run.seeds.iter().map(|seed| stored(*seed)).collect();
    let mut flags = run.flags;
    if blocks[0].len() == PAGE.as_usize() {
        flags = flags.with(PageFlags::PAYLOAD_ALIGNED);
        pages.resize(pages.len().next_multiple_of(PAGE.as_usize()), 0);
    }
    let block_sizes: Vec<u32> = blocks.iter().map(|block| block.len() as u32).collect();
    let total = block_sizes.iter().map(|size| u64::from(*size)).sum();
    pages.extend(blocks.into_iter().flatten());
    let blocks = CompressedBlocks {
        block_sizes,
        total_payload_size: Some(total),
        pages_per_block: Some(1),
    };
    (flags, Some(blocks))
}

/// A page as CRIU 4.3 stores it: nothing for zeros, raw from 7/8 of a page on, else LZ4.
pub(crate) fn stored(seed: u32) -> Vec<u8> {
    let page = page_content(seed);
    let block = lz4_flex::block::compress(&page);
    match seed {
        0 => Vec::new(),
        _ if block.len() >= page.len() / 8 * 7 => page,
        _ => block,
    }
}

fn flags() -> impl Strategy<Value = PageFlags> {
    prop::sample::select(vec![
        PageFlags::PRESENT,
        PageFlags::PRESENT.with(PageFlags::LAZY),
        PageFlags::PARENT,
        PageFlags::PARENT.with(PageFlags::LAZY),
        PageFlags::LAZY,
    ])
}

prop_compose! {
    /// A pagemap of a few runs with everything that a pagemap can say.
    pub(crate) fn level()(
        runs in prop::collection::vec(
            (0..3u64, 1..6u64, flags(), prop::collection::vec(0..9u32, 6), any::<bool>()),
            0..12,
        )
    ) -> Vec<Run> {
        let mut at = FIRST_PAGE;
        runs.into_iter().map(|(gap, pages, flags, mut seeds, compressed)| {
            let start_page = at + gap;
            at = start_page + pages;
            let present = flags.has(PageFlags::PRESENT);
            seeds.truncate(if present { pages as usize } else { 0 });
            Run { start_page, pages, flags, seeds, compressed: compressed && present }
        }).collect()
    }
}

/// A chain of directories in a temporary one; the first is the youngest.
pub(crate) struct Images {
    _root: tempfile::TempDir,
    pub(crate) dirs: Vec<PathBuf>,
}

impl Images {
    /// `depth` empty directories, each with the next as its parent.
    pub(crate) fn new(depth: usize) -> Images {
        let root = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = (0..depth)
            .map(|i| root.path().join(i.to_string()))
            .collect();
        for (i, dir) in dirs.iter().enumerate() {
            std::fs::create_dir(dir).unwrap();
            if i + 1 < depth {
                std::os::unix::fs::symlink(format!("../{}", i + 1), dir.join("parent")).unwrap();
            }
        }
        Images { _root: root, dirs }
    }

    /// The chain of `levels`, youngest first, of the target that the tests use.
    pub(crate) fn of(levels: &[Vec<Run>], wire: Wire) -> Images {
        let images = Images::new(levels.len());
        for (id, (dir, runs)) in images.dirs.iter().zip(levels).enumerate() {
            write_target(dir, TARGET, wire, id as u32 + 1, runs);
        }
        images
    }
}

/// The content of each page of the youngest directory, by page number: the slow way, page by page.
/// `None` for a page that no directory has.
pub(crate) fn naive_memory(levels: &[Vec<Run>]) -> BTreeMap<u64, Option<u32>> {
    let Some((runs, parents)) = levels.split_first() else {
        return BTreeMap::new();
    };
    let parents = naive_memory(parents);
    let mut memory = BTreeMap::new();
    for run in runs {
        for page in run.start_page..run.start_page + run.pages {
            let own = run.seeds.get((page - run.start_page) as usize).copied();
            let inherited = parents.get(&page).copied().flatten();
            let in_parent = run.flags.has(PageFlags::PARENT);
            memory.insert(page, if in_parent { inherited } else { own });
        }
    }
    memory
}

/// The files in a directory, by name.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in dir.read_dir().unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            let name = entry.file_name().into_string().unwrap();
            files.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    files
}

/// Checks that the images in `dir` have the pages of `expected`, by page number and seed.
pub(crate) fn check_images(dir: &Path, target: Target, expected: &BTreeMap<u64, Option<u32>>) {
    let chain = Chain::open(&ImageDir::open(dir, PAGE).unwrap(), target, Missing::Leave).unwrap();
    let mut expected = expected.iter();
    for extent in chain.extents() {
        let mut place = extent.place;
        for page in extent.range.start().get() / 4096..extent.range.end().get() / 4096 {
            let (number, seed) = expected.next().unwrap();
            assert_eq!(*number, page);
            let mut bytes = vec![0; 4096];
            match seed {
                Some(seed) => {
                    chain.read(place, &mut bytes).unwrap();
                    assert_eq!(bytes, page_content(*seed), "page {page:#x}");
                }
                None => assert!(chain.read(place, &mut bytes).is_err()),
            }
            place = place.behind(4096, PAGE);
        }
    }
    assert_eq!(expected.next(), None);
}

/// `runs` with a run behind them that may be larger than a buffer, and another behind that.
pub(crate) fn with_large_runs(mut runs: Vec<Run>, pages: u64) -> Vec<Run> {
    for first_seed in [1000, 5000] {
        let last = runs
            .last()
            .map_or(FIRST_PAGE, |run| run.start_page + run.pages);
        runs.push(Run::present(last, pages, PageFlags::LAZY, first_seed));
    }
    runs
}

/// `runs` without holes that `parent` would not fill.
pub(crate) fn with_true_holes(runs: Vec<Run>, parent: &BTreeMap<u64, Option<u32>>) -> Vec<Run> {
    let has = |page: u64| parent.get(&page).copied().flatten().is_some();
    let is_true = |run: &Run| (run.start_page..run.start_page + run.pages).all(has);
    let honest = |run: Run| match run.flags.has(PageFlags::PARENT) && !is_true(&run) {
        true => Run::present(run.start_page, run.pages, PageFlags::LAZY, 77),
        false => run,
    };
    runs.into_iter().map(honest).collect()
}

/// The options of a side that shows `credentials`.
pub(crate) fn tls_args(credentials: &Credentials) -> TlsArgs {
    TlsArgs {
        tls: true,
        tls_cacert: Some(credentials.cacert.clone()),
        tls_cert: Some(credentials.cert.clone()),
        tls_key: Some(credentials.key.clone()),
        ..TlsArgs::default()
    }
}
