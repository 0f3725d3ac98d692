//! Files of working sets: `working-set.img` in an image directory, which CRIU does not look for, or any other.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::dir::ImageDir;
use super::open::open_regular;
use crate::error::{Error, Kind, Result};
use crate::lazy::working_set::WorkingSet;
use crate::limits::WORKING_SET_FILE_BYTES_MAX;

/// Name of the working set of an image directory.
pub const WORKING_SET_NAME: &str = "working-set.img";

/// Ends the name of a file that is not complete yet.
const PART: &str = ".part";

/// Reads the working set in the file `path`.
///
/// # Errors
///
/// There is none, or it is damaged or too long.
pub fn read(path: &Path) -> Result<WorkingSet> {
    let failed = |error: io::Error| Error::file("read the working set", path, error);
    let file = open_regular(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let longest = WORKING_SET_FILE_BYTES_MAX;
    file.take(longest + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > longest {
        let text = format!(
            "{} is longer than {longest} bytes: it is not a working set",
            path.display()
        );
        return Err(Error::new(Kind::Image, text));
    }
    WorkingSet::decode(&bytes)
        .map_err(|damage| Error::new(Kind::Image, format!("{}: {damage}", path.display())))
}

/// Reads the working set in the file `path`, unless there is no such file.
///
/// # Errors
///
/// It cannot be read, or is damaged or too long.
pub fn read_if_there(path: &Path) -> Result<Option<WorkingSet>> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read(path).map(Some),
    }
}

impl ImageDir {
    /// Where the working set of these images is, if there is one.
    pub fn working_set_path(&self) -> PathBuf {
        self.path().join(WORKING_SET_NAME)
    }
}

/// A file of a working set that is still to be written. It has its name when it is complete.
#[derive(Debug)]
pub struct WorkingSetFile {
    path: PathBuf,
    part: PathBuf,
    /// Until it is complete.
    file: Option<File>,
}

impl WorkingSetFile {
    /// Begins a file that is to be at `path`, in place of one that may be there.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn create(path: &Path) -> Result<WorkingSetFile> {
        let mut part = path.as_os_str().to_owned();
        part.push(PART);
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|error| Error::file("create", &part, error))?;
        Ok(WorkingSetFile {
            path: path.to_owned(),
            part,
            file: Some(file),
        })
    }

    /// Where it is to be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `set` and gives the file its name.
    ///
    /// # Errors
    ///
    /// The disk refuses it. What was there before is still there.
    pub fn complete(mut self, set: &WorkingSet) -> Result<()> {
        let failed = |error| Error::file("write the working set", &self.path, error);
        if let Some(file) = &mut self.file {
            file.write_all(&set.encode()).map_err(failed)?;
        }
        fs::rename(&self.part, &self.path).map_err(failed)?;
        self.file = None;
        Ok(())
    }
}

impl Drop for WorkingSetFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing half-written stays; a missing file is as good.
            let _ = fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageSize;

    #[test]
    fn a_file_is_there_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(WORKING_SET_NAME);
        assert!(read_if_there(&path).unwrap().is_none());
        drop(WorkingSetFile::create(&path).unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        let set = WorkingSet::empty(PageSize::KIB_4);
        let file = WorkingSetFile::create(&path).unwrap();
        file.complete(&set).unwrap();
        assert_eq!(read(&path).unwrap(), set);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::write(&path, "no working set").unwrap();
        let error = read_if_there(&path).unwrap_err().to_string();
        assert!(
            error.contains("working-set.img: it is not a working set"),
            "{error}"
        );
        assert!(read(dir.path()).is_err(), "a directory");
        assert!(WorkingSetFile::create(&dir.path().join("none/set")).is_err());
    }
}
