//! `lazy-pages.socket`: one connection from `criu restore --lazy-pages`, a record for each process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::criu::lazy_socket::{RECORD_BYTES, Record};
use crate::engine::listening::listen::is_in_use;
use crate::error::{Error, Kind, Result};
use crate::sys::fdpass;
use crate::sys::uffd::Uffd;

/// The socket's name in the work directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// What the restore says.
#[derive(Debug)]
pub(super) enum IntakeEvent {
    /// A process is being restored; its memory has this userfaultfd. Its pid on this host stands behind; 0 if
    /// that cannot be told here.
    Process(u32, Uffd, i32),
    /// A zombie: it has no memory.
    Zombie(u32),
    /// Every process is restored.
    Finished,
    /// Nothing more will be said: the restore has finished, or hung up before.
    End,
}

/// Where the conversation stands.
#[derive(Debug)]
enum State {
    Listening(UnixListener),
    Reading {
        stream: UnixStream,
        record: [u8; RECORD_BYTES],
        read: usize,
    },
    /// A process's pid was read; the byte that carries its descriptor is next.
    AwaitingFd {
        stream: UnixStream,
        pid: u32,
    },
    Ended,
}

/// The receiving end of `lazy-pages.socket`. The socket file goes when this does.
#[derive(Debug)]
pub struct Intake {
    /// Where the socket's file is, if this is its owner.
    path: Option<PathBuf>,
    /// Device and number of that file.
    inode: Option<(u64, u64)>,
    state: State,
}

impl Drop for Intake {
    fn drop(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        // The next lazy-client may have put its own in the place of it, once the restore had come.
        let found = std::fs::symlink_metadata(path).ok();
        if found.map(|found| (found.dev(), found.ino())) == self.inode {
            // Nobody is there to connect to any more; a missing file is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Intake {
    /// Whether nobody listens in the directory `dir`.
    pub(super) fn check_free(dir: &Path) -> Result<()> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("look at", &path, error);
        if is_in_use(&path).map_err(failed)? {
            let shown = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
            let text = format!(
                "another process listens at {}: end it, or give another work directory (-W)",
                shown.display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(())
    }

    /// Listens in the directory `dir`, in place of whoever left a socket there.
    pub fn listen(dir: &Path) -> Result<Intake> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("listen on", &path, error);
        Intake::check_free(dir)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        fdpass::ask_for_senders(listener.as_fd()).map_err(failed)?;
        let found = std::fs::symlink_metadata(&path).map_err(failed)?;
        Ok(Intake {
            state: State::Listening(listener),
            path: Some(path),
            inode: Some((found.dev(), found.ino())),
        })
    }

    /// The end of a conversation that another process had.
    pub(super) fn ended() -> Intake {
        Intake {
            path: None,
            inode: None,
            state: State::Ended,
        }
    }

    /// Where the restore must connect to.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(SOCKET_NAME))
    }

    /// Whether no restore has come yet.
    pub(super) fn is_listening(&self) -> bool {
        matches!(self.state, State::Listening(_))
    }

    /// What to poll for reading, until the end. It changes when the restore connects.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Listening(listener) => Some(listener.as_fd()),
            State::Reading { stream, .. } | State::AwaitingFd { stream, .. } => {
                Some(stream.as_fd())
            }
            State::Ended => None,
        }
    }

    /// The next thing the restore says, `None` if it has not said more yet.
    pub(super) fn next(&mut self) -> Result<Option<IntakeEvent>> {
        loop {
            match self.advance() {
                Ok(Advance::Again) => {}
                Ok(Advance::Event(event)) => return Ok(Some(event)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The restore died in mid-sentence.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    self.state = State::Ended;
                    return Ok(Some(IntakeEvent::End));
                }
                Err(error) => return Err(Error::file("read", self.path(), error)),
            }
        }
    }

    fn advance(&mut self) -> io::Result<Advance> {
        match &mut self.state {
            State::Listening(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                self.state = State::Reading {
                    stream,
                    record: [0; RECORD_BYTES],
                    read: 0,
                };
                Ok(Advance::Again)
            }
            State::Reading {
                stream,
                record,
                read,
            } => {
                let bytes = io::Read::read(stream, &mut record[*read..])?;
                *read += bytes;
                match bytes {
                    0 => Ok(self.end()),
                    _ if *read < RECORD_BYTES => Ok(Advance::Again),
                    _ => Ok(self.record()),
                }
            }
            State::AwaitingFd { stream, pid } => {
                let received = fdpass::receive(stream.as_fd(), &mut [0])?;
                if received.bytes == 0 {
                    return Ok(self.end());
                }
                let pid = *pid;
                self.read_on();
                let fd: OwnedFd = received.fd.ok_or_else(|| {
                    io::Error::other(format!("no userfaultfd came with the record of pid {pid}"))
                })?;
                // The process itself hands its userfaultfd over.
                let host = received.sender.unwrap_or(0);
                Ok(Advance::Event(IntakeEvent::Process(
                    pid,
                    Uffd::from(fd),
                    host,
                )))
            }
            State::Ended => Ok(Advance::Event(IntakeEvent::End)),
        }
    }

    fn record(&mut self) -> Advance {
        let State::Reading { record, .. } = &self.state else {
            return Advance::Again;
        };
        let record = Record::decode(*record);
        self.read_on();
        match record {
            Record::Zombie(pid) => Advance::Event(IntakeEvent::Zombie(pid)),
            Record::Finished => {
                // Its last event. A restore that is not detached (-d) keeps the connection for as long as
                // the restored processes live: to wait for its end would be to wait for theirs.
                self.state = State::Ended;
                Advance::Event(IntakeEvent::Finished)
            }
            Record::Process(pid) => {
                if let State::Reading { stream, .. } =
                    std::mem::replace(&mut self.state, State::Ended)
                {
                    self.state = State::AwaitingFd { stream, pid };
                }
                Advance::Again
            }
        }
    }

    fn read_on(&mut self) {
        if let State::Reading { stream, .. } | State::AwaitingFd { stream, .. } =
            std::mem::replace(&mut self.state, State::Ended)
        {
            self.state = State::Reading {
                stream,
                record: [0; RECORD_BYTES],
                read: 0,
            };
        }
    }

    fn end(&mut self) -> Advance {
        self.state = State::Ended;
        Advance::Event(IntakeEvent::End)
    }
}

