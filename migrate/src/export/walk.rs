//! Reads a directory tree and writes it as a layer.
//!
//! A container may change its files meanwhile, on purpose too. So directories are held open, and no name but the last
//! of a path is ever looked up: nothing outside the tree is read.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use pageferry::error::{Error, Kind as ErrorKind, Result};
use pageferry::limits::EXPORT_DEPTH_MAX;

use super::marks::{Kind, LayerEntry, Marks, Verdict, Xattrs, allowed};
use super::report::LayerReport;
use super::tarball::{Entry, Layer, Meta, joined};

/// Where a tree is.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) dir: PathBuf,
    pub(super) marks: Marks,
    /// The mount that shows the tree with all that lies below it.
    pub(super) mount: Option<PathBuf>,
}

/// Writes the tree as a layer to `to`.
pub(super) fn write_layer<W: Write>(tree: &Tree, to: W) -> Result<(W, LayerReport)> {
    write(tree, None, to)
}

/// Writes the tree to `to` without whiteouts. What it hides of the trees `below` is listed in the report.
pub(super) fn write_difference<W: Write>(
    tree: &Tree,
    below: &[Tree],
    to: W,
) -> Result<(W, LayerReport)> {
    write(tree, Some(below), to)
}

fn write<W: Write>(tree: &Tree, below: Option<&[Tree]>, to: W) -> Result<(W, LayerReport)> {
    let root = Dir::open(&tree.dir)?;
    let mut walk = Walk {
        below,
        mount: tree.mount.as_deref(),
        device: root.device,
        layer: Layer::new(to),
        names: HashMap::new(),
        report: LayerReport::default(),
    };
    walk.root(&root, tree.marks)?;
    let to = walk.layer.finish();
    let to = to.map_err(|error| Error::wrap(ErrorKind::Io, "cannot write the layer", error))?;
    Ok((to, walk.report))
}

/// A directory that is held open.
struct Dir {
    file: File,
    /// Its path, for messages.
    path: PathBuf,
    device: u64,
}

impl Dir {
    fn open(path: &Path) -> Result<Dir> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .map_err(|error| Error::file("open", path, error))?;
        Dir::of(file, path.to_owned())
    }

    fn of(file: File, path: PathBuf) -> Result<Dir> {
        let meta = file.metadata();
        let meta = meta.map_err(|error| Error::file("look at", &path, error))?;
        Ok(Dir {
            device: meta.dev(),
            file,
            path,
        })
    }

    fn child(&self, name: &OsStr) -> Result<Dir> {
        let path = self.path.join(name);
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(self.at(name))
            .map_err(|error| Error::file("open", &path, error))?;
        Dir::of(file, path)
    }

    /// A path by which a name in it is found, whatever becomes of the directory's own path.
    fn at(&self, name: &OsStr) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd())).join(name)
    }

    /// Its names, in one order.
    fn names(&self) -> Result<Vec<OsString>> {
        let failed = |error| Error::file("read", &self.path, error);
        let entries = fs::read_dir(self.at(OsStr::new("."))).map_err(failed)?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let mut names = names.collect::<io::Result<Vec<_>>>().map_err(failed)?;
        names.sort();
        Ok(names)
    }
}

struct Walk<'a, W: Write> {
    /// Where what is hidden is listed, and no whiteouts are written: the trees below.
    below: Option<&'a [Tree]>,
    mount: Option<&'a Path>,
    /// Another device is another file system, which is mounted in the tree and no part of it.
    device: u64,
    layer: Layer<W>,
    /// First paths of files with several names.
    names: HashMap<(u64, u64), Vec<u8>>,
    report: LayerReport,
}

/// How a directory is read.
#[derive(Clone, Copy)]
struct DirContext {
    marks: Marks,
    attribute_whiteouts: bool,
    /// Nothing that lies below shows through.
    hides: bool,
    depth: usize,
}

