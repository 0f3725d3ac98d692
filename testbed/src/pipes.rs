//! `fs.pipe-max-size`, raised while someone needs it.
//!
//! `criu dump --lazy-pages` holds memory in pipes of more than 1 MiB, which a process without
//! CAP_SYS_RESOURCE may make only if this sysctl allows it. Several tests may run at a time, so the
//! first raises it and the last puts it back; holders are recorded in a file, and those that died
//! without a word are struck off.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

const SYSCTL: &str = "/proc/sys/fs/pipe-max-size";
/// What CRIU needs, bytes.
const NEEDED: u64 = 4 << 20;

/// While one exists, pipes of 4 MiB are allowed.
#[derive(Debug)]
pub struct LargePipes {
    holds: bool,
}

#[derive(Default, Serialize, Deserialize)]
struct Holders {
    original: u64,
    holders: Vec<Holder>,
}

/// A process, told from a later one with its pid by the time it started.
#[derive(PartialEq, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    started: u64,
}

impl LargePipes {
    /// Raises the sysctl, unless it is high enough.
    ///
    /// # Errors
    /// It cannot be written: not root, or a read-only /proc.
    pub fn allow() -> Result<LargePipes> {
        let mut file = lock()?;
        let mut record = read(&mut file)?;
        let now = current()?;
        if record.holders.is_empty() {
            if now >= NEEDED {
                return Ok(LargePipes { holds: false });
            }
            record.original = now;
        }
        // Holders that died left the value raised: the original is still the recorded one.
        record.holders.retain(Holder::is_alive);
        record.holders.push(Holder::me()?);
        write(&mut file, &record)?;
        set(now.max(NEEDED))?;
        Ok(LargePipes { holds: true })
    }

    fn release() -> Result<()> {
        let mut file = lock()?;
        let mut record = read(&mut file)?;
        record.holders.retain(Holder::is_alive);
        let me = Holder::me()?;
        if let Some(mine) = record.holders.iter().position(|holder| *holder == me) {
            record.holders.remove(mine);
        }
        if record.holders.is_empty() {
            set(record.original)?;
        }
        write(&mut file, &record)
    }
}

impl Drop for LargePipes {
    fn drop(&mut self) {
        if self.holds
            && let Err(error) = LargePipes::release()
        {
            eprintln!("putting {SYSCTL} back: {error:#}");
        }
    }
}

impl Holder {
    fn of(pid: u32) -> Option<Holder> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name may contain anything, a closing bracket too: count behind the last.
        let after_name = stat.rsplit_once(')')?.1;
        let started = after_name.split_whitespace().nth(19)?.parse().ok()?;
        Some(Holder { pid, started })
    }

    fn me() -> Result<Holder> {
        Holder::of(std::process::id()).context("/proc/self/stat")
    }

    fn is_alive(&self) -> bool {
        Holder::of(self.pid).as_ref() == Some(self)
    }
}

fn lock() -> Result<Flock<File>> {
    let path: PathBuf = std::env::temp_dir().join("pageferry-pipe-max-size.json");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
}

fn read(file: &mut File) -> Result<Holders> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    if text.is_empty() {
        return Ok(Holders::default());
    }
    serde_json::from_str(&text).context("record of who holds fs.pipe-max-size")
}

fn write(file: &mut File, record: &Holders) -> Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.write_all(&serde_json::to_vec(record)?)?)
}

fn current() -> Result<u64> {
    fs::read_to_string(SYSCTL)?.trim().parse().context(SYSCTL)
}

fn set(bytes: u64) -> Result<()> {
    fs::write(SYSCTL, bytes.to_string()).with_context(|| format!("writing {bytes} to {SYSCTL}"))
}
