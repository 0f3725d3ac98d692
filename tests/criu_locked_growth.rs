//! Memory that a process locks and lets grow (mremap) while pages are missing: the kernel brings the new pages before it tells
//! of the move, and lets nobody fill them until then. A real CRIU.

use std::fs;

use anyhow::{Context, Result};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::exchange;
use testbed::migration::Restore;
use testbed::suite::{make, with_criu};
use testbed::test_dir::TestDir;

fn locked_memory_grows(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (images, dir) = exchange::dump(test_dir, criu, "locked")?;
    let mut options = Options::new(&images).log_to("lazy.log");
    if matches!(make(criu), Make::Ours) {
        // Pages come when they are touched: memory is watched to the end.
        options = options.with(&["--on-demand"]);
    }
    let mut client = LazyDaemon::start(make(criu), &options, None)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    exchange::expect_right(&dir.join("result.txt")).with_context(|| client.process().log_tail())
}

#[test]
fn locked_memory_grows_while_pages_are_missing() {
    with_criu(Suite::Sid, locked_memory_grows);
}
