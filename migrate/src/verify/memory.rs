//! Each pagemap, pages file and parent of the memory that a restore needs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::criu::header::{PageFlags, Target};
use pageferry::error::Error;
use pageferry::image::chain::{Absence, Chain, Missing, Place, Resolved};
use pageferry::image::dir::ImageDir;
use pageferry::image::mm::Mappings;
use pageferry::image::pagemap::Extent;
use pageferry::image::proto::PagemapEntry;
use pageferry::observe::progress::{Display, Snapshot};
use pageferry::units::{PageRange, PageSize};

use super::findings::Findings;
use super::processes::{Needed, shorten};
use super::{COMPRESSED, Checked, Criteria, LONG_COUNTS};
use crate::scan::{Pagemap, scan};

/// Pages read at once.
const READ_PAGES: u64 = 256;

/// Checks the memory that is `needed`; `chain_dirs` is the directory and its parents.
pub(super) fn check(
    chain_dirs: &[ImageDir],
    needed: &[Needed],
    criteria: Criteria,
    findings: &mut Findings,
    checked: &mut Checked,
) {
    let mut check = Check {
        chain_dirs,
        criteria,
        findings,
        checked,
        read_pages: Arc::default(),
    };
    let read_pages = Arc::clone(&check.read_pages);
    let page = chain_dirs[0].page();
    let _display = criteria.read.then(|| {
        Display::start(move || {
            let done_pages = read_pages.load(Ordering::Relaxed);
            Snapshot {
                done_pages,
                total_pages: 0,
                bytes: done_pages << page.shift(),
                note: "read".to_owned(),
            }
        })
    });
    for needed in needed {
        check.memory(needed);
    }
    check.lengths();
}

struct Check<'a> {
    chain_dirs: &'a [ImageDir],
    criteria: Criteria,
    findings: &'a mut Findings,
    checked: &'a mut Checked,
    read_pages: Arc<AtomicU64>,
}

