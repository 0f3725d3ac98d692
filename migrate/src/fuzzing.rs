//! What reads bytes of others, for the fuzzers in fuzz/ alone: nothing here is promised to anybody else.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry::error::Result;
use pageferry::replay::Player;

use crate::files::{Permitted, ReceivedTree, StagingDir};
use crate::service_log::{LogReader, Next};
use crate::{archive, export, files, image_stream, watch};

/// Unpacks a stream of image files into `dir`.
///
/// # Errors
/// It is no such stream.
pub fn unpack_images(from: &[u8], dir: &Path) -> Result<()> {
    image_stream::unpack(from, dir)
}

/// Unpacks the archive `file` into `parts`, and its files over `root`.
///
/// # Errors
/// It is no archive of a container, or its files lead out of `root`.
pub fn unpack_archive(file: &Path, parts: &Path, root: &Path) -> Result<()> {
    archive::restore::unpack_parts(file, parts)?;
    archive::restore::apply_files(parts, root)
}

/// Takes the image of the OCI layout in `dir` over into a new one in `to`, and tells the number of its layers.
///
/// # Errors
/// It is no such layout, or damaged.
pub fn take_base(dir: &Path, to: &Path) -> Result<usize> {
    export::take_base(dir, to)
}

/// The number of rules in a file of `pageferry watch`.
///
/// # Errors
/// There is a mistake in it, which the text names with its line.
pub fn rules(text: &str) -> std::result::Result<usize, String> {
    watch::count_rules(text)
}

/// Reads the log in `dir` to its end, as a replay does, and tells the number of entries and where the last one ends.
///
/// # Errors
/// The log is damaged, or the service would have had to answer otherwise.
pub fn read_log(dir: &Path) -> Result<(u64, u64)> {
    let mut reader = LogReader::open(dir)?;
    let mut player = Player::new(false).without_order();
    let mut entries = 0;
    while let Next::Entry(entry) = reader.next()? {
        entries += 1;
        if player.take(&entry).is_err() {
            break;
        }
    }
    Ok((entries, reader.position()))
}

/// Decodes the index of a tree of files, and tells its digest.
///
/// # Errors
/// It is none.
pub fn file_index(bytes: &[u8]) -> Result<String> {
    files::index_digest(bytes)
}

/// A tree of files that arrives beside its place.
#[derive(Debug)]
pub struct ArrivingTree {
    tree: ReceivedTree,
    at: PathBuf,
}

impl ArrivingTree {
    /// One that becomes `target`, and is empty.
    ///
    /// # Errors
    /// The disk.
    pub fn new(target: &Path) -> Result<ArrivingTree> {
        let staging = StagingDir::of(target);
        let permitted = Permitted {
            replace: false,
            unused: false,
        };
        staging.prepare("fuzz", permitted)?;
        let mut at = target.as_os_str().to_owned();
        at.push(".pageferry/tree");
        let tree = ReceivedTree::new(staging)?;
        tree.index()?;
        Ok(ArrivingTree {
            tree,
            at: at.into(),
        })
    }

    /// Carries the operations of a stream out.
    ///
    /// # Errors
    /// The stream is damaged, or names what is not there.
    pub fn store(&self, stream: &[u8]) -> Result<()> {
        self.tree.store(stream)
    }

    /// What the tree holds, as its receiver says: packed.
    ///
    /// # Errors
    /// The disk.
    pub fn index(&self) -> Result<Vec<u8>> {
        self.tree.index()
    }

    /// The names at the top of what has arrived.
    pub fn names(&self) -> Vec<std::ffi::OsString> {
        let entries = fs::read_dir(&self.at).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).collect()
    }
}
