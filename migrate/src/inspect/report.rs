//! What is found, in the shape in which it is printed as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use pageferry::criu::header::{Target, Wire};
use pageferry::error::{Error, Result};
use pageferry::image::chain::{Absence, Chain, Missing, Place};
use pageferry::image::dir::ImageDir;
use pageferry::image::file::Magic;
use pageferry::image::proto::Core;
use schemars::JsonSchema;
use serde::Serialize;

use super::contents::Contents;
use crate::scan::{Pagemap, scan};

/// Names the fields' meaning: another one when a field changes or goes.
const SCHEMA: &str = "pageferry-inspect-1";

/// Size of the unit of `st_blocks`, bytes (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// What images contain.
#[derive(Serialize, Debug, JsonSchema)]
pub(super) struct Report {
    /// Name of this format. It changes if a field gets another meaning or is removed.
    #[schemars(extend("const" = SCHEMA))]
    schema: &'static str,
    /// Size of a page, bytes.
    pub(super) page_bytes: u64,
    /// The directory first, then its parents, nearest first.
    pub(super) directories: Vec<Directory>,
    /// Each memory of the directory itself, with its pages found in it or in its parents.
    pub(super) memory: Vec<Memory>,
    /// Sums over `memory`, and over all pages files.
    pub(super) totals: Totals,
}

/// One directory.
#[derive(Serialize, Debug, JsonSchema)]
pub(super) struct Directory {
    /// Absolute path.
    pub(super) path: String,
    /// Whether `inventory.img` is there, which a dump writes last.
    pub(super) complete: bool,
    /// How many processes are in `pstree.img`; null without one that can be read.
    pub(super) processes: Option<usize>,
    /// Its pagemap files.
    pub(super) pagemaps: Vec<PagemapReport>,
    /// Its pages files.
    pub(super) pages_files: Vec<PagesFile>,
    /// Length of all other files, bytes.
    pub(super) other_bytes: u64,
}

/// One pagemap file, as it stands in this directory.
#[derive(Serialize, Debug, JsonSchema)]
pub(super) struct PagemapReport {
    /// Its name.
    pub(super) file: String,
    /// `process` or `shared`.
    pub(super) kind: &'static str,
    /// Pid in the images, or number of the shared memory.
    pub(super) id: u64,
    /// Its pages file is `pages-ID.img`; null if the pagemap cannot be read.
    pub(super) pages_id: Option<u32>,
    /// `v1`: page counts as CRIU up to 4.1.1 writes them, `v2`: as later ones do; null without an entry.
    pub(super) layout: Option<&'static str>,
    /// How many entries, each of which is a run of pages.
    pub(super) entries: u64,
    /// Pages in all entries.
    pub(super) pages: u64,
    /// Pages that are in the pages file.
    pub(super) here_pages: u64,
    /// Of these, pages in entries that have compressed blocks.
    pub(super) compressed_pages: u64,
    /// Pages that are holes to the parent.
    pub(super) in_parent_pages: u64,
    /// Pages that stayed with the source of a lazy dump.
    pub(super) with_source_pages: u64,
    /// Pages with the flag LAZY, wherever they are.
    pub(super) lazy_pages: u64,
    /// End of its last page in the pages file, bytes.
    pub(super) stored_bytes: u64,
    /// Why it cannot be read to its end; null if it can be.
    pub(super) damage: Option<String>,
}

/// One pages file.
#[derive(Serialize, Debug, JsonSchema)]
pub(super) struct PagesFile {
    /// Its name.
    pub(super) file: String,
    /// Its length, bytes.
    pub(super) bytes: u64,
    /// Space that it takes on its file system, bytes: less than `bytes` if it has holes, as after `--auto-dedup`.
    pub(super) room_bytes: u64,
    /// End of the last page that a pagemap names, bytes.
    pub(super) named_bytes: u64,
    /// The pagemaps that name it. If there are several, they share it.
    pub(super) used_by: Vec<String>,
}

