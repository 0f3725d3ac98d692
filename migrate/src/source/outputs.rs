//! Where a container writes what it prints, and the log that goes on at the destination.
//!
//! | standard output and error | here | at the destination |
//! |---|---|---|
//! | a file of the host | its bytes are sent before the freeze, the rest in it | the container has the copy open, and goes on in it |
//! | a pipe | its reader goes on; the log that it writes is sent, the rest when the reader is done | a reader of pageferry's appends to the copy |
//! | /dev/null, a file of the container | | as it was |

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Output, OutputSeal, OutputStatus};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tokio_util::io::ReaderStream;

use crate::client::AgentClient;

/// The descriptors of what a process prints.
const PRINTED: [i32; 2] = [1, 2];

/// How long the reader of a pipe may take to write what it has read, once the container is gone.
const READER_LIMIT: Duration = Duration::from_secs(10);

/// How often it is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Bytes of a log that are read at once.
const READ_BYTES: usize = 256 << 10;

/// A log, and where it goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct OutputArg {
    here: PathBuf,
    there: PathBuf,
}

/// `FILE`, or `FILE:THERE`.
pub(super) fn output_arg(text: &str) -> std::result::Result<OutputArg, String> {
    let (here, there) = text.split_once(':').unwrap_or((text, text));
    let here = std::path::absolute(here).map_err(|error| error.to_string())?;
    let there = match text.contains(':') {
        true => PathBuf::from(there),
        false => here.clone(),
    };
    match there.is_absolute() {
        true => Ok(OutputArg { here, there }),
        false => Err(format!("{} is not an absolute path", there.display())),
    }
}

/// One output of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Source {
    output: Output,
    /// The log here.
    file: Option<PathBuf>,
    /// How much of it is at the destination, bytes.
    #[serde(skip)]
    sent: Option<u64>,
}

/// All of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Outputs(Vec<Source>);

impl Outputs {
    /// Of what is no container.
    pub(super) fn none(wanted: Option<&OutputArg>) -> Result<Outputs> {
        match wanted {
            Some(_) => Err(Error::new(Kind::Usage, "--output-log is for a --container")),
            None => Ok(Outputs::default()),
        }
    }

