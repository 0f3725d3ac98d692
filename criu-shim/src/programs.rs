//! The programs behind this one.
//!
//! Another copy of this program may be taken for the real CRIU, which would hand everything back. So whoever hands on says
//! in the environment which copies have done so; one that finds itself there refuses.
//!
//! The file that runs may be `pageferry`, under the name `criu` by a link. Files are compared with links followed, so
//! such a link is this program too, wherever it is. For the same reason page-server and lazy-client may be this file.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};

use pageferry::error::{Error, Kind, Result};

use crate::config::Config;

/// The file that runs, also when it has been replaced or removed since: then its path is another file's, or nobody's.
const RUNNING: &str = "/proc/self/exe";

/// Which copies of this program have handed on: the pid of the last one, then device and number of each one's file.
const CHAIN_VARIABLE: &str = "PAGEFERRY_SHIM_CHAIN";

/// Where each program is.
#[derive(Debug)]
pub(crate) struct Programs {
    criu: PathBuf,
    page_server: PathBuf,
    lazy_client: PathBuf,
    /// What the real CRIU is told in [`CHAIN_VARIABLE`].
    chain: String,
}

impl Programs {
    pub(crate) fn find(config: &Config) -> Result<Programs> {
        let this = env::current_exe()
            .map_err(|error| Error::wrap(Kind::Io, "cannot find this program's own path", error))?;
        let criu = match &config.criu {
            Some(path) if !is_another(path) => {
                let text = format!("{} is this program, not the real CRIU", path.display());
                return Err(Error::new(Kind::Usage, text));
            }
            Some(path) => path.clone(),
            None => in_path("criu", is_another).ok_or_else(|| {
                let text = "there is no other criu in PATH: name the real one in PAGEFERRY_CRIU";
                Error::new(Kind::Usage, text)
            })?,
        };
        let chain = handed_on(&this, &criu)?;
        let beside = this.parent().unwrap_or(Path::new("/"));
        let ours = |name: &str| match &config.bin_dir {
            Some(dir) => dir.join(name),
            None if beside.join(name).is_file() => beside.join(name),
            None => in_path(name, |_| true).unwrap_or_else(|| beside.join(name)),
        };
        Ok(Programs {
            criu,
            page_server: ours("page-server"),
            lazy_client: ours("lazy-client"),
            chain,
        })
    }

    /// The real CRIU, to be started.
    pub(crate) fn criu(&self) -> Command {
        let mut command = Command::new(&self.criu);
        command.env(CHAIN_VARIABLE, &self.chain);
        command
    }

    /// Our page server, to be started.
    pub(crate) fn page_server(&self) -> Command {
        Command::new(&self.page_server)
    }

    /// Turns this process into the real CRIU.
    pub(crate) fn become_criu(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(self.criu(), argv)
    }

    /// Turns this process into our page server.
    pub(crate) fn become_page_server(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(Command::new(&self.page_server), argv)
    }

    /// Turns this process into lazy-client.
    pub(crate) fn become_lazy_client(&self, argv: &[OsString]) -> Result<ExitCode> {
        become_program(Command::new(&self.lazy_client), argv)
    }
}

fn become_program(mut command: Command, argv: &[OsString]) -> Result<ExitCode> {
    let error = command.args(argv).exec();
    let path = Path::new(command.get_program());
    Err(Error::file("start", path, error))
}

/// The chain of copies that have handed on, this one included. Fails if it is in the chain already: `criu`, to which it
/// would hand on, or one behind that, has handed back to `this`.
fn handed_on(this: &Path, criu: &Path) -> Result<String> {
    let own = identity(Path::new(RUNNING)).unwrap_or_default();
    let copies = env::var(CHAIN_VARIABLE).unwrap_or_default();
    let parent = parent_id();
    let of_parent = || identity(Path::new(&format!("/proc/{parent}/exe"))).unwrap_or_default();
    let before = copies_before(&copies, process::id(), parent, of_parent);
    if before.contains(&own.as_str()) {
        let text = format!(
            "{} and {} are both pageferry's criu and hand to each other: name the real CRIU in PAGEFERRY_CRIU, or \
             leave one of the two in PATH",
            this.display(),
            criu.display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    let mut words = vec![process::id().to_string()];
    words.extend(before.into_iter().map(str::to_owned));
    words.push(own);
    Ok(words.join(" "))
}

/// The copies that have handed on to this process, as `told`: if that was said by what this process was before, or by
/// its parent, which is still such a copy. What a real CRIU starts has inherited these variables, which are not meant for it.
fn copies_before(copies: &str, pid: u32, parent: u32, of_parent: impl Fn() -> String) -> Vec<&str> {
    let mut words = copies.split(' ');
    let by = words.next().and_then(|word| word.parse::<u32>().ok());
    let copies: Vec<&str> = words.collect();
    let is_for_this =
        by == Some(pid) || by == Some(parent) && copies.contains(&of_parent().as_str());
    match is_for_this {
        true => copies,
        false => Vec::new(),
    }
}

/// The first executable of this name in PATH that `suits`.
fn in_path(name: &str, suits: impl Fn(&Path) -> bool) -> Option<PathBuf> {
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
        .find(|path| is_program(path) && suits(path))
}

/// Whether the file is not the one that runs.
fn is_another(path: &Path) -> bool {
    !is_same_file(path, Path::new(RUNNING))
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    identity(one).is_some() && identity(one) == identity(other)
}

/// Device and number of a file.
fn identity(path: &Path) -> Option<String> {
    let file = fs::metadata(path).ok()?;
    Some(format!("{}:{}", file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_handed_on_is_known_to_those_who_are_told() {
        let copies = "7 1:2 1:3";
        let real = || "9:9".to_owned();
        let copy = || "1:3".to_owned();
        assert_eq!(copies_before(copies, 7, 1, real), ["1:2", "1:3"], "by exec");
        assert_eq!(copies_before(copies, 8, 7, copy), ["1:2", "1:3"], "by fork");
        assert!(
            copies_before(copies, 8, 7, real).is_empty(),
            "started by the real CRIU that took the copy's place"
        );
        assert!(copies_before(copies, 8, 1, copy).is_empty(), "by others");
        assert!(copies_before("", 8, 1, copy).is_empty());
        assert!(copies_before("x 1:3", 8, 1, copy).is_empty());
    }
}
