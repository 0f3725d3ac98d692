//! Rewrites CRIU's images into shapes that are awkward to get from CRIU itself.
//!
//! A kernel without soft-dirty cannot make a chain of parents, and a finished dump holds all pages.
//! Both are only a matter of where pages stand: an entry changes its flags, and its pages leave the
//! pages file.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing, Place};
use pageferry::image::dir::{ImageDir, PARENT_LINK};
use pageferry::image::file::{Magic, MessageWriter};
use pageferry::image::pagemap::{PagemapDecoder, Payload, encode_entry};
use pageferry::image::proto::{PagemapEntry, PagemapHead};
use pageferry::units::{PageCount, PageRange, PageSize, Vaddr};
use prost::Message;

use crate::load::page_words;
use crate::sys::WORD_BYTES;

/// The page size of this machine, on which all images here were made.
///
/// # Errors
/// It is none that pageferry knows.
pub fn page_size() -> Result<PageSize> {
    PageSize::new((page_words() * WORD_BYTES) as u64).context("this machine's page size")
}

/// Copies an image directory without the pages that a restore leaves to a lazy-pages daemon: what
/// the destination has when the source keeps them. Returns how many pages were left out.
///
/// # Errors
/// The images cannot be read or written.
pub fn copy_without_lazy_pages(from: &Path, to: &Path) -> Result<u64> {
    copy_files(from, to)?;
    let mut left_out = 0;
    for_each_target(from, |dir, target| {
        left_out += rewrite(dir, target, to, |flags, _, _| {
            let lazy = flags.has(PageFlags::LAZY) && flags.has(PageFlags::PRESENT);
            Ok(lazy.then_some(PageFlags::LAZY))
        })?;
        Ok(())
    })?;
    Ok(left_out)
}

/// Makes `parent` the parent of `images`: pages that are the same in both leave `images`. Returns
/// how many these are.
///
/// # Errors
/// The images cannot be read or written.
pub fn move_same_pages_to_parent(images: &Path, parent: &Path) -> Result<u64> {
    let parent_dir = ImageDir::open_any(parent, page_size()?)?;
    let rewritten = images.with_extension("rewritten");
    copy_files(images, &rewritten)?;
    let mut moved = 0;
    for_each_target(images, |dir, target| {
        if !parent_dir.has_pagemap(target) {
            return Ok(());
        }
        let older = Chain::open(&parent_dir, target, Missing::Leave)?;
        let mut old = vec![0; dir.page().as_usize()];
        moved += rewrite(dir, target, &rewritten, |flags, addr, page| {
            if !flags.has(PageFlags::PRESENT) {
                return Ok(None);
            }
            let Some(found) = older.find(addr) else {
                return Ok(None);
            };
            if matches!(found.place, Place::Absent { .. }) {
                return Ok(None);
            }
            older.read(found.place, &mut old)?;
            Ok((old == page).then_some(PageFlags::PARENT))
        })?;
        Ok(())
    })?;
    fs::remove_dir_all(images)?;
    fs::rename(&rewritten, images)?;
    symlink(parent, images.join(PARENT_LINK))?;
    Ok(moved)
}

/// Adds to the inventory in `images` how long the machine was up when the dump was made. CRIU writes
/// that when it tracks memory, which it refuses to do without soft-dirty, and goes on top of no
/// parent that lacks it: it could not tell whether a pid was used again.
///
/// # Errors
/// There is no inventory, or it cannot be written.
pub fn tell_uptime(images: &Path) -> Result<()> {
    let path = images.join("inventory.img");
    let mut bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let uptime = fs::read_to_string("/proc/uptime")?;
    // Seconds with two decimals, and more behind a space.
    let seconds = uptime.split(' ').next().context("/proc/uptime is empty")?;
    let hundredths: u64 = seconds.replace('.', "").parse()?;
    let uptime = DumpUptime {
        microseconds: hundredths * 10_000,
    };
    // A field more at the end of the one message; its length stands behind the magic.
    bytes.extend(uptime.encode_to_vec());
    let message_bytes = u32::try_from(bytes.len() - INVENTORY_HEAD_BYTES)?;
    bytes[INVENTORY_HEAD_BYTES - 4..INVENTORY_HEAD_BYTES]
        .copy_from_slice(&message_bytes.to_le_bytes());
    fs::write(&path, bytes).with_context(|| path.display().to_string())
}

/// Words before the message of an inventory: its magic, the message's length.
const INVENTORY_HEAD_BYTES: usize = 8;

/// A part of an inventory (`InventoryEntry` in CRIU's inventory.proto).
#[derive(Clone, PartialEq, Message)]
struct DumpUptime {
    #[prost(uint64, required, tag = "8")]
    microseconds: u64,
}

