//! Where the other programs are.

use std::env;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::CriuVersion;
use tokio::process::Command;

/// Which programs to run; the defaults fit an installed pageferry.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ProgramArgs {
    /// The criu to run [default: the one on PATH]
    #[arg(long, value_name = "FILE")]
    criu: Option<PathBuf>,

    /// Directory of page-server and lazy-client [default: the directory of this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

/// The programs, found.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) criu: PathBuf,
    pub(crate) page_server: PathBuf,
    pub(crate) lazy_client: PathBuf,
    /// This program.
    pub(crate) pageferry: PathBuf,
}

impl ProgramArgs {
    /// Finds all of them, or says which one is missing.
    pub(crate) fn find(&self) -> Result<Programs> {
        let pageferry = own_path()?;
        let criu = match &self.criu {
            Some(path) => path.clone(),
            None => on_path("criu").ok_or_else(|| {
                Error::new(
                    Kind::Usage,
                    "no criu on PATH (install CRIU, or name it by --criu)",
                )
            })?,
        };
        Ok(Programs {
            criu,
            page_server: self.ours("page-server")?,
            lazy_client: self.ours("lazy-client")?,
            pageferry,
        })
    }

    /// The CRIU that was named.
    pub(crate) fn criu(&self) -> Option<&Path> {
        self.criu.as_deref()
    }

    /// Finds one of these programs, or says where it is missing.
    pub(crate) fn ours(&self, name: &str) -> Result<PathBuf> {
        let own = own_path()?;
        let beside = own.parent().unwrap_or(Path::new("."));
        let path = self.bin_dir.as_deref().unwrap_or(beside).join(name);
        if path.is_file() {
            return Ok(path);
        }
        on_path(name).ok_or_else(|| {
            let text = format!(
                "{} is missing (--bin-dir names its directory)",
                path.display()
            );
            Error::new(Kind::Usage, text)
        })
    }
}

fn own_path() -> Result<PathBuf> {
    env::current_exe()
        .map_err(|error| Error::wrap(Kind::Io, "cannot find this program's own path", error))
}

/// The first program of this name on PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    all_on_path(name).into_iter().next()
}

/// All programs of this name, the one that is run first.
pub(crate) fn all_on_path(name: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Ordinary users' PATH may lack the directories of the administrator's programs.
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|dir| dir.join(name))
        .filter(|path| path.is_file())
        .collect()
}

/// The version of CRIU, if it starts.
pub(crate) async fn version_of(criu: &Path) -> Option<CriuVersion> {
    let output = Command::new(criu).arg("--version").output().await;
    CriuVersion::parse(&String::from_utf8_lossy(&output.ok()?.stdout))
}

/// What `criu check` complains of; empty if it looks good.
pub(crate) async fn problems_of(criu: &Path) -> String {
    match Command::new(criu).arg("check").output().await {
        Ok(output) if output.status.success() => String::new(),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("{}: {error}", criu.display()),
    }
}

impl Programs {
    /// The version of CRIU, if it starts.
    pub(crate) async fn criu_version(&self) -> Option<CriuVersion> {
        version_of(&self.criu).await
    }

    /// What `criu check` complains of; empty if it looks good.
    pub(crate) async fn criu_problems(&self) -> String {
        problems_of(&self.criu).await
    }
}

/// Whether the CRIU restores compressed pages: from 4.3 on, if it is built with LZ4.
pub(crate) async fn reads_compressed(criu: &Path) -> bool {
    let mut check = Command::new(criu);
    check.args(["check", "--feature", "compress"]);
    let output = check.output().await;
    output.is_ok_and(|output| output.status.success())
}
