//! Memory that a fork leaves zero in the child (MADV_WIPEONFORK), while it is missing, and a parent that gives other
//! advice right behind the fork: what counts is the advice at the fork. And memory that a child does not have at all
//! (MADV_DONTFORK), where another mapping grows to in the child. A real CRIU.

use std::fs;

use anyhow::{Context, Result};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::exchange;
use testbed::migration::Restore;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

fn advice_at_the_fork_counts(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (images, dir) = exchange::dump(test_dir, criu, "advice")?;
    // Pages come when they are touched: a part is missing when its turn comes.
    let options = Options::new(&images)
        .with(&["--on-demand"])
        .log_to("lazy.log");
    let mut client = LazyDaemon::start(Make::Ours, &options, None)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    exchange::expect_right(&dir.join("result.txt")).with_context(|| client.process().log_tail())
}

#[test]
fn advice_at_the_fork_counts_4_2() {
    with_criu(Suite::Sid, advice_at_the_fork_counts);
}

#[test]
fn advice_at_the_fork_counts_4_3() {
    with_criu(Suite::Experimental, advice_at_the_fork_counts);
}
