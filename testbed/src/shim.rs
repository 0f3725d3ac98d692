//! The `criu` that stands before a real one, as a runtime finds it: by PATH.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::Result;

use crate::criu::Criu;
use crate::workspace::binary;

/// A directory for PATH in `dir`, with a `criu` that stands before `real`. Says `settings` (`NAME=VALUE` words
/// of a shell) to it. As packages have it, the program is `pageferry` by another name.
///
/// # Errors
/// It is not built, or the directory cannot be written.
pub fn before(real: &Criu, dir: &Path, settings: &str) -> Result<Criu> {
    let links = dir.join("links");
    fs::create_dir_all(&links)?;
    let path = dir.join("criu");
    let (program, criu) = (links.join("criu"), real.path.display());
    symlink(binary("pageferry")?, &program)?;
    let script = format!(
        "#!/bin/sh\n{settings} PAGEFERRY_CRIU={criu} exec {} \"$@\"\n",
        program.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(Criu {
        version: real.version.clone(),
        path,
    })
}
