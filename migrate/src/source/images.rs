//! The image files of a dump on their way to the agent.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Result};

/// What runc and crun note of a container's standard streams beside the images.
const DESCRIPTORS: &str = "descriptors.json";

/// Writes the image files of `dir`, but for those in `sent`, as a tar stream, and tells their bytes.
pub(super) fn pack(dir: &Path, sent: &BTreeSet<OsString>, out: impl io::Write) -> Result<u64> {
    let failed = |path: &Path, error| Error::file("send", path, error);
    let mut archive = tar::Builder::new(out);
    let mut bytes = 0;
    let entries = std::fs::read_dir(dir).map_err(|error| failed(dir, error))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let is_image = path.extension().is_some_and(|extension| extension == "img");
        let wanted = |name: &&OsStr| (is_image || *name == DESCRIPTORS) && !sent.contains(*name);
        let Some(name) = path.file_name().filter(wanted) else {
            continue;
        };
        let mut file = File::open(&path).map_err(|error| failed(&path, error))?;
        bytes += file.metadata().map_or(0, |meta| meta.len());
        archive
            .append_file(name, &mut file)
            .map_err(|error| failed(&path, error))?;
    }
    archive
        .into_inner()
        .and_then(|mut out| out.flush())
        .map_err(|error| failed(dir, error))?;
    Ok(bytes)
}
