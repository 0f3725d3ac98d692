//! Each page of a process tree once: `--dedup-tree`.
//!
//! ```text
//! DIR/pagemap-12.img       holes to the parent, and what CRIU does not look for in parents
//! DIR/parent -> tree/1
//! DIR/tree/1/              pages that forks have changed: each fork names its own pages file
//! DIR/tree/1/parent -> ../2
//! DIR/tree/2/              pages of whom they were forked from: all of them name the same pages file
//! DIR/tree/2/parent        -> the images before these, if they are a difference to some
//! ```
//!
//! While pages come nobody knows who will share them. So each process's pages that no process before it has go to a
//! file of its own, and the pagemaps of the directories are written in the end (`layers`). Whose pages a process
//! shares is decided once a sample of its pages has come (`views`). Until then they wait in memory.
//!
//! ```text
//! page  ->  no view chosen:  held
//!       ->  as in the view:  nothing to write
//!       ->  else:            its place in the process's own file
//! ```
//!
//! Only pages come here that CRIU looks for in parents. Equal is what has the same hash, under a key that the dumped
//! processes cannot know.
//!
//! Invariants: `tree` is there whole or not at all: it is made under another name, and gets its own before the images
//! that need it get theirs; the link is there before, so that a tree without images is known for what it is; a directory
//! has the tree of one session.

mod layers;
pub(super) mod names;
mod views;

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use self::layers::Layers;
use self::names::{TREE, TREE_PART, check_empty, link, remove_all, sync_names, target_of, undo};
use self::views::{Member, Pages, Views};
use super::dir::{ImageDir, PARENT_LINK};
use super::pages_part::{Destination, PagesPart};
use super::parents::Parent;
use super::store::{ImageStore, Sync, create_new, pages_name};
use crate::criu::header::{Target, Wire};
use crate::error::{Error, Kind, Result};
use crate::ferry::hash::{PageHash, PageHasher};
use crate::limits::TREE_SAMPLE_BYTES;
use crate::units::{PageRange, PageSize, Vaddr};

/// How pages of a session with a tree were stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TreeCounts {
    /// Pages that another process has at the same address.
    pub same: u64,
    /// Zero pages that take no room.
    pub zero: u64,
    /// Pages with a place of their own.
    pub stored: u64,
}

/// What becomes of a page.
#[derive(Debug)]
pub enum TreePlace {
    /// Its bytes need not be written: another process has the page, or it waits for a decision.
    Settled,
    /// Its bytes go here.
    At(Destination),
}

/// The tree of one session. See the module's text.
#[derive(Debug)]
pub(super) struct Tree {
    dir: ImageDir,
    sync: Sync,
    hasher: PageHasher,
    views: Views,
    current: Option<Current>,
    counts: TreeCounts,
    state: State,
    /// The pages file that was read last, by its number.
    reading: Option<(u32, File)>,
}

/// What is to be undone if the session fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The part.
    Part,
    /// The part, or the tree with its name, and the link if it is there.
    Linked,
    /// Nothing.
    Kept,
}

/// The process whose pages come.
#[derive(Debug)]
struct Current {
    member: Member,
    file: Option<Arc<PagesPart>>,
    bytes: u64,
    /// Pages that wait until a view is chosen; `None` afterwards.
    held: Option<Vec<Held>>,
    held_bytes: Vec<u8>,
    /// The process in the directory's parent, once it was read there.
    parent: Option<Parent>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    vaddr: Vaddr,
    what: HeldPage,
}

#[derive(Clone, Copy, Debug)]
enum HeldPage {
    /// Its bytes stand behind those of the page before; a zero page has none.
    Content { hash: PageHash, zero: bool },
    /// It is in the directory's parent.
    InParent,
}

