//! What a container has printed at the source, and goes on to print here: one log.
//!
//! ```text
//! source's log ── PUT ──> PATH.pageferry-ID ── seal ──> PATH
//!                                                        │ file: the container has it open, and goes on in it
//! pipe: container ──> pageferry output-log ── held ──────┘ once the source's part is whole
//! ```
//!
//! A pipe's reader at the source may write for as long as the container's pipe is open: so what the container prints
//! here is held back until that is over. Nothing is lost if it takes too long: the log goes on without the rest then,
//! and what comes later is refused.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use axum::body::Body;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::OUTPUT_LOG_BYTES_MAX;
use pageferry::migration::messages::{MigrationId, Output, OutputStatus};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio_stream::StreamExt;

use crate::child::Program;
use crate::output_log::{Claim, HELD, file_of};
use crate::programs::Programs;
use crate::records;
use crate::runtime::criu_wrapper::Lent;

/// What is compared at once, bytes.
const COMPARED_BYTES: usize = 64 << 10;

/// The log of one output of a container.
#[derive(Debug)]
pub(super) struct OutputLog {
    /// The directory of the migration.
    dir: PathBuf,
    id: MigrationId,
    number: usize,
    output: Output,
    /// What reads the container's pipe, until the container has the other end.
    reader: Mutex<Option<Reader>>,
    /// One request at a time changes the log.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Reader {
    name: ProcessName,
    /// The end for the container, so that the reader does not see the pipe's end before it has one.
    _writer: std::io::PipeWriter,
    _program: Program,
}

/// What was done to the host's file, to be undone if the migration is given up.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Installed {
    /// Length of the log that was there before, bytes; `None` if there was none.
    before: Option<u64>,
}

impl OutputLog {
    /// The logs of a migration in `dir`.
    pub(super) fn all(dir: &Path, id: &MigrationId, outputs: &[Output]) -> Vec<OutputLog> {
        let numbered = outputs.iter().enumerate();
        numbered
            .map(|(number, output)| OutputLog {
                dir: dir.to_owned(),
                id: id.clone(),
                number,
                output: output.clone(),
                reader: Mutex::default(),
                turn: tokio::sync::Mutex::default(),
            })
            .collect()
    }

    /// The log that goes on here.
    pub(super) fn path(&self) -> PathBuf {
        match &self.output.path {
            Some(path) => PathBuf::from(path),
            None => file_of(&self.dir, self.number, "log"),
        }
    }

    /// What has arrived of the source's part, until it is whole.
    fn part(&self) -> PathBuf {
        let mut name = self.path().into_os_string();
        name.push(format!(".pageferry-{}", self.id));
        PathBuf::from(name)
    }

    fn record(&self) -> PathBuf {
        file_of(&self.dir, self.number, "json")
    }

    /// How much has arrived.
    pub(super) fn status(&self) -> Result<OutputStatus> {
        let sealed = records::read::<Installed>(&self.record())?.is_some();
        let path = if sealed { self.path() } else { self.part() };
        let bytes = fs::metadata(path).map_or(0, |found| found.len());
        Ok(OutputStatus { bytes, sealed })
    }

