//! A load that is dumped by a real CRIU, and restored.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::criu::Criu;
use crate::daemons::Make;
use crate::load::Load;
use crate::load::spec::LoadSpec;
use crate::migration::{Dump, Restore};
use crate::rounds::Rounds;
use crate::test_dir::TestDir;

/// Starts a load and dumps it into `images`. It is gone then.
///
/// # Errors
/// CRIU fails.
pub fn dump(criu: &Criu, spec: LoadSpec, images: &Path) -> Result<Load> {
    let mut load = Load::start(spec, None)?;
    Dump::new(criu, load.pid(), images).run()?;
    load.wait_until_gone()?;
    Ok(load)
}

/// Restores `images` and lets every process check its memory against what `load` was.
///
/// # Errors
/// CRIU fails, or memory is wrong.
pub fn restore_and_check(criu: &Criu, images: &Path, load: &mut Load) -> Result<()> {
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, images).run()?;
    load.expect_first_memory().map(drop)
}

/// A load of mixed memory after its first round, which our page-server has stored compressed. Returns the images too.
///
/// # Errors
/// CRIU or the page-server fails.
pub fn compressed_round<'a>(
    test_dir: &TestDir,
    criu: &'a Criu,
    mib: u32,
) -> Result<(Rounds<'a>, PathBuf)> {
    let mut rounds = Rounds::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), mib))?;
    rounds.dump(Make::Ours, &["--compress"])?;
    let images = rounds.images(1);
    Ok((rounds, images))
}
