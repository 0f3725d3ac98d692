//! Image files: every message that is read, pagemaps, and chains of directories.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::symlink;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing, Place};
use pageferry::image::check::{check_lazy, check_previous, check_served};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageReader, MessageWriter};
use pageferry::image::mm::Mappings;
use pageferry::image::pagemap::{PagemapDecoder, Payload, encode_entry};
use pageferry::image::proto::{
    CompressedBlocks, Core, Inventory, Memfd, Mm, PagemapEntry, PagemapHead, PstreeEntry, Vma,
};
use pageferry::units::{PageRange, PageSize, Vaddr};
use prost::Message;

use crate::{byte, canary, scratch};

const PAGE: PageSize = PageSize::KIB_4;

/// The process whose memory the directories of [`chain`] hold.
const TARGET: Target = Target::Process(7);

/// The bytes of an image file: the magic words of `kind`, then `rest`.
fn file(kind: Magic, rest: &[u8]) -> Vec<u8> {
    let writer = MessageWriter::new(Vec::new(), kind).expect("memory is written");
    let mut bytes = writer.into_inner();
    bytes.extend_from_slice(rest);
    bytes
}

/// What stands behind the magic words of a file with these messages.
fn body<M: Message>(messages: &[M]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        let len = u32::try_from(message.encoded_len()).expect("a short message");
        out.extend_from_slice(&len.to_le_bytes());
        message.encode(&mut out).expect("memory is written");
    }
    out
}

/// A pagemap: the messages behind the magic words.
pub(crate) fn pagemap(data: &[u8]) {
    let bytes = file(Magic::Pagemap, data);
    let mut reader = MessageReader::new(Cursor::new(bytes), Magic::Pagemap).expect("it has them");
    if !matches!(reader.read::<PagemapHead>(), Ok(Some(_))) {
        return;
    }
    let mut decoder = PagemapDecoder::new(PAGE);
    let (mut end, mut offset) = (0, 0);
    while let Ok(Some(entry)) = reader.read::<PagemapEntry>() {
        let Ok(extent) = decoder.decode(&entry) else {
            return;
        };
        let range = extent.range;
        assert!(
            !range.is_empty() && range.start().get() >= end,
            "extents are in order"
        );
        assert!(PAGE.divides(range.start().get()) && PAGE.divides(range.bytes()));
        end = range.end().get();
        // No seed has pages so far up.
        canary(end >= 1 << 20);
        match extent.payload {
            Payload::None => {}
            Payload::Raw { offset: at } => {
                assert!(at >= offset, "payload is in order");
                offset = at
                    .checked_add(range.bytes())
                    .expect("it ends within a file");
            }
            Payload::Blocks { offset: at, ends } => {
                assert!(at >= offset, "payload is in order");
                assert_eq!(ends.len() as u64, range.pages(PAGE).get());
                assert!(ends.is_sorted());
                offset = at + ends.last().copied().unwrap_or(0);
            }
        }
    }
}

fn entry(range: PageRange, flags: PageFlags, sizes: Option<Vec<u32>>) -> PagemapEntry {
    let blocks = sizes.map(|block_sizes| CompressedBlocks {
        total_payload_size: Some(block_sizes.iter().map(|size| u64::from(*size)).sum()),
        block_sizes,
        pages_per_block: Some(1),
    });
    let wire = match blocks {
        Some(_) => Wire::V2,
        None => Wire::V1,
    };
    encode_entry(range, flags, blocks, wire, PAGE)
}

/// A pagemap with entries of every kind.
pub(crate) fn pagemap_seeds() -> Vec<Vec<u8>> {
    let present = PageFlags::PRESENT;
    let entries = [
        entry(PageRange::new(0x1000, 0x3000), PageFlags::PARENT, None),
        entry(PageRange::new(0x3000, 0x5000), present, None),
        entry(PageRange::new(0x9000, 0xa000), PageFlags::LAZY, None),
        entry(
            PageRange::new(0x10_000, 0x12_000),
            present,
            Some(vec![0, 4096]),
        ),
        entry(
            PageRange::new(0x20_000, 0x22_000),
            present,
            Some(vec![9, 4096]),
        ),
    ];
    let head = body(&[PagemapHead { pages_id: 1 }]);
    vec![
        [head.as_slice(), &body(&entries[..3])].concat(),
        [head.as_slice(), &body(&entries)].concat(),
    ]
}