impl Check<'_> {
    fn memory(&mut self, needed: &Needed) {
        let (target, top) = (needed.target, &self.chain_dirs[0]);
        self.checked.memories += 1;
        let mut sound = true;
        for (depth, dir) in self.chain_dirs.iter().enumerate() {
            let mappings = needed.mappings.as_ref().filter(|_| depth == 0);
            match self.pagemap(dir, target, mappings) {
                Some(readable) => sound &= readable,
                None if depth == 0 => return self.no_pagemap(target),
                // As for CRIU, a parent without this pagemap ends the chain.
                None => break,
            }
        }
        if !sound {
            return;
        }
        match Chain::open(top, target, Missing::Leave) {
            Ok(chain) => self.chain(&chain),
            Err(error) => {
                let path = top.path().join(target.pagemap_name());
                self.findings
                    .fault("pagemap-damaged", &path, shorten(&error, &path));
            }
        }
    }

    fn no_pagemap(&mut self, target: Target) {
        let path = self.chain_dirs[0].path().join(target.pagemap_name());
        let text = format!("{target} has memory, and its pagemap is not there");
        self.findings.fault("pagemap-missing", &path, text);
    }

    /// Whether the pagemap in `dir` can be read; `None` if there is none. With mappings it is the restored
    /// directory's own.
    fn pagemap(
        &mut self,
        dir: &ImageDir,
        target: Target,
        mappings: Option<&Mappings>,
    ) -> Option<bool> {
        let (criteria, page) = (self.criteria, dir.page());
        let path = dir.path().join(target.pagemap_name());
        let mut old = Unread::default();
        let findings = &mut *self.findings;
        let pagemap = scan(dir, target, &mut |entry, extent| {
            old.note(entry);
            check_count(findings, &path, criteria, entry);
            if let Some(mappings) = mappings {
                check_mapped(findings, &path, criteria, (extent, mappings, page));
            }
        })?;
        old.report(self.findings, &path, criteria);
        if pagemap.empty_entries > 0 {
            let text = format!(
                "{} entries cover no page, which CRIU from 4.3 on refuses",
                pagemap.empty_entries
            );
            let refused = self.criteria.criu.is_some_and(|criu| criu >= COMPRESSED);
            self.findings.either(refused, "entry-empty", &path, text);
        }
        if let Some(damage) = &pagemap.damage {
            let text = shorten(damage, &path);
            self.findings.fault("pagemap-damaged", &path, text);
            return Some(false);
        }
        self.expect_pages_file(dir, &pagemap);
        Some(true)
    }

    /// One that is missing CRIU refuses when it opens it, whether it needs a page of it or not.
    fn expect_pages_file(&mut self, dir: &ImageDir, pagemap: &Pagemap) {
        let Some(path) = pagemap.pages_id.map(|id| dir.pages_path(id)) else {
            return;
        };
        if !path.exists() {
            let name = pagemap.target.pagemap_name();
            let text = format!("{name} needs it, and it is not there");
            self.findings.fault("pages-missing", &path, text);
        }
    }

    /// Pages files with more bytes than pagemaps name. CRIU restores what is named and does not see the rest.
    fn lengths(&mut self) {
        for dir in self.chain_dirs {
            let mut named: BTreeMap<PathBuf, u64> = BTreeMap::new();
            for target in dir.targets().unwrap_or_default() {
                let pagemap = scan(dir, target, &mut |_, _| {});
                // Where an entry cannot be read, what it names is not known; and that is told already.
                let Some(pagemap) = pagemap.filter(|pagemap| pagemap.damage.is_none()) else {
                    continue;
                };
                let Some(id) = pagemap.pages_id else {
                    continue;
                };
                let most = named.entry(dir.pages_path(id)).or_default();
                *most = pagemap.stored_bytes.max(*most);
            }
            for (path, named) in named {
                let bytes = path.metadata().map_or(0, |meta| meta.len());
                if bytes > named {
                    let text = format!(
                        "it has {bytes} bytes, of which pagemaps name {named}: a pagemap was cut, or the rest is \
                         nobody's"
                    );
                    self.findings.fault("pages-long", &path, text);
                }
            }
        }
    }

    /// Where each page is, and with reading, whether it can be had.
    fn chain(&mut self, chain: &Chain) {
        for extent in chain.extents() {
            let pages = extent.range.pages(chain.page()).get();
            self.checked.pages += pages;
            match extent.place {
                Place::Absent { why, depth } => self.absent(chain, extent, (why, depth)),
                Place::Blocks { .. } => {
                    self.checked.blocks += pages;
                    self.read(chain, extent);
                }
                Place::Raw { .. } => self.read(chain, extent),
            }
        }
    }

    fn absent(&mut self, chain: &Chain, extent: &Resolved, reason: (Absence, u16)) {
        // A lazy restore asks somebody else for these.
        if self.criteria.lazy && extent.lazy {
            return;
        }
        let (why, depth) = reason;
        let dir = &self.chain_dirs[usize::from(depth)];
        let path = dir.path().join(chain.target().pagemap_name());
        let (pages, start) = (extent.range.pages(chain.page()), extent.range.start());
        let what = format!("{pages} pages from {start} on");
        let (code, text) = match why {
            Absence::WithSource => (
                "with-source",
                format!("{what} stayed with the source of a lazy dump (--lazy for a lazy restore)"),
            ),
            Absence::NotInParent => (
                "hole-without-page",
                format!("{what} are holes to the parent, which lacks them"),
            ),
            // Details already.
            Absence::NoPagesFile => return,
            Absence::CutShort => (
                "pages-short",
                format!("its pages file ends before the {what}"),
            ),
        };
        self.findings.fault(code, &path, text);
    }

    fn read(&mut self, chain: &Chain, extent: &Resolved) {
        // Only blocks can be wrong by themselves; raw pages are read for the sake of the disk.
        if !self.criteria.read {
            return;
        }
        let page = chain.page();
        let mut buffer = Vec::new();
        let (mut at, end) = (0, extent.range.bytes());
        while at < end {
            let bytes = (READ_PAGES << page.shift()).min(end - at);
            buffer.resize(usize::try_from(bytes).expect("a few pages"), 0);
            if let Err(error) = chain.read(extent.place.behind(at, page), &mut buffer) {
                self.unreadable(chain, extent, &error);
                return;
            }
            self.read_pages
                .fetch_add(bytes >> page.shift(), Ordering::Relaxed);
            at += bytes;
        }
    }

    fn unreadable(&mut self, chain: &Chain, extent: &Resolved, error: &Error) {
        // What a lazy restore leaves out need not be here, but what is here is served.
        let code = match extent.place {
            Place::Blocks { .. } => "block-damaged",
            _ => "pages-unreadable",
        };
        let path = match chain.span(extent) {
            Some((file, ..)) => chain.file(file).path(),
            None => chain.dir(),
        };
        self.findings.fault(code, path, shorten(error, path));
    }
}