/// One process's memory or one piece of shared memory, looked up through the parents.
#[derive(Serialize, Debug, JsonSchema)]
pub(super) struct Memory {
    /// `process` or `shared`.
    pub(super) kind: &'static str,
    /// Pid in the images, or number of the shared memory.
    pub(super) id: u64,
    /// Name of the process; null for shared memory.
    pub(super) name: Option<String>,
    /// Its pages.
    pub(super) pages: u64,
    /// Pages in each directory, in the order of `directories`.
    pub(super) pages_by_directory: Vec<u64>,
    /// Pages that stayed with the source of a lazy dump.
    pub(super) with_source_pages: u64,
    /// Pages that should be in an image and are in none.
    pub(super) lost_pages: u64,
    /// Bytes of its pages in pages files; of compressed pages their compressed size.
    pub(super) stored_bytes: u64,
    /// Pages of zeros; null with `--no-read`.
    pub(super) zero_pages: Option<u64>,
    /// Other pages with the same contents as an earlier page, of this or an earlier memory; null with `--no-read`.
    pub(super) duplicate_pages: Option<u64>,
    /// Why its pages cannot be found or read; null if they can be.
    pub(super) damage: Option<String>,
}

/// Sums.
#[derive(Serialize, Debug, Default, JsonSchema)]
pub(super) struct Totals {
    /// Pages of all memory.
    pub(super) pages: u64,
    /// Length of all pages files, bytes.
    pub(super) stored_bytes: u64,
    /// Space that they take on their file systems, bytes.
    pub(super) room_bytes: u64,
    /// Pages of zeros; null with `--no-read`.
    pub(super) zero_pages: Option<u64>,
    /// Pages with the same contents as an earlier page; null with `--no-read`.
    pub(super) duplicate_pages: Option<u64>,
    /// Pages that should be in an image and are in none.
    pub(super) lost_pages: u64,
    /// Pages that stayed with the source of a lazy dump.
    pub(super) with_source_pages: u64,
}

impl Report {
    /// What stands in `dir` and its parents.
    pub(super) fn of(dir: &ImageDir) -> Result<Report> {
        let directories: Result<Vec<Directory>> =
            dir.chain_dirs()?.iter().map(Directory::of).collect();
        Ok(Report {
            schema: SCHEMA,
            page_bytes: dir.page().bytes(),
            directories: directories?,
            memory: Vec::new(),
            totals: Totals::default(),
        })
    }

    /// Looks each page up; with `read` its content too.
    pub(super) fn resolve(&mut self, dir: &ImageDir, read: bool) -> Result<()> {
        let mut contents = match read {
            true => Some(Contents::new(self.directories[0].pages(), dir.page())?),
            false => None,
        };
        for target in dir.targets()? {
            let memory = Memory::of(dir, target, self.directories.len(), contents.as_mut());
            self.memory.push(memory);
        }
        let sum = |of: fn(&Memory) -> u64| self.memory.iter().map(of).sum();
        let sum_read = |of: fn(&Memory) -> Option<u64>| self.memory.iter().map(of).sum();
        let files = self.directories.iter().flat_map(|dir| &dir.pages_files);
        self.totals = Totals {
            pages: sum(|memory| memory.pages),
            stored_bytes: files.clone().map(|file| file.bytes).sum(),
            room_bytes: files.map(|file| file.room_bytes).sum(),
            zero_pages: sum_read(|memory| memory.zero_pages),
            duplicate_pages: sum_read(|memory| memory.duplicate_pages),
            lost_pages: sum(|memory| memory.lost_pages),
            with_source_pages: sum(|memory| memory.with_source_pages),
        };
        Ok(())
    }
}

impl Directory {
    fn of(dir: &ImageDir) -> Result<Directory> {
        let mut pagemaps = Vec::new();
        for target in dir.targets()? {
            pagemaps.extend(scan(dir, target, &mut |_, _| {}));
        }
        let (pages_files, other_bytes) = files(dir, &pagemaps)?;
        Ok(Directory {
            path: dir.path().display().to_string(),
            complete: dir.path().join("inventory.img").exists(),
            processes: dir.processes().ok().map(|pids| pids.len()),
            pagemaps: pagemaps.iter().map(PagemapReport::of).collect(),
            pages_files,
            other_bytes,
        })
    }

    fn pages(&self) -> u64 {
        self.pagemaps.iter().map(|pagemap| pagemap.pages).sum()
    }
}

