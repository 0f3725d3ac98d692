//! Calls that fail in restored processes whose memory has not all come, since they meet sealed memory (mseal): nothing of it
//! is lost. A real CRIU.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use testbed::criu::{Criu, Suite};
use testbed::exchange;
use testbed::migration::Restore;
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::workspace;

/// A lazy-client that brings what is asked for alone.
fn client(images: &Path) -> Result<Spawned> {
    let mut command = Command::new(workspace::binary("lazy-client")?);
    command.arg("-D").arg(images);
    command.args(["-o", "lazy.log", "-v4", "--on-demand"]);
    Spawned::start_ready("lazy-client", &mut command, images.join("lazy.log"))
}

fn a_refused_munmap_loses_nothing(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (images, dir) = exchange::dump(test_dir, criu, "sealed")?;
    let client = client(&images)?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    fs::write(dir.join("go"), "")?;
    exchange::expect_right(&dir.join("said.txt")).with_context(|| client.log_tail())
}

#[test]
fn munmap_that_meets_sealed_memory_loses_no_page() {
    with_criu(Suite::Sid, a_refused_munmap_loses_nothing);
}
