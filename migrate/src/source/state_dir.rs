//! The directory of one migration below the source's `--state-dir`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::MigrationId;
use serde::de::DeserializeOwned;

use crate::records;

/// Makes the directory of the migration `id`, for its owner alone: it may hold memory of processes, and commands.
pub(super) fn make(state_dir: &Path, id: &MigrationId) -> Result<PathBuf> {
    fs::create_dir_all(state_dir)
        .map_err(|error| Error::file("make the directory", state_dir, error))?;
    let dir = state_dir.join(id.to_string());
    fs::create_dir(&dir).map_err(|error| Error::file("make the directory", &dir, error))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
        .map_err(|error| Error::file("protect", &dir, error))?;
    Ok(dir)
}

/// The facts of the migration in `dir`, in the file `name`.
///
/// # Errors
/// They cannot be read, or there are none: it is not a migration's directory.
pub(super) fn facts<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T> {
    records::read(&dir.join(name))?.ok_or_else(|| {
        let text = format!("{} is not a migration's directory", dir.display());
        Error::new(Kind::Usage, text)
    })
}
