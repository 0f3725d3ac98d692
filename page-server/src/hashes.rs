//! The files of `--save-hashes` and `--known-hashes`.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::known_hashes::KnownHashes;
use pageferry::limits::HASHES_FILE_BYTES_MAX;
use pageferry::units::PageSize;

/// Makes the file of --save-hashes.
pub(crate) fn to_be_saved(path: &Path) -> Result<File> {
    // What is there of another migration is worth nothing, and others may have it open.
    let removed = fs::remove_file(path);
    let made = match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path),
    };
    made.map_err(|error| Error::file("make the file (--save-hashes)", path, error))
}

/// Reads the file of --known-hashes. Without it the clients are asked.
pub(crate) fn known(path: &Path, page: PageSize) -> Option<KnownHashes> {
    read(path, page)
        .inspect_err(|why| {
            tracing::warn!(
                "{} (--known-hashes) cannot be used: {why}: the clients are asked",
                path.display()
            );
        })
        .ok()
}

fn read(path: &Path, page: PageSize) -> Result<KnownHashes> {
    let failed = |error| Error::file("read", path, error);
    let bytes = fs::metadata(path).map_err(failed)?.len();
    if bytes > HASHES_FILE_BYTES_MAX {
        let text = format!("it has {bytes} bytes, which no dump's hashes have");
        return Err(Error::new(Kind::Usage, text));
    }
    let file = fs::read(path).map_err(failed)?;
    KnownHashes::read(&file, page)
        .map_err(|error| Error::wrap(Kind::Usage, "it is not whole", error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_saved_is_for_its_owner_alone_and_half_of_it_is_not_used() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("hashes");
        assert!(known(&path, PageSize::KIB_4).is_none());
        fs::write(&path, "another migration's").unwrap();
        assert!(known(&path, PageSize::KIB_4).is_none());
        let file = to_be_saved(&path).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.mode() & 0o777, metadata.len()), (0o600, 0));
        assert!(known(&path, PageSize::KIB_4).is_none());
        file.set_len(HASHES_FILE_BYTES_MAX + 1).unwrap();
        assert!(
            read(&path, PageSize::KIB_4)
                .unwrap_err()
                .to_string()
                .contains("bytes")
        );
        let missing = to_be_saved(Path::new("/nowhere/hashes")).unwrap_err();
        assert!(missing.to_string().contains("--save-hashes"), "{missing}");
    }
}