/// Spoils up to `most` compressed lazy pages of the images in `dir`, so that they do not decode. Returns how many.
///
/// # Errors
/// The images cannot be read or written.
pub fn spoil_compressed_pages(dir: &Path, most: usize) -> Result<usize> {
    let mut longest = (PathBuf::new(), Vec::new());
    for_each_target(dir, |dir, target| {
        let (_, mut pagemap) = dir.pagemap(target)?.context("no pagemap")?;
        let head: PagemapHead = pagemap.read()?.context("an empty pagemap")?;
        let mut decoder = PagemapDecoder::new(dir.page());
        while let Some(entry) = pagemap.read::<PagemapEntry>()? {
            let extent = decoder.decode(&entry)?;
            let Payload::Blocks { offset, ends } = extent.payload else {
                continue;
            };
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let blocks = starts
                .zip(ends.iter())
                .map(|(start, end)| (offset + start, end - start));
            // The others decode whatever they hold.
            let packed = blocks.filter(|(_, bytes)| (1..dir.page().bytes()).contains(bytes));
            let packed: Vec<(u64, u64)> = packed.collect();
            if extent.flags.has(PageFlags::LAZY) && packed.len() > longest.1.len() {
                longest = (dir.pages_path(head.pages_id), packed);
            }
        }
        Ok(())
    })?;
    let (path, packed) = longest;
    let pages = File::options().write(true).open(&path);
    let pages = pages.with_context(|| path.display().to_string())?;
    for (offset, bytes) in packed.iter().take(most) {
        let nonsense = vec![0xff; usize::try_from(*bytes)?];
        pages.write_all_at(&nonsense, *offset)?;
    }
    Ok(packed.len().min(most))
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_file() {
            let name = path.file_name().context("a listed file has a name")?;
            fs::copy(&path, to.join(name)).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

fn for_each_target(
    dir: &Path,
    mut change: impl FnMut(&ImageDir, Target) -> Result<()>,
) -> Result<()> {
    let dir = ImageDir::open(dir, page_size()?)?;
    for target in dir.targets()? {
        change(&dir, target).with_context(|| format!("{target} in {}", dir.path().display()))?;
    }
    Ok(())
}

/// Writes the pagemap and the pages of `target` in `dir` to the directory `to`. `new_flags` is
/// asked about each page (its flags, address and content, which is empty without PRESENT): the
/// flags that it gets, without PRESENT, when it leaves the pages file. Returns how many left.
fn rewrite(
    dir: &ImageDir,
    target: Target,
    to: &Path,
    mut new_flags: impl FnMut(PageFlags, Vaddr, &[u8]) -> Result<Option<PageFlags>>,
) -> Result<u64> {
    let page = dir.page();
    let (_, mut pagemap) = dir.pagemap(target)?.context("no pagemap")?;
    let head: PagemapHead = pagemap.read()?.context("an empty pagemap")?;
    let content = Chain::open(dir, target, Missing::Leave)?;
    let pages_name = format!("pages-{}.img", head.pages_id);
    let mut pages = BufWriter::new(File::create(to.join(pages_name))?);
    let entries = BufWriter::new(File::create(to.join(target.pagemap_name()))?);
    let mut entries = MessageWriter::new(entries, Magic::Pagemap)?;
    entries.write(&head)?;
    let mut left = 0;
    let mut bytes = vec![0; page.as_usize()];
    while let Some(entry) = pagemap.read::<PagemapEntry>()? {
        let wire = entry.wire();
        let count = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
        let old = entry.flags.map_or(PageFlags::PRESENT, PageFlags::from_bits);
        // The run that is being gathered: where it begins, and the flags of its pages.
        let mut run: Option<(u64, PageFlags)> = None;
        for addr in (0..count).map(|n| entry.vaddr + n * page.bytes()) {
            let present = old.has(PageFlags::PRESENT);
            let shown: &[u8] = if present {
                let found = content
                    .find(Vaddr(addr))
                    .context("a page without a place")?;
                content.read(found.place, &mut bytes)?;
                &bytes
            } else {
                &[]
            };
            let flags = if let Some(flags) = new_flags(old, Vaddr(addr), shown)? {
                left += 1;
                flags
            } else {
                pages.write_all(shown)?;
                // Everything is written raw and close together.
                PageFlags::from_bits(old.bits() & !PageFlags::PAYLOAD_ALIGNED.bits())
            };
            match run {
                Some((_, same)) if same == flags => {}
                Some((start, other)) => {
                    write_run(&mut entries, start, addr, other, wire, page)?;
                    run = Some((addr, flags));
                }
                None => run = Some((addr, flags)),
            }
        }
        if let Some((start, flags)) = run {
            write_run(
                &mut entries,
                start,
                entry.vaddr + count * page.bytes(),
                flags,
                wire,
                page,
            )?;
        }
    }
    entries.into_inner().flush()?;
    pages.flush()?;
    Ok(left)
}

fn write_run<W: Write>(
    entries: &mut MessageWriter<W>,
    start: u64,
    end: u64,
    flags: PageFlags,
    wire: Wire,
    page: PageSize,
) -> Result<()> {
    let pages = PageCount((end - start) >> page.shift());
    let range = PageRange::checked(Vaddr(start), pages, page).context("an entry out of range")?;
    Ok(entries.write(&encode_entry(range, flags, None, wire, page))?)
}
