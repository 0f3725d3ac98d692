//! What can be done with finished images: made whole for a restore, or split for a lazy one.

use std::path::PathBuf;
use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::image::dir::ImageDir;
use pageferry::image::rewrite::{self, Rewritten};
use pageferry::sys::process::page_size;

/// `pageferry finish DIR`.
#[derive(clap::Args, Debug)]
pub(crate) struct FinishArgs {
    /// The image directory, complete
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// `pageferry split DIR -o LAZYDIR`.
#[derive(clap::Args, Debug)]
pub(crate) struct SplitArgs {
    /// The image directory; what stays in it is restored from lazily
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Where the pages go that a lazy restore can do without
    #[arg(short, long, value_name = "LAZYDIR")]
    output: PathBuf,
}

pub(crate) fn finish(args: &FinishArgs) -> ExitCode {
    let done = open(&args.dir).and_then(|dir| rewrite::finish(&dir));
    report(done, |done| {
        format!(
            "{} pages that CRIU does not look for in parents, and {} pages of zeros for locked memory, were put into \
             {} pagemaps",
            done.filled_pages, done.zero_pages, done.pagemaps
        )
    })
}

pub(crate) fn split(args: &SplitArgs) -> ExitCode {
    let done = open(&args.dir).and_then(|dir| rewrite::split(&dir, &args.output));
    report(done, |done| {
        format!(
            "{} pages were moved to {}; {} pages were copied from parents",
            done.moved_pages,
            args.output.display(),
            done.filled_pages
        )
    })
}

/// The image directory at `dir`, with the page size of this host.
pub(crate) fn open(dir: &std::path::Path) -> Result<ImageDir> {
    let page = page_size()
        .map_err(|error| Error::wrap(Kind::Unsupported, "cannot determine the page size", error))?;
    ImageDir::open(dir, page)
}

fn report(done: Result<Rewritten>, say: impl Fn(&Rewritten) -> String) -> ExitCode {
    match done {
        Ok(done) => {
            tracing::info!("{}", say(&done));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
