//! Every kind of mapping in one process, which checks itself: `memkinds`.
//!
//! ```text
//!   Kinds::start ──> ready.json: kind -> null, or why this kernel lacks it
//!   check(n)     ──> go-n ──> out-n.json: kind -> null, or what is wrong, also in a child that it forks
//!   change       ──> changed-0.json, changed-1.json: change -> null, or why this kernel lacks it
//! ```
//!
//! A tree has a second process that lives on: what it has inherited, with pages that it wrote and the first one lacks. Both
//! make each of [`CHANGES`] once they are told to.

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
    ($(#[$attribute:meta])* $list:ident: $($name:literal: $title:literal),+ $(,)?) => {
        $(#[$attribute])*
        pub const $list: &[Kind] = &[$(Kind { name: $name, title: $title }),+];
    };
}

kinds!(
    /// All kinds, in the order of the table.
    KINDS:
    "private": "private anonymous",
    "sparse": "every second page touched",
    "readonly": "written, then read-only",
    "write-only": "for writing alone (PROT_WRITE)",
    "protections": "1,024 mappings of a page whose protections alternate",
    "cow": "shared with a living child since a fork, partly written by both",
    "child-none": "PROT_NONE with data in a living child alone",
    "child-moved": "moved in a living child, with a new mapping in its place there",
    "zero-read": "read and never written",
    "lazyfree": "MADV_FREE, partly written again",
    "remapped": "moved and grown (mremap)",
    "left-empty": "moved, an empty mapping left behind (MREMAP_DONTUNMAP)",
    "code": "executable (PROT_EXEC)",
    "dontdump": "MADV_DONTDUMP",
    "named": "with a name (PR_SET_VMA_ANON_NAME)",
    "vdso": "in front of the vDSO and behind it",
    "lowest": "at the lowest address (vm.mmap_min_addr)",
    "highest": "at the highest address",
    "shared": "shared anonymous",
    "shared-tree": "shared anonymous, with a living child",
    "shared-grandchild": "shared anonymous, with a living grandchild whose parent has unmapped it",
    "shared-part": "shared anonymous, both ends unmapped",
    "shared-twice": "shared anonymous, mapped twice",
    "guard": "guard regions (MADV_GUARD_INSTALL)",
    "guard-edges": "guard regions in the first and last pages of mappings, and over the border of two",
    "guard-many": "guard regions in every second page",
    "guard-readonly": "guard regions in read-only memory",
    "guard-thp": "guard regions in transparent huge pages",
    "guard-wipe": "guard regions in MADV_WIPEONFORK",
    "guard-locked": "guard regions in locked memory (MLOCK_ONFAULT)",
    "guard-shared": "guard regions in shared anonymous memory",
    "guard-file": "guard regions in a private file",
    "child-guard": "guard regions of a living child alone",
    "parent-guard": "guard regions that a living child has not",
    "hugetlb-private": "private huge pages (MAP_HUGETLB)",
    "hugetlb-sparse": "private huge pages, every second one touched",
    "hugetlb-readonly": "private huge pages, read-only",
    "hugetlb-cow": "private huge pages, shared with a living child since a fork, written by both",
    "hugetlb-shared": "shared huge pages",
    "hugetlb-memfd": "memfd of huge pages",
    "hugetlb-memfd-private": "memfd of huge pages, private",
    "hugetlb-sysv": "System V segment of huge pages",
    "huge-neighbours": "huge pages of hugetlbfs, transparent ones and those of a memfd, side by side",
    "sysv": "System V segment",
    "sysv-twice": "System V segments, one attached twice (SHM_RDONLY)",
    "sysv-removed": "System V segment that is removed (IPC_RMID)",
    "thp": "transparent huge pages",
    "thp-holes": "transparent huge pages with holes (MADV_DONTNEED)",
    "thp-zero": "transparent huge pages, read and one page written",
    "mlock": "locked (mlock)",
    "mlock-on-fault": "locked on fault (MLOCK_ONFAULT)",
    "wipe": "MADV_WIPEONFORK",
    "wipe-moved": "MADV_WIPEONFORK, moved and grown (mremap)",
    "child-wipe": "MADV_WIPEONFORK in a living child alone",
    "dontfork": "MADV_DONTFORK",
    "droppable": "MAP_DROPPABLE",
    "growsdown": "MAP_GROWSDOWN",
    "growsdown-grown": "MAP_GROWSDOWN that has grown",
    "prot-none": "PROT_NONE with data",
    "file-private": "private file, partly written",
    "file-shared": "shared file",
    "file-past-end": "private file, mapped beyond its end",
    "file-offset": "private file, two mappings of parts of it that overlap",
    "file-odd": "private file that ends within a page, that page written",
    "deleted-private": "private file that is deleted, partly written",
    "deleted-shared": "shared file that is deleted",
    "shm-deleted": "shared file of /dev/shm that is deleted",
    "dev-zero": "/dev/zero, private",
    "dev-zero-shared": "/dev/zero, shared",
    "memfd": "memfd, shared",
    "memfd-past-end": "memfd, shared, mapped beyond its end",
    "memfd-noexec": "memfd that may not be executed (MFD_NOEXEC_SEAL)",
    "memfd-private": "memfd, private, partly written",
    "memfd-sealed": "memfd, sealed (F_SEAL_WRITE)",
    "ksm": "merged pages (MADV_MERGEABLE)",
    "mseal": "sealed (mseal)",
    "aio": "AIO ring",
    "reservation": "reservation of 400 GiB, 3 pages touched",
    "reservation-none": "reservation of 64 GiB without access (PROT_NONE), 16 pages made accessible",
    "many": "10,000 mappings of a page",
);

kinds!(
    /// What becomes of memory between a round and the last dump.
    CHANGES:
    "c-zero": "overwritten with zeros",
    "c-first-written": "read before, written now",
    "c-dontneed": "given back (MADV_DONTNEED)",
    "c-dontneed-read": "given back, and read",
    "c-dontneed-same": "given back, a part written again with what it held",
    "c-free": "MADV_FREE, a part written again",
    "c-moved": "moved (mremap)",
    "c-moved-new": "moved, with a new mapping in its place, a part of it written",
    "c-swapped": "two mappings in each other's place",
    "c-unmapped": "a part unmapped",
    "c-mapped-anew": "unmapped and mapped anew, untouched",
    "c-grown": "grown, a part of what is new written",
    "c-shrunk": "shrunk, and grown again",
    "c-prot-none": "written, then PROT_NONE",
    "c-readonly": "written, then read-only; every second page",
    "c-guard": "under a guard region now",
    "c-guard-removed": "no guard region any more, a part written",
    "c-locked": "locked now (mlock)",
    "c-unlocked": "locked no more, and a part given back",
    "c-wipe": "MADV_WIPEONFORK now",
    "c-dontfork": "MADV_DONTFORK now",
    "c-collapsed": "made of transparent huge pages",
    "c-thp-holes": "transparent huge pages, of which parts are given back",
    "c-huge-given-back": "huge pages given back, one written with zeros",
    "c-to-shared": "private, now shared anonymous with the same contents",
    "c-to-file": "private, now a private file with the same contents in every second page",
    "c-to-memfd": "private, now a memfd with the same contents",
    "c-to-memfd-private": "private, now a private memfd with the same contents in every second page",
    "c-to-hugetlb": "private, now huge pages with the same contents",
    "c-to-dev-zero": "private, now /dev/zero with the same contents",
    "c-to-growsdown": "private, now MAP_GROWSDOWN with the same contents",
    "c-from-shared": "shared anonymous, now private with the same contents",
    "c-from-file": "private file, now private anonymous with the same contents",
    "c-from-memfd": "memfd, now private anonymous with the same contents",
    "c-from-hugetlb": "huge pages, now private of small pages with the same contents",
    "c-shared-written": "shared anonymous, written by one of two processes",
    "c-shared-zero": "shared anonymous, overwritten with zeros",
    "c-shared-removed": "shared anonymous, a part given back (MADV_REMOVE)",
    "c-shared-replaced": "shared anonymous, another segment in its place in one of two processes",
    "c-memfd-punched": "memfd, with a hole punched",
    "c-memfd-cut": "memfd, cut",
    "c-memfd-regrown": "memfd, cut and grown again",
    "c-memfd-grown": "memfd and its mapping grown",
    "c-memfd-by-call": "memfd, written by write()",
    "c-file-dontneed": "private file, written pages given back",
    "c-file-cut": "private file, cut",
    "c-file-regrown": "private file, cut and grown again",
    "c-file-rewritten": "private file, written by write() where it has no page of its own",
    "c-forked": "a child that was forked since",
    "c-ended": "a child that has ended since",
);

/// The kind, or the change, called `name`.
pub fn kind(name: &str) -> Option<Kind> {
    let all = KINDS.iter().chain(CHANGES);
    all.copied().find(|kind| kind.name == name)
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
        Kinds::start_with(dir, kinds, &[])
    }

    /// The same with a child that lives on.
    ///
    /// # Errors
    /// As [`Kinds::start`].
    pub fn start_tree(dir: &Path, kinds: &[Kind]) -> Result<Kinds> {
        Kinds::start_with(dir, kinds, &["--tree"])
    }

    fn start_with(dir: &Path, kinds: &[Kind], options: &[&str]) -> Result<Kinds> {
        fs::create_dir_all(dir)?;
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
        let mut command = Command::new(workspace::binary("memkinds")?);
        command
            .arg("--dir")
            .arg(dir)
            .args(["--kinds", &names.join(",")])
            .args(options);
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
        Ok(Kinds {
            dir: dir.to_owned(),
            process,
            lacking: lacking_of(read(&ready)?),
        })
    }

    /// A command of a shell that lets the processes of a tree make their changes, and waits until they have.
    pub fn change_command(&self) -> String {
        let dir = self.dir.display();
        format!(
            "touch '{dir}/change'; until [ -e '{dir}/changed-0.json' ] && [ -e '{dir}/changed-1.json' ]; do sleep 0.01; done"
        )
    }

    /// Tells the processes of a tree to make their changes.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn change(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("change"), "")?)
    }

    /// Waits until the changes are made. What this kernel lacks is among what is lacking then.
    ///
    /// # Errors
    /// They are not made.
    pub fn wait_until_changed(&mut self) -> Result<()> {
        for process in 0..2 {
            let path = self.dir.join(format!("changed-{process}.json"));
            self.wait_for("changes of memory", &path)?;
            self.lacking.extend(lacking_of(read(&path)?));
        }
        Ok(())
    }

    /// Waits for what a process writes, as long as none has failed.
    fn wait_for(&self, what: &str, path: &Path) -> Result<()> {
        let failure = self.dir.join("failure.txt");
        wait::until(what, LIMIT, || {
            if let Ok(said) = fs::read_to_string(&failure) {
                bail!("memkinds: {said}");
            }
            Ok(path.exists().then_some(()))
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

    /// The same as a command of a shell.
    pub fn ask_command(&self, n: u32) -> String {
        format!("touch '{}/go-{n}'", self.dir.display())
    }

    /// What the `n`th check found.
    ///
    /// # Errors
    /// It does not come.
    pub fn answer(&self, n: u32) -> Result<KindResults> {
        let path = self.dir.join(format!("out-{n}.json"));
        self.wait_for("the check of all kinds of mappings", &path)?;
        read(&path)
    }
}

fn lacking_of(said: KindResults) -> BTreeMap<String, String> {
    let lacking = said.into_iter();
    lacking
        .filter_map(|(kind, why)| Some((kind, why?)))
        .collect()
}

fn read(path: &Path) -> Result<KindResults> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}
