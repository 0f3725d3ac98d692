//! An image directory that sessions write to: what they share, and what outlives them.
//!
//! ```text
//! DIR/.pages-65537.img.part     while a session writes
//! DIR/.pagemap-12.img.part
//! DIR/pages-65537.img           after its CLOSE
//! DIR/pagemap-12.img
//! DIR/parent -> ../previous     with --prev-images-dir
//! ```
//!
//! With `--split-lazy` there is a second directory, which the pages go to that a lazy restore can do without.
//!
//! Invariants: a name without the dot is a whole image; the number of a pages file is taken by
//! creating its part exclusively, so two sessions never share one, in whatever processes they run;
//! whoever writes holds a shared lock on the directory, so parts that nobody can be writing to any
//! more are known by an exclusive one, and removed.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::check::{check_parents, check_previous, check_split, check_whole, check_writable};
use super::consume::refuse_consumed;
use super::dir::{ImageDir, PARENT_LINK};
use super::tree::names::{check_empty, remove_stale};
use crate::error::{Error, Kind, Result};
use crate::ferry::hash::{HashKey, PageHasher};
use crate::limits::PAGES_ID_FIRST;
use crate::units::PageSize;

/// What is on disk when a session's CLOSE is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sync {
    /// Whatever the kernel has written by itself, as with CRIU.
    #[default]
    None,
    /// The images, names and all: they survive a power cut.
    Close,
    /// The same, and every write waits for the disk as it is made.
    Always,
}

impl Sync {
    /// Flags of `open(2)` for pages files.
    pub(super) fn open_flags(self) -> i32 {
        match self {
            Sync::Always => libc::O_DSYNC,
            Sync::None | Sync::Close => 0,
        }
    }
}

/// A directory that sessions write images to. See the module's text.
#[derive(Debug)]
pub struct ImageStore {
    dir: ImageDir,
    sync: Sync,
    /// The directory itself, with the shared lock.
    lock: Flock<File>,
    /// The number of a pages file that may be free.
    next_pages_id: AtomicU32,
    /// Where pages go that a lazy restore can do without, if not here.
    lazy: Option<Arc<ImageStore>>,
    /// Compares the pages of the processes of a tree, if each is to be stored once.
    tree: Option<PageHasher>,
}

impl ImageStore {
    /// Opens the directory `path` for images of a host with pages of `page`, and removes the parts
    /// that killed sessions left behind. With `previous` (relative to `path`) the link to the parent
    /// is made first.
    pub fn open(
        path: &Path,
        page: PageSize,
        previous: Option<&Path>,
        sync: Sync,
    ) -> Result<Arc<ImageStore>> {
        ImageStore::open_alone(path, page, previous, sync).map(Arc::new)
    }

    /// Opens the directory `path` for what a lazy restore needs of images, and `lazy_path`, which is made if it
    /// is missing, for the pages that it can do without.
    ///
    /// # Errors
    ///
    /// Those of [`ImageStore::open`]; [`Kind::Usage`] if both are one directory, or one has a parent.
    pub fn open_split(
        path: &Path,
        lazy_path: &Path,
        page: PageSize,
        sync: Sync,
    ) -> Result<Arc<ImageStore>> {
        let failed = |error| Error::file("make the directory (--split-lazy)", lazy_path, error);
        std::fs::create_dir_all(lazy_path).map_err(failed)?;
        let (dir, lazy_dir) = (
            ImageDir::open_any(path, page)?,
            ImageDir::open_any(lazy_path, page)?,
        );
        check_split(&dir, &lazy_dir)?;
        let lazy = ImageStore::open(lazy_path, page, None, sync);
        let lazy = lazy.map_err(|error| error.within("--split-lazy"))?;
        let mut store = ImageStore::open_alone(path, page, None, sync)?;
        store.lazy = Some(lazy);
        Ok(Arc::new(store))
    }

