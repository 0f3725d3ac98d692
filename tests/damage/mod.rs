//! Ways of damaging real images, each with what a restore makes of it.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pageferry::criu::header::{PageFlags, Target};
use pageferry::image::dir::{ImageDir, PARENT_LINK};
use pageferry::image::file::{Magic, MessageReader, MessageWriter};
use pageferry::image::proto::{PagemapEntry, PagemapHead};
use testbed::images::{copy_without_lazy_pages, page_size};

/// Images to be damaged: a copy of good ones.
pub(crate) struct Images {
    pub(crate) dir: PathBuf,
    /// The root process.
    pub(crate) pid: u32,
}

/// A way of damaging them.
#[derive(Clone, Copy)]
pub(crate) struct Damage {
    pub(crate) name: &'static str,
    pub(crate) apply: fn(&Images) -> Result<()>,
    /// What `verify` finds; `None`: a restore is right all the same, and `verify` says good.
    pub(crate) code: Option<&'static str>,
    /// `verify` warns although CRIU restores right: the two causes cannot be told apart, and the other one
    /// loses memory.
    pub(crate) may_be_right: bool,
    /// CRIU from 4.3 on checks entries before it restores, and refuses this.
    pub(crate) checked_by_4_3: bool,
}

const fn damage(
    name: &'static str,
    apply: fn(&Images) -> Result<()>,
    code: Option<&'static str>,
) -> Damage {
    Damage {
        name,
        apply,
        code,
        may_be_right: false,
        checked_by_4_3: false,
    }
}

/// What can happen to a dump that stands alone.
pub(crate) const ALONE: &[Damage] = &[
    damage("nothing", |_| Ok(()), None),
    damage(
        "pages file a page short",
        |i| i.cut_pages(4096),
        Some("pages-short"),
    ),
    damage(
        "pages file a byte short",
        |i| i.cut_pages(1),
        Some("pages-short"),
    ),
    damage(
        "pages file empty",
        |i| i.cut_pages(u64::MAX),
        Some("pages-short"),
    ),
    damage(
        "pages file missing",
        Images::remove_pages,
        Some("pages-missing"),
    ),
    Damage {
        may_be_right: true,
        ..damage(
            "pages file a page long",
            Images::lengthen_pages,
            Some("pages-long"),
        )
    },
    // It may be the end of a stack, which holds what a program was started with and need not look at again.
    Damage {
        may_be_right: true,
        ..damage(
            "last entry missing",
            |i| i.entries(|e| drop(e.pop())),
            Some("pages-long"),
        )
    },
    damage(
        "pagemap missing",
        |i| i.remove(&i.pagemap()),
        Some("pagemap-missing"),
    ),
    damage(
        "pagemap of no bytes",
        |i| i.cut(&i.pagemap(), u64::MAX),
        Some("pagemap-damaged"),
    ),
    damage(
        "pagemap cut",
        |i| i.cut(&i.pagemap(), 1),
        Some("pagemap-damaged"),
    ),
    damage(
        "pagemap with another magic",
        |i| i.poke(&i.pagemap(), 4),
        Some("pagemap-damaged"),
    ),
    damage(
        "pagemap without entries",
        |i| i.entries(Vec::clear),
        Some("pages-long"),
    ),
    damage(
        "pages outside mappings",
        |i| i.entries(|e| move_last(e)),
        Some("outside-mappings"),
    ),
    damage(
        "entries out of order",
        |i| i.entries(|e| swap_addresses(e)),
        Some("pagemap-damaged"),
    ),
    damage(
        "hole without a parent",
        |i| i.entries(|e| flag(e, PageFlags::PARENT)),
        Some("hole-without-page"),
    ),
    damage(
        "pages left at a source",
        Images::leave_at_source,
        Some("with-source"),
    ),
    Damage {
        checked_by_4_3: true,
        ..damage("an entry of no pages", |i| i.entries(insert_empty), None)
    },
    damage("a pagemap too many", Images::add_pagemap, None),
    damage("mm missing", |i| i.remove(&i.mm()), Some("mm-missing")),
    damage("mm cut", |i| i.cut(&i.mm(), 1), Some("mm-damaged")),
    damage(
        "mm with another magic",
        |i| i.poke(&i.mm(), 4),
        Some("mm-damaged"),
    ),
    damage(
        "core missing",
        |i| i.remove(&format!("core-{}.img", i.pid)),
        Some("core-missing"),
    ),
    damage(
        "inventory missing",
        |i| i.remove("inventory.img"),
        Some("inventory-missing"),
    ),
    damage(
        "inventory with another magic",
        |i| i.poke("inventory.img", 0),
        Some("inventory-damaged"),
    ),
    damage(
        "inventory empty",
        |i| i.cut("inventory.img", u64::MAX),
        Some("inventory-damaged"),
    ),
    damage(
        "pstree missing",
        |i| i.remove("pstree.img"),
        Some("pstree-missing"),
    ),
    damage(
        "pstree cut",
        |i| i.cut("pstree.img", 1),
        Some("pstree-damaged"),
    ),
    damage(
        "shared pagemap missing",
        |i| i.remove(&i.shared()?.pagemap_name()),
        Some("pagemap-missing"),
    ),
    damage(
        "shared pages file missing",
        Images::remove_shared_pages,
        Some("pages-missing"),
    ),
];