impl<W: Write> Walk<'_, W> {
    fn root(&mut self, root: &Dir, marks: Marks) -> Result<()> {
        let failed = |error| Error::file("read", &root.path, error);
        let meta = root.file.metadata().map_err(failed)?;
        let xattrs = xattrs(&root.at(OsStr::new("."))).map_err(failed)?;
        let Verdict::Keep(kept) = marks.judge(Kind::Directory, xattrs, false) else {
            return Ok(());
        };
        let attribute_whiteouts = kept.attribute_whiteouts;
        let written = self
            .layer
            .add(b"", &Entry::Directory, &described(&meta, kept.xattrs));
        written.map_err(failed)?;
        let within = DirContext {
            marks,
            attribute_whiteouts,
            hides: false,
            depth: 0,
        };
        self.directory(root, b"", within)
    }

    fn directory(&mut self, dir: &Dir, path: &[u8], within: DirContext) -> Result<()> {
        if within.depth > EXPORT_DEPTH_MAX {
            let text = format!(
                "{} lies more than {EXPORT_DEPTH_MAX} directories deep",
                dir.path.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let names = dir.names()?;
        if let (Some(below), true) = (self.below, within.hides) {
            let mut hidden = hidden(below, path, &names)?;
            self.report.hidden.append(&mut hidden);
        }
        for name in names {
            self.file(dir, &name, &joined(path, name.as_bytes()), within)?;
        }
        Ok(())
    }

    fn file(&mut self, dir: &Dir, name: &OsStr, path: &[u8], within: DirContext) -> Result<()> {
        let at = dir.at(name);
        let failed = |error| Error::file("export", &dir.path.join(name), error);
        let meta = fs::symlink_metadata(&at).map_err(failed)?;
        let found = xattrs(&at).map_err(failed)?;
        let judged = within
            .marks
            .judge(kind(&meta), found, within.attribute_whiteouts);
        let Verdict::Keep(kept) = judged else {
            self.report.whiteouts += 1;
            if self.below.is_some() {
                self.report.hidden.push(listed(path)?);
                return Ok(());
            }
            return self.layer.add_whiteout(path).map_err(failed);
        };
        allowed(name.as_bytes()).map_err(|error| {
            let text = format!("cannot export {}: {error}", dir.path.join(name).display());
            Error::new(ErrorKind::Unsupported, text)
        })?;
        if kept.from_mount {
            return self.by_mount(dir, name, path, within);
        }
        if meta.is_dir() {
            return self.subdirectory(dir, name, path, (&meta, kept), within);
        }
        if meta.file_type().is_socket() {
            self.report.sockets.push(shown(path));
            return Ok(());
        }
        let key = (meta.dev(), meta.ino());
        let described = described(&meta, kept.xattrs);
        if meta.nlink() > 1 {
            if let Some(first) = self.names.get(&key) {
                self.report.hard_links += 1;
                let entry = Entry::HardLink(first);
                return self.layer.add(path, &entry, &described).map_err(failed);
            }
            self.names.insert(key, path.to_vec());
        }
        self.report.files += 1;
        self.plain(&at, path, &meta, &described).map_err(failed)
    }

    /// A file that is no directory and no second name.
    fn plain(
        &mut self,
        at: &Path,
        path: &[u8],
        meta: &Metadata,
        described: &Meta,
    ) -> io::Result<()> {
        let kind = meta.file_type();
        // Device numbers of Linux have 32 bits in all.
        let number = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
        let numbers = (number(major(meta.rdev())), number(minor(meta.rdev())));
        if kind.is_symlink() {
            let target = fs::read_link(at)?.into_os_string().into_vec();
            return self.layer.add(path, &Entry::Symlink(&target), described);
        }
        if !kind.is_file() {
            let entry = match kind {
                _ if kind.is_fifo() => Entry::Fifo,
                _ if kind.is_char_device() => Entry::CharDevice(numbers.0, numbers.1),
                _ => Entry::BlockDevice(numbers.0, numbers.1),
            };
            return self.layer.add(path, &entry, described);
        }
        let file = OpenOptions::new()
            .read(true)
            // What has become a FIFO meanwhile must not be waited for.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(at)?;
        let before = file.metadata()?;
        if (before.dev(), before.ino()) != (meta.dev(), meta.ino()) {
            return Err(io::Error::other(
                "another file has taken its place: export a paused container (--pause)",
            ));
        }
        let size = before.len();
        if before.blocks().saturating_mul(512) < size {
            self.report.sparse.push(shown(path));
        }
        self.layer.add_file(path, described, size, &file)?;
        let after = file.metadata()?;
        let times = |meta: &Metadata| {
            (
                meta.len(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
            )
        };
        if times(&before) != times(&after) {
            self.report.changed.push(shown(path));
        }
        self.report.bytes += size;
        Ok(())
    }

    fn subdirectory(
        &mut self,
        dir: &Dir,
        name: &OsStr,
        path: &[u8],
        (meta, kept): (&Metadata, LayerEntry),
        within: DirContext,
    ) -> Result<()> {
        let failed = |error| Error::file("export", &dir.path.join(name), error);
        self.report.directories += 1;
        let child = dir.child(name)?;
        let described = described(meta, kept.xattrs);
        self.layer
            .add(path, &Entry::Directory, &described)
            .map_err(failed)?;
        if kept.opaque {
            self.report.opaque += 1;
            self.opaque(path).map_err(failed)?;
        }
        if child.device != self.device {
            self.report.mounts.push(shown(path));
            return Ok(());
        }
        let within = DirContext {
            attribute_whiteouts: kept.attribute_whiteouts,
            hides: within.hides || kept.opaque,
            depth: within.depth + 1,
            ..within
        };
        self.directory(&child, path, within)
    }

    fn opaque(&mut self, path: &[u8]) -> io::Result<()> {
        match self.below {
            Some(_) => Ok(()),
            None => self.layer.add_opaque(path),
        }
    }

    /// Takes a file, or a directory with all that is in it, from the mount: the layer has a part of it alone.
    fn by_mount(&mut self, dir: &Dir, name: &OsStr, path: &[u8], within: DirContext) -> Result<()> {
        let here = dir.path.join(name);
        let Some(mount) = self.mount else {
            let text = format!(
                "{} has its contents in a layer below (overlay.redirect or overlay.metacopy): name the mount \
                 by --merged, or the container",
                here.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let parent = match Path::new(OsStr::from_bytes(path)).parent() {
            Some(parent) => parent.to_owned(),
            None => PathBuf::new(),
        };
        let mut shown_by = Dir::open(mount)?;
        let device = std::mem::replace(&mut self.device, shown_by.device);
        for part in parent.components() {
            shown_by = shown_by.child(part.as_os_str())?;
        }
        let within = DirContext {
            marks: Marks::None,
            hides: true,
            ..within
        };
        self.report.from_mount.push(shown(path));
        let meta = fs::symlink_metadata(shown_by.at(name));
        let is_dir = meta.is_ok_and(|meta| meta.is_dir());
        let done = self
            .file(&shown_by, name, path, within)
            .and_then(|()| match is_dir {
                // All of it is in this layer: what lies below at its new place is another directory's.
                true => self
                    .layer
                    .add_opaque(path)
                    .map_err(|error| Error::file("export", &here, error)),
                false => Ok(()),
            });
        self.device = device;
        done
    }
}

/// What the trees `below` have in the directory `path` beside `names`.
fn hidden(below: &[Tree], path: &[u8], names: &[OsString]) -> Result<Vec<String>> {
    let mut hidden = BTreeSet::new();
    'trees: for tree in below {
        let mut dir = Dir::open(&tree.dir)?;
        for part in Path::new(OsStr::from_bytes(path)).components() {
            match dir.child(part.as_os_str()) {
                Ok(child) => dir = child,
                // It has no such directory.
                Err(_) => continue 'trees,
            }
        }
        let more = dir
            .names()?
            .into_iter()
            .filter(|name| !names.contains(name));
        hidden.extend(more);
    }
    let paths = hidden
        .iter()
        .map(|name| listed(&joined(path, name.as_bytes())));
    paths.collect()
}

/// A path in a list of deletions, which is text.
fn listed(path: &[u8]) -> Result<String> {
    match std::str::from_utf8(path) {
        Ok(path) => Ok(format!("/{path}")),
        Err(_) => {
            let text = format!(
                "the deletion of {} cannot be written down: its name is not UTF-8",
                shown(path)
            );
            Err(Error::new(ErrorKind::Unsupported, text))
        }
    }
}

/// A path for people.
fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

fn kind(meta: &Metadata) -> Kind {
    let kind = meta.file_type();
    match kind {
        _ if kind.is_dir() => Kind::Directory,
        _ if kind.is_file() => Kind::File(meta.len()),
        _ if kind.is_char_device() => Kind::Device(major(meta.rdev()), minor(meta.rdev())),
        _ => Kind::Other,
    }
}

fn described(meta: &Metadata, xattrs: Xattrs) -> Meta {
    Meta {
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        // The kernel tells less than a second's worth.
        mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
        xattrs,
    }
}

fn xattrs(path: &Path) -> io::Result<Xattrs> {
    let names = match xattr::list(path) {
        // A file system without attributes has none.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let mut found = Vec::new();
    for name in names {
        // One that has been taken away since is none.
        if let Some(value) = xattr::get(path, &name)? {
            found.push((name.into_vec(), value));
        }
    }
    Ok(found)
}