impl Tree {
    /// Begins the tree of a session in the directory of `store`.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if there is one, or another session is making one.
    pub(super) fn create(store: &ImageStore, hasher: PageHasher) -> Result<Tree> {
        let dir = store.dir().clone();
        let part = dir.path().join(TREE_PART);
        std::fs::create_dir(&part).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => {
                let path = part.display();
                let text = format!(
                    "another session is receiving a dump into this directory (--dedup-tree): {path} is there"
                );
                Error::new(Kind::Usage, text)
            }
            _ => Error::file("make the directory", &part, error),
        })?;
        let tree = Tree {
            views: Views::new(dir.page()),
            sync: store.sync(),
            hasher,
            current: None,
            counts: TreeCounts::default(),
            state: State::Part,
            reading: None,
            dir,
        };
        // From now on nobody else makes one.
        check_empty(&tree.dir)?;
        Ok(tree)
    }

    /// From now on pages are those of `target`, whose pages file has the number `pages_id`.
    pub(super) fn open(&mut self, target: Target, wire: Wire, pages_id: u32) -> Result<()> {
        self.finish_current()?;
        let undecided = matches!(target, Target::Process(_)) && self.views.has_candidates();
        self.current = Some(Current {
            member: Member {
                target,
                wire,
                pages_id,
                base: None,
                depth: 0,
                own: Pages::default(),
                needed: Vec::new(),
            },
            file: None,
            bytes: 0,
            held: undecided.then(Vec::new),
            held_bytes: Vec::new(),
            parent: None,
        });
        Ok(())
    }

    /// How pages were stored so far.
    pub(super) fn counts(&self) -> TreeCounts {
        self.counts
    }

    /// Takes the next page, `None` if it is all zeros.
    ///
    /// # Errors
    ///
    /// A file cannot be made or written.
    pub(super) fn page(&mut self, vaddr: Vaddr, bytes: Option<&[u8]>) -> Result<TreePlace> {
        let hash = match bytes {
            Some(bytes) => self.hasher.hash(bytes),
            None => self.hasher.zero_page(),
        };
        let page = page_at(vaddr, self.dir.page());
        let current = current(&mut self.current, vaddr)?;
        views::push(&mut current.member.needed, page);
        let Some(held) = &mut current.held else {
            let to = self.put(vaddr, hash, bytes.is_none())?;
            return Ok(to.map_or(TreePlace::Settled, TreePlace::At));
        };
        let zero = bytes.is_none();
        held.push(Held {
            vaddr,
            what: HeldPage::Content { hash, zero },
        });
        current.held_bytes.extend_from_slice(bytes.unwrap_or(&[]));
        self.choose_if_enough()?;
        Ok(TreePlace::Settled)
    }

    /// The next pages are those of the directory's parent.
    ///
    /// # Errors
    ///
    /// Another process has other pages there, so that they must be stored, and that fails.
    pub(super) fn in_parent(&mut self, range: PageRange) -> Result<()> {
        let page = self.dir.page();
        let current = current(&mut self.current, range.start())?;
        views::push(&mut current.member.needed, range);
        if current.held.is_none() && current.member.base.is_none() {
            return Ok(());
        }
        let mut at = range.start();
        while at < range.end() {
            let current = self::current(&mut self.current, at)?;
            match &mut current.held {
                None => self.put_from_parent(at)?,
                Some(held) => {
                    held.push(Held {
                        vaddr: at,
                        what: HeldPage::InParent,
                    });
                    self.choose_if_enough()?;
                }
            }
            at = page_at(at, page).end();
        }
        Ok(())
    }

    /// Stores what still waits.
    pub(super) fn end_target(&mut self) -> Result<()> {
        match &self.current {
            Some(current) if current.held.is_some() => self.choose(),
            _ => Ok(()),
        }
    }

    fn choose_if_enough(&mut self) -> Result<()> {
        let most = TREE_SAMPLE_BYTES / self.dir.page().as_usize();
        let held = self
            .current
            .as_ref()
            .and_then(|current| current.held.as_ref());
        match held.is_some_and(|held| held.len() >= most) {
            true => self.choose(),
            false => Ok(()),
        }
    }

    /// Chooses the view that the current process shares pages with, and stores the pages that waited.
    fn choose(&mut self) -> Result<()> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let held = current.held.take().unwrap_or_default();
        let bytes = std::mem::take(&mut current.held_bytes);
        let sample: Vec<_> = held
            .iter()
            .filter_map(|page| match page.what {
                HeldPage::Content { hash, .. } => Some((page.vaddr, hash)),
                HeldPage::InParent => None,
            })
            .collect();
        let base = self.views.choose(&sample);
        current.member.base = base;
        current.member.depth = self.views.depth_on(base);
        if let Some(base) = base {
            let (target, other) = (current.member.target, &self.views.members()[base]);
            tracing::debug!("{target} shares pages with {}", other.target);
        }
        let mut pages = bytes.chunks_exact(self.dir.page().as_usize());
        for Held { vaddr, what } in held {
            match what {
                HeldPage::InParent => self.put_from_parent(vaddr)?,
                HeldPage::Content { hash, zero: true } => drop(self.put(vaddr, hash, true)?),
                HeldPage::Content { hash, zero: false } => {
                    let bytes = pages.next().unwrap_or_default();
                    if let Some(to) = self.put(vaddr, hash, false)? {
                        write(&to, bytes)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The place of a page in the process's own file, `None` if the view has it or its bytes need not be written.
    fn put(&mut self, vaddr: Vaddr, hash: PageHash, zero: bool) -> Result<Option<Destination>> {
        let page = self.dir.page();
        let current = current(&mut self.current, vaddr)?;
        if self.views.find(current.member.base, vaddr) == Some(hash) {
            self.counts.same += 1;
            return Ok(None);
        }
        let part = match &current.file {
            Some(part) => Arc::clone(part),
            None => {
                let path = self.dir.path().join(TREE_PART);
                let path = path.join(pages_name(current.member.pages_id));
                let flags = self.sync.open_flags();
                let file = create_new(&path, flags)
                    .map_err(|error| Error::file("create", &path, error))?;
                let part = Arc::new(PagesPart::new(file, path));
                current.file = Some(Arc::clone(&part));
                part
            }
        };
        let offset = current.bytes;
        current.bytes = offset.checked_add(page.bytes()).ok_or_else(|| {
            let text = format!("{}: more pages than a file can hold", current.member.target);
            Error::new(Kind::Protocol, text)
        })?;
        current.member.own.push(page_at(vaddr, page), hash);
        match zero {
            true => self.counts.zero += 1,
            false => self.counts.stored += 1,
        }
        Ok((!zero).then_some(Destination { part, offset }))
    }

    /// The page at `vaddr` is that of the directory's parent. Where the view has another one the parent's is stored.
    fn put_from_parent(&mut self, vaddr: Vaddr) -> Result<()> {
        let current = current(&mut self.current, vaddr)?;
        if self.views.find(current.member.base, vaddr).is_none() {
            return Ok(());
        }
        let target = current.member.target;
        if current.parent.is_none() {
            current.parent = Parent::open(&self.dir, target)?;
        }
        let mut bytes = vec![0; self.dir.page().as_usize()];
        let parent = current.parent.as_ref();
        let read = parent.map(|parent| parent.read(vaddr, &mut bytes));
        if read.transpose()? != Some(true) {
            let text = format!("the parent lacks {target}'s page at {vaddr}");
            return Err(Error::new(Kind::Image, text));
        }
        let hash = self.hasher.hash(&bytes);
        // It is counted as one of the parent's.
        let same = self.counts.same;
        let to = self.put(vaddr, hash, false)?;
        self.counts.same = same;
        match to {
            Some(to) => write(&to, &bytes),
            None => Ok(()),
        }
    }

    /// Reads the page at `vaddr` of `target`, which is not the current one. Returns whether it is there.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub(super) fn read(&mut self, target: Target, vaddr: Vaddr, out: &mut [u8]) -> Result<bool> {
        let mut members = self.views.members().iter();
        let view = members.position(|member| member.target == target);
        let Some((member, number)) = self.views.place(view, vaddr) else {
            return Ok(false);
        };
        let pages_id = self.views.members()[member].pages_id;
        let path = self.dir.path().join(TREE_PART).join(pages_name(pages_id));
        let failed = |error| Error::file("read", &path, error);
        let file = match &mut self.reading {
            Some((open, file)) if *open == pages_id => file,
            reading => {
                let file = File::open(&path).map_err(failed)?;
                &mut reading.insert((pages_id, file)).1
            }
        };
        let offset = (number as u64) << self.dir.page().shift();
        file.read_exact_at(out, offset).map_err(failed)?;
        Ok(true)
    }

    /// The current process has no more pages.
    pub(super) fn finish_current(&mut self) -> Result<()> {
        self.end_target()?;
        let Some(current) = self.current.take() else {
            return Ok(());
        };
        if let Some(part) = &current.file {
            let sized = part.file().set_len(current.bytes);
            sized.map_err(|error| part.write_error(error))?;
        }
        if !current.member.needed.is_empty() {
            self.views.add(current.member);
        }
        Ok(())
    }

    /// Lays the directories out, gives them their name, and makes them the parent of the session's directory. All
    /// bytes must have been written.
    ///
    /// # Errors
    ///
    /// A file cannot be made, synced or renamed.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.finish_current()?;
        let part = self.dir.path().join(TREE_PART);
        if self.views.members().is_empty() {
            remove_all(&part)?;
            self.state = State::Kept;
            return Ok(());
        }
        let behind = target_of(&self.dir.path().join(PARENT_LINK))?;
        Layers::new(&self.views, &part, self.dir.page(), self.sync).write(behind.as_deref())?;
        // The link comes first: a tree without one could be anybody's.
        self.state = State::Linked;
        link(self.dir.path(), &PathBuf::from(TREE).join("1"))?;
        if self.sync != Sync::None {
            sync_names(self.dir.path())?;
        }
        let tree = self.dir.path().join(TREE);
        std::fs::rename(&part, &tree).map_err(|error| Error::file("rename", &part, error))
    }

    /// The images that need the tree have their names.
    pub(super) fn keep(&mut self) {
        self.state = State::Kept;
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // A directory is listed with a descriptor, of which there may be no more.
        (self.current, self.reading) = (None, None);
        let undone = match self.state {
            State::Kept => return,
            State::Part => remove_all(&self.dir.path().join(TREE_PART)),
            State::Linked => {
                undo(&self.dir).and_then(|()| remove_all(&self.dir.path().join(TREE_PART)))
            }
        };
        if let Err(error) = undone {
            tracing::warn!("{error}");
        }
    }
}

fn page_at(vaddr: Vaddr, page: PageSize) -> PageRange {
    PageRange::new(vaddr.get(), vaddr.get() + page.bytes())
}

fn current(current: &mut Option<Current>, at: Vaddr) -> Result<&mut Current> {
    current.as_mut().ok_or_else(|| {
        let text = format!("pages at {at} belong to no process");
        Error::new(Kind::Protocol, text)
    })
}

fn write(to: &Destination, bytes: &[u8]) -> Result<()> {
    let written = to.part.file().write_all_at(bytes, to.offset);
    written.map_err(|error| to.part.write_error(error))
}

#[cfg(test)]
mod tests;