/// What can happen to a dump on top of another one.
pub(crate) const ON_PARENT: &[Damage] = &[
    damage("nothing", |_| Ok(()), None),
    damage("link removed", |i| i.link(None), Some("hole-without-page")),
    damage(
        "link to nothing",
        |i| i.link(Some("../nowhere")),
        Some("hole-without-page"),
    ),
    damage(
        "link to itself",
        |i| i.link(Some(".")),
        Some("parent-unusable"),
    ),
    damage(
        "link to a file",
        |i| i.link(Some("inventory.img")),
        Some("parent-unusable"),
    ),
    damage(
        "parent without inventory",
        |i| i.parent().remove("inventory.img"),
        None,
    ),
    damage("parent without mm", |i| i.parent().remove(&i.mm()), None),
    damage(
        "parent without pagemap",
        |i| i.parent().remove(&i.pagemap()),
        Some("hole-without-page"),
    ),
    damage(
        "parent's pagemap cut",
        |i| i.parent().cut(&i.pagemap(), 1),
        Some("pagemap-damaged"),
    ),
    damage(
        "parent's pages file cut",
        |i| i.parent().cut_pages(u64::MAX),
        Some("pages-short"),
    ),
    damage(
        "parent's pages file missing",
        |i| i.parent().remove_pages(),
        Some("pages-missing"),
    ),
    damage(
        "parent's page lost",
        |i| i.parent().leave_at_source(),
        Some("with-source"),
    ),
    damage(
        "parent's first entry missing",
        |i| i.parent().entries(|e| lose_first(e)),
        Some("hole-without-page"),
    ),
];

impl Images {
    fn parent(&self) -> Images {
        Images {
            dir: self.dir.join(PARENT_LINK),
            pid: self.pid,
        }
    }

    fn pagemap(&self) -> String {
        Target::Process(self.pid).pagemap_name()
    }

    fn mm(&self) -> String {
        format!("mm-{}.img", self.pid)
    }

    fn images(&self) -> Result<ImageDir> {
        Ok(ImageDir::open(&self.dir, page_size()?)?)
    }

    fn pages(&self, target: Target) -> Result<PathBuf> {
        let (_, mut reader) = self.images()?.pagemap(target)?.context("no pagemap")?;
        let head: PagemapHead = reader.read()?.context("no head")?;
        Ok(self.images()?.pages_path(head.pages_id))
    }

    fn shared(&self) -> Result<Target> {
        let targets = self.images()?.targets()?;
        let shared = |target: &Target| matches!(target, Target::Shmem(_));
        targets.into_iter().find(shared).context("no shared memory")
    }

    fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.dir.join(name)).with_context(|| name.to_owned())
    }

    fn remove_pages(&self) -> Result<()> {
        Ok(fs::remove_file(self.pages(Target::Process(self.pid))?)?)
    }

    fn remove_shared_pages(&self) -> Result<()> {
        Ok(fs::remove_file(self.pages(self.shared()?)?)?)
    }

    fn cut_pages(&self, bytes: u64) -> Result<()> {
        cut(&self.pages(Target::Process(self.pid))?, bytes)
    }

    fn cut(&self, name: &str, bytes: u64) -> Result<()> {
        cut(&self.dir.join(name), bytes)
    }

    fn lengthen_pages(&self) -> Result<()> {
        let path = self.pages(Target::Process(self.pid))?;
        let file = File::options().write(true).open(path)?;
        Ok(file.set_len(file.metadata()?.len() + 4096)?)
    }

    /// Changes the byte at `at`.
    fn poke(&self, name: &str, at: usize) -> Result<()> {
        let path = self.dir.join(name);
        let mut bytes = fs::read(&path)?;
        bytes[at] ^= 1;
        Ok(fs::write(path, bytes)?)
    }

    fn link(&self, to: Option<&str>) -> Result<()> {
        let link = self.dir.join(PARENT_LINK);
        fs::remove_file(&link)?;
        match to {
            Some(to) => Ok(symlink(to, link)?),
            None => Ok(()),
        }
    }

    /// As a lazy dump leaves it.
    fn leave_at_source(&self) -> Result<()> {
        let whole = self.dir.canonicalize()?.with_extension("whole");
        fs::rename(self.dir.canonicalize()?, &whole)?;
        let parent = fs::read_link(whole.join(PARENT_LINK)).ok();
        let dir = whole.with_extension("");
        copy_without_lazy_pages(&whole, &dir)?;
        if let Some(parent) = parent {
            symlink(parent, dir.join(PARENT_LINK))?;
        }
        Ok(fs::remove_dir_all(whole)?)
    }

    fn add_pagemap(&self) -> Result<()> {
        let copy = self.dir.join("pagemap-77777.img");
        fs::copy(self.dir.join(self.pagemap()), copy)?;
        Ok(())
    }

    /// Changes the entries of the process's pagemap.
    pub(crate) fn entries(&self, change: impl FnOnce(&mut Vec<PagemapEntry>)) -> Result<()> {
        let path = self.dir.join(self.pagemap());
        let mut reader = MessageReader::new(BufReader::new(File::open(&path)?), Magic::Pagemap)?;
        let head: PagemapHead = reader.read()?.context("no head")?;
        let mut entries = Vec::new();
        while let Some(entry) = reader.read()? {
            entries.push(entry);
        }
        change(&mut entries);
        let mut writer = MessageWriter::new(BufWriter::new(File::create(&path)?), Magic::Pagemap)?;
        writer.write(&head)?;
        for entry in &entries {
            writer.write(entry)?;
        }
        Ok(writer.into_inner().flush()?)
    }
}

fn cut(path: &Path, bytes: u64) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let len = file.metadata()?.len();
    ensure!(len > 0, "{} is empty", path.display());
    Ok(file.set_len(len.saturating_sub(bytes))?)
}

/// An entry that is restored for sure: the largest one.
fn largest(entries: &mut [PagemapEntry]) -> &mut PagemapEntry {
    let largest = entries.iter_mut().max_by_key(|entry| entry.pages());
    largest.expect("a process has pages")
}

fn flag(entries: &mut [PagemapEntry], flags: PageFlags) {
    largest(entries).flags = Some(flags.bits());
}

/// To where nothing is mapped, behind the others.
fn move_last(entries: &mut [PagemapEntry]) {
    entries.last_mut().expect("a process has pages").vaddr = 0x7fff_ffff_0000;
}

/// Two neighbouring entries of different sizes have each other's addresses.
fn swap_addresses(entries: &mut [PagemapEntry]) {
    let other = entries[1].vaddr;
    entries[1].vaddr = entries[0].vaddr;
    entries[0].vaddr = other;
}

fn insert_empty(entries: &mut Vec<PagemapEntry>) {
    let mut empty = entries[1].clone();
    empty.compat_nr_pages = 0;
    empty.nr_pages = empty.nr_pages.map(|_| 0);
    entries.insert(1, empty);
}

/// Without its pages in the file: what follows stays where it is.
fn lose_first(entries: &mut [PagemapEntry]) {
    // Its pages are at addresses that nobody asks for.
    let entry = largest(entries);
    entry.vaddr -= 4096;
}