/// What some versions of CRIU cannot read in a pagemap.
#[derive(Clone, Copy, Default)]
struct Unread {
    /// Entries whose page count CRIU up to 4.1.1 does not see.
    long_counts: u64,
    compressed: u64,
}

impl Unread {
    fn note(&mut self, entry: &PagemapEntry) {
        self.long_counts += u64::from(entry.nr_pages.is_some() && entry.compat_nr_pages == 0);
        self.compressed += u64::from(entry.blocks.is_some());
    }

    fn report(self, findings: &mut Findings, path: &Path, criteria: Criteria) {
        let Unread {
            long_counts,
            compressed,
        } = self;
        if long_counts > 0 && criteria.must_be_read_before(LONG_COUNTS) {
            let text = format!(
                "CRIU up to 4.1.1 takes {long_counts} entries for empty: their page counts are those of later ones"
            );
            findings.fault("count-unread", path, text);
        }
        if compressed > 0 {
            let unread = criteria.must_be_read_before(COMPRESSED) || !criteria.lz4;
            let text = format!(
                "{compressed} entries have compressed pages: only a CRIU from 4.3 on that is built with LZ4 \
                 restores them itself"
            );
            findings.either(unread, "compressed", path, text);
        }
    }
}

/// Page counts that differ between CRIU up to 4.1.1 and later ones.
fn check_count(findings: &mut Findings, path: &Path, criteria: Criteria, entry: &PagemapEntry) {
    let (old, new) = (entry.compat_nr_pages, entry.nr_pages);
    if let Some(new) = new
        && old != 0
        && u64::from(old) != new
    {
        let text = format!(
            "the entry at {:#x} has {old} pages for CRIU up to 4.1.1 and {new} for later ones",
            entry.vaddr
        );
        let concerned = criteria.must_be_read_before(LONG_COUNTS);
        findings.either(concerned, "count-mismatch", path, text);
    }
}

/// Pages where the process has no memory that CRIU would restore from them, and holes that CRIU does not fill.
fn check_mapped(
    findings: &mut Findings,
    path: &Path,
    criteria: Criteria,
    (extent, mappings, page): (&Extent, &Mappings, PageSize),
) {
    let (range, flags) = (extent.range, extent.flags);
    if criteria.lazy && flags.has(PageFlags::LAZY) {
        return;
    }
    let mapped: u64 = common(&mappings.private, range).map(PageRange::bytes).sum();
    if mapped < range.bytes() {
        let pages = (range.bytes() - mapped) >> page.shift();
        let text = format!(
            "{pages} pages of the entry at {} lie outside the private mappings of mm-*.img: CRIU refuses them",
            range.start()
        );
        findings.fault("outside-mappings", path, text);
    }
    if flags.has(PageFlags::PARENT) {
        let unread: u64 = common(&mappings.without_parents, range)
            .map(PageRange::bytes)
            .sum();
        if unread > 0 {
            let text = format!(
                "{} pages of the entry at {} are holes to the parent, where CRIU looks into none (huge pages and \
                 mappings of plugins): `pageferry finish` puts them here",
                unread >> page.shift(),
                range.start()
            );
            findings.fault("hole-unread", path, text);
        }
    }
}

/// What `range` has in common with `ranges`, which are sorted and disjoint.
fn common(ranges: &[PageRange], range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
    let first = ranges.partition_point(|other| other.end() <= range.start());
    ranges[first..]
        .iter()
        .map_while(move |other| other.intersect(range))
}
