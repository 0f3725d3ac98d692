//! Pagemaps and chains of them.

use std::fs::{self, File};
use std::io::{self, Cursor};
use std::os::unix::fs::symlink;
use std::path::Path;

use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageReader, MessageWriter};
use pageferry::image::pagemap::{PagemapDecoder, encode_entry};
use pageferry::image::proto::{PagemapEntry, PagemapHead};
use pageferry::units::{PageRange, PageSize, Vaddr};
use tempfile::TempDir;

use crate::Run;

const PAGE: PageSize = PageSize::KIB_4;
const TARGET: Target = Target::Process(7);

/// Entries of a pagemap.
const ENTRIES: u64 = 16_384;

/// Directories of a chain: a dump and the rounds before it.
const DEPTH: u64 = 16;

/// Look-ups of one piece of work.
const FINDS: u64 = 20_000;

/// One page each: every entry is an extent of its own.
fn range(number: u64) -> PageRange {
    let start = (0x1000 + number) << PAGE.shift();
    PageRange::new(start, start + PAGE.bytes())
}

/// A pagemap whose entry `number` has the flags `of(number)`.
fn pagemap(of: impl Fn(u64) -> PageFlags) -> Vec<u8> {
    let mut map = MessageWriter::new(Vec::new(), Magic::Pagemap).expect("memory is written");
    let head = PagemapHead { pages_id: 1 };
    map.write(&head).expect("memory is written");
    for number in 0..ENTRIES {
        let entry = encode_entry(range(number), of(number), None, Wire::V2, PAGE);
        map.write(&entry).expect("memory is written");
    }
    map.into_inner()
}

pub(crate) fn pagemap_encode() -> Run {
    Box::new(|| pagemap(|_| PageFlags::PRESENT).len() as u64)
}

pub(crate) fn pagemap_decode() -> Run {
    let bytes = pagemap(|_| PageFlags::PRESENT);
    Box::new(move || {
        let mut map = MessageReader::new(Cursor::new(bytes.as_slice()), Magic::Pagemap)
            .expect("it has its magic");
        let head = map.read::<PagemapHead>().expect("it has a head");
        let mut decoder = PagemapDecoder::new(PAGE);
        let mut sum = u64::from(head.map_or(0, |head| head.pages_id));
        while let Some(entry) = map.read::<PagemapEntry>().expect("it is whole") {
            let extent = decoder.decode(&entry).expect("it is in order");
            sum += extent.range.end().get();
        }
        sum
    })
}

/// A chain in which neighbouring pages lie in different directories. It goes with the value.
struct Images(TempDir);

impl Images {
    fn new() -> io::Result<Images> {
        let root = TempDir::new()?;
        for depth in 0..DEPTH {
            let dir = root.path().join(depth.to_string());
            fs::create_dir(&dir)?;
            write_level(&dir, depth)?;
            if depth + 1 < DEPTH {
                symlink(format!("../{}", depth + 1), dir.join("parent"))?;
            }
        }
        Ok(Images(root))
    }

    fn open(&self) -> Chain {
        let dir = ImageDir::open(&self.0.path().join("0"), PAGE).expect("images are there");
        Chain::open(&dir, TARGET, Missing::Refuse).expect("they are whole")
    }
}

fn write_level(dir: &Path, depth: u64) -> io::Result<()> {
    let is_here = |number: u64| number % DEPTH == depth || depth + 1 == DEPTH;
    let map = pagemap(|number| match is_here(number) {
        true => PageFlags::PRESENT,
        false => PageFlags::PARENT,
    });
    fs::write(dir.join(TARGET.pagemap_name()), map)?;
    let here = (0..ENTRIES).filter(|number| is_here(*number)).count() as u64;
    File::create(dir.join("pages-1.img"))?.set_len(here << PAGE.shift())
}

pub(crate) fn chain_open() -> Run {
    let images = Images::new().expect("images are written");
    Box::new(move || images.open().extents().len() as u64)
}

pub(crate) fn chain_find() -> Run {
    let images = Images::new().expect("images are written");
    let chain = images.open();
    Box::new(move || {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut sum = images.0.path().as_os_str().len() as u64;
        for _ in 0..FINDS {
            let at: Vaddr = range(rng.u64(0..ENTRIES)).start();
            sum += chain.find(at).map_or(0, |found| found.range.bytes());
        }
        sum
    })
}