    /// Appends what comes to the source's part, which must have `offset` bytes so far.
    pub(super) async fn store(&self, offset: u64, body: Body) -> Result<OutputStatus> {
        let _turn = self.turn.lock().await;
        let status = self.status()?;
        if status.sealed || status.bytes != offset {
            let text = format!(
                "the log {} has {} bytes here, and cannot be continued at {offset}",
                self.path().display(),
                status.bytes
            );
            return Err(Error::new(Kind::Usage, text));
        }
        let path = self.part();
        let failed = |error| Error::file("write", &path, error);
        let file = self.open_part().map_err(failed)?;
        let mut file = tokio::fs::File::from_std(file);
        let mut bytes = offset;
        let mut parts = body.into_data_stream();
        while let Some(part) = parts.next().await {
            let part =
                part.map_err(|error| Error::wrap(Kind::PeerLost, "a log breaks off", error))?;
            bytes += part.len() as u64;
            if bytes > OUTPUT_LOG_BYTES_MAX {
                let text = format!("a log may have {OUTPUT_LOG_BYTES_MAX} bytes");
                return Err(Error::new(Kind::Protocol, text));
            }
            file.write_all(&part).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        self.expect_own()?;
        self.status()
    }

    fn open_part(&self) -> io::Result<File> {
        let path = self.part();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut options = File::options();
        options.append(true).create(true).mode(0o600);
        // Somebody's link must not lead elsewhere.
        options.custom_flags(OFlag::O_NOFOLLOW.bits());
        let file = options.open(&path)?;
        file.set_permissions(fs::Permissions::from_mode(self.output.mode & 0o777))?;
        chown(&path, Some(self.output.uid), Some(self.output.gid))?;
        Ok(file)
    }

    /// Fails if another log has the name already: one that is no begin of the source's.
    fn expect_own(&self) -> Result<()> {
        let path = self.path();
        if !path.exists() || begins_alike(&path, &self.part()).unwrap_or(false) {
            return Ok(());
        }
        let text = format!(
            "the destination has another log {}: move it away, or name another place (--output-log FILE:THERE)",
            path.display()
        );
        Err(Error::new(Kind::Usage, text))
    }

    /// The source's part has `bytes` bytes and is whole: it is the log from now on.
    pub(super) async fn seal(&self, bytes: u64) -> Result<OutputStatus> {
        let _turn = self.turn.lock().await;
        let status = self.status()?;
        if status.sealed {
            return Ok(status);
        }
        if status.bytes != bytes {
            let text = format!(
                "{bytes} bytes of a log were sent, and {} have arrived",
                status.bytes
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        let claim = Claim::take(&self.dir, self.number)?.ok_or_else(|| {
            let text = format!(
                "the log {} continues without the end of the source's, which came too late",
                self.path().display()
            );
            Error::new(Kind::Usage, text)
        })?;
        if let Err(error) = self.install(bytes) {
            claim.give_back();
            return Err(error);
        }
        claim.release()?;
        self.status()
    }

    fn install(&self, bytes: u64) -> Result<()> {
        let (path, part) = (self.path(), self.part());
        let before = fs::metadata(&path).ok().map(|found| found.len());
        if before.is_some_and(|before| before > bytes) {
            let text = format!(
                "the log {} is longer here than at the source",
                path.display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        self.expect_own()?;
        let failed = |error| Error::file("write", &part, error);
        // Of a log without a line nothing has come.
        let file = self.open_part().map_err(failed)?;
        file.sync_all().map_err(failed)?;
        records::write(&self.record(), &Installed { before })?;
        fs::rename(&part, &path).map_err(|error| Error::file("write", &path, error))
    }

    /// Makes ready what the container writes to here.
    pub(super) async fn prepare(&self, programs: &Programs) -> Result<()> {
        if self.output.is_file() {
            return match self.status()?.sealed {
                true => Ok(()),
                false => Err(Error::new(
                    Kind::Usage,
                    "the container's log is not whole yet",
                )),
            };
        }
        self.start_reader(programs)?;
        match &self.output.path {
            Some(_) => Ok(()),
            // Nobody has named the source's: there is none to wait for.
            None => self.seal(0).await.map(drop),
        }
    }

    /// Starts what reads the container's pipe.
    fn start_reader(&self, programs: &Programs) -> Result<()> {
        let failed = |error| Error::wrap(Kind::Io, "cannot make a pipe", error);
        let (pipe, writer) = std::io::pipe().map_err(failed)?;
        let log = file_of(&self.dir, self.number, "err");
        let errors = File::create(&log).map_err(|error| Error::file("create", &log, error))?;
        let mut command = Command::new(&programs.pageferry);
        command
            .arg("output-log")
            .arg(&self.dir)
            .arg(self.number.to_string())
            .arg(self.path())
            .stdout(Stdio::null())
            .stderr(errors);
        let program = Program::start_reading("pageferry output-log", &mut command, &log, pipe)?;
        let name = program.name();
        records::write(&file_of(&self.dir, self.number, "reader"), &name)?;
        let mut reader = self.lock();
        *reader = Some(Reader {
            name,
            _writer: writer,
            _program: program,
        });
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Reader>> {
        let reader = self.reader.lock();
        reader.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What a restore is given in the place of what the container had.
    pub(super) fn lent(&self) -> Lent {
        let reader = self.lock().as_ref().map(|reader| reader.name.pid);
        Lent {
            key: self.output.key.clone(),
            path: match reader {
                Some(pid) => PathBuf::from(format!("/proc/{pid}/fd/0")),
                None => self.path(),
            },
        }
    }

    /// The container has its end of the pipe.
    pub(super) fn let_go(&self) {
        let reader = self.lock().take();
        // Nobody waits for it: it ends with the container.
        drop(reader);
    }

    /// The migration is given up: the host's log is as it was.
    pub(super) fn give_up(&self) -> Result<()> {
        drop(self.lock().take());
        let reader = file_of(&self.dir, self.number, "reader");
        if let Some(name) = records::read::<ProcessName>(&reader)? {
            // It may have ended by itself.
            let _ = name.signal(Signal::SIGKILL as i32);
        }
        let path = self.path();
        if let Some(installed) = records::read::<Installed>(&self.record())? {
            let undone = match installed.before {
                None => fs::remove_file(&path),
                Some(before) => File::options()
                    .write(true)
                    .open(&path)
                    .and_then(|file| file.set_len(before)),
            };
            match undone {
                // It was about to get its name.
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("give back", &path, error));
                }
                _ => {}
            }
            fs::remove_file(self.record())
                .map_err(|error| Error::file("remove", &self.record(), error))?;
        }
        for left in [self.part(), file_of(&self.dir, self.number, HELD)] {
            match fs::remove_file(&left) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", &left, error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether two files are alike as far as both go.
fn begins_alike(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let length = one.metadata()?.len().min(other.metadata()?.len());
    one.seek(SeekFrom::Start(0))?;
    let (mut left, mut right) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    let mut at = 0;
    while at < length {
        let most = (length - at).min(COMPARED_BYTES as u64);
        let most = usize::try_from(most).unwrap_or(COMPARED_BYTES);
        one.read_exact(&mut left[..most])?;
        other.read_exact(&mut right[..most])?;
        if left[..most] != right[..most] {
            return Ok(false);
        }
        at += most as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(dir: &Path, path: Option<&Path>, key: &str) -> OutputLog {
        let output = Output {
            key: key.to_owned(),
            path: path.map(|path| path.display().to_string()),
            mode: 0o640,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        };
        let id = "m-1".parse().unwrap();
        OutputLog::all(dir, &id, &[output]).pop().unwrap()
    }

    async fn store(log: &OutputLog, offset: u64, text: &str) -> Result<OutputStatus> {
        log.store(offset, Body::from(text.to_owned())).await
    }

    #[tokio::test]
    async fn a_log_arrives_in_parts_and_has_its_name_when_it_is_whole() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("logs/c.log");
        let log = log(tmp.path(), Some(&path), "file[1:2]");
        assert_eq!(store(&log, 0, "one\n").await.unwrap().bytes, 4);
        assert!(
            store(&log, 0, "one\n").await.is_err(),
            "twice is once too often"
        );
        store(&log, 4, "two\n").await.unwrap();
        assert!(log.seal(9).await.is_err() && !path.exists());
        let sealed = log.seal(8).await.unwrap();
        assert_eq!((sealed.bytes, sealed.sealed), (8, true));
        assert_eq!(log.seal(8).await.unwrap(), sealed);
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\n");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert!(store(&log, 8, "late").await.is_err());
        log.give_up().unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_earlier_part_of_the_log_is_gone_on_with_and_another_log_is_not() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("c.log");
        fs::write(&path, "one\n").unwrap();
        let earlier = log(tmp.path(), Some(&path), "file[1:2]");
        store(&earlier, 0, "one\ntwo\n").await.unwrap();
        earlier.seal(8).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\n");
        earlier.give_up().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\n");

        fs::remove_file(file_of(tmp.path(), 0, "claim")).unwrap();
        fs::write(&path, "another\n").unwrap();
        let other = log(tmp.path(), Some(&path), "file[1:2]");
        let refused = store(&other, 0, "one\n").await.unwrap_err().to_string();
        assert!(refused.contains("another log"), "{refused}");
        other.give_up().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"another\n");
    }
}
