//! Settings of the kernel that tests raise while they need it.
//!
//! Several tests may run at a time, so the first raises a setting and the last puts it back. Holders are recorded in a
//! file, each with what it needs; those that died without a word are struck off.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// A setting that is a number.
#[derive(Debug)]
pub struct Sysctl {
    /// Its file below /proc/sys.
    pub path: &'static str,
    /// Name of the file in which its holders are recorded.
    pub record: &'static str,
    /// What it must be at least, of what it was at first and what each holder needs.
    pub value: fn(u64, &[u64]) -> u64,
}

/// While one exists, a setting is high enough for what it was raised for.
#[derive(Debug)]
pub struct Raised {
    sysctl: &'static Sysctl,
    needed: u64,
}

#[derive(Default, Serialize, Deserialize)]
struct Record {
    original: u64,
    holders: Vec<Holder>,
}

/// A process, told from a later one with its pid by the time it started.
#[derive(PartialEq, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    started: u64,
    #[serde(default)]
    needed: u64,
}

impl Sysctl {
    /// Raises it for one that needs `needed`, unless it is high enough whoever else needs it.
    ///
    /// # Errors
    /// It cannot be written (not root, or a read-only /proc), or the kernel does not go so far.
    pub fn raise(&'static self, needed: u64) -> Result<Option<Raised>> {
        let mut file = self.lock()?;
        let mut record = read(&mut file)?;
        let now = self.current()?;
        if record.holders.is_empty() {
            if now >= (self.value)(now, &[needed]) {
                return Ok(None);
            }
            record.original = now;
        }
        // Holders that died left the value raised: the original is still the recorded one.
        record.holders.retain(Holder::is_alive);
        record.holders.push(Holder::me(needed)?);
        write(&mut file, &record)?;
        let reached = self.reach(record.wanted(self));
        drop(file);
        // Put back also when the kernel does not go so far.
        let raised = Raised {
            sysctl: self,
            needed,
        };
        reached.map(|()| Some(raised))
    }

    fn reach(&self, wanted: u64) -> Result<()> {
        if self.current()? < wanted {
            self.set(wanted)?;
        }
        let now = self.current()?;
        ensure!(now >= wanted, "{} is {now}, not {wanted}", self.path);
        Ok(())
    }

    fn release(&self, needed: u64) -> Result<()> {
        let mut file = self.lock()?;
        let mut record = read(&mut file)?;
        record.holders.retain(Holder::is_alive);
        let me = Holder::me(needed)?;
        if let Some(mine) = record.holders.iter().position(|holder| *holder == me) {
            record.holders.remove(mine);
        }
        self.set(record.wanted(self))?;
        write(&mut file, &record)
    }

    fn lock(&self) -> Result<Flock<File>> {
        let path = std::env::temp_dir().join(self.record);
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

    fn current(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path).context(self.path)?;
        text.trim().parse().context(self.path)
    }

    fn set(&self, value: u64) -> Result<()> {
        fs::write(self.path, value.to_string())
            .with_context(|| format!("writing {value} to {}", self.path))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Err(error) = self.sysctl.release(self.needed) {
            eprintln!("putting {} back: {error:#}", self.sysctl.path);
        }
    }
}

impl Record {
    fn wanted(&self, sysctl: &Sysctl) -> u64 {
        let needed = self.holders.iter().map(|holder| holder.needed);
        let needed: Vec<u64> = needed.collect();
        match needed.is_empty() {
            true => self.original,
            false => (sysctl.value)(self.original, &needed),
        }
    }
}

impl Holder {
    fn of(pid: u32, needed: u64) -> Option<Holder> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name may contain anything, a closing bracket too: count behind the last.
        let after_name = stat.rsplit_once(')')?.1;
        let started = after_name.split_whitespace().nth(19)?.parse().ok()?;
        Some(Holder {
            pid,
            started,
            needed,
        })
    }

    fn me(needed: u64) -> Result<Holder> {
        Holder::of(std::process::id(), needed).context("/proc/self/stat")
    }

    fn is_alive(&self) -> bool {
        Holder::of(self.pid, self.needed).as_ref() == Some(self)
    }
}

fn read(file: &mut File) -> Result<Record> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    if text.is_empty() {
        return Ok(Record::default());
    }
    serde_json::from_str(&text).context("record of who holds a setting of the kernel")
}

fn write(file: &mut File, record: &Record) -> Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.write_all(&serde_json::to_vec(record)?)?)
}