    /// Looks at what the container's first process writes to.
    pub(super) fn find(root: i32, wanted: Option<&OutputArg>) -> Result<Outputs> {
        let mounts = mounts_of(root)?;
        let mut found: Vec<Source> = Vec::new();
        for fd in PRINTED {
            let path = PathBuf::from(format!("/proc/{root}/fd/{fd}"));
            // One that the container has closed.
            let (Ok(about), Ok(name)) = (fs::metadata(&path), fs::read_link(&path)) else {
                continue;
            };
            let source = match about.file_type() {
                kind if kind.is_fifo() && name.to_string_lossy().starts_with("pipe:[") => {
                    of_pipe(&name, wanted)?
                }
                kind if kind.is_file() => {
                    let mount = mount_of(root, fd)?;
                    if mounts.contains(&mount) {
                        continue;
                    }
                    of_file((mount, &about), &name, wanted)?
                }
                _ => continue,
            };
            if found
                .iter()
                .all(|other| other.output.key != source.output.key)
            {
                found.push(source);
            }
        }
        let logs: BTreeSet<&Option<String>> = found.iter().map(|one| &one.output.path).collect();
        if found.len() == 2 && logs.len() == 1 && found[0].output.path.is_some() {
            let text = "standard output and standard error are two pipes: --output-log takes the log of one pipe alone, \
                        so start the container with one pipe for both (2>&1)";
            return Err(Error::new(Kind::Usage, text));
        }
        if let Some(wanted) = wanted
            && found
                .iter()
                .all(|one| one.file.as_ref() != Some(&wanted.here))
        {
            let text = format!(
                "--output-log {}: the container writes to no pipe, and not to this file",
                wanted.here.display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(Outputs(found))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their descriptions for the agent.
    pub(super) fn descriptions(&self) -> Vec<Output> {
        self.0.iter().map(|one| one.output.clone()).collect()
    }

    /// What CRIU is to leave out of the images.
    pub(super) fn external(&self) -> Vec<String> {
        let files = self.0.iter().filter(|one| one.output.is_file());
        files.map(|one| one.output.key.clone()).collect()
    }

    /// Sends what is in the logs and not at the destination.
    pub(super) async fn send(&mut self, client: &AgentClient, path: &str) -> Result<()> {
        for (number, source) in self.0.iter_mut().enumerate() {
            source.send(client, &format!("{path}/{number}")).await?;
        }
        Ok(())
    }

    /// Nothing more comes of the files that the container has open: it stands still.
    pub(super) async fn seal_files(&mut self, client: &AgentClient, path: &str) -> Result<()> {
        for (number, source) in self.0.iter().enumerate() {
            if source.output.is_file() {
                source.seal(client, &format!("{path}/{number}")).await?;
            }
        }
        Ok(())
    }

    /// The container is gone here: sends what the readers of its pipes have written since. Returns what went wrong.
    pub(super) async fn end(&self, client: &AgentClient, path: &str) -> Vec<String> {
        let mut problems = Vec::new();
        for (number, source) in self.0.iter().enumerate() {
            let is_read = !source.output.is_file() && source.file.is_some();
            if !is_read {
                continue;
            }
            let mut source = source.clone();
            let log = source.file.clone().unwrap_or_default();
            if !readers_end(&source.output.key).await {
                problems.push(format!(
                    "the reader of the container's pipe is still there after {} s: what it writes to {} from now on \
                     stays here",
                    READER_LIMIT.as_secs(),
                    log.display()
                ));
            }
            let path = format!("{path}/{number}");
            let sent = async {
                // Whoever comes here may not know what was sent.
                source.sent = None;
                source.send(client, &path).await?;
                source.seal(client, &path).await
            };
            if let Err(error) = sent.await {
                problems.push(format!(
                    "the end of the log {} is not at the destination: {error}",
                    log.display()
                ));
            }
        }
        problems
    }
}

impl Source {
    async fn send(&mut self, client: &AgentClient, path: &str) -> Result<()> {
        let Some(log) = &self.file else {
            return Ok(());
        };
        let sent = match self.sent {
            Some(sent) => sent,
            None => {
                let status: OutputStatus = client.get(path).await?;
                if status.sealed {
                    return Ok(());
                }
                status.bytes
            }
        };
        let failed = |error| Error::file("read", log, error);
        let mut file = File::open(log).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length < sent {
            let text = format!("the log {} was cut meanwhile", log.display());
            return Err(Error::new(Kind::Usage, text));
        }
        self.sent = Some(length);
        if length == sent {
            return Ok(());
        }
        file.seek(SeekFrom::Start(sent)).map_err(failed)?;
        let part = tokio::fs::File::from_std(file);
        let part = tokio::io::AsyncReadExt::take(part, length - sent);
        let body = Body::from_stream(ReaderStream::with_capacity(part, READ_BYTES));
        let status: OutputStatus = client.put(&format!("{path}/{sent}"), body).await?;
        match status.bytes == length {
            true => Ok(()),
            false => {
                let text = format!("the log {} was cut while it was sent", log.display());
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    async fn seal(&self, client: &AgentClient, path: &str) -> Result<()> {
        let bytes = self.sent.unwrap_or_default();
        let path = format!("{path}/seal");
        let seal = OutputSeal { bytes };
        client.post::<OutputStatus>(&path, &seal).await.map(drop)
    }
}

/// A pipe, whose reader writes the log that the user names.
fn of_pipe(name: &Path, wanted: Option<&OutputArg>) -> Result<Source> {
    let about = wanted
        .map(|wanted| {
            fs::metadata(&wanted.here).map_err(|error| Error::file("find", &wanted.here, error))
        })
        .transpose()?;
    Ok(Source {
        output: Output {
            key: name.to_string_lossy().into_owned(),
            path: wanted.map(|wanted| wanted.there.display().to_string()),
            mode: about.as_ref().map_or(0o600, MetadataExt::mode) & 0o777,
            uid: about.as_ref().map_or(0, MetadataExt::uid),
            gid: about.as_ref().map_or(0, MetadataExt::gid),
        },
        file: wanted.map(|wanted| wanted.here.clone()),
        sent: None,
    })
}

/// A file that the container has open from outside of its mounts.
fn of_file(
    (mount, about): (u64, &fs::Metadata),
    name: &Path,
    wanted: Option<&OutputArg>,
) -> Result<Source> {
    let same = |found: fs::Metadata| (found.dev(), found.ino()) == (about.dev(), about.ino());
    if !fs::metadata(name).is_ok_and(same) {
        let text = format!(
            "the container writes to a file that no longer exists ({}): it cannot be continued at the destination",
            name.display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    let there = match wanted {
        Some(wanted) if wanted.here == name => &wanted.there,
        _ => name,
    };
    Ok(Source {
        output: Output {
            key: format!("file[{mount:x}:{:x}]", about.ino()),
            path: Some(there.display().to_string()),
            mode: about.mode() & 0o777,
            uid: about.uid(),
            gid: about.gid(),
        },
        file: Some(name.to_owned()),
        sent: None,
    })
}

/// Numbers of the mounts that a process sees.
fn mounts_of(pid: i32) -> Result<BTreeSet<u64>> {
    let path = PathBuf::from(format!("/proc/{pid}/mountinfo"));
    let text = fs::read_to_string(&path).map_err(|error| Error::file("read", &path, error))?;
    let numbers = text.lines().filter_map(|line| line.split(' ').next());
    Ok(numbers.filter_map(|number| number.parse().ok()).collect())
}

/// Number of the mount that a file was opened through.
fn mount_of(pid: i32, fd: i32) -> Result<u64> {
    let path = PathBuf::from(format!("/proc/{pid}/fdinfo/{fd}"));
    let mut text = String::new();
    File::open(&path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(|error| Error::file("read", &path, error))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let number = number.and_then(|number| number.trim().parse().ok());
    number.ok_or_else(|| {
        let error = io::Error::from(io::ErrorKind::InvalidData);
        Error::file("find a mount in", &path, error)
    })
}

/// Waits until nobody has the pipe open. False if that takes too long.
async fn readers_end(pipe: &str) -> bool {
    let began = Instant::now();
    while has_reader(pipe) {
        if began.elapsed() > READER_LIMIT {
            return false;
        }
        sleep(LOOK_AGAIN).await;
    }
    true
}

/// Whether a process has the pipe open.
fn has_reader(pipe: &str) -> bool {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit())
    });
    let mut open = processes.flat_map(|process| {
        // It may end meanwhile.
        let list = fs::read_dir(process.path().join("fd"));
        list.into_iter().flatten().flatten()
    });
    open.any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == pipe))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_log_has_a_place_on_both_hosts() {
        let same = output_arg("/var/log/c.log").unwrap();
        assert_eq!(same.here, same.there);
        let other = output_arg("/var/log/c.log:/srv/c.log").unwrap();
        assert_eq!(
            (other.here, other.there),
            ("/var/log/c.log".into(), "/srv/c.log".into())
        );
        let relative = output_arg("c.log").unwrap();
        assert!(relative.here.is_absolute() && relative.here == relative.there);
        assert!(output_arg("/a:b").is_err());
    }

    #[test]
    fn pipes_are_found_and_files_of_the_processes_own_mounts_are_not() {
        let tmp = tempfile::tempdir().unwrap();
        let log = tmp.path().join("log");
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let found = Outputs::find(pid, None).unwrap();
        assert_eq!(found.descriptions().len(), 1, "{found:?}");
        let output = &found.descriptions()[0];
        assert!(
            output.key.starts_with("pipe:[") && output.path.is_none(),
            "{output:?}"
        );
        assert!(output.is_possible() && has_reader(&output.key) && found.external().is_empty());
        let wanted = output_arg(&format!("{}:/there", log.display())).unwrap();
        let named = Outputs::find(pid, Some(&wanted)).unwrap();
        assert_eq!(named.descriptions()[0].path.as_deref(), Some("/there"));
        child.kill().unwrap();
        child.wait().unwrap();
        drop(child.stdout.take());
        assert!(!has_reader(&output.key));
    }
}
