//! The pages of one process: where each stands, and what it must contain.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use testbed::load::content::PageId;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Advice, Part};
use testbed::sys::{self, Backing, WORD_BYTES};

/// What a page must contain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expect {
    /// This generation of its content.
    Generation(u32),
    /// Zeros.
    Zero,
    /// Zeros, or this generation: after `MADV_FREE`.
    ZeroOr(u32),
    /// It is not mapped.
    Gone,
}

/// One page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) address: usize,
    pub(crate) expect: Expect,
}

/// The pages of one area, in the order of their indices, wherever they stand by now.
pub(crate) struct Area {
    pub(crate) spec: AreaSpec,
    pub(crate) cells: Vec<Cell>,
}

/// All memory under test of this process.
pub(crate) struct Memory {
    pub(crate) seed: u64,
    pub(crate) areas: Vec<Area>,
    pub(crate) page_bytes: usize,
    next_free: usize,
    scratch: Vec<u64>,
}

/// Unmapped pages between areas, so that mappings do not merge.
const GAP_PAGES: usize = 16;

/// Default size of a huge page on x86_64 and aarch64, bytes.
const HUGE_PAGE_BYTES: usize = 2 << 20;

impl Memory {
    /// Maps and fills all areas.
    pub(crate) fn new(spec: &LoadSpec, page_bytes: usize) -> Result<Memory> {
        let mut memory = Memory {
            seed: spec.seed,
            areas: Vec::new(),
            page_bytes,
            next_free: sys::WINDOW.start,
            scratch: vec![0; page_bytes / WORD_BYTES],
        };
        for (area, area_spec) in (0u32..).zip(&spec.areas) {
            memory
                .add_area(area, area_spec, spec)
                .with_context(|| format!("area {area}"))?;
        }
        Ok(memory)
    }

    fn add_area(&mut self, area: u32, spec: &AreaSpec, load: &LoadSpec) -> Result<()> {
        let stride = spec.scattered_over as usize * self.page_bytes;
        let length = spec.pages as usize * stride;
        let start = self.reserve_aligned(length, spec.mapping);
        match spec.mapping {
            Mapping::Private if spec.apart => {
                for index in 0..spec.pages as usize {
                    sys::map(start + index * stride, self.page_bytes, Backing::Private)?;
                }
            }
            Mapping::Private | Mapping::ReadOnly => sys::map(start, length, Backing::Private)?,
            Mapping::SharedAnon => sys::map(start, length, Backing::SharedAnon)?,
            Mapping::Memfd => {
                let memfd = memfd_create("testload", MFdFlags::MFD_CLOEXEC)?;
                ftruncate(&memfd, i64::try_from(length)?)?;
                sys::map(start, length, Backing::SharedFile(memfd.as_fd()))?;
            }
            Mapping::SysV => drop(sys::map_sysv(start, length)?),
            Mapping::Locked => {
                sys::map(start, length, Backing::Private)?;
                sys::lock(start, length)?;
            }
            Mapping::Advised => {
                sys::map(start, length, Backing::Private)?;
                sys::advise_huge(start, length)?;
            }
            Mapping::HugePrivate => sys::map(start, length, Backing::PrivateHuge)?,
            Mapping::HugeMemfd => {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB;
                let memfd = memfd_create("testload", flags)?;
                ftruncate(&memfd, i64::try_from(length)?)?;
                sys::map(start, length, Backing::PrivateFile(memfd.as_fd()))?;
            }
            Mapping::PrivateFile => {
                let path = load.dir.join(format!("area-{area}.bin"));
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(path)?;
                self.fill_file(&file, area, spec)?;
                sys::map(start, length, Backing::PrivateFile(file.as_fd()))?;
            }
        }
        let cells = (0..spec.pages)
            .map(|index| Cell {
                address: start + index as usize * stride,
                expect: Expect::Zero,
            })
            .collect();
        self.areas.push(Area {
            spec: spec.clone(),
            cells,
        });
        for index in 0..spec.pages {
            let generation = u32::from(spec.mapping == Mapping::PrivateFile);
            if spec.fills(index) {
                self.write(area, index, generation);
            } else if spec.mapping == Mapping::PrivateFile {
                self.cell_mut(area, index).expect = Expect::Generation(0);
            }
        }
        if spec.mapping == Mapping::ReadOnly {
            sys::protect(start, length, false)?;
        }
        Ok(())
    }

