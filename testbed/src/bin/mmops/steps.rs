//! One random change of memory.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};
use testbed::sys::{self, Backing};

use crate::model::{
    ARENA, ARENA_PAGES, Kind, MOST_PAGES, Model, PAGE, PATCHED_WORD, Page, TABLE_WORDS, Value,
    content,
};

/// Pages of a new mapping, and of what one step is about, at most.
const MOST_AT_ONCE: usize = 48;

/// Pages of a huge one.
const HUGE: usize = 512;

const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Model {
    /// Does one thing.
    pub(crate) fn step(&mut self) -> Result<()> {
        match self.random.below(100) {
            0..9 => self.map(),
            9 => self.map_huge(),
            10..15 => self.unmap(),
            15..20 => self.move_away(),
            20..24 => self.resize(),
            24..29 => self.empty(libc::MADV_DONTNEED, |page| !page.locked),
            29 => self.empty(libc::MADV_DONTNEED_LOCKED, |_| true),
            30..34 => self.free(),
            34..38 => self.guard(),
            38..41 => self.unguard(),
            41..44 => self.inheritance(),
            44..47 => self.wiping(),
            47..53 => self.protect(),
            53..56 => self.lock(),
            56 | 57 => self.unlock(),
            58..64 => self.harmless(),
            64 => self.punch(),
            65..85 => self.write(),
            _ => self.look(),
        }
    }

    pub(crate) fn is_free(&self, at: usize, pages: usize) -> bool {
        let end = at + pages * PAGE;
        end <= ARENA + ARENA_PAGES * PAGE && self.pages.range(at..end).next().is_none()
    }

    fn kind(&mut self) -> Kind {
        let kind = match self.random.below(12) {
            0 | 1 if self.is_first => Kind::SharedAnonymous,
            2 if self.is_first => Kind::Memfd,
            3 if self.is_first => Kind::FileShared,
            4 if !self.leaves_out("memfd-private") => Kind::MemfdPrivate,
            5 => Kind::FilePrivate,
            _ => Kind::Anonymous,
        };
        let is_full = self.table_used + MOST_AT_ONCE > TABLE_WORDS;
        if kind.is_shared() && is_full {
            return Kind::Anonymous;
        }
        kind
    }

    fn map(&mut self) -> Result<()> {
        let pages = 1 + self.random.below(MOST_AT_ONCE);
        if self.pages.len() + pages > MOST_PAGES {
            return self.unmap();
        }
        let (kind, base) = (self.kind(), self.random.content());
        let Some(at) = self.gap(pages, 1) else {
            return Ok(());
        };
        self.note(at, pages, &format!("maps {kind:?}"));
        self.back(kind, at, pages, base)?;
        for n in 0..pages {
            let backing = match kind {
                Kind::Anonymous => 0,
                _ if kind.is_shared() => (self.table_used + n) as u64,
                _ => base.wrapping_add(2 * n as u64),
            };
            let page = Page {
                kind,
                backing,
                value: Value::Backing,
                prot: WRITABLE,
                locked: false,
                wiped: false,
                not_inherited: false,
                guarded: false,
            };
            let page = Page {
                value: page.emptied(),
                ..page
            };
            self.pages.insert(at + n * PAGE, page);
        }
        if kind.is_shared() {
            self.table_used += pages;
        }
        Ok(())
    }

    fn back(&mut self, kind: Kind, at: usize, pages: usize, base: u64) -> Result<()> {
        let length = pages * PAGE;
        let bytes = || -> Vec<u8> {
            let numbers = (0..pages as u64).map(|n| base.wrapping_add(2 * n));
            let words = numbers.flat_map(|number| content((number, 0)));
            words.flat_map(u64::to_ne_bytes).collect()
        };
        self.files += 1;
        let name = format!("file-{}-{}", self.name.replace('/', "_"), self.files);
        let open = || {
            let path = self.dir.join(&name);
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            options.open(path)
        };
        let filled = |mut file: File| -> Result<File> {
            file.write_all(&bytes())?;
            Ok(file)
        };
        let memfd = || Ok::<_, Errno>(File::from(memfd_create(c"mmops", MFdFlags::empty())?));
        match kind {
            Kind::Anonymous => sys::map(at, length, Backing::Private)?,
            Kind::SharedAnonymous => sys::map(at, length, Backing::SharedAnon)?,
            Kind::Memfd => {
                let file = memfd()?;
                file.set_len(length as u64)?;
                sys::map(at, length, Backing::SharedFile(file.as_fd()))?;
            }
            Kind::FileShared => {
                let file = open()?;
                file.set_len(length as u64)?;
                sys::map(at, length, Backing::SharedFile(file.as_fd()))?;
            }
            Kind::MemfdPrivate => {
                sys::map(at, length, Backing::PrivateFile(filled(memfd()?)?.as_fd()))?;
            }
            Kind::FilePrivate => {
                sys::map(at, length, Backing::PrivateFile(filled(open()?)?.as_fd()))?;
            }
        }
        Ok(())
    }

    /// Room for a transparent huge page, of which a little is written.
    fn map_huge(&mut self) -> Result<()> {
        if self.leaves_out("huge") || self.pages.len() + HUGE > MOST_PAGES {
            return Ok(());
        }
        let Some(at) = self.gap(HUGE, HUGE) else {
            return Ok(());
        };
        self.note(at, HUGE, "maps a huge page");
        self.back(Kind::Anonymous, at, HUGE, 1)?;
        mappings::advise(at, HUGE * PAGE, libc::MADV_HUGEPAGE)?;
        for n in 0..HUGE {
            let page = Page {
                kind: Kind::Anonymous,
                backing: 0,
                value: Value::Zero,
                prot: WRITABLE,
                locked: false,
                wiped: false,
                not_inherited: false,
                guarded: false,
            };
            self.pages.insert(at + n * PAGE, page);
        }
        for _ in 0..20 {
            let address = at + self.random.below(HUGE) * PAGE;
            self.write_page(address)?;
        }
        Ok(())
    }

    fn unmap(&mut self) -> Result<()> {
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, |_| true) else {
            return Ok(());
        };
        self.note(at, pages, "unmaps");
        sys::unmap(at, pages * PAGE)?;
        for n in 0..pages {
            self.pages.remove(&(at + n * PAGE));
        }
        Ok(())
    }

    /// Advice that succeeds wherever `fits` holds.
    fn advise(
        &mut self,
        advice: i32,
        fits: impl Fn(&Page) -> bool,
    ) -> Result<Option<(usize, usize)>> {
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, fits) else {
            return Ok(None);
        };
        let what = format!("advice {advice}");
        self.note(at, pages, &what);
        mappings::advise(at, pages * PAGE, advice).with_context(|| {
            format!("{}: {at:#x}+{pages}: {what}{}", self.name, self.history(at))
        })?;
        Ok(Some((at, pages)))
    }

    fn empty(&mut self, advice: i32, fits: impl Fn(&Page) -> bool) -> Result<()> {
        if let Some((at, pages)) = self.advise(advice, fits)? {
            for (_, page) in self.range(at, pages) {
                page.value = page.emptied();
            }
        }
        Ok(())
    }

    fn free(&mut self) -> Result<()> {
        let fits = |page: &Page| page.kind == Kind::Anonymous && !page.locked;
        if let Some((at, pages)) = self.advise(libc::MADV_FREE, fits)? {
            for (_, page) in self.range(at, pages) {
                if let Value::Written(number, patch) = page.value {
                    page.value = Value::Freed(number, patch);
                }
            }
        }
        Ok(())
    }

    fn guard(&mut self) -> Result<()> {
        if self.leaves_out("guard") {
            return Ok(());
        }
        let fits = |page: &Page| page.kind == Kind::Anonymous && !page.locked;
        let may_lack = self.may_lack_pages;
        if let Some((at, pages)) = self.advise(MADV_GUARD_INSTALL, fits)? {
            for (_, page) in self.range(at, pages) {
                page.value = match page.value {
                    // No event tells of a guard: what is missing under one that is soon gone comes all the same.
                    Value::Written(number, patch) | Value::Freed(number, patch) if may_lack => {
                        Value::Freed(number, patch)
                    }
                    _ => page.emptied(),
                };
                page.guarded = true;
            }
        }
        Ok(())
    }

    fn unguard(&mut self) -> Result<()> {
        if self.leaves_out("guard") {
            return Ok(());
        }
        let fits = |page: &Page| page.kind == Kind::Anonymous && !page.locked;
        // Often where there is something to remove.
        let some = self.random.below(4) > 0;
        if let Some((at, pages)) = self.advise(MADV_GUARD_REMOVE, |page| {
            fits(page) && (page.guarded || !some)
        })? {
            for (_, page) in self.range(at, pages) {
                page.guarded = false;
            }
        }
        Ok(())
    }

    fn inheritance(&mut self) -> Result<()> {
        let (advice, not_inherited) = match self.random.below(2) {
            0 => (libc::MADV_DONTFORK, true),
            _ => (libc::MADV_DOFORK, false),
        };
        if let Some((at, pages)) =
            self.advise(advice, |page| page.not_inherited != not_inherited)?
        {
            for (_, page) in self.range(at, pages) {
                page.not_inherited = not_inherited;
            }
        }
        Ok(())
    }

    fn wiping(&mut self) -> Result<()> {
        if self.leaves_out("wipe") {
            return Ok(());
        }
        let (advice, wiped) = match self.random.below(2) {
            0 => (libc::MADV_WIPEONFORK, true),
            _ => (libc::MADV_KEEPONFORK, false),
        };
        let fits = |page: &Page| page.kind == Kind::Anonymous && page.wiped != wiped;
        if let Some((at, pages)) = self.advise(advice, fits)? {
            for (_, page) in self.range(at, pages) {
                page.wiped = wiped;
            }
        }
        Ok(())
    }

    fn protect(&mut self) -> Result<()> {
        let prot = match self.random.below(5) {
            0 => libc::PROT_NONE,
            1 => libc::PROT_READ,
            _ => WRITABLE,
        };
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, |page| page.prot != prot) else {
            return Ok(());
        };
        self.note(at, pages, &format!("protection {prot}"));
        mappings::protect(at, pages * PAGE, prot)?;
        for (_, page) in self.range(at, pages) {
            page.prot = prot;
        }
        Ok(())
    }

    fn lock(&mut self) -> Result<()> {
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, Page::is_readable) else {
            return Ok(());
        };
        let on_fault = self.random.below(2) == 0;
        self.note(at, pages, &format!("locks, on fault: {on_fault}"));
        mappings::lock(at, pages * PAGE, on_fault)
            .with_context(|| format!("{}: mlock{}", self.name, self.history(at)))?;
        for (_, page) in self.range(at, pages) {
            page.locked = true;
        }
        Ok(())
    }

    fn unlock(&mut self) -> Result<()> {
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, |page| page.locked) else {
            return Ok(());
        };
        self.note(at, pages, "unlocks");
        sys::unlock(at, pages * PAGE)?;
        for (_, page) in self.range(at, pages) {
            page.locked = false;
        }
        Ok(())
    }

    /// Advice that changes no content, whether the kernel follows it or not.
    fn harmless(&mut self) -> Result<()> {
        let advices = [
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_COLLAPSE,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_WILLNEED,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_MERGEABLE,
            libc::MADV_UNMERGEABLE,
            libc::MADV_DONTDUMP,
            libc::MADV_DODUMP,
        ];
        let advice = advices[self.random.below(advices.len())];
        let most = match advice {
            libc::MADV_HUGEPAGE | libc::MADV_COLLAPSE => HUGE,
            _ => MOST_AT_ONCE,
        };
        let Some((at, pages)) = self.pick(most, |_| true) else {
            return Ok(());
        };
        let said = mappings::advise(at, pages * PAGE, advice);
        self.note(at, pages, &format!("advice {advice}: {said:?}"));
        Ok(())
    }

    /// Punches a hole into shared memory.
    fn punch(&mut self) -> Result<()> {
        if !self.is_first || self.leaves_out("punch") {
            return Ok(());
        }
        let fits = |page: &Page| page.kind.is_shared() && !page.locked && page.is_writable();
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, fits) else {
            return Ok(());
        };
        self.note(at, pages, "punches holes");
        for address in (0..pages).map(|n| at + n * PAGE) {
            let word = self.pages[&address].backing;
            Model::change_shared(word, 0, || {
                Ok(mappings::advise(address, PAGE, libc::MADV_REMOVE)?)
            })?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let is_first = self.is_first;
        let fits = |page: &Page| page.is_writable() && (is_first || !page.kind.is_shared());
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, fits) else {
            return Ok(());
        };
        self.note(at, pages, "writes");
        let step = 1 + self.random.below(3);
        (0..pages)
            .step_by(step)
            .try_for_each(|n| self.write_page(at + n * PAGE))
    }

    fn write_page(&mut self, address: usize) -> Result<()> {
        let page = self.pages[&address];
        let number = self.random.content();
        let store = |random: usize| -> Result<()> {
            let words = content((number, 0));
            if random == 0 {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                return Ok(mappings::write(address, &bytes)?);
            }
            sys::write_words(address, &words);
            Ok(())
        };
        let way = self.random.below(4);
        if page.kind.is_shared() {
            return Model::change_shared(page.backing, number, || store(way));
        }
        let value = match page.value {
            // One word alone.
            Value::Written(base, _) if way == 3 => {
                patch(address, number);
                Value::Written(base, number)
            }
            Value::Zero if way == 3 => {
                patch(address, number);
                Value::Written(0, number)
            }
            Value::Backing if way == 3 => {
                patch(address, number);
                Value::Written(page.backing, number)
            }
            _ => {
                store(way)?;
                Value::Written(number, 0)
            }
        };
        if let Some(page) = self.pages.get_mut(&address) {
            page.value = value;
        }
        Ok(())
    }

    fn look(&mut self) -> Result<()> {
        let Some((at, pages)) = self.pick(MOST_AT_ONCE, |_| true) else {
            return Ok(());
        };
        (0..pages).try_for_each(|n| self.check(at + n * PAGE))
    }
}

fn patch(address: usize, word: u64) {
    sys::write_words(address + PATCHED_WORD * size_of::<u64>(), &[word]);
}