    /// Opens the directory `path` for one session that stores each page of a process tree once. `previous` is as for
    /// [`ImageStore::open`]. Pages are compared by their hashes under `key`, which dumped processes may not know.
    ///
    /// # Errors
    ///
    /// Those of [`ImageStore::open`]; [`Kind::Usage`] if there are images already.
    pub fn open_tree(
        path: &Path,
        page: PageSize,
        previous: Option<&Path>,
        sync: Sync,
        key: HashKey,
    ) -> Result<Arc<ImageStore>> {
        if let Ok(dir) = ImageDir::open_any(path, page)
            && !dir.targets()?.is_empty()
        {
            // Before a link to the parent is made.
            check_empty(&dir)?;
        }
        let mut store = ImageStore::open_alone(path, page, previous, sync)?;
        check_empty(&store.dir)?;
        store.tree = Some(PageHasher::new(key, page));
        Ok(Arc::new(store))
    }

    fn open_alone(
        path: &Path,
        page: PageSize,
        previous: Option<&Path>,
        sync: Sync,
    ) -> Result<ImageStore> {
        let dir = ImageDir::open_any(path, page)?;
        check_writable(&dir)?;
        let file =
            File::open(dir.path()).map_err(|error| Error::file("open", dir.path(), error))?;
        let lock = lock(&dir, file)?;
        match previous {
            Some(previous) => link_parent(&dir, previous)?,
            None => check_parents(&dir)?,
        }
        if let Some(parent) = dir.parent()? {
            refuse_consumed(&parent)?;
        }
        Ok(ImageStore {
            dir,
            sync,
            lock,
            next_pages_id: AtomicU32::new(PAGES_ID_FIRST),
            lazy: None,
            tree: None,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &ImageDir {
        &self.dir
    }

    /// Where pages go that a lazy restore can do without, if not here.
    pub(super) fn lazy(&self) -> Option<&Arc<ImageStore>> {
        self.lazy.as_ref()
    }

    /// What compares the pages of the processes of a tree, if each is to be stored once.
    pub(super) fn tree(&self) -> Option<&PageHasher> {
        self.tree.as_ref()
    }

    /// What is to be on disk when a session is answered.
    pub fn sync(&self) -> Sync {
        self.sync
    }

    /// Path of the part that becomes the image `name`.
    pub(super) fn part(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!(".{name}{PART_SUFFIX}"))
    }

    /// Creates the part of a pages file with a number that nobody has.
    pub(super) fn create_pages(&self) -> Result<(u32, File)> {
        loop {
            let id = self.next_pages_id.fetch_add(1, Ordering::Relaxed);
            let part = self.part(&pages_name(id));
            match create_new(&part, self.sync.open_flags()) {
                Ok(file) if !self.dir.pages_path(id).exists() => return Ok((id, file)),
                Ok(_) => remove(&part)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::file("create", &part, error)),
            }
        }
    }

    /// Makes the names that were given so far survive a power cut.
    pub(super) fn sync_names(&self) -> Result<()> {
        let synced = self.lock.sync_all();
        synced.map_err(|error| Error::file("sync", self.dir.path(), error))
    }
}

/// Access to images, as CRIU makes them: readable for all, unless the umask forbids it.
const IMAGE_MODE: u32 = 0o644;

/// Ends the names of images that are being written.
const PART_SUFFIX: &str = ".part";

/// Name of the pages file with number `id`.
pub(super) fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

/// Creates a file that must not exist yet, with the access of CRIU's images. `flags` are more flags of
/// `open(2)`.
pub(super) fn create_new(path: &Path, flags: i32) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(IMAGE_MODE)
        .custom_flags(flags)
        .open(path)
}

/// Removes a file.
pub(super) fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|error| Error::file("remove", path, error))
}

/// Makes `DIR/parent` point to `previous`, as CRIU does. A link that is there already must agree.
fn link_parent(dir: &ImageDir, previous: &Path) -> Result<()> {
    let link = dir.path().join(PARENT_LINK);
    let target = dir.path().join(previous);
    if !target.is_dir() {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "--prev-images-dir {} is not a directory (it is taken relative to {})",
                previous.display(),
                dir.path().display()
            ),
        ));
    }
    let parent = ImageDir::open_any(&target, dir.page())?;
    check_previous(dir, &parent)?;
    check_whole(&parent)?;
    match std::os::unix::fs::symlink(previous, &link) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = link.canonicalize().ok();
            if there.is_some() && there == target.canonicalize().ok() {
                return Ok(());
            }
            Err(Error::new(
                Kind::Usage,
                format!(
                    "{} is there already and does not lead to --prev-images-dir {}: remove one of \
                     the two",
                    link.display(),
                    previous.display()
                ),
            ))
        }
        Err(error) => Err(Error::file("make the link", &link, error)),
    }
}

