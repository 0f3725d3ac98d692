//! A load that is dumped again and again while it runs, each round on top of the one before.
//!
//! ```text
//!   Load --dump--> images-1 <--parent-- images-2 <--parent-- images-3      one page server a round
//!          verified before each dump        restored from any round, compared with what it was then
//! ```
//!
//! A kernel without soft-dirty has no incremental dumps: CRIU sends every page in every round, and
//! it is the page server's doing if a round stores less.
//!
//! Invariant: what a restored process must hold was told by the process itself right before that
//! round's dump; a process that was wholly put back to an earlier round is found out.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::criu::Criu;
use crate::daemons::{Make, Options, PageServer};
use crate::images::tell_uptime;
use crate::load::Load;
use crate::load::report::Report;
use crate::load::spec::LoadSpec;
use crate::load::steps::{Order, Pass, Step};
use crate::migration::{Dump, Restore, Restored};
use crate::test_dir::TestDir;
use crate::wait::GENEROUS;

/// Size of the unit of `st_blocks`, bytes (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Rounds of dumps of one load, numbered from 1.
#[derive(Debug)]
pub struct Rounds<'a> {
    criu: &'a Criu,
    dir: PathBuf,
    /// Steers the processes.
    pub load: Load,
    /// What the processes said before each dump.
    before: Vec<Vec<Report>>,
    dumps_know: bool,
}

impl<'a> Rounds<'a> {
    /// Starts a load that `criu` is to dump; images go to the test directory.
    ///
    /// # Errors
    /// The load does not start.
    pub fn start(test_dir: &TestDir, criu: &'a Criu, spec: LoadSpec) -> Result<Rounds<'a>> {
        Ok(Rounds {
            criu,
            dir: test_dir.dir().to_owned(),
            load: Load::start(spec, None)?,
            before: Vec::new(),
            dumps_know: false,
        })
    }

    /// CRIU is told of the round before as well: a dump that hears of a parent from the page server
    /// alone fails, for it does not find the inventory of the parent.
    #[must_use]
    pub fn known_to_dumps(self) -> Rounds<'a> {
        Rounds {
            dumps_know: true,
            ..self
        }
    }

    /// The image directory of a round.
    pub fn images(&self, round: usize) -> PathBuf {
        self.dir.join(format!("images-{round}"))
    }

    /// Begins the next round: the processes verify and tell their memory, and a page server waits
    /// for them with `extra` options, on top of the round before. Returns the server and the dump
    /// that goes to it, which leaves the processes running.
    ///
    /// # Errors
    /// A page is wrong already, or the server does not come up.
    pub fn begin(&mut self, make: Make<'_>, extra: &[&str]) -> Result<(PageServer, Dump<'a>)> {
        let before = self.verify_everywhere(Order::Ascending)?;
        self.before.push(before);
        let round = self.before.len();
        let images = self.images(round);
        let mut options = Options::new(&images).with(extra);
        let mut dump = Dump::new(self.criu, self.load.pid(), &images).leave_running();
        if round > 1 {
            let parent = self.images(round - 1);
            options = options.on_parent(&parent);
            if self.dumps_know {
                tell_uptime(&parent)?;
                dump = dump.with(&["--prev-images-dir", &parent.to_string_lossy()]);
            }
        }
        Ok((PageServer::receiving(make, &options)?, dump))
    }

    /// Carries out the next round.
    ///
    /// # Errors
    /// The dump or the server fails; the error shows the logs.
    pub fn dump(&mut self, make: Make<'_>, extra: &[&str]) -> Result<()> {
        let (server, dump) = self.begin(make, extra)?;
        dump.to(server.address()).run()?;
        server.finish(GENEROUS).map(drop)
    }

    /// Restores the processes as they were in `round`, beside those that run on, and lets every one
    /// compare every byte.
    ///
    /// # Errors
    /// The restore fails, or they are not what they were.
    pub fn expect_restored(&self, round: usize) -> Result<Restored> {
        let restored = Restore::new(self.criu, self.images(round)).run()?;
        self.load.steer(restored.init()?)?;
        let after = self.verify_everywhere(Order::Random)?;
        for (before, after) in self.before[round - 1].iter().zip(after) {
            let process = after.process;
            ensure!(
                after.nonce == before.nonce,
                "process {process} is not the one that was dumped"
            );
            ensure!(
                after.counter >= before.counter,
                "the counter of process {process} went back"
            );
            ensure!(
                after.steps[0].digest == before.steps[0].digest,
                "process {process} has the memory of another round"
            );
        }
        Ok(restored)
    }

    /// Fails unless the processes that were dumped run on with their own memory.
    ///
    /// # Errors
    /// They have ended, stand still, or a page is wrong.
    pub fn expect_running(&mut self) -> Result<()> {
        self.load.expect_running()?;
        self.verify_everywhere(Order::Ascending).map(drop)
    }

    fn verify_everywhere(&self, order: Order) -> Result<Vec<Report>> {
        let reports = self
            .load
            .run_everywhere(&[Step::Verify(Pass::full(order))])?;
        for report in &reports {
            report.expect_right()?;
        }
        Ok(reports)
    }
}

/// The pages files in an image directory.
///
/// # Errors
/// The directory cannot be listed.
pub fn pages_files(images: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(images).with_context(|| images.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Length of all pages files in an image directory together, holes included, bytes.
///
/// # Errors
/// They cannot be looked at.
pub fn pages_file_bytes(images: &Path) -> Result<u64> {
    let length = |path: &PathBuf| Ok(fs::metadata(path)?.len());
    pages_files(images)?.iter().map(length).sum()
}

/// Room that the pages files in an image directory take on their file system, bytes.
///
/// # Errors
/// They cannot be looked at.
pub fn pages_room_bytes(images: &Path) -> Result<u64> {
    let room = |path: &PathBuf| Ok(fs::metadata(path)?.blocks() * STAT_BLOCK_BYTES);
    pages_files(images)?.iter().map(room).sum()
}
