//! Zero pages and pages that are there more than once: all memory is read.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::error::Result;
use pageferry::ferry::hash::{HashKey, PageHasher};
use pageferry::image::chain::{Chain, Place};
use pageferry::observe::progress::{Display, Snapshot};
use pageferry::units::PageSize;

/// Pages read at once.
const READ_PAGES: u64 = 256;

/// What was seen so far.
pub(super) struct Contents {
    hasher: PageHasher,
    page: PageSize,
    /// The first half of each hash: with 64 bits a chance repeat is improbable, and would only be a wrong count.
    seen: HashSet<u64>,
    read_pages: Arc<AtomicU64>,
    _display: Display,
}

/// Pages of one memory.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Counted {
    pub(super) zero_pages: u64,
    /// Other pages whose content some page before them has.
    pub(super) duplicate_pages: u64,
}

impl Contents {
    /// Ready to read about `pages` pages; progress is shown where that takes long.
    pub(super) fn new(pages: u64, page: PageSize) -> Result<Contents> {
        let read_pages = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&read_pages);
        let display = Display::start(move || {
            let done_pages = counter.load(Ordering::Relaxed);
            Snapshot {
                done_pages,
                total_pages: pages,
                bytes: done_pages << page.shift(),
                note: "read".to_owned(),
            }
        });
        let mut key = [0; 16];
        fastrand::fill(&mut key);
        Ok(Contents {
            hasher: PageHasher::new(HashKey(key), page),
            page,
            seen: HashSet::new(),
            read_pages,
            _display: display,
        })
    }

    /// Reads all pages of `chain` that are there.
    pub(super) fn count(&mut self, chain: &Chain) -> Result<Counted> {
        let mut counted = Counted::default();
        let mut buffer = Vec::new();
        for extent in chain.extents() {
            if matches!(extent.place, Place::Absent { .. }) {
                continue;
            }
            let most = READ_PAGES << self.page.shift();
            let (mut at, end) = (0, extent.range.bytes());
            while at < end {
                let bytes = most.min(end - at);
                buffer.resize(usize::try_from(bytes).expect("a few pages"), 0);
                chain.read(extent.place.behind(at, self.page), &mut buffer)?;
                self.add(&buffer, &mut counted);
                at += bytes;
            }
        }
        Ok(counted)
    }

    fn add(&mut self, pages: &[u8], counted: &mut Counted) {
        for page in pages.chunks(self.page.as_usize()) {
            let hash = self.hasher.fingerprint(page);
            if hash.zero {
                counted.zero_pages += 1;
            } else if let Some(hash) = hash.hash {
                let half = hash.0[..8].try_into().expect("a hash has 16 bytes");
                let first = self.seen.insert(u64::from_le_bytes(half));
                counted.duplicate_pages += u64::from(!first);
            }
        }
        let read = (pages.len() / self.page.as_usize()) as u64;
        self.read_pages.fetch_add(read, Ordering::Relaxed);
    }
}
