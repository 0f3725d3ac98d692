//! The images of one session while they are received: appended to, whole or absent afterwards.
//!
//! ```text
//! append(range, flags)  ->  entries of .pagemap-N.img.part     (runs that go on are joined)
//!                       ->  (file, offset): where the caller puts the bytes
//! commit                ->  pages files renamed, then pagemaps, then the caller may answer CLOSE
//! drop                  ->  every part removed
//! ```
//!
//! Bytes of pages do not pass through here: [`SessionImages::append`] says where they go, and an
//! engine writes them when and how it likes, before it commits. A place where nothing is written
//! reads as zero.
//!
//! Where images are split, a page that a lazy restore can do without is appended to a companion in another
//! directory, and here an entry that leaves it out:
//!
//! ```text
//! append(range, LAZY|PRESENT)  ->  LAZY entry in DIR;  entry and bytes in LAZYDIR
//! commit                       ->  LAZYDIR's names first, then DIR's: whose pagemap is in DIR has its pages
//! ```
//!
//! Where each page of a process tree is stored once (`super::tree`), pages that CRIU looks for in parents go to
//! [`SessionImages::append_to_tree`], one by one and with their bytes, and here there are holes in their place.
//!
//! Invariants: entries are in the order of their addresses (the caller's promise, checked in
//! `criu::receive` for what peers say); a page that is said to be in the parent is there; memory does
//! not grow with the number of pages.

