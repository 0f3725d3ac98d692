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
        let pageferry = env::current_exe()
            .map_err(|error| Error::wrap(Kind::Io, "cannot tell this program's path", error))?;
        let beside = pageferry.parent().unwrap_or(Path::new(".")).to_owned();
        let dir = self.bin_dir.clone().unwrap_or(beside);
        let ours = |name: &str| match dir.join(name) {
            path if path.is_file() => Ok(path),
            path => on_path(name).ok_or_else(|| {
                let text = format!(
                    "{} is missing (--bin-dir names its directory)",
                    path.display()
                );
                Error::new(Kind::Usage, text)
            }),
        };
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
            page_server: ours("page-server")?,
            lazy_client: ours("lazy-client")?,
            pageferry,
        })
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Ordinary users' PATH may lack the directories of the administrator's programs.
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

impl Programs {
    /// The version of CRIU, if it starts.
    pub(crate) async fn criu_version(&self) -> Option<CriuVersion> {
        let output = Command::new(&self.criu).arg("--version").output().await;
        CriuVersion::parse(&String::from_utf8_lossy(&output.ok()?.stdout))
    }

    /// What `criu check` complains of; empty if it looks good.
    pub(crate) async fn criu_problems(&self) -> String {
        match Command::new(&self.criu).arg("check").output().await {
            Ok(output) if output.status.success() => String::new(),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("{}: {error}", self.criu.display()),
        }
    }
}
