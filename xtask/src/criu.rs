//! `cargo xtask criu`: real CRIUs, fetched as packages and unpacked beside the system.

use anyhow::Result;
use testbed::criu::{self, Criu, Suite};

/// Which CRIUs to fetch.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A version (4.1.1), a Debian suite (trixie, sid, experimental), or all.
    #[arg(default_value = "all")]
    version: String,
}

/// Fetches what is asked for and not here yet, and prints one line for each: version, path, origin.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.version != "all" {
        print(&criu::of_version(&args.version)?, "fetched");
        return Ok(());
    }
    for suite in Suite::ALL {
        print(&criu::of_suite(suite)?, suite.name());
    }
    if let Some(criu) = criu::of_machine() {
        print(&criu, "the machine's own");
    }
    Ok(())
}

fn print(criu: &Criu, origin: &str) {
    let works = match criu.check() {
        Ok(()) => "looks good".to_owned(),
        Err(error) => format!("{error:#}").replace('\n', " "),
    };
    println!(
        "{}\t{}\t{origin}, {works}",
        criu.version,
        criu.path.display()
    );
}
