//! Shared memory of a lazy dump: every restore needs it before the first instruction, so what the rounds
//! have sent already does not travel once more.
//!
//! `criu dump --lazy-pages` writes shared segments into image files while the processes are frozen. They are
//! read from there and sent through the rounds' forwarder, as a dump would, on top of the last round.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;

use pageferry::criu::header::{Target, Wire};
use pageferry::error::Result;
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::units::{PageCount, PageRange, PageSize};

use crate::rounds::{PageSink, Sender};

/// Pages that are read at once.
const RUN_PAGES: u64 = 256;

/// Sends the shared segments of the images in `dir`, and tells the files that need not travel any more.
pub(super) fn send(
    dir: &Path,
    forwarder: SocketAddr,
    page: PageSize,
    wire: Wire,
) -> Result<BTreeSet<OsString>> {
    let images = ImageDir::open(dir, page)?;
    let mut sender = Sender::connect(forwarder, page, wire, None)?;
    let mut sent = BTreeSet::new();
    let mut bytes = vec![0; usize::try_from(RUN_PAGES).unwrap_or(0) << page.shift()];
    for target in images.targets()? {
        if !matches!(target, Target::Shmem(_)) {
            continue;
        }
        let chain = Chain::open(&images, target, Missing::Refuse)?;
        sender.open(target)?;
        for extent in chain.extents() {
            if let Some((file, _, _)) = chain.span(extent)
                && let Some(name) = chain.file(file).path().file_name()
            {
                sent.insert(name.to_owned());
            }
            send_extent(&chain, extent.range, page, &mut bytes, &mut sender)?;
        }
        sent.insert(target.pagemap_name().into());
    }
    sender.close()?;
    Ok(sent)
}

fn send_extent(
    chain: &Chain,
    range: PageRange,
    page: PageSize,
    bytes: &mut [u8],
    sender: &mut Sender,
) -> Result<()> {
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
