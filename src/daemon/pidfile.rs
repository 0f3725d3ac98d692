//! The file with the background process's pid. It is never taken from a process that lives.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::error::{Error, Kind, Result};

/// Access to the pidfile is for its owner, as CRIU makes it.
const PIDFILE_MODE: u32 = 0o600;

/// Whether a pidfile may be made at `path`: there is none, or its process has ended.
///
/// # Errors
///
/// [`Kind::Usage`]: the process lives, or the file is something else.
pub(super) fn check(path: &Path) -> Result<()> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::file("use the pidfile", path, error)),
    };
    let shown = path.display();
    if text.trim().is_empty() {
        return Ok(());
    }
    let Some(pid) = text.trim().parse().ok().filter(|pid| *pid > 0) else {
        let text = format!(
            "the pidfile {shown} exists and contains no pid: remove it, or give another --pidfile"
        );
        return Err(Error::new(Kind::Usage, text));
    };
    match lives(Pid::from_raw(pid)) {
        false => Ok(()),
        true => Err(Error::new(
            Kind::Usage,
            format!(
                "the pidfile {shown} is that of pid {pid}{}, which is running: stop it, or give another --pidfile \
                 (if another process has the pid by now, remove the file)",
                name(pid)
            ),
        )),
    }
}

/// Writes the pidfile of a process that begins, without a newline, as CRIU does.
pub(super) fn create(path: &Path, pid: Pid) -> Result<()> {
    check(path)?;
    let failed = |error| Error::file("write the pidfile", path, error);
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // Who begins at the same time and comes first keeps it.
    let created = File::options()
        .write(true)
        .create_new(true)
        .mode(PIDFILE_MODE)
        .open(path);
    created
        .and_then(|mut file| write!(file, "{pid}"))
        .map_err(failed)
}

/// Writes the pid of the process that goes on for the one that made the pidfile.
pub(super) fn replace(path: &Path, pid: Pid) -> Result<()> {
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(PIDFILE_MODE)
        .open(path)
        .and_then(|mut file| write!(file, "{pid}"))
        .map_err(|error| Error::file("write the pidfile", path, error))
}

/// Whether the process is there, has not ended, and is another one than this.
fn lives(pid: Pid) -> bool {
    if pid == Pid::this() || kill(pid, None) == Err(Errno::ESRCH) {
        return false;
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X'))
}

/// The process's name in brackets, if it can be told.
fn name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.map_or_else(|_| String::new(), |name| format!(" ({})", name.trim()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_the_pidfile_of_an_ended_process_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let written = || std::fs::read_to_string(&path).unwrap();
        create(&path, Pid::this()).unwrap();
        assert_eq!(written(), Pid::this().to_string());

        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().to_string();
        for text in [pid.clone(), format!("{pid}\n")] {
            std::fs::write(&path, &text).unwrap();
            for refused in [check(&path), create(&path, Pid::this())] {
                let error = refused.unwrap_err();
                assert!(
                    error.to_string().contains(&format!("{pid} (sleep)")),
                    "{error}"
                );
            }
            assert_eq!(written(), text);
        }
        // Ended, although nobody has asked for how yet.
        child.kill().unwrap();
        while lives(Pid::from_raw(pid.parse().unwrap())) {
            std::thread::yield_now();
        }
        create(&path, Pid::this()).unwrap();
        child.wait().unwrap();
        std::fs::write(&path, &pid).unwrap();
        create(&path, Pid::this()).unwrap();
        assert_eq!(written(), Pid::this().to_string());

        for text in ["a letter to somebody", "-1", "12 13"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(create(&path, Pid::this()).unwrap_err().kind(), Kind::Usage);
            assert_eq!(written(), text);
        }
        std::fs::write(&path, "").unwrap();
        create(&path, Pid::this()).unwrap();
        assert!(check(dir.path()).is_err());
    }
}
