//! What a process gives up once it is set up, so that a mistake in it harms as little as possible.
//!
//! ```text
//! set-up        opens its images, certificates, log and sockets; forks
//! Sandbox::enter
//!   files        Landlock: directories that may be read or written, ports that may be connected to
//!   privileges   no_new_privs; all capabilities but those of the role
//!   calls        seccomp: the system calls of the role
//! serves        threads that are started from now on have the same limits
//! ```
//!
//! What each role needs and why stands in docs/security.md.
//!
//! Invariants: a thread that was started before has none of the limits, so there is none. With [`Mode::Auto`] what the
//! kernel lacks is told at the level of information and left out; with [`Mode::Require`] it is an error.

mod calls;
pub(super) mod check;
mod files;
mod privileges;

use std::path::PathBuf;

use clap::ValueEnum;

use crate::error::{Error, Kind, Result};
use calls::Calls;
use privileges::Privileges;

/// Values of `--sandbox`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// What the kernel has
    Auto,
    /// Nothing
    Off,
    /// All of it, or the program does not start
    Require,
}

/// Files that are needed after the set-up.
#[derive(Clone, Default, Debug)]
pub struct FileAccess {
    /// Files, and directories with all below them, that are read. What is not there is left out.
    pub read: Vec<PathBuf>,
    /// Directories with all below them where files are made, written, renamed and removed.
    pub write: Vec<PathBuf>,
    /// Directories where files are removed.
    pub remove: Vec<PathBuf>,
    /// Names of hosts are looked up.
    pub names: bool,
    /// TCP ports that are connected to.
    pub ports: Vec<u16>,
}

/// What a process needs after its set-up.
#[derive(Clone, Debug)]
pub struct Needs {
    privileges: Privileges,
    calls: Calls,
    /// `None`: Landlock would keep the process from what it is for.
    files: Option<FileAccess>,
    /// Whether files are opened to be written, made or renamed.
    writes: bool,
}

impl Needs {
    /// Of a page server that receives images into directories of `files`.
    pub fn receiving(files: FileAccess) -> Needs {
        Needs {
            privileges: Privileges::Files,
            calls: Calls::Server,
            files: Some(files),
            writes: true,
        }
    }

    /// Of a page server that writes no files.
    pub fn serving(files: FileAccess) -> Needs {
        Needs {
            writes: false,
            ..Needs::receiving(files)
        }
    }

    /// Of the process that gives a dump up for a forwarder that was killed.
    pub fn guarding() -> Needs {
        Needs {
            privileges: Privileges::None,
            ..Needs::serving(FileAccess::default())
        }
    }

    /// Of the process that looks into /proc for a page server. Under Landlock it could not.
    pub fn reading_proc() -> Needs {
        Needs {
            privileges: Privileges::OtherProcesses,
            calls: Calls::Reader,
            files: None,
            writes: false,
        }
    }

    /// Of a lazy-client. Under Landlock it could not look at the processes that it fills, nor advise the kernel about
    /// their memory. `writes`: it takes pages out of its images, or may begin reports later.
    pub fn filling(writes: bool) -> Needs {
        Needs {
            privileges: Privileges::Memory,
            calls: Calls::Client,
            files: None,
            writes,
        }
    }
}

/// Whether files will be out of reach for a process that needs `FileAccess`, and with them other processes: Landlock
/// hides those as well.
pub fn hides_processes(mode: Mode) -> bool {
    mode != Mode::Off && files::is_supported()
}

/// Which of a program's processes this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Process {
    /// The one that the log is about.
    Main,
    /// One beside it, which says what is missing alone.
    Beside,
}

/// Gives up everything but `needs`, for this thread and those that it starts.
///
/// # Errors
///
/// [`Kind::Unsupported`] with [`Mode::Require`]: the kernel lacks a part.
pub(super) fn enter(mode: Mode, needs: &Needs, process: Process) -> Result<()> {
    if mode == Mode::Off {
        return Ok(());
    }
    let confined = needs.files.as_ref().map(files::confine);
    // Before the calls that do it are refused, and after files were opened.
    let steps = [
        ("files are not confined (Landlock)", confined),
        (
            "capabilities are not dropped",
            Some(privileges::drop_others(needs.privileges)),
        ),
        (
            "system calls are not filtered (seccomp)",
            Some(calls::filter(needs.calls, needs.writes)),
        ),
    ];
    for (lack, step) in steps {
        match step {
            Some(Err(why)) if mode == Mode::Require => {
                let text = format!("--sandbox require: {lack}: {why}");
                return Err(Error::new(Kind::Unsupported, text));
            }
            Some(Err(why)) => tracing::info!("sandbox: {lack}: {why}"),
            Some(Ok(done)) if process == Process::Main => tracing::info!("sandbox: {done}"),
            Some(Ok(_)) | None => {}
        }
    }
    Ok(())
}