/// Every other image: the kind, then the messages behind the magic words.
pub(crate) fn messages(mut data: &[u8]) {
    match byte(&mut data) % 6 {
        0 => drop(all::<Inventory>(Magic::Inventory, data)),
        1 => drop(all::<Core>(Magic::Core, data)),
        2 => drop(all::<PstreeEntry>(Magic::Pstree, data)),
        3 => drop(all::<Memfd>(Magic::Memfd, data)),
        _ => {
            let read = all::<Mm>(Magic::Mm, data);
            let vmas = read.iter().flat_map(|mm| &mm.vmas);
            if let Ok(mappings) = Mappings::new(vmas, PAGE) {
                for ranges in [
                    &mappings.fillable,
                    &mappings.wiped_on_fork,
                    &mappings.without_parents,
                ] {
                    let apart = ranges.windows(2).all(|two| two[0].end() <= two[1].start());
                    assert!(apart, "ranges are in order and disjoint");
                }
                canary(mappings.fillable.len() >= 3);
            }
        }
    }
}

fn all<M: Message + Default>(kind: Magic, rest: &[u8]) -> Vec<M> {
    let bytes = file(kind, rest);
    let mut reader = MessageReader::new(Cursor::new(bytes), kind).expect("it has its magic");
    let mut messages = Vec::new();
    while let Ok(Some(message)) = reader.read() {
        messages.push(message);
    }
    messages
}

/// One file of each kind.
pub(crate) fn message_seeds() -> Vec<Vec<u8>> {
    let vma = |start, end, status| Vma {
        start,
        end,
        status,
        ..Vma::default()
    };
    let vmas = vec![vma(0x1000, 0x9000, 0x201), vma(0xa000, 0xc000, 0x201)];
    let mut guarded = vmas.clone();
    guarded.push(vma(0x3000, 0x4000, 1 << 16));
    let task = PstreeEntry {
        pid: 7,
        ppid: 0,
        threads: vec![7, 8],
    };
    let seeds = [
        (0, body(&[Inventory { img_version: 2 }])),
        (1, body(&[Core::default()])),
        (2, body(&[task])),
        (
            3,
            body(&[Memfd {
                size: 4096,
                shmid: 3,
            }]),
        ),
        (
            4,
            body(&[Mm {
                vmas,
                ..Mm::default()
            }]),
        ),
        (
            5,
            body(&[Mm {
                vmas: guarded,
                ..Mm::default()
            }]),
        ),
    ];
    let of = |(kind, body): (u8, Vec<u8>)| [&[kind], body.as_slice()].concat();
    seeds.into_iter().map(of).collect()
}

/// One run of a pagemap.
#[derive(Arbitrary, Debug)]
struct Run {
    gap: u8,
    pages: u8,
    kind: u8,
    sizes: [u16; 3],
}

/// A directory of a chain.
#[derive(Arbitrary, Debug)]
struct Level {
    runs: Vec<Run>,
    /// How much shorter or longer its pages file is than the pagemap says, bytes.
    pages_off_by: i16,
    /// Bytes of the pagemap that are something else.
    damage: Option<(u16, u8)>,
    /// Where its `parent` leads: the next directory, nowhere, itself, or the first one.
    parent: u8,
}

/// Directories with chains of parents, as structures; then everything that opens them.
pub(crate) fn chain(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(levels) = <[Level; 3]>::arbitrary(&mut input) else {
        return;
    };
    let tmp = scratch::directory();
    let paths = [0, 1, 2].map(|number: u8| tmp.path().join(number.to_string()));
    for (number, level) in levels.iter().enumerate() {
        fs::create_dir(&paths[number]).expect("a directory is made");
        write(&paths[number], level, number).expect("images are written");
    }
    let Ok(dir) = ImageDir::open(&paths[0], PAGE) else {
        return;
    };
    let _ = (
        dir.processes(),
        dir.chain_dirs(),
        check_served(&dir),
        check_lazy(&dir),
    );
    if let Ok(previous) = ImageDir::open(&paths[1], PAGE) {
        let _ = check_previous(&dir, &previous);
    }
    for missing in [Missing::Refuse, Missing::Leave] {
        if let Ok(chain) = Chain::open(&dir, TARGET, missing) {
            read(&chain, missing);
        }
    }
}