/// The pages files of `dir`, and the bytes of its other files.
fn files(dir: &ImageDir, pagemaps: &[Pagemap]) -> Result<(Vec<PagesFile>, u64)> {
    let failed = |error| Error::file("list", dir.path(), error);
    let mut users: BTreeMap<String, (Vec<String>, u64)> = BTreeMap::new();
    for pagemap in pagemaps {
        if let Some(id) = pagemap.pages_id {
            let (names, bytes) = users.entry(format!("pages-{id}.img")).or_default();
            names.push(pagemap.target.pagemap_name());
            *bytes = pagemap.stored_bytes.max(*bytes);
        }
    }
    let (mut pages_files, mut other_bytes) = (Vec::new(), 0);
    for entry in fs::read_dir(dir.path()).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Not what a link leads to: the parent is a directory of its own.
        let meta = entry.metadata().map_err(failed)?;
        if !meta.is_file() {
            continue;
        }
        if !(name.starts_with("pages-") && name.ends_with(".img")) {
            other_bytes += meta.len();
            continue;
        }
        let (used_by, named_bytes) = users.remove(&name).unwrap_or_default();
        pages_files.push(PagesFile {
            file: name,
            bytes: meta.len(),
            room_bytes: meta.blocks() * STAT_BLOCK_BYTES,
            named_bytes,
            used_by,
        });
    }
    pages_files.sort_by(|one, other| one.file.cmp(&other.file));
    Ok((pages_files, other_bytes))
}

impl PagemapReport {
    fn of(pagemap: &Pagemap) -> PagemapReport {
        let (kind, id) = kind_and_id(pagemap.target);
        let pages = pagemap.pages;
        PagemapReport {
            file: pagemap.target.pagemap_name(),
            kind,
            id,
            pages_id: pagemap.pages_id,
            layout: pagemap.layout.map(|layout| match layout {
                Wire::V1 => "v1",
                Wire::V2 => "v2",
            }),
            entries: pagemap.entries,
            pages: pages.total,
            here_pages: pages.here,
            compressed_pages: pages.compressed,
            in_parent_pages: pages.in_parent,
            with_source_pages: pages.with_source,
            lazy_pages: pages.lazy,
            stored_bytes: pagemap.stored_bytes,
            damage: pagemap.damage.as_ref().map(ToString::to_string),
        }
    }
}

impl Memory {
    fn of(
        dir: &ImageDir,
        target: Target,
        directories: usize,
        contents: Option<&mut Contents>,
    ) -> Memory {
        let (kind, id) = kind_and_id(target);
        let mut memory = Memory {
            kind,
            id,
            name: name_of(dir, target),
            pages: 0,
            pages_by_directory: vec![0; directories],
            with_source_pages: 0,
            lost_pages: 0,
            stored_bytes: 0,
            zero_pages: None,
            duplicate_pages: None,
            damage: None,
        };
        if let Err(error) = memory.fill(dir, target, contents) {
            memory.damage = Some(error.to_string());
        }
        memory
    }

    fn fill(
        &mut self,
        dir: &ImageDir,
        target: Target,
        contents: Option<&mut Contents>,
    ) -> Result<()> {
        let chain = Chain::open(dir, target, Missing::Leave)?;
        let chain_dirs = dir.chain_dirs()?;
        for extent in chain.extents() {
            let pages = extent.range.pages(dir.page()).get();
            self.pages += pages;
            match extent.place {
                Place::Absent {
                    why: Absence::WithSource,
                    ..
                } => self.with_source_pages += pages,
                Place::Absent { .. } => self.lost_pages += pages,
                Place::Raw { .. } | Place::Blocks { .. } => {}
            }
            let Some((file, _, bytes)) = chain.span(extent) else {
                continue;
            };
            self.stored_bytes += bytes;
            let holder = chain.file(file).path().parent();
            let depth = chain_dirs.iter().position(|dir| Some(dir.path()) == holder);
            if let Some(depth) = depth {
                self.pages_by_directory[depth] += pages;
            }
        }
        if let Some(contents) = contents {
            let found = contents.count(&chain)?;
            self.zero_pages = Some(found.zero_pages);
            self.duplicate_pages = Some(found.duplicate_pages);
        }
        Ok(())
    }
}

fn kind_and_id(target: Target) -> (&'static str, u64) {
    match target {
        Target::Process(pid) => ("process", u64::from(pid)),
        Target::Shmem(id) => ("shared", id),
    }
}

/// What the process was called.
fn name_of(dir: &ImageDir, target: Target) -> Option<String> {
    let Target::Process(pid) = target else {
        return None;
    };
    let path = dir.path().join(format!("core-{pid}.img"));
    let cores: Vec<Core> = dir.messages(&path, Magic::Core).ok()??;
    let comm = cores.into_iter().find_map(|core| core.task)?.comm?;
    Some(String::from_utf8_lossy(&comm).into_owned())
}
