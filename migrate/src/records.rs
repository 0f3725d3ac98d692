//! Small files that survive a crash: whole or absent, and on disk before the call returns.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes `value` to `path` as JSON; what was there before stays until all of it is on disk.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let failed = |error: io::Error| Error::file("write", path, error);
    let part = path.with_extension("part");
    let text = serde_json::to_vec_pretty(value).map_err(|error| failed(error.into()))?;
    let written = write_part(&part, &text).and_then(|()| fs::rename(&part, path));
    if let Err(error) = written {
        // The error that counts is that of the writing.
        let _ = fs::remove_file(&part);
        return Err(failed(error));
    }
    File::open(directory_of(path))
        .and_then(|dir| dir.sync_all())
        .map_err(failed)
}

/// The directory that `path` is in. A name alone is in the current one, and has an empty path for a parent.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn write_part(part: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::create(part)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Reads what [`write`] wrote; `None` if there is no such file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let text = format!("{} is not what pageferry wrote there", path.display());
            Error::wrap(Kind::Io, text, error)
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_alone_is_in_the_current_directory() {
        assert_eq!(directory_of(Path::new("port")), Path::new("."));
        assert_eq!(directory_of(Path::new("a/port")), Path::new("a"));
        assert_eq!(directory_of(Path::new("/port")), Path::new("/"));
    }

    #[test]
    fn a_record_is_read_back_and_the_newest_counts() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("record.json");
        assert_eq!(read::<u32>(&path).unwrap(), None);
        for value in [7, 8] {
            write(&path, &value).unwrap();
            assert_eq!(read(&path).unwrap(), Some(value));
        }
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
        fs::write(&path, "{").unwrap();
        let error = read::<u32>(&path).unwrap_err().to_string();
        assert!(error.contains("record.json"), "{error}");
    }
}
