//! `pageferry split`: what a lazy restore can do without goes to another directory, from where a page server
//! serves it; the small rest is restored from lazily.

use std::process::Command;

use anyhow::ensure;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::debian::Suite;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::rounds::pages_file_bytes;
use testbed::suite::with_criu;
use testbed::wait::GENEROUS;
use testbed::workspace;

#[test]
fn split_images_are_restored_lazily_from_their_rest() {
    with_criu(Suite::Sid, |bed, criu| {
        let mut load = Load::start(LoadSpec::tree(bed.path("load"), 16, 2), None)?;
        let (images, lazy) = (bed.path("images"), bed.path("lazy"));
        Dump::new(criu, load.pid(), &images).run()?;
        load.wait_until_gone()?;
        let whole = pages_file_bytes(&images)?;
        let split = Command::new(workspace::binary("pageferry")?)
            .arg("split")
            .arg(&images)
            .arg("-o")
            .arg(&lazy)
            .status()?;
        ensure!(split.success(), "pageferry split: {split}");
        let (rest, moved) = (pages_file_bytes(&images)?, pages_file_bytes(&lazy)?);
        ensure!(rest + moved == whole, "{rest} and {moved} of {whole} bytes");
        ensure!(moved > 16 << 20, "only {moved} bytes have moved");

        let server = PageServer::serving(Make::Ours, &Options::new(&lazy))?;
        let options = Options::new(&images).log_to("lazy.log");
        let daemon = LazyDaemon::start(Make::Ours, &options, Some(server.address()))?;
        let _restored = Restore::new(criu, &images).lazily().run()?;
        load.expect_first_memory()?;
        daemon.finish(GENEROUS)?;
        server.finish(GENEROUS).map(drop)
    });
}