/// Takes the shared lock. If nobody else has it, stale parts are removed first.
fn lock(dir: &ImageDir, file: File) -> Result<Flock<File>> {
    let failed = |errno: Errno| Error::file("lock", dir.path(), errno);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            remove_stale_parts(dir)?;
            remove_stale(dir)?;
            lock.relock(FlockArg::LockShared).map_err(failed)?;
            Ok(lock)
        }
        Err((file, Errno::EWOULDBLOCK)) => {
            Flock::lock(file, FlockArg::LockShared).map_err(|(_, errno)| failed(errno))
        }
        Err((_, errno)) => Err(failed(errno)),
    }
}

fn remove_stale_parts(dir: &ImageDir) -> Result<()> {
    let failed = |error| Error::file("list", dir.path(), error);
    for entry in dir.path().read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name.to_str().is_some_and(is_part) {
            let path = entry.path();
            tracing::warn!(
                "removing {}, which a session that was killed left behind",
                path.display()
            );
            remove(&path)?;
        }
    }
    Ok(())
}

fn is_part(name: &str) -> bool {
    let image = name
        .strip_prefix('.')
        .and_then(|name| name.strip_suffix(PART_SUFFIX));
    image.is_some_and(|image| {
        (image.starts_with("pages-") || image.starts_with("pagemap-")) && image.ends_with(".img")
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::sys::stat::{Mode, umask};

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn store(dir: &Path) -> Arc<ImageStore> {
        ImageStore::open(dir, PAGE, None, Sync::None).unwrap()
    }

    #[test]
    fn stale_parts_go_unless_somebody_may_be_writing_them() {
        let tmp = tempfile::tempdir().unwrap();
        let names = [
            ".pages-65537.img.part",
            ".pagemap-7.img.part",
            ".pagemap-shmem-7.img.part",
        ];
        let others = ["pages-65537.img", ".pages.part", "pagemap-7.img.part"];
        for name in names.iter().chain(&others) {
            std::fs::write(tmp.path().join(name), "x").unwrap();
        }
        let first = store(tmp.path());
        let there = |name: &&str| tmp.path().join(name).exists();
        assert!(!names.iter().any(&there));
        assert!(others.iter().all(there));
        std::fs::write(tmp.path().join(names[0]), "x").unwrap();
        let second = store(tmp.path());
        assert!(there(&names[0]));
        drop((first, second));
        store(tmp.path());
        assert!(!there(&names[0]));
    }

    #[test]
    fn numbers_of_pages_files_are_never_given_twice() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("pages-65538.img"), "x").unwrap();
        let (first, second) = (store(tmp.path()), store(tmp.path()));
        let ids: Vec<u32> = [&first, &second, &first]
            .map(|store| store.create_pages().unwrap().0)
            .into();
        assert_eq!(ids, [65537, 65539, 65540]);
    }

    #[test]
    fn images_follow_the_umask_as_those_of_criu_do() {
        let tmp = tempfile::tempdir().unwrap();
        let store = store(tmp.path());
        for (mask, mode) in [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)] {
            // Each test has a process of its own.
            umask(Mode::from_bits_truncate(mask));
            let (_, file) = store.create_pages().unwrap();
            let found = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(found, mode, "umask {mask:o}");
        }
    }

    #[test]
    fn the_parent_link_is_made_once() {
        let tmp = tempfile::tempdir().unwrap();
        for name in ["now", "before", "other"] {
            std::fs::create_dir(tmp.path().join(name)).unwrap();
        }
        let now = tmp.path().join("now");
        let open =
            |previous: &str| ImageStore::open(&now, PAGE, Some(Path::new(previous)), Sync::None);
        assert_eq!(open("../none").unwrap_err().kind(), Kind::Usage);
        open("../before").unwrap();
        let link = std::fs::read_link(now.join(PARENT_LINK)).unwrap();
        assert_eq!(link, Path::new("../before"));
        open("../before").unwrap();
        assert_eq!(open("../other").unwrap_err().kind(), Kind::Usage);
    }
}
