//! The programs behind this one.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use pageferry::error::{Error, Kind, Result};

use crate::config::Config;

/// The file that runs, also when it has been replaced or removed since: then its path is another file's, or nobody's.
const RUNNING: &str = "/proc/self/exe";

/// Where each program is.
#[derive(Debug)]
pub(crate) struct Programs {
    criu: PathBuf,
    page_server: PathBuf,
    lazy_client: PathBuf,
}

impl Programs {
    pub(crate) fn find(config: &Config) -> Result<Programs> {
        let this = env::current_exe()
            .map_err(|error| Error::wrap(Kind::Io, "cannot tell where this program is", error))?;
        let criu = match &config.criu {
            Some(path) if is_same_file(path, Path::new(RUNNING)) => {
                let text = format!("{} is this program, not the real CRIU", path.display());
                return Err(Error::new(Kind::Usage, text));
            }
            Some(path) => path.clone(),
            None => in_path("criu").ok_or_else(|| {
                let text = "there is no other criu in PATH: name the real one in PAGEFERRY_CRIU";
                Error::new(Kind::Usage, text)
            })?,
        };
        let beside = this.parent().unwrap_or(Path::new("/"));
        let ours = |name: &str| match &config.bin_dir {
            Some(dir) => dir.join(name),
            None if beside.join(name).is_file() => beside.join(name),
            None => in_path(name).unwrap_or_else(|| beside.join(name)),
        };
        Ok(Programs {
            criu,
            page_server: ours("page-server"),
            lazy_client: ours("lazy-client"),
        })
    }

    /// The real CRIU, to be started.
    pub(crate) fn criu(&self) -> Command {
        Command::new(&self.criu)
    }

    /// Our page server, to be started.
    pub(crate) fn page_server(&self) -> Command {
        Command::new(&self.page_server)
    }

    /// Turns this process into the real CRIU.
    pub(crate) fn become_criu(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(&self.criu, argv)
    }

    /// Turns this process into our page server.
    pub(crate) fn become_page_server(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(&self.page_server, argv)
    }

    /// Turns this process into lazy-client.
    pub(crate) fn become_lazy_client(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(&self.lazy_client, argv)
    }
}

fn become_program(path: &Path, argv: &[OsString]) -> Result<ExitCode> {
    Err(Error::file(
        "start",
        path,
        Command::new(path).args(argv).exec(),
    ))
}

/// The first executable of this name in PATH that is not the one that runs.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Runtimes may lack the directories of the administrator's programs.
    let usual = [
        "/usr/local/sbin",
        "/usr/sbin",
        "/sbin",
        "/usr/local/bin",
        "/usr/bin",
        "/bin",
    ];
    let dirs = env::split_paths(&path).chain(usual.map(PathBuf::from));
    let is_program = |path: &PathBuf| {
        let metadata = fs::metadata(path);
        metadata
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    dirs.map(|dir| dir.join(OsStr::new(name)))
        .find(|path| is_program(path) && !is_same_file(path, Path::new(RUNNING)))
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    identity(one).is_some() && identity(one) == identity(other)
}
