//! Every kind of mapping in one process, which checks itself: `memkinds`.
//!
//! ```text
//!   Kinds::start ──> ready.json: kind -> null, or why this kernel lacks it
//!   check(n)     ──> go-n ──> out-n.json: kind -> null, or what is wrong, also in a child that it forks
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use crate::process::Spawned;
use crate::wait;
use crate::workspace;

/// Long enough for a process to make or check all of its memory on a loaded machine.
const LIMIT: Duration = Duration::from_secs(40);

/// A kind of mapping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Kind {
    /// Its name on command lines and in reports.
    pub name: &'static str,
    /// What it is, for readers.
    pub title: &'static str,
}

macro_rules! kinds {
    ($($name:literal: $title:literal),+ $(,)?) => {
        /// All kinds, in the order of the table.
        pub const KINDS: &[Kind] = &[$(Kind { name: $name, title: $title }),+];
    };
}

kinds!(
    "private": "private anonymous",
    "sparse": "every second page touched",
    "cow": "shared with a living child since a fork, partly written by both",
    "zero-read": "read and never written",
    "lazyfree": "MADV_FREE, partly written again",
    "remapped": "moved and grown (mremap)",
    "code": "executable (PROT_EXEC)",
    "dontdump": "MADV_DONTDUMP",
    "named": "with a name (PR_SET_VMA_ANON_NAME)",
    "vdso": "in front of the vDSO and behind it",
    "shared": "shared anonymous",
    "shared-tree": "shared anonymous, with a living child",
    "shared-part": "shared anonymous, both ends unmapped",
    "shared-twice": "shared anonymous, mapped twice",
    "guard": "guard regions (MADV_GUARD_INSTALL)",
    "hugetlb-private": "private huge pages (MAP_HUGETLB)",
    "hugetlb-sparse": "private huge pages, every second one touched",
    "hugetlb-shared": "shared huge pages",
    "hugetlb-memfd": "memfd of huge pages",
    "hugetlb-memfd-private": "memfd of huge pages, private",
    "hugetlb-sysv": "System V segment of huge pages",
    "huge-neighbours": "huge pages of hugetlbfs, transparent ones and those of a memfd, side by side",
    "sysv": "System V segment",
    "thp": "transparent huge pages",
    "thp-holes": "transparent huge pages with holes (MADV_DONTNEED)",
    "mlock": "locked (mlock)",
    "mlock-on-fault": "locked on fault (MLOCK_ONFAULT)",
    "wipe": "MADV_WIPEONFORK",
    "dontfork": "MADV_DONTFORK",
    "droppable": "MAP_DROPPABLE",
    "growsdown": "MAP_GROWSDOWN",
    "prot-none": "PROT_NONE with data",
    "file-private": "private file, partly written",
    "file-shared": "shared file",
    "file-past-end": "private file, mapped beyond its end",
    "deleted-private": "private file that is deleted, partly written",
    "deleted-shared": "shared file that is deleted",
    "dev-zero": "/dev/zero, private",
    "dev-zero-shared": "/dev/zero, shared",
    "memfd": "memfd, shared",
    "memfd-private": "memfd, private, partly written",
    "memfd-sealed": "memfd, sealed (F_SEAL_WRITE)",
    "ksm": "merged pages (MADV_MERGEABLE)",
    "mseal": "sealed (mseal)",
    "aio": "AIO ring",
    "reservation": "reservation of 400 GiB, 3 pages touched",
    "many": "10,000 mappings of a page",
);

/// The kind called `name`.
pub fn kind(name: &str) -> Option<Kind> {
    KINDS.iter().copied().find(|kind| kind.name == name)
}

/// What a check, or the start, said of each kind: `None` is right.
pub type KindResults = BTreeMap<String, Option<String>>;

/// A running `memkinds`, dumped or restored. The process that was started here is killed on drop.
#[derive(Debug)]
pub struct Kinds {
    dir: PathBuf,
    process: Spawned,
    /// Kinds that this kernel lacks, and why.
    pub lacking: BTreeMap<String, String>,
}

impl Kinds {
    /// Starts a process with `kinds` that exchanges files in `dir`.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(dir: &Path, kinds: &[Kind]) -> Result<Kinds> {
        fs::create_dir_all(dir)?;
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
        let mut command = Command::new(workspace::binary("memkinds")?);
        command
            .arg("--dir")
            .arg(dir)
            .args(["--kinds", &names.join(",")]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Spawned::start_ungrouped("memkinds", &mut command, None)?;
        let ready = dir.join("ready.json");
        wait::until("a process with all kinds of mappings", LIMIT, || {
            if let Some(ended) = process.ended()? {
                let said = fs::read_to_string(dir.join("failure.txt")).unwrap_or_default();
                bail!("memkinds: {}: {said}", ended.status);
            }
            Ok(ready.exists().then_some(()))
        })?;
        let said = read(&ready)?;
        let lacking = said
            .into_iter()
            .filter_map(|(kind, why)| Some((kind, why?)));
        Ok(Kinds {
            dir: dir.to_owned(),
            process,
            lacking: lacking.collect(),
        })
    }

    /// The pid of the process that was started.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Waits until the process that was started is gone, as after a dump.
    ///
    /// # Errors
    /// It lives on.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.process.wait(LIMIT).map(drop)
    }

    /// Kills the process that was started and runs on, so that only a restored one answers.
    ///
    /// # Errors
    /// It cannot be reaped.
    pub fn stop(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Tells the process, or the one that will be restored, to check everything for the `n`th time.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn ask(&self, n: u32) -> Result<()> {
        Ok(fs::write(self.dir.join(format!("go-{n}")), "")?)
    }

    /// What the `n`th check found.
    ///
    /// # Errors
    /// It does not come.
    pub fn answer(&self, n: u32) -> Result<KindResults> {
        let path = self.dir.join(format!("out-{n}.json"));
        wait::until("the check of all kinds of mappings", LIMIT, || {
            Ok(path.exists().then_some(()))
        })?;
        read(&path)
    }
}

fn read(path: &Path) -> Result<KindResults> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}
