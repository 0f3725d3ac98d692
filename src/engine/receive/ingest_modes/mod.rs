//! What becomes of received pages: the two ingest modes.
//!
//! ```text
//! Verbatim     every page at its place in the file; whole runs move at once    (the default)
//! Inspected    page by page: zero? same as in the parent, or in another process? compressed?
//!              (--dedup-content, --dedup-tree, --compress)
//! ```

mod inspected;
mod side_buffer;
mod verbatim;

use std::fmt;
use std::ops::Range;

use self::inspected::Inspected;
pub(in crate::engine) use self::side_buffer::unpack as decompress_page;
use self::verbatim::Verbatim;
use crate::criu::header::PageFlags;
use crate::engine::io::batch::Plan;
use crate::engine::io::session_io::SessionIo;
use crate::error::Result;
use crate::image::writer::{Destination, SessionImages};
use crate::observe::received::StoredPages;
use crate::units::{PageRange, PageSize};

/// What to do with received pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IngestOptions {
    /// Store pages that equal the parent's as holes, and zero pages without their bytes.
    pub dedup_content: bool,
    /// Store pages once that processes of a tree have at the same address.
    pub dedup_tree: bool,
    /// Store pages as CRIU 4.3 compresses them.
    pub compress: bool,
}

/// What an ingest mode works with while it looks at a receive buffer.
pub(in crate::engine) struct IngestScope<'a> {
    /// Where entries go and places come from.
    pub(in crate::engine) images: &'a mut SessionImages,
    /// Where filled buffers go and empty ones come from.
    pub(in crate::engine) session_io: &'a mut SessionIo,
    /// What is to be written of the receive buffer.
    pub(in crate::engine) plan: &'a mut Plan,
    /// The receive buffer, as far as it is filled.
    pub(in crate::engine) buffer: &'a [u8],
}

/// An ingest mode. The bytes of a run come in order, cut anywhere.
pub(in crate::engine) trait IngestMode: fmt::Debug {
    /// A run of pages begins.
    fn begin_run(
        &mut self,
        scope: &mut IngestScope<'_>,
        range: PageRange,
        flags: PageFlags,
    ) -> Result<()>;

    /// Raw bytes of the run are in this range of the receive buffer.
    fn raw(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>) -> Result<()>;

    /// Where the run's next raw bytes go, if they need not be seen.
    fn place(&self) -> Option<Destination> {
        None
    }

    /// So many of the run's raw bytes went to their [`IngestMode::place`].
    fn placed(&mut self, _bytes: u64) {}

    /// Bytes of the LZ4 block of the run's next page are in this range.
    fn lz4(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>, ends: bool) -> Result<()>;

    /// The run's next page is zero.
    fn zero_page(&mut self, scope: &mut IngestScope<'_>) -> Result<()>;

    /// The target's last page has come: what is held back is written.
    fn end_target(&mut self, images: &mut SessionImages, session_io: &mut SessionIo) -> Result<()>;

    /// What was done so far.
    fn stored(&self) -> StoredPages;
}

impl IngestOptions {
    /// The ingest mode that is asked for.
    pub(in crate::engine) fn mode(self, page: PageSize) -> Box<dyn IngestMode> {
        if self == IngestOptions::default() {
            Box::new(Verbatim::new(page))
        } else {
            Box::new(Inspected::new(self, page))
        }
    }
}
