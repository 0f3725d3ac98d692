//! Memory that every restore needs before the first instruction, a lazy one as well: what the rounds have sent already
//! does not travel once more.
//!
//! `criu dump --lazy-pages` writes it into image files while the processes are frozen: shared segments, and of private
//! memory what is mlocked, huge pages of hugetlbfs and written pages of file mappings. It is read from there and sent
//! through the rounds' forwarder, as a dump would, on top of the last round.
//!
//! ```text
//! pagemap-PID.img at the source     here     lazy     here          pages of `here` in pages-N.img
//! sent                              pages    a mark   pages         the forwarder compares with the last round
//! pagemap-PID.img there             parent   lazy     here, parent
//! ```

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;

use pageferry::criu::header::{Target, Wire};
use pageferry::error::Result;
use pageferry::image::chain::{Chain, Missing, Place, Resolved};
use pageferry::image::dir::ImageDir;
use pageferry::units::{PageCount, PageRange, PageSize};

use crate::rounds::{PageSink, Sender};

/// Pages that are read at once.
const RUN_PAGES: u64 = 256;

/// Private memory of a process below this travels with its images, bytes: at 1 Gbit/s in 2 ms.
pub(super) const WORTH_COMPARING_BYTES: u64 = 256 << 10;

/// Sends what the images in `dir` have of memory, and tells the files that need not travel any more.
pub(super) fn send(
    dir: &Path,
    forwarder: SocketAddr,
    page: PageSize,
    wire: Wire,
) -> Result<BTreeSet<OsString>> {
    let images = ImageDir::open(dir, page)?;
    let mut sender = Sender::connect(forwarder, page, wire, None)?;
    let mut sent = BTreeSet::new();
    let mut bytes = Vec::new();
    for target in images.targets()? {
        let chain = Chain::open(&images, target, Missing::Leave)?;
        let here = |extent: &&Resolved| !matches!(extent.place, Place::Absent { .. });
        let present = chain.extents().iter().filter(here);
        let present: u64 = present.map(|extent| extent.range.bytes()).sum();
        if matches!(target, Target::Process(_)) && present < WORTH_COMPARING_BYTES {
            continue;
        }
        sender.open(target)?;
        for extent in chain.extents() {
            sender.lazily(extent.lazy);
            match extent.place {
                Place::Absent { .. } if extent.lazy => {
                    sender.left_at(extent.range.start(), extent.range.pages(page).get())?;
                }
                Place::Absent { .. } => return Err(chain.absence(extent)),
                _ => send_extent(&chain, extent.range, page, &mut bytes, &mut sender)?,
            }
            if let Some((file, _, _)) = chain.span(extent)
                && let Some(name) = chain.file(file).path().file_name()
            {
                sent.insert(name.to_owned());
            }
        }
        sent.insert(target.pagemap_name().into());
    }
    sender.close()?;
    Ok(sent)
}

/// Sends the pages `range`, which `chain` has; `bytes` is kept for its room.
pub(super) fn send_extent(
    chain: &Chain,
    range: PageRange,
    page: PageSize,
    bytes: &mut Vec<u8>,
    sender: &mut Sender,
) -> Result<()> {
    bytes.resize(usize::try_from(RUN_PAGES).unwrap_or(0) << page.shift(), 0);
    let mut at = range.start();
    while at < range.end() {
        let left = (range.end().get() - at.get()) >> page.shift();
        let Some(extent) = chain.find(at) else {
            return Ok(());
        };
        let length = usize::try_from(left.min(RUN_PAGES)).unwrap_or(0) << page.shift();
        chain.read(extent.place, &mut bytes[..length])?;
        sender.pages_at(at, &bytes[..length])?;
        match PageRange::checked(at, PageCount(left.min(RUN_PAGES)), page) {
            Some(done) => at = done.end(),
            None => return Ok(()),
        }
    }
    Ok(())
}