    fn fill_file(&mut self, file: &File, area: u32, spec: &AreaSpec) -> Result<()> {
        for index in 0..spec.pages {
            self.id(area, index, 0)
                .fill(spec.content, &mut self.scratch);
            let bytes: Vec<u8> = self
                .scratch
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect();
            file.write_all_at(&bytes, u64::from(index) * self.page_bytes as u64)?;
        }
        Ok(())
    }

    /// Takes `length` bytes of the window that nothing used before.
    fn reserve(&mut self, length: usize) -> usize {
        let start = self.next_free;
        self.next_free += length + GAP_PAGES * self.page_bytes;
        start
    }

    /// The same at an address that the mapping can have.
    fn reserve_aligned(&mut self, length: usize, mapping: Mapping) -> usize {
        if mapping.is_huge() || mapping == Mapping::Advised {
            self.next_free = self.next_free.next_multiple_of(HUGE_PAGE_BYTES);
        }
        self.reserve(length)
    }

    fn id(&self, area: u32, index: u32, generation: u32) -> PageId {
        PageId {
            seed: self.seed,
            area,
            index,
            generation,
        }
    }

    fn cell_mut(&mut self, area: u32, index: u32) -> &mut Cell {
        &mut self.areas[area as usize].cells[index as usize]
    }

    /// Gives a page the content of `generation`.
    pub(crate) fn write(&mut self, area: u32, index: u32, generation: u32) {
        let id = self.id(area, index, generation);
        let mut words = std::mem::take(&mut self.scratch);
        id.fill(self.areas[area as usize].spec.content, &mut words);
        let cell = self.cell_mut(area, index);
        cell.expect = Expect::Generation(generation);
        sys::write_words(cell.address, &words);
        self.scratch = words;
    }

    /// Gives a private, mapped page its next generation; says whether the page was such a one.
    pub(crate) fn rewrite(&mut self, area: u32, index: u32) -> bool {
        let writable = matches!(
            self.areas[area as usize].spec.mapping,
            Mapping::Private
                | Mapping::PrivateFile
                | Mapping::Locked
                | Mapping::Advised
                | Mapping::HugePrivate
                | Mapping::HugeMemfd
        );
        let next = match self.cell_mut(area, index).expect {
            Expect::Gone => return false,
            Expect::Zero => 1,
            Expect::Generation(generation) | Expect::ZeroOr(generation) => generation + 1,
        };
        if writable {
            self.write(area, index, next);
        }
        writable
    }

    /// Gives this process's own copies of inherited pages their own content.
    pub(crate) fn rewrite_after_fork(&mut self, process: u32) {
        for area in 0..self.areas.len() {
            for index in 0..self.areas[area].cells.len() {
                let (area, index) = (to_u32(area), to_u32(index));
                let mapping = self.areas[area as usize].spec.mapping;
                if let Some(generation) = LoadSpec::forked_generation(process, mapping, index) {
                    self.write(area, index, generation);
                }
            }
        }
    }

    /// Fills `words` with what a page must contain, or with its alternative after `MADV_FREE`.
    pub(crate) fn expected(&self, area: u32, index: u32, expect: Expect, words: &mut [u64]) {
        match expect {
            Expect::Generation(generation) | Expect::ZeroOr(generation) => {
                let content = self.areas[area as usize].spec.content;
                self.id(area, index, generation).fill(content, words);
            }
            Expect::Zero | Expect::Gone => words.fill(0),
        }
    }

    /// Address and length of a part that stands in one piece.
    fn piece(&mut self, part: Part) -> (usize, usize) {
        (
            self.cell_mut(part.area, part.first).address,
            part.pages as usize * self.page_bytes,
        )
    }

