//! Pressure stall information: the kernel tells when tasks have waited for too long, and nothing is polled.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe;
use pageferry::error::{Error, Kind, Result};
use tokio::sync::mpsc;

use super::Event;
use super::rules::{Psi, Resource, Tasks};

/// A trigger of the kernel's.
#[derive(Debug)]
pub(super) struct Trigger {
    file: File,
    path: PathBuf,
}

/// The file that has the trigger.
fn path(psi: &Psi) -> PathBuf {
    let resource = match psi.resource {
        Resource::Memory => "memory",
        Resource::Cpu => "cpu",
        Resource::Io => "io",
    };
    match &psi.cgroup {
        Some(cgroup) => cgroup.join(format!("{resource}.pressure")),
        None => Path::new("/proc/pressure").join(resource),
    }
}

impl Trigger {
    /// Asks the kernel to tell.
    pub(super) fn open(psi: &Psi) -> Result<Trigger> {
        let path = path(psi);
        let failed = |error: std::io::Error| {
            let why = match error.raw_os_error() {
                Some(libc::EINVAL) => "without CAP_SYS_RESOURCE, `window` is a multiple of 2s",
                _ => "it needs root, a kernel with CONFIG_PSI, and the control group",
            };
            let text = format!("a PSI trigger on {} ({why})", path.display());
            Error::wrap(Kind::Unsupported, text, error)
        };
        let file = File::options().read(true).write(true).open(&path);
        let mut file = file.map_err(failed)?;
        let tasks = match psi.tasks {
            Tasks::Some => "some",
            Tasks::Full => "full",
        };
        let trigger = format!(
            "{tasks} {} {}\0",
            psi.stall.as_micros(),
            psi.window.as_micros()
        );
        file.write_all(trigger.as_bytes()).map_err(failed)?;
        Ok(Trigger { file, path })
    }

    /// Sends an event each time the kernel tells, at most once in a window, until what this returns is dropped.
    pub(super) fn start(self, place: (u64, usize), events: mpsc::Sender<Event>) -> Result<OwnedFd> {
        let failed = |error: std::io::Error| Error::wrap(Kind::Io, "a pipe, a thread", error);
        let (ended, end) = pipe().map_err(|errno| failed(errno.into()))?;
        let name = "psi".to_owned();
        let thread = thread::Builder::new().name(name).spawn(move || {
            let (generation, number) = place;
            while let Some(waited) = self.next(&ended) {
                let event = match waited {
                    Ok(()) => Event::Pressure(generation, number),
                    Err(error) => Event::TriggerGone(generation, number, error),
                };
                let is_gone = matches!(event, Event::TriggerGone(..));
                if events.blocking_send(event).is_err() || is_gone {
                    return;
                }
            }
        });
        thread.map_err(failed)?;
        Ok(end)
    }

    /// Waits for the next event; `None` if the other end of `ended` is closed.
    fn next(&self, ended: &OwnedFd) -> Option<Result<()>> {
        let mut watched = [
            PollFd::new(self.file.as_fd(), PollFlags::POLLPRI),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut watched, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Some(Err(Error::file("poll", &self.path, errno))),
            }
        }
        let [file, ended] = watched.map(|watched| watched.revents().unwrap_or(PollFlags::empty()));
        if !ended.is_empty() {
            return None;
        }
        if file.contains(PollFlags::POLLERR) {
            let text = format!("{} is gone", self.path.display());
            return Some(Err(Error::new(Kind::Io, text)));
        }
        Some(Ok(()))
    }
}
