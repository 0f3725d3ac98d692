//! Which files a destination needs.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use pageferry::error::{Error, Result};
use pageferry::image::dir::{ImageDir, PARENT_LINK};

/// Files that no restore reads, and that may still grow: logs, pid files, parts of a page server.
const LEFT_OUT: [&str; 3] = [".log", ".pid", ".part"];

/// The files of a directory that are copied.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub(super) dir: PathBuf,
    /// Names, sorted.
    pub(super) names: Vec<OsString>,
    /// What the link to the parent says, if there is one.
    pub(super) parent: Option<PathBuf>,
}

impl Listing {
    /// The images in `dir`, and what runtimes put beside them (`descriptors.json`).
    pub(super) fn of(dir: &ImageDir) -> Result<Listing> {
        let failed = |error| Error::file("list", dir.path(), error);
        let mut names = Vec::new();
        for entry in fs::read_dir(dir.path()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let shown = name.to_string_lossy();
            let left_out = LEFT_OUT.iter().any(|end| shown.ends_with(end));
            if entry.file_type().map_err(failed)?.is_file() && !left_out {
                names.push(name);
            }
        }
        names.sort();
        Ok(Listing {
            dir: dir.path().to_owned(),
            names,
            parent: fs::read_link(dir.path().join(PARENT_LINK)).ok(),
        })
    }
}
