//! A run of a real dump: for how long the process stands still.

use std::fs::File;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::syncfs;
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::units::PageCount;
use testbed::daemons::PageServer;
use testbed::load::Load;
use testbed::migration::Dump;
use testbed::stats::{self, DumpStats};
use testbed::test_dir::{TestDir, warm_memory};
use testbed::wait;

use super::case::{Contender, Link, Target};
use super::run::{Bench, Run, TIMEOUT};

impl Bench<'_> {
    /// Dumps `load`, which has `memory` bytes and runs on, into a contender's server.
    ///
    /// # Errors
    /// CRIU or the server fails, or not all pages were stored.
    pub(super) fn dump(
        &self,
        load: &Load,
        memory: u64,
        target: Target,
        link: Link,
        who: Contender,
    ) -> Result<Run> {
        let test_dir = TestDir::new_in(&target.dir(self.disk)?)?;
        if target == Target::Disk {
            syncfs(&File::open(test_dir.dir())?)?;
        }
        warm_memory(self.dir(), memory)?;
        let images = test_dir.path("images");
        let mut server = PageServer::receiving(self.make(who), &self.options(&images, link))?;
        let cpu = server.process().cpu()?;
        let dumped = test_dir.path("dumped");
        let options = self.options(&dumped, link).extra;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let dump = Dump::new(self.criu, load.pid(), &dumped).to(server.address());
        let mut dump = dump.leave_running().with(&options).start()?;
        let mut peak = 0;
        wait::until("the end of the dump", TIMEOUT, || {
            // The server may end before the dump does.
            peak = server.process().peak_rss_bytes().unwrap_or(0).max(peak);
            dump.ended()
        })?;
        dump.succeed(TIMEOUT)?;
        let used = server.finish(TIMEOUT)?.cpu.saturating_sub(cpu);

        let DumpStats {
            frozen_time,
            pages_written,
            shared_pages_written,
        } = stats::of_dump(&dumped)?;
        let sent = pages_written + shared_pages_written.unwrap_or(0);
        let dir = ImageDir::open(&images, self.page)?;
        let mut stored = 0;
        for target in dir.targets()? {
            let chain = Chain::open(&dir, target, Missing::Refuse)?;
            let pages = chain.extents().iter().map(|run| run.range.pages(self.page));
            stored += pages.map(PageCount::get).sum::<u64>();
        }
        ensure!(stored == sent, "{stored} pages stored of {sent} sent");
        let wall = Duration::from_micros(frozen_time.into());
        Ok(Run::new(wall, sent << self.page.shift(), used, peak))
    }
}