fn read(chain: &Chain, missing: Missing) {
    let mut end = 0;
    let mut page = [0; 4096];
    let mut blocks = 0;
    for extent in chain.extents() {
        assert!(extent.range.start().get() >= end && !extent.range.is_empty());
        end = extent.range.end().get();
        let last = chain.find(Vaddr(end - PAGE.bytes()));
        for part in [*extent, last.expect("the last page lies in the extent")] {
            let absent = matches!(part.place, Place::Absent { .. });
            assert!(
                !(absent && missing == Missing::Refuse),
                "holes were refused"
            );
            let read = chain.read(part.place, &mut page);
            assert!(!(absent && read.is_ok()), "an absent page has no contents");
            blocks += usize::from(read.is_ok() && matches!(part.place, Place::Blocks { .. }));
            assert_eq!(
                chain.find(part.range.start()).map(|found| found.place),
                Some(part.place)
            );
        }
    }
    canary(blocks > 0 && chain.extents().len() > 2);
}

fn write(dir: &Path, level: &Level, number: usize) -> std::io::Result<()> {
    let tasks = [PstreeEntry {
        pid: 7,
        ppid: 0,
        threads: vec![7],
    }];
    fs::write(dir.join("pstree.img"), file(Magic::Pstree, &body(&tasks)))?;
    fs::write(
        dir.join("inventory.img"),
        file(Magic::Inventory, &body(&[Inventory { img_version: 3 }])),
    )?;
    let mut entries = Vec::new();
    let (mut at, mut bytes) = (0x10_u64, 0_u64);
    for run in &level.runs {
        at += u64::from(run.gap % 4);
        let pages = u64::from(run.pages % 4) + u64::from(run.kind % 5 != 3);
        let range = PageRange::new(at << 12, (at + pages) << 12);
        at += pages;
        let (flags, sizes) = match run.kind % 5 {
            0 | 1 => (PageFlags::PRESENT, None),
            2 => (PageFlags::PARENT, None),
            3 => (PageFlags::LAZY.with(PageFlags::PRESENT), None),
            _ => {
                let sizes = (0..3).cycle().map(|i| u32::from(run.sizes[i]) % 4200);
                let count = usize::try_from(pages).unwrap_or(0);
                (
                    PageFlags::PRESENT,
                    Some(sizes.take(count).collect::<Vec<_>>()),
                )
            }
        };
        bytes += match &sizes {
            Some(sizes) => sizes.iter().map(|size| u64::from(*size)).sum(),
            None if flags.has(PageFlags::PRESENT) => range.bytes(),
            None => 0,
        };
        entries.push(entry(range, flags, sizes));
    }
    let head = body(&[PagemapHead { pages_id: 1 }]);
    let mut map = file(Magic::Pagemap, &[head, body(&entries)].concat());
    if let Some((at, value)) = level.damage {
        let len = map.len();
        map[usize::from(at) % len] = value;
    }
    fs::write(dir.join(TARGET.pagemap_name()), map)?;
    let pages = fs::File::create(dir.join("pages-1.img"))?;
    pages.set_len(bytes.saturating_add_signed(i64::from(level.pages_off_by.min(0))))?;
    match level.parent % 8 {
        0 => symlink("../0", dir.join("parent")),
        1 => symlink("../none", dir.join("parent")),
        2 => symlink(".", dir.join("parent")),
        3 => Ok(()),
        _ => symlink(format!("../{}", number + 1), dir.join("parent")),
    }
}

/// Bytes that make directories with something in them.
pub(crate) fn chain_seeds() -> Vec<Vec<u8>> {
    let of = |step: u8| {
        let mut value = step;
        let next = || {
            value = value.wrapping_mul(5).wrapping_add(step | 1);
            value
        };
        std::iter::repeat_with(next).take(160).collect()
    };
    // A run, as a vector's next item: the gap before it, pages, kind, sizes of blocks.
    let run = |gap, pages, kind, size: u16| {
        let [low, high] = size.to_le_bytes();
        [1, gap, pages, kind, low, high, 0, 0, 0, 0]
    };
    // What is behind the runs of a directory: as long as it should be, undamaged, and where its parent is.
    let end = |parent| [0, 0, 0, 0, parent];
    let first = [run(0, 0, 0, 0), run(1, 0, 4, 4096), run(1, 0, 2, 0)].concat();
    let second = run(3, 1, 0, 0);
    let honest = [&first[..], &end(4), &second, &end(3), &end(3)].concat();
    let mut seeds: Vec<_> = [0, 3, 7, 64, 200].into_iter().map(of).collect();
    seeds.push(honest);
    seeds
}