    fn each_cell(&mut self, part: Part, mut change: impl FnMut(usize, &mut Cell)) {
        let first = part.first as usize;
        let cells = &mut self.areas[part.area as usize].cells[first..first + part.pages as usize];
        for (n, cell) in cells.iter_mut().enumerate() {
            change(n, cell);
        }
    }

    /// Moves a part to fresh addresses.
    pub(crate) fn move_part(&mut self, part: Part) -> Result<()> {
        let (from, length) = self.piece(part);
        let to = self.reserve(length);
        sys::move_to(from, length, length, to).context("mremap")?;
        let page_bytes = self.page_bytes;
        self.each_cell(part, |n, cell| cell.address = to + n * page_bytes);
        Ok(())
    }

    /// Makes an area longer, at a new place.
    pub(crate) fn grow(&mut self, area: u32, pages: u32) -> Result<()> {
        let old = to_u32(self.areas[area as usize].cells.len());
        let whole = Part::new(area, 0, old);
        let (from, length) = self.piece(whole);
        let longer = length + pages as usize * self.page_bytes;
        let to = self.reserve(longer);
        sys::move_to(from, length, longer, to).context("mremap to grow")?;
        let page_bytes = self.page_bytes;
        self.each_cell(whole, |n, cell| cell.address = to + n * page_bytes);
        let new = (0..pages as usize).map(|n| Cell {
            address: to + length + n * page_bytes,
            expect: Expect::Zero,
        });
        self.areas[area as usize].cells.extend(new);
        Ok(())
    }

    /// Unmaps a part; with `map_again` puts new memory there and writes every second page of it.
    pub(crate) fn unmap(&mut self, part: Part, map_again: bool) -> Result<()> {
        let (start, length) = self.piece(part);
        sys::unmap(start, length).context("munmap")?;
        if !map_again {
            self.each_cell(part, |_, cell| {
                *cell = Cell {
                    address: 0,
                    expect: Expect::Gone,
                }
            });
            return Ok(());
        }
        sys::map(start, length, Backing::Private).context("mmap over unmapped pages")?;
        self.each_cell(part, |_, cell| cell.expect = Expect::Zero);
        for index in (part.first..part.first + part.pages).step_by(2) {
            self.write(part.area, index, 500);
        }
        Ok(())
    }

    /// Gives the content of a part back.
    pub(crate) fn drop_content(&mut self, part: Part, advice: Advice) -> Result<()> {
        let (start, length) = self.piece(part);
        sys::give_back(start, length, advice == Advice::Free).context("madvise")?;
        self.each_cell(part, |_, cell| {
            cell.expect = match (advice, cell.expect) {
                (Advice::Free, Expect::Generation(old) | Expect::ZeroOr(old)) => {
                    Expect::ZeroOr(old)
                }
                _ => Expect::Zero,
            }
        });
        Ok(())
    }

    /// Makes a part read-only, or writable again.
    pub(crate) fn protect(&mut self, part: Part, writable: bool) -> Result<()> {
        let (start, length) = self.piece(part);
        sys::protect(start, length, writable).context("mprotect")
    }

    /// Locks everything of the process but the areas that are not to be.
    pub(crate) fn pin_everything_else(&self) -> Result<()> {
        sys::lock_everything_on_fault().context("mlockall")?;
        for area in &self.areas {
            if area.spec.mapping == Mapping::Locked {
                continue;
            }
            if area.spec.apart {
                for cell in &area.cells {
                    sys::unlock(cell.address, self.page_bytes).context("munlock")?;
                }
            } else if let Some(first) = area.cells.first() {
                let stride = area.spec.scattered_over as usize * self.page_bytes;
                let length = area.cells.len() * stride;
                sys::unlock(first.address, length).context("munlock")?;
            }
        }
        Ok(())
    }
}

/// Counts of pages and areas come from `u32`s of the description.
pub(crate) fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("areas are described by 32-bit numbers")
}
