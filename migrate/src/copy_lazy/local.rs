//! A copy on this host.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use pageferry::error::{Error, Kind, Result};
use pageferry::image::dir::PARENT_LINK;

use super::Copied;
use super::files::Listing;

/// Bytes copied between two looks at whether to stop.
const COPIED_AT_ONCE: usize = 1 << 20;

/// A directory that is removed unless it is published.
struct Part {
    path: PathBuf,
    published: bool,
}

/// Copies to `to`, which is not there or empty, until `stop` is set.
pub(super) fn copy(listing: &Listing, to: &Path, stop: &AtomicBool) -> Result<Copied> {
    let to = std::path::absolute(to).map_err(|error| Error::file("find", to, error))?;
    expect_free(&to)?;
    let part = Part::create(&to)?;
    let mut copied = Copied::default();
    for name in &listing.names {
        let (from, into) = (listing.dir.join(name), part.path.join(name));
        copied.bytes += copy_file(&from, &into, stop)?;
        copied.files += 1;
    }
    if listing.parent.is_some() {
        link_parent(listing, &part.path)?;
    }
    part.publish(&to)?;
    Ok(copied)
}

fn expect_free(to: &Path) -> Result<()> {
    match fs::read_dir(to).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let text = format!(
                "{} is there and not empty: give another directory",
                to.display()
            );
            Err(Error::new(Kind::Usage, text))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file("write to", to, error)),
    }
}

/// The parent stays where it is: the copy leads there from wherever it is.
fn link_parent(listing: &Listing, part: &Path) -> Result<()> {
    let link = listing.dir.join(PARENT_LINK);
    let parent = fs::canonicalize(&link).map_err(|error| Error::file("follow", &link, error))?;
    let copy = part.join(PARENT_LINK);
    symlink(parent, &copy).map_err(|error| Error::file("make", &copy, error))
}

/// Copies what is not a hole; returns the length.
fn copy_file(from: &Path, to: &Path, stop: &AtomicBool) -> Result<u64> {
    let reading = |error: std::io::Error| Error::file("read", from, error);
    let writing = |error: std::io::Error| Error::file("write", to, error);
    let mut input = File::open(from).map_err(reading)?;
    let len = input.metadata().map_err(reading)?.len();
    let output = File::create_new(to).map_err(writing)?;
    output.set_len(len).map_err(writing)?;
    let mut buffer = vec![0; COPIED_AT_ONCE];
    let mut at = 0;
    while let Some((start, end)) = next_data(&input, at, len).map_err(reading)? {
        input.seek(SeekFrom::Start(start)).map_err(reading)?;
        let mut data = (&mut input).take(end - start);
        let mut offset = start;
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, "the copy was stopped"));
            }
            let read = data.read(&mut buffer).map_err(reading)?;
            if read == 0 {
                break;
            }
            output
                .write_all_at(&buffer[..read], offset)
                .map_err(writing)?;
            offset += read as u64;
        }
        at = end;
    }
    output.sync_all().map_err(writing)?;
    Ok(len)
}

/// The next run of bytes that is not a hole, from `at` on.
fn next_data(file: &File, at: u64, len: u64) -> std::io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, from, whence).map(i64::cast_unsigned)
    };
    match seek(at, Whence::SeekData) {
        Ok(start) => Ok(Some((start, seek(start, Whence::SeekHole)?.min(len)))),
        // Nothing but a hole to the end.
        Err(Errno::ENXIO) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::EINVAL) => Ok(Some((at, len))),
        Err(errno) => Err(errno.into()),
    }
}

impl Part {
    /// Makes one beside `to`, on the same file system.
    fn create(to: &Path) -> Result<Part> {
        let failed = |path: &Path, error| Error::file("make the directory", path, error);
        let above = to.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(above).map_err(|error| failed(above, error))?;
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        let path = above.join(format!(".{name}.part-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| failed(&path, error))?;
        Ok(Part {
            path,
            published: false,
        })
    }

    fn publish(mut self, to: &Path) -> Result<()> {
        // An empty directory gives way.
        fs::rename(&self.path, to).map_err(|error| Error::file("rename to", to, error))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn listing(dir: &Path) -> Listing {
        Listing {
            dir: dir.to_owned(),
            names: vec!["a.img".into(), "b.img".into()],
            parent: None,
        }
    }

    #[test]
    fn holes_stay_holes_and_a_failure_leaves_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let from = tmp.path().join("from");
        fs::create_dir(&from).unwrap();
        let holey = File::create(from.join("a.img")).unwrap();
        holey.set_len(8 << 20).unwrap();
        holey.write_all_at(&[7; 4096], 4 << 20).unwrap();
        let to = tmp.path().join("to");
        let stop = AtomicBool::new(false);

        // b.img is not there.
        copy(&listing(&from), &to, &stop).unwrap_err();
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);

        fs::write(from.join("b.img"), "b").unwrap();
        let copied = copy(&listing(&from), &to, &stop).unwrap();
        assert_eq!((copied.files, copied.bytes), (2, (8 << 20) + 1));
        let meta = fs::metadata(to.join("a.img")).unwrap();
        assert!(
            meta.len() == 8 << 20 && meta.blocks() * 512 < 1 << 20,
            "{meta:?}"
        );
        assert_eq!(
            fs::read(to.join("a.img")).unwrap(),
            fs::read(from.join("a.img")).unwrap()
        );
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);

        let refused = copy(&listing(&from), &to, &stop).unwrap_err();
        assert_eq!(refused.kind(), Kind::Usage);
        stop.store(true, Ordering::Relaxed);
        let stopped = copy(&listing(&from), &tmp.path().join("other"), &stop).unwrap_err();
        assert_eq!(stopped.kind(), Kind::Interrupted);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
    }
}