enum Advance {
    Again,
    Event(IntakeEvent),
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn events(intake: &mut Intake) -> Vec<IntakeEvent> {
        let mut words = Vec::new();
        while let Some(event) = intake.next().unwrap() {
            let ended = matches!(event, IntakeEvent::End);
            words.push(event);
            if ended {
                break;
            }
        }
        words
    }

    #[test]
    fn the_word_that_all_is_restored_is_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut intake = Intake::listen(dir.path()).unwrap();
        assert!(events(&mut intake).is_empty());
        let mut restore = UnixStream::connect(intake.path()).unwrap();
        restore.write_all(&(-7i32).to_le_bytes()).unwrap();
        assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
        restore.write_all(b"FTSR").unwrap();
        // The restore does not hang up.
        let last = events(&mut intake);
        assert!(
            matches!(last[..], [IntakeEvent::Finished, IntakeEvent::End]),
            "{last:?}"
        );
        assert!(intake.socket().is_none());
    }

    #[test]
    fn a_restore_that_hangs_up_has_ended_without_that_word() {
        let dir = tempfile::tempdir().unwrap();
        let mut intake = Intake::listen(dir.path()).unwrap();
        let mut restore = UnixStream::connect(intake.path()).unwrap();
        restore.write_all(&(-7i32).to_le_bytes()).unwrap();
        drop(restore);
        let all = events(&mut intake);
        assert!(
            matches!(all[..], [IntakeEvent::Zombie(7), IntakeEvent::End]),
            "{all:?}"
        );
    }
}