mod target;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::dir::ImageDir;
use super::extents::Extents;
pub use super::pages_part::{Destination, PagesPart};
use super::parents::punch_out_of_parents;
use super::store::{ImageStore, Sync, pages_name, remove};
use super::tree::{Tree, TreeCounts, TreePlace};
use crate::criu::header::{PageFlags, Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::limits::PAGES_ID_FIRST;
use crate::units::{PageRange, Vaddr};
use target::TargetImages;

/// The images of one session. See the module's text.
#[derive(Debug)]
pub struct SessionImages {
    store: Arc<ImageStore>,
    current: Option<TargetImages>,
    /// Targets whose last page was named, in the order in which they came.
    finished: Vec<Finished>,
    committed: bool,
    /// Where pages go that a lazy restore can do without, if not here.
    lazy: Option<Box<SessionImages>>,
    /// Where pages go that processes of a tree may share, if each is to be stored once.
    tree: Option<Tree>,
}

/// The images of a session that are whole now.
#[derive(Debug)]
pub struct CommittedImages {
    store: Arc<ImageStore>,
    targets: Vec<Target>,
}

impl CommittedImages {
    /// Takes the pages of the session out of the parents' files, as CRIU's `--auto-dedup`. Returns how
    /// many bytes that freed.
    pub fn punch_out_of_parents(&self) -> Result<u64> {
        let mut punched = 0;
        for target in &self.targets {
            punched += punch_out_of_parents(self.store.dir(), *target)?;
        }
        Ok(punched)
    }
}

/// A target's two parts, complete.
#[derive(Debug)]
struct Finished {
    target: Target,
    pages_id: u32,
}

impl ImageStore {
    /// Begins a session, which leaves nothing behind unless it is committed.
    pub fn begin(self: &Arc<Self>) -> SessionImages {
        SessionImages::new(Arc::clone(self))
    }
}

impl SessionImages {
    fn new(store: Arc<ImageStore>) -> SessionImages {
        let lazy = store.lazy().map(|lazy| Box::new(lazy.begin()));
        SessionImages {
            lazy,
            store,
            current: None,
            finished: Vec::new(),
            committed: false,
            tree: None,
        }
    }

    /// Whether the parent directory has the pagemap of `target`: the answer to PARENT and OPEN2.
    pub fn has_parent(&self, target: Target) -> Result<bool> {
        let parent = self.store.dir().parent()?;
        Ok(parent.is_some_and(|dir| dir.has_pagemap(target)))
    }

    /// From now on pages are those of `target`, for a sender that speaks `wire`.
    ///
    /// # Errors
    ///
    /// The parts cannot be made; [`Kind::Usage`] if another session is receiving the same target, or the
    /// directory for its lazy pages has some already.
    pub fn open(&mut self, target: Target, wire: Wire) -> Result<()> {
        self.finish_current()?;
        if let Some(lazy) = &self.lazy {
            lazy.refuse_present(target)?;
        }
        if let (None, Some(hasher)) = (&self.tree, self.store.tree()) {
            self.tree = Some(Tree::create(&self.store, hasher.clone())?);
        }
        let current = TargetImages::create(&self.store, target, wire)?;
        if let Some(tree) = &mut self.tree {
            tree.open(target, wire, current.pages_id)?;
        }
        self.current = Some(current);
        Ok(())
    }

    /// Refuses pages of a target that there are some of already: images in another directory may need them, and the
    /// two could not be replaced at once.
    fn refuse_present(&self, target: Target) -> Result<()> {
        let dir = self.store.dir();
        if !dir.has_pagemap(target) {
            return Ok(());
        }
        let there = dir.path().display();
        let text = format!(
            "{there} has pages of {target} already: give an empty directory to --split-lazy"
        );
        Err(Error::new(Kind::Usage, text))
    }

    fn current(&mut self, at: Vaddr) -> Result<(&mut TargetImages, &ImageDir)> {
        let current = self.current.as_mut().ok_or_else(|| {
            let text = format!("pages at {at} belong to no process");
            Error::new(Kind::Protocol, text)
        })?;
        Ok((current, self.store.dir()))
    }

    /// Where pages with these flags go, if a lazy restore can do without them and they are kept apart.
    fn apart(&mut self, flags: PageFlags) -> Result<Option<&mut TargetImages>> {
        let (Some(lazy), Some(current)) = (&mut self.lazy, &self.current) else {
            return Ok(None);
        };
        let target = current.target;
        if !is_lazy_page(target, flags) {
            return Ok(None);
        }
        if lazy.current.as_ref().map(|current| current.target) != Some(target) {
            lazy.open(target, current.wire)?;
            // From now on nobody else can give them a name.
            lazy.refuse_present(target)?;
        }
        Ok(lazy.current.as_mut())
    }

    /// Appends the pages of `range`. With PRESENT returns where their bytes go. Pages with PARENT are
    /// looked for in the parent.
    ///
    /// # Errors
    ///
    /// The parent lacks a page, or a file cannot be read or written. Nothing was opened:
    /// [`Kind::Protocol`].
    pub fn append(&mut self, range: PageRange, flags: PageFlags) -> Result<Option<Destination>> {
        let (current, dir) = self.current(range.start())?;
        if flags.has(PageFlags::PARENT) {
            current.find_in_parent(dir, range)?;
            if let Some(tree) = &mut self.tree {
                tree.in_parent(range)?;
            }
        }
        match self.apart(flags)? {
            Some(apart) => {
                let to = apart.append(range, flags)?;
                self.leave_out(range)?;
                Ok(to)
            }
            None => self.current(range.start())?.0.append(range, flags),
        }
    }

    /// Appends the pages of `range` as CRIU 4.3 compresses them: `sizes` says how many bytes each is
    /// stored in, 0 for a zero page, a page's size for a raw one. Returns where these bytes go, one
    /// page behind the other.
    ///
    /// # Errors
    ///
    /// As for [`SessionImages::append`]; [`Kind::Unsupported`] if the sender is a CRIU that could not
    /// read such images.
    pub fn append_blocks(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        sizes: Vec<u32>,
    ) -> Result<Destination> {
        if let Some(apart) = self.apart(flags)? {
            let to = apart.append_blocks(range, flags, sizes)?;
            self.leave_out(range)?;
            return Ok(to);
        }
        let (current, _) = self.current(range.start())?;
        if current.wire == Wire::V1 {
            let text = "--compress: CRIU up to 4.1.1, which sends this, cannot read such images";
            return Err(Error::new(Kind::Unsupported, text));
        }
        current.append_blocks(range, flags, sizes)
    }

    /// Whether pages with these flags go to [`SessionImages::append_to_tree`].
    pub fn goes_to_tree(&self, flags: PageFlags) -> bool {
        let target = self.current.as_ref().map(|current| current.target);
        self.tree.is_some() && target.is_some_and(|target| is_lazy_page(target, flags))
    }

    /// Appends a page that processes of a tree may share, `None` if it is all zeros. Returns where its bytes go, if they
    /// are to be written.
    ///
    /// # Errors
    ///
    /// As for [`SessionImages::append`].
    pub fn append_to_tree(
        &mut self,
        page: PageRange,
        flags: PageFlags,
        bytes: Option<&[u8]>,
    ) -> Result<TreePlace> {
        let hole = flags.without(PageFlags::PRESENT).with(PageFlags::PARENT);
        self.current(page.start())?.0.append(page, hole)?;
        match &mut self.tree {
            Some(tree) => tree.page(page.start(), bytes),
            None => Ok(TreePlace::Settled),
        }
    }

    /// Reads the page at `vaddr` of `target`, whose pages have all come, if processes of a tree may share it. Returns whether
    /// it is there.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub fn read_from_tree(&mut self, target: Target, vaddr: Vaddr, out: &mut [u8]) -> Result<bool> {
        match &mut self.tree {
            Some(tree) => tree.read(target, vaddr, out),
            None => Ok(false),
        }
    }

    /// Writes what waits of the open target's pages that processes may share.
    pub fn end_target_in_tree(&mut self) -> Result<()> {
        match &mut self.tree {
            Some(tree) => tree.end_target(),
            None => Ok(()),
        }
    }

    /// How pages were stored that processes of a tree may share.
    pub fn tree_counts(&self) -> TreeCounts {
        let tree = self.tree.as_ref();
        tree.map(Tree::counts).unwrap_or_default()
    }

    /// Appends pages that a lazy restore asks for where they are.
    fn leave_out(&mut self, range: PageRange) -> Result<()> {
        let (current, _) = self.current(range.start())?;
        current.append(range, PageFlags::LAZY).map(drop)
    }

    /// Whether pages with these flags may be compressed where that is asked for. Where images are split, what
    /// CRIU reads itself stays as it is, for not every CRIU can decompress.
    pub fn may_be_compressed(&self, flags: PageFlags) -> bool {
        let target = self.current.as_ref().map(|current| current.target);
        self.lazy.is_none() || target.is_some_and(|target| is_lazy_page(target, flags))
    }

    /// Whether pages with these flags may be stored as holes to the parent because their contents are the same
    /// there. CRIU does not look into parents for private huge pages and for mappings that plugins provide, and
    /// does not say what is one. But it calls pages LAZY that it could leave to a lazy restore, always, and those
    /// never are; and shared memory is restored another way, with parents.
    pub fn may_be_hole(&self, flags: PageFlags) -> bool {
        let target = self.current.as_ref().map(|current| current.target);
        flags.has(PageFlags::LAZY) || matches!(target, Some(Target::Shmem(_)))
    }

    /// Whether the page at `vaddr` has just these `bytes` in the parent directory.
    pub fn equals_parent(&mut self, vaddr: Vaddr, bytes: &[u8]) -> Result<bool> {
        let (current, dir) = self.current(vaddr)?;
        match current.parent(dir)? {
            Some(parent) => parent.equals(vaddr, bytes),
            None => Ok(false),
        }
    }

    /// Gives every image its name. All bytes must have been written.
    ///
    /// # Errors
    ///
    /// Something cannot be synced or renamed. Then none of the session's images is left.
    pub fn commit(mut self) -> Result<CommittedImages> {
        let mut renamed = Vec::new();
        let superseded = self.publish(&mut renamed).inspect_err(|_| {
            for path in renamed {
                // The first error is the one to tell; what is left keeps an unknown name.
                let _ = remove(&path);
            }
        })?;
        for path in superseded {
            remove(&path)?;
        }
        Ok(CommittedImages {
            store: Arc::clone(&self.store),
            targets: self.finished.iter().map(|done| done.target).collect(),
        })
    }

    /// Gives every image its name, the lazy pages' first, and lists the names in `renamed`. Returns the files that
    /// nothing needs any more.
    ///
    /// A disk may take the names in any order until they are synced. So a pagemap gets its name when its pages have
    /// theirs for good, and what it replaces needs is removed when it has its own for good.
    fn publish(&mut self, renamed: &mut Vec<PathBuf>) -> Result<Vec<PathBuf>> {
        self.finish_current()?;
        if self.store.sync() != Sync::None {
            self.sync_parts()?;
        }
        let mut superseded = self.superseded()?;
        if let Some(lazy) = &mut self.lazy {
            superseded.extend(lazy.publish(renamed)?);
        }
        if let Some(tree) = &mut self.tree {
            tree.publish()?;
        }
        self.rename(self.pages_names(), renamed)?;
        self.sync_names()?;
        self.rename(self.pagemap_names(), renamed)?;
        self.sync_names()?;
        if let Some(tree) = &mut self.tree {
            tree.keep();
        }
        self.committed = true;
        Ok(superseded)
    }

    fn sync_names(&self) -> Result<()> {
        match self.store.sync() {
            Sync::None => Ok(()),
            Sync::Close | Sync::Always => self.store.sync_names(),
        }
    }

    fn finish_current(&mut self) -> Result<()> {
        if let Some(current) = self.current.take() {
            // On failure, too, its parts are to be removed in the end.
            self.finished.push(Finished {
                target: current.target,
                pages_id: current.pages_id,
            });
            current.finish()?;
        }
        Ok(())
    }

    fn pages_names(&self) -> impl Iterator<Item = String> + '_ {
        self.finished.iter().map(|done| pages_name(done.pages_id))
    }

    fn pagemap_names(&self) -> impl Iterator<Item = String> + '_ {
        self.finished.iter().map(|done| done.target.pagemap_name())
    }

    fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.pages_names().chain(self.pagemap_names())
    }

    fn sync_parts(&self) -> Result<()> {
        for name in self.names() {
            let part = self.store.part(&name);
            let synced = File::open(&part).and_then(|file| file.sync_all());
            synced.map_err(|error| Error::file("sync", &part, error))?;
        }
        Ok(())
    }

    fn rename(
        &self,
        names: impl Iterator<Item = String>,
        renamed: &mut Vec<PathBuf>,
    ) -> Result<()> {
        for name in names {
            let part = self.store.part(&name);
            let path = self.store.dir().path().join(name);
            std::fs::rename(&part, &path).map_err(|error| Error::file("rename", &part, error))?;
            renamed.push(path);
        }
        Ok(())
    }

    /// Pages files of earlier sessions that no pagemap will need once this session's are there.
    fn superseded(&self) -> Result<Vec<PathBuf>> {
        let dir = self.store.dir();
        let (mut replaced, mut kept) = (Vec::new(), Vec::new());
        let received = |target: &Target| self.finished.iter().any(|done| done.target == *target);
        let already_there: Vec<Target> = dir.targets()?;
        if !already_there.iter().any(received) {
            return Ok(replaced);
        }
        for target in already_there {
            let pages_id = pages_id_of(dir, target);
            let list = if received(&target) {
                &mut replaced
            } else {
                &mut kept
            };
            list.extend(pages_id.map(|id| dir.pages_path(id)));
        }
        replaced.retain(|path| !kept.contains(path) && path.exists());
        Ok(replaced)
    }
}

impl Drop for SessionImages {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if let Some(current) = self.current.take() {
            self.finished.push(Finished {
                target: current.target,
                pages_id: current.pages_id,
            });
        }
        for name in self.names() {
            let part = self.store.part(&name);
            if let Err(error) = std::fs::remove_file(&part)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("cannot remove {}: {error}", part.display());
            }
        }
    }
}

/// Whether a page is here and a lazy restore can do without it. Only memory of processes is restored lazily.
fn is_lazy_page(target: Target, flags: PageFlags) -> bool {
    let here = flags.has(PageFlags::PRESENT) && !flags.has(PageFlags::PARENT);
    here && flags.has(PageFlags::LAZY) && matches!(target, Target::Process(_))
}

/// The number of the pages file that a page server wrote for `target`, if its pagemap can be read.
fn pages_id_of(dir: &ImageDir, target: Target) -> Option<u32> {
    let pages_id = Extents::open(dir, target).ok()??.pages_id();
    (pages_id >= PAGES_ID_FIRST).then_some(pages_id)
}

#[cfg(test)]
mod tests;
