//! A directory for targets that read files: in memory, where there is such a place.

use std::path::Path;

/// An empty directory that is removed when it is dropped.
pub(crate) fn directory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let made = match shm.is_dir() {
        true => tempfile::tempdir_in(shm),
        false => tempfile::tempdir(),
    };
    made.expect("a directory for temporary files")
}
